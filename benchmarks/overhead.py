"""What a measurement costs: a measured training step over a plain one, and the engines beside their rivals.

    python benchmarks/overhead.py [--quick] [--models MLP,GPT] [--out benchmarks/results]

Steps are measured inside a real Trainer, every second one, so that measured and plain steps share each moment of the
machine; steps that are preceded by checks are told apart. The engines run on the bare network, interleaved. Writes
overhead.json; benchmarks/performance.py makes the table of docs/performance.md from it. Rivals: the extra `bench`.
"""

import argparse
import json
import logging
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L
import torch
from models import TASKS, Task
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import GradientDiversityMonitor
from lightning_graddiv.per_example.functional import functional_gradients, loop_gradients
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.proof import ghost_pass, prove

Seconds = list[float]


class Module(L.LightningModule):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task, self.net = task, task.net()

    def training_step(self, batch: Any) -> Tensor:
        x, y = batch
        return self.task.loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


class Start(L.Callback):
    """First of the callbacks: the others' share of a step is part of it."""

    def on_train_batch_start(self, *_: Any) -> None:
        self.time = time.perf_counter()


class End(L.Callback):
    """Last of the callbacks."""

    def __init__(self, start: Start, monitor: GradientDiversityMonitor) -> None:
        self.start, self.monitor, self.measured = start, monitor, 0
        self.steps: list[tuple[str, float]] = []

    def on_train_batch_end(self, *_: Any) -> None:
        seconds = time.perf_counter() - self.start.time
        checks = self.measured in (0, 1, 4, 16, 64) or self.measured % 256 == 0
        is_measured, self.measured = self.monitor.measurements > self.measured, self.monitor.measurements
        kind = ("checked" if checks else "measured") if is_measured else "plain"
        self.steps.append((kind, seconds))


def train(task: Task, steps: int, every_n_steps: int) -> tuple[dict[str, Seconds], GradientDiversityMonitor]:
    """Return the seconds of plain, measured and checked steps, without the first two."""
    torch.manual_seed(0)
    x, y = task.batch()
    data = TensorDataset(*(tensor.repeat(steps, *[1] * (tensor.ndim - 1)) for tensor in (x, y)))
    monitor, start = GradientDiversityMonitor(every_n_steps=every_n_steps), Start()
    end = End(start, monitor)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[start, monitor, end],
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(task), DataLoader(data, len(x)))
    found: dict[str, Seconds] = {"plain": [], "measured": [], "checked": []}
    for kind, seconds in end.steps[2:]:
        found[kind].append(seconds)
    return found, monitor


def in_training(task: Task, quick: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    pilot, _ = train(task, 6, 10**6)
    steps = max(14, min(200, int((8 if quick else 25) / statistics.median(pilot["plain"]))))
    seconds, monitor = train(task, steps, 2)
    plain = statistics.median(seconds["plain"])
    return {
        "plain": spread(seconds["plain"]),
        "measured": spread(seconds["measured"]),
        "checked": spread(seconds["checked"]),
        "measured_over_plain": statistics.median(seconds["measured"]) / plain,
        "checked_over_plain": statistics.median(seconds["checked"]) / plain,
        # In the long run: one step of twenty is measured, and one measurement of 256 is checked.
        "overhead_at_default_cadence": (
            (statistics.median(seconds["measured"]) - plain) / 20
            + (statistics.median(seconds["checked"]) - plain) / (20 * 256)
        )
        / plain,
        "engine": monitor._measurer.engine,
        "coverage": monitor._coverage,
    }


def spread(seconds: Seconds) -> dict[str, float]:
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"milliseconds": 1e3 * statistics.median(seconds), "low": 1e3 * quartiles[0], "high": 1e3 * quartiles[2]}


def contestants(task: Task) -> dict[str, Callable[[], Any]]:
    """Return what computes the squared norms of a batch's per-example gradients; each on a network of its own."""
    torch.manual_seed(0)
    x, y = task.batch()
    makers = {
        "plain step": plain_step,
        "ours, in-band": ours_in_band,
        "ours, functional": lambda t, net, x, y: ours(functional_gradients, t, net, x, y),
        "ours, loop": lambda t, net, x, y: ours(loop_gradients, t, net, x, y),
        "torch.func": torch_func,
        "Opacus, hooks": opacus_hooks,
        "Opacus, ghost": opacus_ghost,
        "BackPACK, BatchGrad": lambda t, net, x, y: backpack(t, net, x, y, "BatchGrad", "grad_batch"),
        "BackPACK, BatchL2Grad": lambda t, net, x, y: backpack(t, net, x, y, "BatchL2Grad", "batch_l2"),
    }
    found = {}
    for name, make in makers.items():
        torch.manual_seed(1)
        try:
            run = make(task, task.net(), x, y)
            run()
            found[name] = run
        except Exception as error:
            print(f"{task.name}: {name} does not run: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
    return found


def plain_step(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    def run() -> None:
        net.zero_grad()
        task.loss(net(x), y).backward()

    return run


def ours_in_band(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    loss = StepLoss(net, loss_fn=lambda net, batch: task.loss(net(batch[0]), batch[1]))
    with measuring(net):
        plan, _ = prove(loss, (x, y), len(x))
    if plan.misses:
        raise RuntimeError(f"{len(plan.misses)} parameters are not covered")
    return lambda: ghost_pass(loss, (x, y), len(x), plan)


def ours(engine: Any, task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    loss = StepLoss(net, loss_fn=lambda net, batch: task.loss(net(batch[0]), batch[1]))
    return lambda: engine(loss, (x, y), len(x))


def torch_func(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    values = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(values: Any, x: Tensor, y: Tensor) -> Tensor:
        return task.loss(functional_call(net, values, (x[None],)), y[None])

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))

    def run() -> Tensor:
        gradients = per_example(values, x, y)
        return torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)

    return run


def opacus_hooks(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(net, loss_reduction="mean")

    def run() -> Tensor:
        wrapped.zero_grad()
        task.loss(wrapped(x), y).backward()
        return torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in net.parameters()]).sum(0)

    return run


def opacus_ghost(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        net, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def run() -> Tensor:
        wrapped.zero_grad()
        task.loss(wrapped(x), y).backward()
        return wrapped.get_norm_sample()

    return run


def backpack(task: Task, net: nn.Module, x: Tensor, y: Tensor, extension: str, attribute: str) -> Callable[[], Any]:
    import backpack
    from backpack import extensions

    if task.name == "GPT":
        raise RuntimeError("BackPACK knows no attention")
    extended, loss = backpack.extend(net), backpack.extend(nn.CrossEntropyLoss())

    def run() -> Tensor:
        extended.zero_grad()
        out = extended(x)
        value = loss(out.flatten(0, -2), y.flatten())
        with backpack.backpack(getattr(extensions, extension)()):
            value.backward()
        found = [getattr(p, attribute) for p in extended.parameters()]
        return torch.stack([f if f.ndim == 1 else f.flatten(1).square().sum(1) for f in found]).sum(0)

    return run


def bare(task: Task, quick: bool) -> dict[str, Any]:
    runs = contestants(task)
    seconds: dict[str, Seconds] = {name: [] for name in runs}
    for _ in range(5 if quick else 9):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    plain = statistics.median(seconds["plain step"])
    return {name: {**spread(s), "over_plain": statistics.median(s) / plain} for name, s in seconds.items()}


def peak_memory(name: str, every_n_steps: int) -> float:
    """Return the most that training in a process of its own holds beyond what it held before, in MiB."""
    command = [sys.executable, __file__, "--memory-of", name, "--every-n-steps", str(every_n_steps)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def held_by_training(name: str, every_n_steps: int) -> float:
    before = kilobytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew (Linux)
    train(TASKS[name], 14, every_n_steps)
    return (kilobytes("VmHWM") - before) / 1024


def kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def versions() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
    }
    for package in ("torch", "lightning", "opacus", "backpack-for-pytorch", "lightning_graddiv"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--models", default=",".join(TASKS))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--every-n-steps", type=int, default=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    if arguments.memory_of:
        print(held_by_training(arguments.memory_of, arguments.every_n_steps))
        return
    results: dict[str, Any] = {"versions": versions(), "models": {}}
    for name in arguments.models.split(","):
        memory = {kind: peak_memory(name, every) for kind, every in (("plain", 10**6), ("measured", 2))}
        results["models"][name] = {
            "training": in_training(TASKS[name], arguments.quick),
            "engines": bare(TASKS[name], arguments.quick),
            "peak_MiB": {**memory, "ratio": memory["measured"] / memory["plain"]},
        }
        training = results["models"][name]["training"]
        print(f"{name}: measured over plain {training['measured_over_plain']:.2f}, {memory}", flush=True)
    (arguments.out / "overhead.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
