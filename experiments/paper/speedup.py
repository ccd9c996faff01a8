"""Figure 1: what workers gain on one pass, and what the batch that they need costs in passes.

(a) Throughput of one and of two processes on one thread each, for three batch sizes, in real DDP over gloo.
(b) Passes over the data until 95 % of the training set are right, for growing batches; the learning rate of each size
is the best of several where --factors gives several. A GradientDiversityMonitor measures B_S along the way at the
smallest size, and gain(B) of that predicts the passes of the others from those of the smallest.

A part that is not in --parts is drawn from what an earlier run left in --out.

    python experiments/paper/speedup.py [--quick] [--parts passes throughput] [--seeds 5] [--data-dir FOLDER]
"""

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from images import Images, find_images, training_set
from networks import convnet
from results import COLOURS, HERE, Mean, mean_of, panels, read_csv, read_options, size_axis, write_csv, write_summary
from torch import nn
from training import AfterEachPass, Data, Readings, fit, new_network, over_processes, score

from lightning_graddiv.theory import sample_efficiency

QUICK = {
    "parts": ("passes", "throughput"),
    "batch_sizes": (16, 64, 256, 512),
    "factors": (1.0,),
    "examples": 1024,
    "side": 16,
    "width": 8,
    "seeds": 3,
    "target": 0.95,
    "most_passes": 200,
    "steps": 2,
}
FULL = {
    "parts": ("passes", "throughput"),
    "batch_sizes": (64, 128, 256, 512, 1024, 2048),
    "factors": (0.5, 1.0, 2.0),
    "examples": 8192,
    "side": 32,
    "width": 16,
    "seeds": 5,
    "target": 0.95,
    "most_passes": 400,
    "steps": 10,
}
# Found by halving and doubling with --quick at one seed; sizes between and beyond take the nearest.
LEARNING_RATES = {16: 0.03, 64: 0.12, 256: 0.25, 512: 0.25}
TIMED_SIZES = (64, 512, 4096)


def learning_rate(batch_size: int) -> float:
    return LEARNING_RATES[min(LEARNING_RATES, key=lambda size: abs(math.log(size / batch_size)))]


def passes_to_target(
    data: Data, batch_size: int, factor: float, seed: int, measures: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Train until the target, and return how many passes that took: infinite if it was not reached."""
    accuracies: list[float] = []

    def look(_: int, net: nn.Module) -> bool:
        accuracies.append(score(net, data).accuracy)
        return accuracies[-1] >= options["target"]

    monitor = Readings(every_n_steps=max(1, len(data[1]) // batch_size // 4))
    rate = factor * learning_rate(batch_size)
    fit(
        new_network(convnet, data, seed, width=options["width"]),
        data,
        batch_size=batch_size,
        learning_rate=rate,
        passes=options["most_passes"],
        seed=seed,
        callbacks=[AfterEachPass(look), *([monitor] if measures else [])],
    )
    reached = accuracies[-1] >= options["target"]
    # One over the bound is what averages: a bound may be infinite.
    inverse = statistics.fmean(1 / bound for _, bound, _, _ in monitor.readings) if monitor.readings else math.nan
    return {
        "batch_size": batch_size,
        "learning_rate": rate,
        "seed": seed,
        "passes": len(accuracies) if reached else math.inf,
        "accuracy": accuracies[-1],
        "bound": 1 / inverse if inverse > 0 else math.inf if inverse == 0 else math.nan,
    }


def passes(data: Data, options: Any) -> list[dict[str, Any]]:
    settings = {name: getattr(options, name) for name in ("target", "width", "most_passes")}
    sizes = sorted(options.batch_sizes)
    jobs = [
        (data, size, factor, seed, size == sizes[0], settings)
        for size in sizes
        for factor in options.factors
        for seed in range(options.seeds)
    ]
    return over_processes(passes_to_target, jobs, options.workers)


def best(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each batch size the learning rate with the fewest passes, beside what B_S predicts."""
    rows: list[dict[str, Any]] = []
    for size in sorted({run["batch_size"] for run in runs}):
        these = [run for run in runs if run["batch_size"] == size]
        tried = {rate: [run["passes"] for run in these if run["learning_rate"] == rate] for rate in rates_of(these)}
        rate = min(tried, key=lambda rate: statistics.fmean(tried[rate]))
        bounds = [run["bound"] for run in these if run["learning_rate"] == rate and not math.isnan(run["bound"])]
        bound = statistics.harmonic_mean(bounds) if bounds else rows[0]["bound"]
        first = rows[0]["passes"] if rows else mean_of(tried[rate])
        from_smallest = sample_efficiency(rows[0]["batch_size"] if rows else size, bound)
        predicted = first.value * from_smallest / sample_efficiency(size, bound)
        of = {"batch_size": size, "learning_rate": rate, "bound": bound}
        rows.append({**of, "passes": mean_of(tried[rate]), "predicted": predicted})
    return rows


def rates_of(runs: list[dict[str, Any]]) -> list[float]:
    return sorted({run["learning_rate"] for run in runs})


def throughput(images: Images, options: Any) -> list[dict[str, Any]]:
    """Examples a second by batch size and processes."""
    data = training_set(images, 4096)  # full-sized images, whatever the sizes of the other half
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        torch.save(data, Path(folder) / "data.pt")
        for processes in (1, 2):
            out = Path(folder) / f"{processes}.json"
            command = [sys.executable, str(HERE / "throughput.py"), str(Path(folder) / "data.pt"), str(out)]
            command += ["--processes", str(processes), "--steps", str(options.steps)]
            subprocess.run([*command, "--batch-sizes", *map(str, TIMED_SIZES)], check=True)
            rates = json.loads(out.read_text())
            rows += [{"batch_size": int(b), "processes": processes, "examples_per_second": v} for b, v in rates.items()]
    for row in rows:
        one = next(r for r in rows if r["processes"] == 1 and r["batch_size"] == row["batch_size"])
        row["speedup"] = row["examples_per_second"] / one["examples_per_second"]
    return rows


def picture(rates: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the parts that there are numbers of."""
    figure, axes = panels(1, max(1, bool(rates) + bool(rows)), width=4.8)
    if rates:
        draw_throughput(axes[0, 0], rates)
    if rows:
        draw_passes(axes[0, -1], rows)
    figure.savefig(path, dpi=110)


def draw_throughput(ax: Any, rates: list[dict[str, Any]]) -> None:
    for i, size in enumerate(sorted({row["batch_size"] for row in rates})):
        these = [row for row in rates if row["batch_size"] == size]
        workers = [row["processes"] for row in these]
        ax.plot(workers, [row["speedup"] for row in these], "o-", color=COLOURS[i], label=f"B = {size:,}")
    ax.plot([1, 2], [1, 2], ":", color="0.4", label="ideal")
    ax.set_xticks([1, 2])
    ax.legend(frameon=False, fontsize=8)
    ax.set_xlabel("processes")
    ax.set_ylabel("examples a second, over one process")


def draw_passes(ax: Any, rows: list[dict[str, Any]]) -> None:
    reached = [row for row in rows if math.isfinite(row["passes"].value)]
    sizes, means = [row["batch_size"] for row in reached], [row["passes"] for row in reached]
    spread = [mean.half_width if math.isfinite(mean.half_width) else 0 for mean in means]
    look = {"fmt": "o-", "color": COLOURS[0], "capsize": 3, "label": "measured"}
    ax.errorbar(sizes, [mean.value for mean in means], spread, **look)
    every_size, predicted = [row["batch_size"] for row in rows], [row["predicted"] for row in rows]
    ax.plot(every_size, predicted, "--", color=COLOURS[1], label="predicted by the $B_S$ measured at the first")
    size_axis(ax, every_size, "batch size")
    ax.set_ylim(0)
    ax.set_ylabel("passes to the target")
    ax.legend(frameon=False, fontsize=8)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = read_options(__doc__, QUICK, FULL, arguments, images="CIFAR-10")
    images = find_images("CIFAR-10", options.data_dir)
    timed, trained = options.out / "speedup_throughput.csv", options.out / "speedup_passes.csv"
    if "throughput" in options.parts:
        write_csv(timed, throughput(images, options))
    if "passes" in options.parts:
        write_csv(trained, passes(training_set(images, options.examples, side=options.side), options))
    rates, rows = read_csv(timed), best(read_csv(trained))
    for row in rates:
        print(f"B = {row['batch_size']:5}  {row['processes']} processes  {row['examples_per_second']:9.0f} examples/s")
    for row in rows:
        mean: Mean = row["passes"]
        line = f"passes {mean.value:6.1f} +- {mean.half_width:.1f}   predicted {row['predicted']:.1f}"
        print(f"B = {row['batch_size']:5}  learning rate {row['learning_rate']:.3g}   {line}")
    picture(rates, rows, options.out / "speedup.png")
    summary = {"throughput": rates, "passes": rows}
    write_summary(options.out / "speedup.json", options, summary, data=images.name)
    return summary


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
