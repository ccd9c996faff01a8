"""Stability: two trainings on data sets that differ in one example, for several batch sizes at one gamma.

Both start from the same weights and draw the same positions in the same order. After each pass: the normalised
distance sqrt(|w - w'|^2 / (|w|^2 + |w'|^2)) of their weights, which is at most sqrt(2), and loss and accuracy on the
training set and on held-out images. The step size gamma on the sum of a batch's gradients is the same for all batch
sizes, as in the paper's theorems, so that the learning rate on the mean grows in proportion to the batch.

    python experiments/paper/stability.py [--quick] [--examples 8192] [--passes 30] [--seeds 5] [--data-dir FOLDER]
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from images import find_images, held_out_set, training_set
from networks import convnet
from results import COLOURS, Mean, mean_of, panels, read_options, write_csv, write_summary
from torch import Tensor, nn
from training import AfterEachPass, Data, fit, new_network, over_processes, score

COMMON = {"batch_sizes": (64, 512, 1024), "learning_rate_at_64": 0.03}
QUICK = {"examples": 1024, "passes": 30, "seeds": 3, "side": 16, "width": 8, **COMMON}
FULL = {"examples": 8192, "passes": 30, "seeds": 5, "side": 32, "width": 16, **COMMON}


def with_one_other(data: Data, other: Data) -> Data:
    """Return the data set with its first example replaced."""
    images, labels = data[0].clone(), data[1].clone()
    images[0], labels[0] = other[0][0], (other[1][0] + (other[1][0] == labels[0])) % 10  # another label as well
    return images, labels


def train_pair(
    data: Data, held_out: Data, batch_size: int, learning_rate: float, seed: int, passes: int, width: int
) -> list[dict[str, Any]]:
    """Train on both data sets; return one row for each pass."""
    trails: list[list[Tensor]] = []
    scores: list[Any] = []
    for these in (data, with_one_other(data, held_out)):
        trail: list[Tensor] = []
        net = new_network(convnet, data, seed, width=width)

        def look(_: int, net: nn.Module, trail: list[Tensor] = trail) -> bool:
            trail.append(nn.utils.parameters_to_vector(net.parameters()).detach().double())
            if not trails:
                scores.append((score(net, data), score(net, held_out)))
            return not bool(trail[-1].isfinite().all())

        callbacks = [AfterEachPass(look)]
        fit(
            net,
            these,
            batch_size=batch_size,
            learning_rate=learning_rate,
            passes=passes,
            seed=seed,
            callbacks=callbacks,
        )
        trails.append(trail)
    rows = []
    for i, (w, other, (train, test)) in enumerate(zip(*trails, scores, strict=False)):
        sq_norms = w.square().sum() + other.square().sum()
        of = {"batch_size": batch_size, "seed": seed, "pass": i + 1}
        distance = float(((w - other).square().sum() / sq_norms).sqrt())
        rows.append({**of, "distance": distance, **named("train", train), **named("test", test)})
    return rows


def named(part: str, score: Any) -> dict[str, float]:
    return {f"{part}_loss": score.loss, f"{part}_accuracy": score.accuracy}


def curve(rows: list[dict[str, Any]], batch_size: int, column: str) -> tuple[list[int], list[Mean]]:
    """Mean over the seeds after each pass that all of them made with finite weights."""
    these = [row for row in rows if row["batch_size"] == batch_size]
    seeds = len({row["seed"] for row in these})
    passes, means = [], []
    for done in sorted({row["pass"] for row in these}):
        values = [row[column] for row in these if row["pass"] == done and math.isfinite(row[column])]
        if len(values) == seeds:
            passes.append(done)
            means.append(mean_of(values))
    return passes, means


def picture(rows: list[dict[str, Any]], batch_sizes: Sequence[int], path: Path) -> None:
    figure, axes = panels(1, 3)
    titles = ("distance of the two runs", "loss (training -, held out --)", "accuracy (training -, held out --)")
    columns = (("distance",), ("train_loss", "test_loss"), ("train_accuracy", "test_accuracy"))
    for ax, title, names in zip(axes[0], titles, columns, strict=True):
        for i, batch_size in enumerate(batch_sizes):
            for name, style in zip(names, ("-", "--"), strict=False):
                passes, means = curve(rows, batch_size, name)
                values, widths = [m.value for m in means], [m.half_width for m in means]
                label = f"B = {batch_size}" if style == "-" else None
                ax.plot(passes, values, style, color=COLOURS[i], linewidth=1.8, label=label)
                if all(map(math.isfinite, widths)):
                    low, high = ([v + sign * w for v, w in zip(values, widths, strict=True)] for sign in (-1, 1))
                    ax.fill_between(passes, low, high, color=COLOURS[i], alpha=0.13, linewidth=0)
        ax.set_title(title, loc="left", fontsize=10)
        ax.set_xlabel("passes")
        ax.set_ylim(bottom=0)
    axes[0, 0].axhline(math.sqrt(2), color="0.5", linewidth=0.8, linestyle=":")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[0, 1].set_ylim(0, 4)
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    options = read_options(__doc__, QUICK, FULL, arguments, images="CIFAR-10")
    images = find_images("CIFAR-10", options.data_dir)
    data = training_set(images, options.examples, side=options.side)
    held_out = held_out_set(images, min(options.examples, 2000), side=options.side)
    jobs = [
        (data, held_out, size, options.learning_rate_at_64 * size / 64, seed, options.passes, options.width)
        for size in sorted(options.batch_sizes)
        for seed in range(options.seeds)
    ]
    rows = [row for rows in over_processes(train_pair, jobs, options.workers) for row in rows]
    summary: dict[str, Any] = {}
    for size in options.batch_sizes:
        last = {name: curve(rows, size, name) for name in ("distance", *list(rows[0])[4:])}
        finite = {name: means[-1] if means else None for name, (_, means) in last.items()}
        summary[f"B = {size}"] = {"passes": max(last["distance"][0], default=0), **finite}
        print(f"B = {size:5}   after {summary[f'B = {size}']['passes']} passes:", rounded_line(finite))
    write_csv(options.out / "stability.csv", rows)
    picture(rows, options.batch_sizes, options.out / "stability.png")
    write_summary(options.out / "stability.json", options, summary, data=images.name)
    return summary


def rounded_line(means: dict[str, Mean | None]) -> str:
    return "   ".join(f"{name} {m.value:.3f} +- {m.half_width:.3f}" for name, m in means.items() if m is not None)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
