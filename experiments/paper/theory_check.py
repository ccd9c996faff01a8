"""Theorems 2 to 5: mini-batch against serial SGD at B = delta * B_S + 1, the loss of accuracy against 1 + delta / 2.

For each class a problem on which the paper's lower bound of B_S for generalised linear models holds at every w, so that
B is admissible throughout; step size and number of gradient evaluations are those of the theorem, the same for every B.
Many runs at once, in float64. The ratio of mini-batch to serial error must stay under 1 + delta / 2, and each error
under (1 + delta / 2) * eps.

    python experiments/paper/theory_check.py [--quick] [--runs 10000] [--deltas 0.25 0.5 1 2 4]
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from results import COLOURS, MARKERS, panels, read_options, write_csv, write_summary
from torch import Tensor

from lightning_graddiv.jackknife import student_t_quantile
from lightning_graddiv.theory import (
    Guarantee,
    convex_guarantee,
    glm_batch_size_bound,
    polyak_lojasiewicz_guarantee,
    smooth_guarantee,
    strongly_convex_guarantee,
)

QUICK = {"runs": 1500, "deltas": (0.25, 0.5, 1.0, 2.0, 4.0), "seed": 0}
FULL = {"runs": 10_000, "deltas": (0.25, 0.5, 1.0, 2.0, 4.0), "seed": 0}


@dataclass
class Problem:
    """Losses f_i(w) = l(x_i' w - y_i); ``slope`` is l', and every error is one number for each row of weights.

    ``error(last, mean)`` looks at the last weights and at the mean of the weights of all steps; a problem that looks at
    the gradients along the way has ``along`` instead, which is averaged over the steps.
    """

    name: str
    features: Tensor
    targets: Tensor
    slope: Callable[[Tensor], Tensor]
    start: Tensor
    guarantee: Callable[[float], Guarantee]
    accuracy: float
    second_moment: float
    error: Callable[[Tensor, Tensor], Tensor] | None = None
    along: Callable[[Tensor], Tensor] | None = None

    @property
    def bound(self) -> float:
        """What B_S is at least, at every w (arXiv theorem 1)."""
        return glm_batch_size_bound(self.features)

    def gradients_squared(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """M2(w) and |grad F(w)|^2 of each row of weights."""
        slopes = self.slope(weights @ self.features.T - self.targets)
        sq_norms = self.features.square().sum(1)
        gradient = slopes @ self.features / len(self.features)
        return (slopes.square() * sq_norms).mean(1), gradient.square().sum(1)


def frame(copies: int, dimensions: int, generator: torch.Generator) -> Tensor:
    """Rows of random orthogonal matrices: unit vectors in all directions alike, so that B_S is at least d."""
    blocks = [torch.randn(dimensions, dimensions, dtype=torch.float64, generator=generator) for _ in range(copies)]
    return torch.cat([torch.linalg.qr(block).Q for block in blocks])


def smooth_problem(seed: int) -> Problem:
    """Theorem 2: sigmoid losses, not convex, labels of a random teacher of which a tenth is wrong."""
    generator = torch.Generator().manual_seed(seed)
    x = frame(8, 16, generator)
    teacher = torch.randn(16, dtype=torch.float64, generator=generator)
    wrong = torch.rand(len(x), generator=generator) < 0.1
    x = x * torch.where((x @ teacher > 0) ^ wrong, 1.0, -1.0)[:, None]  # l(u) = sigmoid(-u), u = y x'w
    slope = lambda u: -torch.sigmoid(u) * torch.sigmoid(-u)  # noqa: E731
    start = torch.zeros(16, dtype=torch.float64)
    second_moment, smoothness = 1 / 16, 1 / (6 * math.sqrt(3)) / 16  # sup l'^2, and sup |l''| / d
    accuracy = 1e-3

    def guarantee(delta: float) -> Guarantee:
        sizes = {"smoothness": smoothness, "second_moment": second_moment, "initial_gap": 0.5}  # F >= 0, F(0) = 1/2
        return smooth_guarantee(accuracy, **sizes, delta=delta)

    problem = Problem(
        "theorem 2: smooth, not convex", x, torch.zeros(len(x)), slope, start, guarantee, accuracy, second_moment
    )
    problem.along = lambda weights: problem.gradients_squared(weights)[1]
    return problem


def polyak_lojasiewicz_problem(seed: int) -> Problem:
    """Theorem 3: l(u) = u^2 + 5/4 sin^2 u on two copies of a basis, targets s above and below 0: PL, and not convex.

    In each direction F is u^2 + s^2 + 5/8 (1 - cos 2s cos 2u), whose second derivative is negative near u = pi/2.
    """
    generator = torch.Generator().manual_seed(seed)
    d, s, far = 16, 0.2, 1.6
    x = frame(1, d, generator).repeat(2, 1)
    targets = torch.cat([torch.full((d,), s), torch.full((d,), -s)]).double()
    slope = lambda u: 2 * u + 1.25 * (2 * u).sin()  # noqa: E731
    gap = lambda u: u.square() + 0.625 * math.cos(2 * s) * (1 - (2 * u).cos())  # noqa: E731
    u = torch.linspace(far / 1e4, far, 10_000, dtype=torch.float64)
    gap_slope = 2 * u + 1.25 * math.cos(2 * s) * (2 * u).sin()
    mu, smoothness = float((gap_slope.square() / (2 * gap(u))).min()) / d, (2 + 2.5 * math.cos(2 * s)) / d
    second_moment = float(((slope(u - s).square() + slope(u + s).square()) / 2).max())
    initial_gap = float(gap(u[-1]))
    accuracy = initial_gap / 8

    def guarantee(delta: float) -> Guarantee:
        sizes = {"smoothness": smoothness, "polyak_lojasiewicz": mu, "second_moment": second_moment}
        return polyak_lojasiewicz_guarantee(accuracy, **sizes, initial_gap=initial_gap, delta=delta)

    def error(last: Tensor, _: Tensor) -> Tensor:
        return gap(last @ x[:d].T).mean(1)

    start = x[:d].T @ torch.full((d,), far, dtype=torch.float64)
    name = "theorem 3: PL, not convex"
    return Problem(name, x, targets, slope, start, guarantee, accuracy, second_moment, error)


def convex_problem(seed: int) -> Problem:
    """Theorem 4: least absolute deviations, not smooth; every |g_i| is 1, and B_S does not grow near the minimiser."""
    generator = torch.Generator().manual_seed(seed)
    d, distance, accuracy = 16, 4.0, 0.1
    x = frame(4, d, generator)
    teacher = torch.randn(d, dtype=torch.float64, generator=generator)
    teacher *= distance / teacher.norm()
    targets = x @ teacher

    def guarantee(delta: float) -> Guarantee:
        return convex_guarantee(accuracy, second_moment=1.0, sq_distance=distance**2, delta=delta)

    def error(_: Tensor, mean: Tensor) -> Tensor:
        return (mean @ x.T - targets).abs().mean(1)

    start = torch.zeros(d, dtype=torch.float64)
    return Problem("theorem 4: convex", x, targets, torch.sign, start, guarantee, accuracy, 1.0, error)


def strongly_convex_problem(seed: int) -> Problem:
    """Theorem 5: least squares with noise, F strongly convex with lambda = 1/d."""
    generator = torch.Generator().manual_seed(seed)
    d, noise = 32, 0.3
    x = frame(4, d, generator)
    teacher = torch.randn(d, dtype=torch.float64, generator=generator)
    targets = x @ teacher + noise * torch.randn(len(x), dtype=torch.float64, generator=generator)
    optimum = torch.linalg.lstsq(x, targets).solution
    start = optimum + 4 * teacher / teacher.norm()
    second_moment = float((x @ start - targets).square().mean())
    accuracy = 1.0

    def guarantee(delta: float) -> Guarantee:
        sizes = {"strong_convexity": 1 / d, "second_moment": second_moment, "sq_distance": 16.0}
        return strongly_convex_guarantee(accuracy, **sizes, delta=delta)

    def error(last: Tensor, _: Tensor) -> Tensor:
        return (last - optimum).square().sum(1)

    identity = lambda u: u  # noqa: E731
    name = "theorem 5: strongly convex"
    return Problem(name, x, targets, identity, start, guarantee, accuracy, second_moment, error)


PROBLEMS = (smooth_problem, polyak_lojasiewicz_problem, convex_problem, strongly_convex_problem)


@dataclass
class Outcome:
    errors: Tensor
    steps: int
    largest_second_moment: float
    delta_met: float


def simulate(problem: Problem, batch_size: int, runs: int, seed: int) -> Outcome:
    """Run SGD many times at once: T / B steps of gamma times the sum of B gradients, drawn with replacement."""
    generator = torch.Generator().manual_seed(seed)
    guarantee = problem.guarantee(0.0)
    steps = max(1, round(guarantee.evaluations / batch_size))
    weights = problem.start.expand(runs, -1).clone()
    mean, along = torch.zeros_like(weights), torch.zeros(runs, dtype=torch.float64)
    look_every = max(1, steps // 50)
    second_moments, deltas = [], []
    for step in range(steps):
        mean += weights / steps
        if problem.along is not None:
            along += problem.along(weights) / steps
        if step % look_every == 0:
            second_moment, sq_norm = (float(x.mean()) for x in problem.gradients_squared(weights))
            second_moments.append(second_moment)
            deltas.append((batch_size - 1) * sq_norm / second_moment)
        drawn = torch.randint(len(problem.features), (runs, batch_size), generator=generator)
        rows = problem.features[drawn]
        slopes = problem.slope(torch.einsum("rbd,rd->rb", rows, weights) - problem.targets[drawn])
        weights = weights - guarantee.step_size * torch.einsum("rb,rbd->rd", slopes, rows)
    errors = along if problem.error is None else problem.error(weights, mean)
    return Outcome(errors, steps, max(second_moments), max(deltas))


def check(problem: Problem, options: Any) -> list[dict[str, Any]]:
    """Compare each delta with serial SGD."""
    serial = simulate(problem, 1, options.runs, options.seed)
    rows = []
    for i, delta in enumerate((0.0, *options.deltas)):
        batch_size = math.floor(delta * problem.bound + 1)
        guarantee = problem.guarantee((batch_size - 1) / problem.bound)
        outcome = serial if delta == 0 else simulate(problem, batch_size, options.runs, options.seed + i)
        error, base = float(outcome.errors.mean()), float(serial.errors.mean())
        variance = sum((float(o.errors.std()) / float(o.errors.mean())) ** 2 / options.runs for o in (outcome, serial))
        margin = 0.0 if delta == 0 else student_t_quantile(options.runs - 1, 0.95) * error / base * math.sqrt(variance)
        rows.append(
            {
                "problem": problem.name,
                "bound": problem.bound,
                "batch_size": batch_size,
                "delta": (batch_size - 1) / problem.bound,
                "steps": outcome.steps,
                "gamma": guarantee.step_size,
                "max_batch_size": guarantee.max_batch_size,
                "accuracy_promised": guarantee.accuracy,
                "error": error,
                "error_over_eps": error / problem.accuracy,
                "ratio_to_serial": error / base,
                "half_width": margin,
                "one_plus_half_delta": 1 + (batch_size - 1) / problem.bound / 2,
                "largest_delta_met": outcome.delta_met,
                "second_moment_supposed": problem.second_moment,
                "largest_second_moment_met": outcome.largest_second_moment,
            }
        )
    return rows


def picture(rows: list[dict[str, Any]], path: Path) -> None:
    figure, axes = panels(1, 2, width=5)
    names = list(dict.fromkeys(row["problem"] for row in rows))
    deltas = [0, max(row["delta"] for row in rows)]
    for ax, column in zip(axes[0], ("ratio_to_serial", "error_over_eps"), strict=True):
        ax.plot(deltas, [1 + delta / 2 for delta in deltas], "--", color="0.3", label="promise: $1 + \\delta/2$")
        for i, name in enumerate(names):
            these = [row for row in rows if row["problem"] == name]
            spread = [row["half_width"] if column == "ratio_to_serial" else 0 for row in these]
            x, y = [row["delta"] for row in these], [row[column] for row in these]
            look = {"color": COLOURS[i], "marker": MARKERS[i], "capsize": 3, "markersize": 5, "label": name}
            ax.errorbar(x, y, spread, **look)
        ax.set_xlabel("$\\delta = (B - 1) / B_S$")
        ax.set_ylim(0)
    axes[0, 0].set_ylabel("error of mini-batches / error of serial SGD")
    axes[0, 1].set_ylabel("error / $\\epsilon$")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = read_options(__doc__, QUICK, FULL, arguments)
    rows = [row for make in PROBLEMS for row in check(make(options.seed), options)]
    for row in rows:
        print(
            f"{row['problem']:30} delta {row['delta']:.2f}  B = {row['batch_size']:3}  {row['steps']:6} steps   "
            f"ratio {row['ratio_to_serial']:.3f} +- {row['half_width']:.3f} "
            f"(at most {row['one_plus_half_delta']:.3f})  "
            f"error / eps {row['error_over_eps']:.3f}"
        )
    limits = [row["one_plus_half_delta"] for row in rows]
    summary = {
        "points": len(rows),
        "ratios_within_promise": sum(
            row["ratio_to_serial"] - row["half_width"] <= x for row, x in zip(rows, limits, strict=True)
        ),
        "errors_within_promise": sum(row["error_over_eps"] <= x for row, x in zip(rows, limits, strict=True)),
        "second_moments_as_supposed": sum(
            row["largest_second_moment_met"] <= row["second_moment_supposed"] * (1 + 1e-9) for row in rows
        ),
        "batches_within_extra_condition": sum(row["batch_size"] <= row["max_batch_size"] for row in rows),
    }
    print(summary)
    write_csv(options.out / "theory_check.csv", rows)
    picture(rows, options.out / "theory_check.png")
    write_summary(options.out / "theory_check.json", options, summary)
    return summary


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
