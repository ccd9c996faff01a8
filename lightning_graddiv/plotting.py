"""Pictures of a run, from what its CSVLogger wrote. Needs matplotlib, which the extra ``examples`` installs."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from lightning_graddiv.finding import BatchSizeFinding

# Okabe and Ito's colours, which stay apart for colour-blind readers; line styles tell runs apart in print.
_BATCH_COLOUR, _BOUND_COLOUR = "#0072B2", "#D55E00"
_RUN_COLOURS = (_BATCH_COLOUR, "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_RUN_STYLES = ("-", "--", "-.", ":")
# In place of infinity, which cannot be drawn: far above the top of any axis of batch sizes.
_BEYOND = 1e30


class Series(NamedTuple):
    """One metric of a run: ``values[i]`` was logged at optimizer step ``steps[i]``."""

    steps: list[int]
    values: list[float]


Metrics = Mapping[str, tuple[Sequence[int], Sequence[float]]]
"""Steps and values by the name of the metric."""


def read_metrics(path: str | Path) -> dict[str, Series]:
    """Read what Lightning's ``CSVLogger`` wrote.

    A row of the file holds only what was logged together, so each metric has steps of its own.

    Args:
        path: a ``metrics.csv``, or the folder that holds one (``CSVLogger.log_dir``).

    Returns:
        Each metric by its name, in the order of the file's columns.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file has no column ``step``.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "metrics.csv"
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        names = list(rows.fieldnames or [])
        if "step" not in names:
            raise ValueError(f"Expected argument `path` to be a CSVLogger's file but {path} has no column `step`")
        metrics = {name: Series([], []) for name in names if name != "step"}
        for row in rows:
            for name, series in metrics.items():
                if row[name]:
                    series.steps.append(int(row["step"]))
                    series.values.append(float(row[name]))
    return metrics


def plot_batch_size(metrics: Metrics, *, ax: "Axes | None" = None, log_prefix: str = "graddiv") -> "Axes":
    """Draw the staircase of the batch size under B_S(w) and its interval, against optimizer steps.

    Both are numbers of examples, on one logarithmic axis. The band goes to the top of the axis where the interval's
    upper end is infinite; where the bound itself is, there is a triangle at the top and a gap in the line.

    Args:
        metrics: steps and values by name, as :func:`read_metrics` returns them.
        ax: where to draw. None: a new figure.
        log_prefix: the callback's.

    Returns:
        The axes.

    Raises:
        ValueError: the run logged no measurements under ``log_prefix``.
        ModuleNotFoundError: matplotlib is missing.
    """
    names = ("batch_size", "batch_size_bound", "bound_lower", "bound_upper")
    batch, bound, lower, upper = (_series(metrics, f"{log_prefix}/{name}") for name in names)
    ax = _axes(ax)
    ax.fill_between(
        lower.steps,
        [min(value, _BEYOND) for value in lower.values],
        [min(value, _BEYOND) for value in upper.values],
        color=_BOUND_COLOUR,
        alpha=0.17,
        linewidth=0,
        label="its interval",
    )
    finite = [value if math.isfinite(value) else math.nan for value in bound.values]
    ax.plot(bound.steps, finite, "o-", color=_BOUND_COLOUR, linewidth=1.3, markersize=2, label="bound $B_S(w)$")
    infinite = [step for step, value in zip(*bound, strict=True) if math.isinf(value)]
    top_edge = ax.get_xaxis_transform()
    ax.plot(infinite, [0.985] * len(infinite), "^", color=_BOUND_COLOUR, markersize=3.5, transform=top_edge)
    # A size is logged where it is measured, and the last one holds to the end of the run.
    end = max(max(steps, default=0) for steps, _ in metrics.values())
    stairs = [*batch.steps, end], [*batch.values, batch.values[-1]]
    ax.plot(*stairs, color=_BATCH_COLOUR, linewidth=2.6, drawstyle="steps-post", label="batch size")

    ax.set_yscale("log", base=2)
    ax.set_ylim(min(batch.values) / 2, _top(batch.values, bound.values))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _dress(ax, title="Batch size, and the bound that it grows under", ylabel="examples per optimizer step")
    ax.set_xlim(0, end)
    handles, labels = ax.get_legend_handles_labels()
    ax.legend(
        handles[::-1],
        labels[::-1],
        ncols=3,
        loc="lower left",  # above the axes, where nothing is drawn
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0,
        columnspacing=1.2,
        handlelength=1.4,
        frameon=False,
    )
    return ax


def plot_accuracy(runs: Mapping[str, Metrics], *, name: str = "val_accuracy", ax: "Axes | None" = None) -> "Axes":
    """Draw the accuracy of several runs against optimizer steps; a dot marks the end of each.

    Args:
        runs: the metrics of each run, as :func:`read_metrics` returns them, by the name for the legend.
        name: the metric's name; its values are shares of 1.
        ax: where to draw. None: a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: there is no run, or one did not log the metric.
        ModuleNotFoundError: matplotlib is missing.
    """
    if not runs:
        raise ValueError("Expected argument `runs` to hold at least one run but got none")
    curves = {label: _series(metrics, name) for label, metrics in runs.items()}
    ax = _axes(ax)
    for i, (label, curve) in enumerate(curves.items()):
        colour = _RUN_COLOURS[i % len(_RUN_COLOURS)]
        ax.plot(*curve, color=colour, linestyle=_RUN_STYLES[i % len(_RUN_STYLES)], linewidth=2, label=label)
        ax.plot(curve.steps[-1], curve.values[-1], "o", color=colour, markersize=6, zorder=4)
    ax.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.4g} %")
    _dress(ax, title="Accuracy against optimizer steps", ylabel="accuracy")
    ax.set_xlim(left=0)
    ax.legend(loc="lower right", frameon=False)
    return ax


def plot_finding(finding: "BatchSizeFinding", *, ax: "Axes | None" = None) -> "Axes":
    """Draw what larger batches gain and what they cost: throughput (left axis) and sample efficiency (right axis).

    Both against the number of examples, on a logarithmic axis: in one pass on all processes for the throughput, in one
    optimizer step for the efficiency, whose band is the interval of B_S. The vertical line is the recommended batch.

    Args:
        finding: what :func:`~lightning_graddiv.find_batch_size` returned.
        ax: where to draw. None: a new figure.

    Returns:
        The axes of the throughput.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    ax = _axes(ax)
    passes = [size * finding.present.world_size for size in finding.seconds]
    recommended = finding.recommended.batch_size
    ax.plot(passes, list(finding.throughput.values()), "o-", color=_BATCH_COLOUR, linewidth=2, label="throughput")
    ax.axvline(recommended, color="0.4", linestyle="--", linewidth=1.2, label=f"recommended: {recommended:,}")
    efficiency = ax.twinx()
    sizes = _doublings(min(*passes, recommended), max(*passes, recommended))
    low, mid, high = ([1 / (1 + (b - 1) / bound) for b in sizes] for bound in _bounds(finding))
    efficiency.fill_between(sizes, low, high, color=_BOUND_COLOUR, alpha=0.17, linewidth=0)
    efficiency.plot(sizes, mid, "-", color=_BOUND_COLOUR, linewidth=2, label="sample efficiency")
    efficiency.set_ylim(0, 1.02)
    efficiency.set_ylabel("sample efficiency", color=_BOUND_COLOUR)
    efficiency.spines["top"].set_visible(False)

    _dress(ax, title="What a larger batch gains and costs", ylabel="examples per second")
    ax.yaxis.label.set_color(_BATCH_COLOUR)
    ax.set_ylim(bottom=0)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.set_xlabel("examples")
    handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (ax, efficiency)), strict=True))
    ax.legend(
        handles,
        labels,
        ncols=3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        columnspacing=1.2,
        handlelength=1.4,
        frameon=False,
    )
    return ax


def _bounds(finding: "BatchSizeFinding") -> tuple[float, float, float]:
    estimate = finding.estimate
    return estimate.lower, estimate.bound, estimate.upper


def _doublings(first: float, last: float, parts: int = 8) -> list[float]:
    """Return sizes from the first to at least the last, so many to a doubling."""
    count = math.ceil(parts * math.log2(last / first)) if last > first else 1
    return [first * 2 ** (i / parts) for i in range(count + 1)]


def _series(metrics: Metrics, name: str) -> Series:
    if name not in metrics or not metrics[name][0]:
        logged = ", ".join(sorted(metrics)) or "nothing"
        raise ValueError(f"Expected the run to have logged `{name}` but it logged {logged}")
    steps, values = metrics[name]
    return Series(list(steps), list(values))


def _axes(ax: "Axes | None") -> "Axes":
    try:
        import matplotlib.pyplot as plt
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'Plotting needs matplotlib, which the extra `examples` installs: pip install "lightning_graddiv[examples]"',
            name="matplotlib",
        ) from error
    return plt.subplots(figsize=(6, 4), layout="constrained")[1] if ax is None else ax


def _top(sizes: Sequence[float], bounds: Sequence[float]) -> float:
    """Return where the axis ends: above all sizes and most bounds, whose highest values are mostly noise."""
    finite = [value for value in bounds if math.isfinite(value)]
    highest = max(8 * max(sizes), 4 * statistics.median(finite) if finite else 0)
    return float(2 ** math.ceil(math.log2(highest)))


def _dress(ax: "Axes", *, title: str, ylabel: str) -> None:
    ax.set_title(title, loc="left", fontweight="bold", pad=22)  # leaves a line for a legend
    ax.set_xlabel("optimizer steps")
    ax.set_ylabel(ylabel)
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="0.88", linewidth=0.8)
    ax.set_axisbelow(True)
