"""Which estimate of the batch-size bound is right under batch normalisation in training?

An example's gradient does not exist there: it depends on the others in the micro-batch. What exists is the gradient of
a micro-batch of m examples, and the bound that says how many of these may be averaged before that stops paying::

    B = 1 + m tr(Cov of the micro-batch gradient) / |its mean|^2

Truth comes from many independent micro-batches at fixed weights. Against it stand

- in-band: contributions of single examples, which add up to the micro-batch's gradient, taken for their gradients;
- groups:  each micro-batch taken apart into J groups that are run by themselves (their statistics are of m / J);
- between: whole micro-batches compared with each other, as the engine `microbatch` does.

Run as `python benchmarks/batch_norm.py`; writes benchmarks/results/batch_norm.json.
"""

import argparse
import json
import math
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_graddiv.per_example.ghost import GhostRecorder
from lightning_graddiv.per_example.layers import Layout
from lightning_graddiv.per_example.microbatch import GroupSums


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet20(width: int, channels: int, classes: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage, outputs in enumerate((width, 2 * width, 4 * width)):
        for block in range(3):
            layers.append(Block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def images(examples: int, seed: int) -> tuple[Tensor, Tensor]:
    """Ten classes of smooth patterns under noise: a stream that is never exhausted."""
    generator = torch.Generator().manual_seed(12345)
    means = F.interpolate(torch.randn(10, 3, 4, 4, generator=generator), size=16, mode="bilinear")
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 10, (examples,), generator=generator)
    return means[y] + 1.5 * torch.randn(examples, 3, 16, 16, generator=generator), y


def gradient(net: nn.Module, x: Tensor, y: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(F.cross_entropy(net(x), y), list(net.parameters())))


def flat(gradients: list[Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients]).double()


def train(net: nn.Module, steps: int, size: int) -> None:
    optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9)
    for step in range(steps):
        x, y = images(size, 1_000_000 + step)
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()


def in_band(net: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Return sum |c_i|^2 and |sum c_i|^2."""
    parameters = list(net.parameters())
    layouts = {(index, 0): Layout.FIRST for index in range(len(parameters))}
    with GhostRecorder(parameters, layouts) as recorder:
        recorder.attach(net)
        recorder.begin(len(x))
        together = flat(gradient(net, x, y))
        recorded = recorder.finish()
    assert not recorded.misses, recorded.misses
    return float(recorded.total(range(len(parameters))).sum()), float(together @ together)


def in_groups(net: nn.Module, x: Tensor, y: Tensor, groups: int) -> tuple[float, float, float]:
    """Return M, S1 and S2 between groups of a micro-batch."""
    size = len(x) // groups
    sums, mean = GroupSums(), torch.zeros(())
    for part in range(groups):
        rows = slice(part * size, (part + 1) * size)
        one = flat(gradient(net, x[rows], y[rows]))
        sums += GroupSums.of_group(float(one @ one), size, 1 / groups)
        mean = mean + one / groups
    moments = sums.moments(float(mean @ mean))
    return moments.count, moments.sum_sq_norms, moments.sq_norm_of_sum


def pooled(probes: list[tuple[float, float, float]]) -> tuple[float, float]:
    """Return rho of (M, S1, S2), and its jackknife standard error."""

    def rho(chosen: list[tuple[float, float, float]]) -> float:
        signal = math.fsum(s2 - s1 for _, s1, s2 in chosen)
        return signal / math.fsum((m - 1) * s1 for m, s1, _ in chosen)

    k = len(probes)
    left_out = [rho(probes[:i] + probes[i + 1 :]) for i in range(k)]
    mean = math.fsum(left_out) / k
    return rho(probes), math.sqrt((k - 1) / k * math.fsum((value - mean) ** 2 for value in left_out))


def compare(net: nn.Module, size: int, batches: int) -> dict[str, Any]:
    estimates: dict[str, list[tuple[float, float, float]]] = {}
    total, squares = torch.zeros(()), 0.0
    previous = None
    for batch in range(batches):
        x, y = images(size, batch)
        s1, s2 = in_band(net, x, y)
        estimates.setdefault("in-band", []).append((size, size**2 * s1, size**2 * s2))
        for groups in (2, 4, 8):
            if size // groups >= 4:
                estimates.setdefault(f"{groups} groups", []).append(in_groups(net, x, y, groups))
        together = flat(gradient(net, x, y))
        total, squares = total + together, squares + float(together @ together)
        if previous is not None and batch % 2:
            sums = GroupSums.of_group(float(together @ together), size, 0.5)
            sums += GroupSums.of_group(float(previous @ previous), size, 0.5)
            mean = (together + previous) / 2
            moments = sums.moments(float(mean @ mean))
            estimates.setdefault("between", []).append((moments.count, moments.sum_sq_norms, moments.sq_norm_of_sum))
        previous = together
    # All pairs of independent micro-batches: E <G_a, G_b> is |mean|^2.
    signal = (float(total @ total) - squares) / (batches * (batches - 1))
    truth = signal / (signal + size * (squares / batches - signal))
    result: dict[str, Any] = {"micro_batch": size, "micro_batches": batches, "true_rho": truth, "true_bound": 1 / truth}
    for name, probes in estimates.items():
        rho, error = pooled(probes)
        result[name] = {"rho": rho, "standard_error": error, "bound": 1 / rho, "bound_over_truth": truth / rho}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--examples", type=int, default=16384, help="for each size of the micro-batch")
    parser.add_argument("--width", type=int, default=8)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "batch_norm.json")
    arguments = parser.parse_args()
    rows = []
    for steps in (20, 60):
        torch.manual_seed(0)
        net = resnet20(arguments.width, 3, 10)
        train(net, steps, 64)
        for size in (16, 32, 128):
            rows.append({"trained_steps": steps, **compare(net, size, arguments.examples // size)})
            print(json.dumps(rows[-1]))
    environment = {"torch": torch.__version__, "python": platform.python_version(), "machine": platform.machine()}
    arguments.output.write_text(json.dumps({"environment": environment, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
