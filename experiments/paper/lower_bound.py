"""Theorem 6's construction: the error that SGD settles at, measured over many runs, against its closed form.

With f_i(w) = |w - x_i|^2 / 2 on centres of length 1 that add up to 0, gamma fixed and batches up to 1 / (2 gamma), the
error E|w - w*|^2 settles at (1 + delta) gamma M2 / 2, with delta = (B - 1) / B_S there. Each point is the mean of many
runs that start on the unit sphere and make the same number of gradient evaluations; intervals hold for all points
together with 95 % confidence.

    python experiments/paper/lower_bound.py [--quick] [--runs 20000] [--step-size 0.0078125] [--pairs 64]
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from results import COLOURS, MARKERS, panels, read_options, size_axis, write_csv, write_summary
from torch import Tensor

from lightning_graddiv import GradientMoments
from lightning_graddiv.jackknife import student_t_quantile
from lightning_graddiv.theory import LowerBoundProblem, lower_bound_error

QUICK = {"runs": 2000, "pairs": 64, "dimensions": 16, "step_size": 1 / 128, "seed": 0}
FULL = {"runs": 20_000, "pairs": 64, "dimensions": 16, "step_size": 1 / 128, "seed": 0}

HALVINGS = 10.0
"""What is left of the starting error at the end: e^(-2 * HALVINGS) of it."""


def settle(problem: LowerBoundProblem, step_size: float, batch_size: int, replacement: bool, options: Any) -> Tensor:
    """Run SGD many times at once from random unit vectors; return the last weights, shape (runs, d)."""
    generator = torch.Generator().manual_seed(1000 * options.seed + 2 * batch_size + replacement)
    n, d = problem.centres.shape
    weights = torch.randn(options.runs, d, dtype=torch.float64, generator=generator)
    weights /= weights.norm(dim=1, keepdim=True)
    for _ in range(steps_for(step_size, batch_size)):
        if replacement:
            drawn = torch.randint(n, (options.runs, batch_size), generator=generator)
        else:
            drawn = torch.rand(options.runs, n, generator=generator).topk(batch_size, dim=1).indices
        counts = torch.zeros(options.runs, n, dtype=torch.float64)
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
        # The sum of the batch's gradients, w - x_i each: the paper's step is on the sum.
        weights = weights - step_size * (batch_size * weights - counts @ problem.centres)
    return weights


def steps_for(step_size: float, batch_size: int) -> int:
    return math.ceil(HALVINGS / (step_size * batch_size))


def measured(problem: LowerBoundProblem, batch_size: int, replacement: bool, points: int, options: Any) -> dict:
    weights = settle(problem, options.step_size, batch_size, replacement, options)
    errors = weights.square().sum(1)
    margin = student_t_quantile(len(errors) - 1, 1 - 0.05 / points) * float(errors.std()) / math.sqrt(len(errors))
    predicted = problem.expected_error(
        options.step_size,
        batch_size,
        steps=steps_for(options.step_size, batch_size),
        initial_error=1.0,
        replacement=replacement,
    )
    bound, second_moment = expected_bound(problem, weights)
    delta = (batch_size - 1) / bound
    return {
        "drawn": "with replacement" if replacement else "without",
        "batch_size": batch_size,
        "steps": steps_for(options.step_size, batch_size),
        "error": float(errors.mean()),
        "half_width": margin,
        "predicted": predicted,
        "delta": delta,
        "bound": bound,
        "theorem_6": lower_bound_error(
            delta, step_size=options.step_size, second_moment=second_moment, strong_convexity=problem.strong_convexity
        ),
    }


def expected_bound(problem: LowerBoundProblem, weights: Tensor) -> tuple[float, float]:
    """B_S = E M2 / E|G|^2 over some of the runs, from the per-example gradients at their weights; and E M2."""
    moments = [GradientMoments.from_gradients(problem.gradients(w)) for w in weights[:1000]]
    n = problem.dataset_size
    second_moment = math.fsum(m.sum_sq_norms for m in moments) / n / len(moments)
    sq_norm = math.fsum(m.sq_norm_of_sum for m in moments) / n**2 / len(moments)
    return second_moment / sq_norm, second_moment


def picture(rows: list[dict[str, Any]], step_size: float, path: Path) -> None:
    figure, axes = panels(1, 2, width=5)
    left, right = axes[0]
    for i, drawn in enumerate(("with replacement", "without")):
        these = [row for row in rows if row["drawn"] == drawn]
        sizes = [row["batch_size"] for row in these]
        left.plot(
            sizes, [row["predicted"] / step_size for row in these], "-", color=COLOURS[i], label=f"{drawn}: exact"
        )
        spread = [row["half_width"] / step_size for row in these]
        dots = {"fmt": MARKERS[i], "color": COLOURS[i], "capsize": 3, "markersize": 5, "label": f"{drawn}: measured"}
        left.errorbar(sizes, [row["error"] / step_size for row in these], spread, **dots)
    left.set_ylabel("settled error $E|w - w^*|^2 / \\gamma$")
    size_axis(left, sizes, "batch size B, up to $1 / (2 \\lambda \\gamma)$")
    left.legend(frameon=False, fontsize=8)
    with_replacement = [row for row in rows if row["drawn"] == "with replacement"]
    deltas = [row["delta"] for row in with_replacement]
    scale = [row["theorem_6"] / (1 + row["delta"]) for row in with_replacement]
    right.plot([0, max(deltas)], [1, 1 + max(deltas)], "-", color=COLOURS[0], label="theorem 6: $1 + \\delta$, c = 1/2")
    ratio = [row["error"] / s for row, s in zip(with_replacement, scale, strict=True)]
    spread = [row["half_width"] / s for row, s in zip(with_replacement, scale, strict=True)]
    right.errorbar(deltas, ratio, spread, fmt="o", color=COLOURS[1], capsize=3, markersize=5, label="measured")
    right.set_xlabel("$\\delta = (B - 1) / B_S$, measured")
    right.set_ylabel("error / ($\\gamma M_2 / 2\\lambda$)")
    right.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = read_options(__doc__, QUICK, FULL, arguments)
    problem = LowerBoundProblem.random(options.pairs, options.dimensions)
    largest = int(1 / (2 * options.step_size * problem.strong_convexity))
    sizes = [2**k for k in range(largest.bit_length())]
    plans = [(size, replacement) for replacement in (True, False) for size in sizes if size <= problem.dataset_size]
    rows = [measured(problem, *plan, len(plans), options) for plan in plans]
    for row in rows:
        print(
            f"B = {row['batch_size']:4} {row['drawn']:17} error {row['error']:.6f} +- {row['half_width']:.6f}   "
            f"exact {row['predicted']:.6f}   delta {row['delta']:.3f}"
        )
    summary = {
        "points": len(rows),
        "within_error_bars": sum(abs(row["error"] - row["predicted"]) <= row["half_width"] for row in rows),
        "largest_relative_half_width": max(row["half_width"] / row["error"] for row in rows),
        "largest_relative_difference": max(abs(row["error"] / row["predicted"] - 1) for row in rows),
        "largest_delta": max(row["delta"] for row in rows),
    }
    write_csv(options.out / "lower_bound.csv", rows)
    picture(rows, options.step_size, options.out / "lower_bound.png")
    write_summary(options.out / "lower_bound.json", options, summary)
    return summary


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
