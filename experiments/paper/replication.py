"""Replicated data: the more copies of fewer points, the more a large batch loses to a small one, and B_S says so.

Of n examples 1/r are kept and repeated r times. A small and a large batch then make the same number of passes; the
large one is given the best of several learning rates. The paper reports the ratio of their losses. Added here: B_S(w)
along the way, from a GradientDiversityMonitor in the same Trainer, beside the exact B_S of the replicated set and of
its distinct points at the same weights, which must be equal.

    python experiments/paper/replication.py [--quick] [--examples 10000] [--passes 20] [--seeds 5] [--data-dir FOLDER]
"""

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from images import find_images, training_set
from networks import NETWORKS
from results import (
    COLOURS,
    MARKERS,
    geometric_mean_of,
    panels,
    read_options,
    size_axis,
    write_csv,
    write_summary,
)
from torch import nn
from training import AfterEachPass, Data, Readings, exact_bound, fit, new_network, over_processes, score

QUICK = {"examples": 2048, "passes": 6, "seeds": 2, "side": 16, "width": 8, "replications": (1, 2, 4, 8)}
FULL = {"examples": 8192, "passes": 16, "seeds": 5, "side": 32, "width": 16, "replications": (1, 2, 4, 8)}

SMALL = 16
# The small batch's rate, the larger batches, and by what factors their rates are tried: linear scaling would be B / 16.
# Found on a coarse grid at r = 1 and one seed; the small batch keeps its rate for every r, which favours the large one.
PLANS: dict[str, tuple[float, tuple[int, ...], tuple[float, ...]]] = {
    "logistic regression": (0.005, (256, 512, 768), (0.5, 1, 2)),
    "convnet": (0.06, (512,), (2, 4, 8)),
    "residual network": (0.06, (512,), (0.5, 1, 2)),
}
PROBES_A_PASS = 8


def replicated(data: Data, r: int) -> tuple[Data, Data]:
    """Keep 1/r of the examples and repeat each r times; return that and the distinct ones."""
    images, labels = (part[: len(part) // r] for part in data)
    return (images.repeat(r, 1, 1, 1), labels.repeat(r)), (images, labels)


def train(
    network: str, data: Data, r: int, batch_size: int, learning_rate: float, seed: int, passes: int, width: int
) -> dict[str, Any]:
    """Train once on r copies of a part of the data; with B_S by the monitor, and for seed 0 and SMALL exactly too."""
    many, distinct = replicated(data, r)
    net = new_network(NETWORKS[network], data, seed, **({} if network == "logistic regression" else {"width": width}))
    exact: list[tuple[int, float, float]] = []

    def look(done: int, net: nn.Module) -> None:
        # All per-example gradients of a whole data set, in float64: cheap for the linear model alone.
        is_due = done == passes or (network == "logistic regression" and done & (done - 1) == 0)
        if seed == 0 and batch_size == SMALL and is_due:
            exact.append((done, exact_bound(net, many), exact_bound(net, distinct)))

    monitor = Readings(every_n_steps=max(1, len(many[0]) // batch_size // PROBES_A_PASS))
    callbacks = [AfterEachPass(look), *([monitor] if batch_size == SMALL else [])]
    fit(net, many, batch_size=batch_size, learning_rate=learning_rate, passes=passes, seed=seed, callbacks=callbacks)
    loss, accuracy = score(net, many)
    run = {"network": network, "r": r, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    return {**run, "loss": loss, "accuracy": accuracy, "readings": monitor.readings, "exact": exact}


def all_runs(options: Any, data: dict[str, Data]) -> list[dict[str, Any]]:
    jobs = []
    for network, (rate, batch_sizes, factors) in PLANS.items():
        for r in options.replications:
            for seed in range(options.seeds):
                plans = [(SMALL, rate), *((b, f * rate) for b in batch_sizes for f in factors)]
                jobs += [(network, data[network], r, *plan, seed, options.passes, options.width) for plan in plans]
    jobs.sort(key=lambda job: (job[3], job[0] != "residual network"))  # the long ones first
    return over_processes(train, jobs, options.workers)


def best_rate(runs: list[dict[str, Any]]) -> float:
    """Return the learning rate whose geometric mean loss over the seeds is least."""
    rates = sorted({run["learning_rate"] for run in runs})
    return min(rates, key=lambda rate: sum(math.log(run["loss"]) for run in runs if run["learning_rate"] == rate))


def ratios(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Compare loss(large) with loss(small), seed by seed, for each network, large batch and r."""
    rows = []
    for network, (_, batch_sizes, _) in PLANS.items():
        for batch_size in batch_sizes:
            for r in sorted({run["r"] for run in runs}):
                these = [run for run in runs if (run["network"], run["r"]) == (network, r)]
                large = [run for run in these if run["batch_size"] == batch_size]
                rate = best_rate(large)
                losses = {run["seed"]: run["loss"] for run in these if run["batch_size"] == SMALL}
                ratio = [run["loss"] / losses[run["seed"]] for run in large if run["learning_rate"] == rate]
                mean, low, high = geometric_mean_of(ratio)
                row = {"network": network, "batch_size": batch_size, "r": r, "ratio": mean, "low": low, "high": high}
                rows.append({**row, "learning_rate": rate})
    return rows


def bounds(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was read of B_S along the way: by the monitor, and exactly on the replicated set and its distinct points."""
    rows = []
    for run in runs:
        of = {name: run[name] for name in ("network", "r", "batch_size", "seed")}
        nothing = dict.fromkeys(("bound", "lower", "upper", "exact_replicated", "exact_distinct"))
        for done, bound, lower, upper in run["readings"]:
            rows.append({**of, "passes": done, **nothing, "bound": bound, "lower": lower, "upper": upper})
        for done, replicated_bound, distinct_bound in run["exact"]:
            both = {"exact_replicated": replicated_bound, "exact_distinct": distinct_bound}
            rows.append({**of, "passes": float(done), **nothing, **both})
    return rows


def summary(runs: list[dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    exact = [values for run in runs for values in run["exact"]]
    return {
        "largest_relative_difference_of_exact_bounds": max(abs(a / b - 1) for _, a, b in exact),
        "exact_comparisons": len(exact),
        "ratios": rows,
    }


def picture(runs: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = panels(2, len(PLANS))
    for column, network in enumerate(PLANS):
        draw_ratios(axes[0, column], network, [row for row in rows if row["network"] == network])
        small = [run for run in runs if (run["network"], run["batch_size"], run["seed"]) == (network, SMALL, 0)]
        draw_bounds(axes[1, column], sorted(small, key=lambda run: run["r"]))
    axes[0, 0].set_ylabel(f"loss(B) / loss({SMALL}) after equal passes")
    axes[1, 0].set_ylabel(f"$B_S(w)$ at the weights of B = {SMALL}")
    axes[1, 1].set_title("line: monitor; o: exact, replicated; x: exact, distinct points", fontsize=9)
    axes[1, 0].legend(fontsize=8, ncols=2, frameon=False)
    figure.savefig(path, dpi=110)


def draw_ratios(ax: Any, network: str, rows: list[dict[str, Any]]) -> None:
    for i, batch_size in enumerate(sorted({row["batch_size"] for row in rows})):
        these = [row for row in rows if row["batch_size"] == batch_size]
        x, y = [row["r"] for row in these], [row["ratio"] for row in these]
        spread = [[row["ratio"] - row["low"] for row in these], [row["high"] - row["ratio"] for row in these]]
        look = {"color": COLOURS[i], "marker": MARKERS[i], "capsize": 3, "linewidth": 1.8, "markersize": 5}
        has_spread = all(math.isfinite(high) for high in spread[1])
        ax.errorbar(x, y, spread if has_spread else None, label=f"B = {batch_size}", **look)
    ax.set_yscale("log")
    ax.axhline(1, color="0.5", linewidth=0.8)
    top = ax.get_ylim()[1]
    ticks = [tick for power in range(4) for tick in (10**power, 2 * 10**power, 5 * 10**power) if tick < top]
    ax.set_yticks(ticks, [f"{tick:,}" for tick in ticks])
    size_axis(ax, [row["r"] for row in these], "copies of each example, r")
    ax.set_title(network, loc="left", fontweight="bold", fontsize=10)
    ax.legend(frameon=False, fontsize=8)


def draw_bounds(ax: Any, runs: list[dict[str, Any]]) -> None:
    """B_S by the monitor as lines, for the fewest and the most copies; exactly as dots, for all."""
    shown = [value for run in runs for *_, value in run["exact"]]
    for i, run in enumerate(runs):
        if i in (0, len(runs) - 1):
            done, bound, lower, upper = zip(*run["readings"], strict=True)
            ax.plot(done, bound, color=COLOURS[i], linewidth=1.6)
            ax.fill_between(done, lower, [min(u, 1e9) for u in upper], color=COLOURS[i], alpha=0.15, linewidth=0)
            shown += [value for value in bound if math.isfinite(value)]
        if run["exact"]:
            at, replicated_bound, distinct_bound = zip(*run["exact"], strict=True)
            ax.plot(
                at, replicated_bound, "o", color=COLOURS[i], markersize=8, fillstyle="none", label=f"r = {run['r']}"
            )
            ax.plot(at, distinct_bound, "x", color=COLOURS[i], markersize=5)
    ax.set_yscale("log")
    ax.set_ylim(min(shown) / 3, 20 * statistics.median(shown))
    ax.set_xlabel("passes")


def main(arguments: Sequence[str] | None = None) -> None:
    options = read_options(__doc__, QUICK, FULL, arguments, images="CIFAR-10")
    images = find_images("CIFAR-10", options.data_dir)
    ten_classes = training_set(images, options.examples, side=options.side)
    two_classes = training_set(images, options.examples, classes=(0, 1))
    data = {network: two_classes if network == "logistic regression" else ten_classes for network in PLANS}
    runs = all_runs(options, data)
    rows = ratios(runs)
    for row in rows:
        interval = f"[{row['low']:.2f}, {row['high']:.2f}]"
        print(f"{row['network']:20} B = {row['batch_size']:4}  r = {row['r']}  ratio {row['ratio']:8.2f}  {interval}")
    write_csv(
        options.out / "replication.csv",
        [{name: value for name, value in run.items() if name not in {"readings", "exact"}} for run in runs],
    )
    write_csv(options.out / "replication_bound.csv", bounds(runs))
    picture(runs, rows, options.out / "replication.png")
    write_summary(options.out / "replication.json", options, summary(runs, rows), data=images.name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
