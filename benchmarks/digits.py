"""The numbers that the README quotes: examples/digits.py over five seeds, with every usual learning rate for the large.

    python benchmarks/digits.py [--seeds 5] [--epochs 40] [--out benchmarks/results]

Writes digits.json, with every run and its means, and digits.png, the picture of the first seed.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning
import torch
import torchmetrics

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))

from digits import EPOCHS, LARGE, SMALL, Run, adaptive_batch_size, picture, quiet, train_digits  # noqa: E402

import lightning_graddiv  # noqa: E402

# What each run is given besides the seed.
PLANS: dict[str, dict[str, Any]] = {
    "small": {},
    "large": {"batch_size": LARGE, "learning_rate_factor": (LARGE / SMALL) ** 0.5},
    "adaptive": {"adaptive": True},
    "large, same rate": {"batch_size": LARGE},
    "large, linear rate": {"batch_size": LARGE, "learning_rate_factor": LARGE / SMALL},
    "half as large, linear rate": {"batch_size": LARGE // 2, "learning_rate_factor": LARGE / SMALL / 2},
}


def run_plan(name: str, seed: int, epochs: int, out: Path) -> Run:
    options = dict(PLANS[name])
    callback = adaptive_batch_size() if options.pop("adaptive", False) else None
    return train_digits(name, seed, epochs=epochs, out=out / str(seed), callback=callback, verbose=False, **options)


def run_all(seeds: int, epochs: int, out: Path) -> dict[str, list[Run]]:
    """Train every plan with every seed, interleaved, so that a busy minute of the machine does not fall on one plan."""
    runs: dict[str, list[Run]] = {name: [] for name in PLANS}
    for seed in range(seeds):
        for name in PLANS:
            runs[name].append(run_plan(name, seed, epochs, out))
            print(f"seed {seed}   {name:28}{100 * runs[name][-1].accuracy:6.1f} %", flush=True)
    return runs


def summary(runs: dict[str, list[Run]]) -> dict[str, Any]:
    return {name: summary_of(these) for name, these in runs.items()}


def summary_of(runs: list[Run]) -> dict[str, Any]:
    fields = ("accuracy", "steps", "seconds", "batch_size", "overhead")
    per_seed = {field: [round(getattr(run, field), 4) for run in runs] for field in fields}
    means = {field: round(statistics.fmean(getattr(run, field) for run in runs), 4) for field in fields}
    return {"mean": means, "per_seed": per_seed}


def report(seeds: int, epochs: int, runs: dict[str, list[Run]]) -> dict[str, Any]:
    plans = summary(runs)
    small, adaptive = plans["small"]["mean"], plans["adaptive"]["mean"]
    return {
        "command": f"python benchmarks/digits.py --seeds {seeds} --epochs {epochs}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
            "torchmetrics": torchmetrics.__version__,
            "lightning_graddiv": lightning_graddiv.__version__,
        },
        "machine": {"cpus": os.cpu_count(), "processor": platform.machine(), "torch_threads": torch.get_num_threads()},
        "plans": plans,
        "adaptive_against_small": {
            "fewer_steps": round(small["steps"] / adaptive["steps"], 3),
            "accuracy_points": round(100 * (adaptive["accuracy"] - small["accuracy"]), 3),
            "time": round(adaptive["seconds"] / small["seconds"], 3),
        },
    }


def table(results: dict[str, Any]) -> str:
    lines = [f"{'mean of the seeds':28}{'test accuracy':>15}{'(lowest)':>10}{'optimizer steps':>17}{'seconds':>9}"]
    for name, plan in results["plans"].items():
        mean, lowest = plan["mean"], min(plan["per_seed"]["accuracy"])
        accuracies = f"{100 * mean['accuracy']:13.1f} %{100 * lowest:8.1f} %"
        lines.append(f"{name:28}{accuracies}{mean['steps']:17,.0f}{mean['seconds']:9.1f}")
    against = results["adaptive_against_small"]
    lines.append(
        f"\nadaptive against small: {against['fewer_steps']:.2f} times fewer steps, {against['accuracy_points']:+.2f} "
        f"points of accuracy, {against['time']:.2f} times the time"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args()
    quiet(decisions=False)
    torch.set_num_threads(1)

    with tempfile.TemporaryDirectory() as out:
        train_digits("warm-up", 0, epochs=2, out=Path(out), callback=adaptive_batch_size(), verbose=False)
        runs = run_all(options.seeds, options.epochs, Path(out))
    results = report(options.seeds, options.epochs, runs)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "digits.json").write_text(json.dumps(results, indent=2) + "\n")
    picture([runs[name][0] for name in ("small", "large", "adaptive")], options.out / "digits.png", ylim=(0.9, 1))
    print(f"\n{table(results)}\n\nwritten to {options.out}")


if __name__ == "__main__":
    main()
