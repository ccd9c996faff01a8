"""What every experiment takes and leaves: flags, a CSV file of every run, a JSON file of how it was made, a picture."""

import argparse
import csv
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import lightning
import torch
from matplotlib.figure import Figure

import lightning_graddiv
from lightning_graddiv.jackknife import student_t_quantile

HERE = Path(__file__).resolve().parent
# Okabe and Ito's colours, which stay apart for colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STARTED = time.perf_counter()


class Mean(NamedTuple):
    """A mean of independent runs and half the width of its 95 % interval (Student's t); infinite for one run."""

    value: float
    half_width: float


def mean_of(values: Iterable[float]) -> Mean:
    values = list(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return Mean(statistics.fmean(values), math.inf)
    error = statistics.stdev(values) / math.sqrt(len(values))
    return Mean(statistics.fmean(values), student_t_quantile(len(values) - 1, 0.95) * error)


def geometric_mean_of(values: Iterable[float]) -> tuple[float, float, float]:
    """Return the geometric mean of independent runs and the ends of its 95 % interval."""
    mean, half_width = mean_of(math.log(value) for value in values)
    if math.isinf(half_width):
        return math.exp(mean), 0.0, math.inf
    return math.exp(mean), math.exp(mean - half_width), math.exp(mean + half_width)


def read_options(
    doc: str, quick: Mapping[str, Any], full: Mapping[str, Any], arguments: Sequence[str] | None, *, images: str = ""
) -> argparse.Namespace:
    """Read the command line: a flag for each number that the two presets give, and the flags that all experiments have.

    Args:
        doc: the experiment's docstring.
        quick: values for --quick.
        full: values without it, with the same keys.
        arguments: instead of the command line.
        images: the data set that is asked for, where there is one.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, for two cores and a few minutes")
    for name, value in full.items():
        kind = type(value[0]) if isinstance(value, tuple) else type(value)
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            type=kind,
            nargs="+" if isinstance(value, tuple) else None,
            help=f"default {value}, with --quick {quick[name]}",
        )
    if images:
        parser.add_argument("--data-dir", type=Path, help=f"folder of the usual files, instead of fetching {images}")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the independent runs")
    parser.add_argument("--out", type=Path, default=Path("outputs/paper"), help="folder for CSV, JSON and PNG")
    options = parser.parse_args(arguments)
    for name, value in (quick if options.quick else full).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.out.mkdir(parents=True, exist_ok=True)
    return options


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{x:.6g}" if isinstance(x, float) else x for name, x in row.items()})


def read_csv(path: Path) -> list[dict[str, Any]]:
    """Read what :func:`write_csv` wrote, all of it numbers; nothing where there is no such file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [{name: number(text) for name, text in row.items()} for row in csv.DictReader(file)]


def number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def write_summary(path: Path, options: argparse.Namespace, summary: Mapping[str, Any], *, data: str = "") -> None:
    """Write what came out beside what it came from: options, data, versions and machine."""
    settings = {name: value for name, value in vars(options).items() if name not in {"out", "data_dir"}}
    content = {
        "experiment": path.stem,
        "options": settings,
        **({"data": data} if data else {}),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "lightning_graddiv": lightning_graddiv.__version__,
        },
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine()},
        "seconds": round(time.perf_counter() - STARTED, 1),
        "summary": summary,
    }
    path.write_text(json.dumps(rounded(content), indent=2) + "\n")
    print(f"written to {path.parent}: {', '.join(sorted(p.name for p in path.parent.glob(f'{path.stem}*')))}")


def rounded(content: Any) -> Any:
    """Four digits of each number, and text for what JSON has no number for."""
    if isinstance(content, Mapping):
        return {str(name): rounded(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    if isinstance(content, float):
        return float(f"{content:.4g}") if math.isfinite(content) else str(content)
    return content


def panels(rows: int, columns: int, *, width: float = 4.2, height: float = 3.5) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", linewidth=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def size_axis(ax: Any, sizes: Sequence[int], label: str) -> None:
    """A logarithmic axis of sizes, with a tick at each."""
    ax.set_xscale("log", base=2)
    ax.set_xticks(list(sizes), [f"{size:,}" for size in sizes])
    ax.minorticks_off()
    ax.set_xlabel(label)
