"""What a measurement costs: a measured training step over a plain one, and the engines beside their rivals.

    python benchmarks/overhead.py [--quick] [--models MLP,GPT] [--device cuda] [--out benchmarks/results]

Steps are measured inside a real Trainer, every second one, so that measured and plain steps share each moment of the
machine; steps that are preceded by checks are told apart. The engines run on the bare network, in turn, and each
gives what B_S needs: the squared norms of the examples' gradients, and that of their sum. Writes overhead.json (one for
each kind of device); benchmarks/performance.py makes the tables of docs/performance.md from it. Rivals: the extra
`bench`.
"""

import argparse
import ctypes
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import lightning as L
import torch
from networks import ON_ACCELERATORS, TASKS, Task, gpt_of_length, mlp_of_batch, mlp_of_width
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import get_total_norm
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import GradientDiversityMonitor, measure_moments
from lightning_graddiv.callbacks import outcome
from lightning_graddiv.callbacks.outcome import ghost_outcome
from lightning_graddiv.per_example import devices
from lightning_graddiv.per_example.directions import Directions
from lightning_graddiv.per_example.functional import functional_gradients, loop_gradients
from lightning_graddiv.per_example.ghost import GhostRecorder
from lightning_graddiv.per_example.ghost_engine import GhostEngine, is_proof_due
from lightning_graddiv.per_example.layers import Layout
from lightning_graddiv.per_example.losses import StepLoss

Seconds = list[float]

_SECONDS = 1.5
"""For plain steps beside each engine."""

_TRAININGS = 3

_BUILDS = 3
"""Of the networks that engines run on."""

_REPEATS_OF_SLOW = 3
"""Of what takes more than four plain steps, each time that it is built."""


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

    def on_train_start(self, *_: Any) -> None:
        self.began = now()

    def on_train_batch_start(self, *_: Any) -> None:
        self.time = now()


class End(L.Callback):
    """Last of the callbacks.

    Attributes:
        steps: what kind each was, plain, measured or checked, and its seconds.
        seconds: of the training, its loader included.
        logged: what the monitor says that measuring adds to the rest of the training.
    """

    def __init__(self, start: Start, monitor: GradientDiversityMonitor) -> None:
        self.start, self.monitor, self.measured = start, monitor, 0
        self.steps: list[tuple[str, float]] = []
        self.seconds = self.logged = 0.0

    def on_train_end(self, *_: Any) -> None:
        self.seconds, self.logged = now() - self.start.began, self.monitor._stopwatch.overhead

    def seen(self) -> float:
        """Return the same by the clocks of this benchmark: a measured step takes longer than the middle plain one."""
        plain = statistics.median(by_kind(self.steps)["plain"])
        extra = sum(seconds - plain for kind, seconds in self.steps if kind != "plain")
        return extra / (self.seconds - extra)

    def on_train_batch_end(self, *_: Any) -> None:
        seconds = now() - self.start.time
        checks = is_proof_due(self.measured, is_wrapped=False)
        is_measured, self.measured = self.monitor.measurements > self.measured, self.monitor.measurements
        kind = ("checked" if checks else "measured") if is_measured else "plain"
        self.steps.append((kind, seconds))


def now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def give_back_what_is_free() -> None:
    ctypes.CDLL("libc.so.6").malloc_trim(0)


class PeakFrom(L.Callback):
    """Lets the peak of memory begin anew with a step: of the GPU that trains, or of this process (Linux, glibc)."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step != self.step:
            return
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            give_back_what_is_free()
            Path("/proc/self/clear_refs").write_text("5")


def train(
    task: Task,
    steps: int,
    every_n_steps: int,
    device: str = "cpu",
    precision: Any = "32-true",
    callbacks: Sequence[L.Callback] = (),
) -> End:
    """Train, and return what was seen of it."""
    torch.manual_seed(0)
    x, y = task.batch()
    data = TensorDataset(*(tensor.repeat(steps, *[1] * (tensor.ndim - 1)) for tensor in (x, y)))
    monitor, start = GradientDiversityMonitor(every_n_steps=every_n_steps), Start()
    end = End(start, monitor)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[start, monitor, *callbacks, end],
        logger=False,
        accelerator=device,
        devices=1,
        precision=precision,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Module(task), DataLoader(data, len(x)))
    return end


def by_kind(steps: Sequence[tuple[str, float]]) -> dict[str, Seconds]:
    found: dict[str, Seconds] = {"plain": [], "measured": [], "checked": []}
    for kind, seconds in steps:
        found[kind].append(seconds)
    return found


def in_training(task: Task, quick: bool, device: str, precision: Any = "32-true") -> dict[str, Any]:
    """Return what measuring costs a training: the middle of several, since the machine is another from time to time."""
    per_step = statistics.median(by_kind(train(task, 6, 10**6, device, precision).steps)["plain"])
    steps = max(24, min(400, int((5 if quick else 15) / per_step)))
    with numbers_sent() as sent:
        trainings = [train(task, steps, 2, device, precision) for _ in range(_TRAININGS if device == "cpu" else 1)]
    each = [by_kind(training.steps[2:]) for training in trainings]  # the first two steps pay for start-up
    ratios = [statistics.median(of_one["measured"]) / statistics.median(of_one["plain"]) for of_one in each]
    seconds = {kind: [second for of_one in each for second in of_one[kind]] for kind in each[0]}
    for _ in range(FIRST_CHECKS):
        seconds["checked"] += by_kind(train(task, 4, 4, device, precision).steps)["checked"]
    plain = statistics.median(seconds["plain"])
    cadence = GradientDiversityMonitor().every_n_steps
    return {
        "plain": spread(seconds["plain"]),
        "measured": spread(seconds["measured"]),
        "checked": spread(seconds["checked"]),
        "measured_over_plain": statistics.median(ratios),
        "checked_over_plain": statistics.median(seconds["checked"]) / plain,
        # In the long run: one measurement of 256 is checked.
        "every_n_steps": cadence,
        "overhead_at_default_cadence": (
            (statistics.median(ratios) - 1) + (statistics.median(seconds["checked"]) / plain - 1) / 256
        )
        / cadence,
        "overhead_logged": statistics.median(training.logged for training in trainings),
        "overhead_seen_from_outside": statistics.median(training.seen() for training in trainings),
        "bytes_sent_by_a_measurement": 8 * statistics.mode(sent),
        "engine": trainings[-1].monitor._measurer.engine,
        "coverage": trainings[-1].monitor._coverage,
    }


@contextmanager
def numbers_sent() -> Iterator[list[int]]:
    """Count the numbers of float64 that each measurement hands to collectives, were there other processes."""
    sent: list[int] = []
    summed, smallest = outcome.summed_over_ranks, outcome.smallest_over_ranks

    def count_summed(numbers: Any, device: torch.device) -> list[float]:
        sent.append(len(numbers))
        return summed(numbers, device)

    def count_smallest(numbers: Any, device: torch.device) -> list[float]:
        sent[-1] += len(numbers)
        return smallest(numbers, device)

    outcome.summed_over_ranks, outcome.smallest_over_ranks = count_summed, count_smallest
    try:
        yield sent
    finally:
        outcome.summed_over_ranks, outcome.smallest_over_ranks = summed, smallest


def spread(seconds: Seconds) -> dict[str, float]:
    quartiles = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return {"milliseconds": 1e3 * statistics.median(seconds), "low": 1e3 * quartiles[0], "high": 1e3 * quartiles[2]}


def contestants(task: Task, device: str, only: Sequence[str] | None = None) -> dict[str, Callable[[], Any]]:
    """Return what computes a batch's squared norms, of its examples' gradients and of the sum; each on its own net."""
    torch.manual_seed(0)
    x, y = (tensor.to(device) for tensor in task.batch())
    makers = {
        "plain step": plain_step,
        "ours, in-band": ours_in_band,
        "ours, auto": lambda t, net, x, y: ours_auto(t, net, x, y),
        "ours, functional": lambda t, net, x, y: ours(functional_gradients, t, net, x, y),
        "ours, loop": lambda t, net, x, y: ours(loop_gradients, t, net, x, y),
        "torch.func": torch_func,
        "Opacus, hooks": opacus_hooks,
        "Opacus, ghost": opacus_ghost,
        "BackPACK, BatchGrad": lambda t, net, x, y: backpack(t, net, x, y, "BatchGrad", "grad_batch"),
        "BackPACK, BatchL2Grad": lambda t, net, x, y: backpack(t, net, x, y, "BatchL2Grad", "batch_l2"),
        "floor: kernels alone": kernels_alone,
    }
    found = {}
    for name in only or makers:
        torch.manual_seed(1)
        try:
            run = makers[name](task, task.net().to(device), x, y)
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


def kernels_alone(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Return a step, and then what the layers' rules compute from its activations: no hooks, no proof, no Trainer."""
    parameters, step = list(net.parameters()), plain_step(task, net, x, y)
    recorder, directions = GhostRecorder(parameters), Directions(parameters, 0)
    recorder.attach(net)
    recorder.begin(len(x))
    step()
    uses = recorder.uses
    recorder.detach()

    def run() -> None:
        step()
        with torch.no_grad():
            for use in uses:
                use._found = None
                for name, contributions in use.contributions(Layout.FIRST, len(x)).items():
                    contributions.measure(directions.right(use.parameters[name]))
            get_total_norm([parameter.grad for parameter in parameters])

    return run


def ours_in_band(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Return what a measured step does, without the Trainer: with the proof of coverage, and |sum g|^2 with it."""
    loss = StepLoss(net, loss_fn=lambda net, batch: task.loss(net(batch[0]), batch[1]))
    engine, parameters = GhostEngine(), list(net.parameters())
    mask = engine.check(loss, (x, y), len(x), seed=0)
    if not all(mask):
        raise RuntimeError(f"{mask.count(0.0)} parameters are not covered")
    engine.adopt(mask, net, parameters)
    seeds = count()

    def run() -> None:
        net.zero_grad()  # here, as all others do: memory that comes free between both passes costs them time
        step = engine.step(parameters, compares_processes=False, holds_all=True, seed=next(seeds), noise_seed=0)
        step.forward(net, None, (x, y), len(x), 1)
        value = task.loss(net(x), y)
        step.look_at(value)
        value.backward()
        step.backward(1.0)
        found = ghost_outcome(step, parameters, None, x.device)
        step.close()
        if found.moments is None:
            raise RuntimeError(str(found.refusal))

    return run


def ours_auto(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    """Return the function of the library, which proves what it measures at every call."""
    return lambda: measure_moments(
        net, (x, y), loss_fn=lambda net, batch: task.loss(net(batch[0]), batch[1]), engine="auto"
    )


def ours(engine: Any, task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    loss = StepLoss(net, loss_fn=lambda net, batch: task.loss(net(batch[0]), batch[1]))
    return lambda: engine(loss, (x, y), len(x))


def torch_func(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    values = {name: parameter.detach() for name, parameter in net.named_parameters()}

    def loss(values: Any, x: Tensor, y: Tensor) -> Tensor:
        return task.loss(functional_call(net, values, (x[None],)), y[None])

    per_example = vmap(grad(loss), in_dims=(None, 0, 0))

    def run() -> tuple[Tensor, Tensor]:
        gradients = per_example(values, x, y)
        norms = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0)
        return norms, get_total_norm([g.sum(0) for g in gradients.values()])

    return run


def opacus_hooks(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    from opacus.grad_sample import GradSampleModule

    wrapped = GradSampleModule(net, loss_reduction="mean")

    def run() -> tuple[Tensor, Tensor]:
        wrapped.zero_grad()
        task.loss(wrapped(x), y).backward()
        norms = torch.stack([p.grad_sample.flatten(1).square().sum(1) for p in net.parameters()]).sum(0)
        return norms, get_total_norm([p.grad for p in net.parameters()])

    return run


def opacus_ghost(task: Task, net: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    wrapped = GradSampleModuleFastGradientClipping(
        net, loss_reduction="mean", max_grad_norm=1.0, use_ghost_clipping=True
    )

    def run() -> tuple[Tensor, Tensor]:
        wrapped.zero_grad()
        task.loss(wrapped(x), y).backward()
        return wrapped.get_norm_sample(), get_total_norm([p.grad for p in net.parameters()])

    return run


def backpack(task: Task, net: nn.Module, x: Tensor, y: Tensor, extension: str, attribute: str) -> Callable[[], Any]:
    import backpack
    from backpack import extensions

    if task.name == "GPT":
        raise RuntimeError("BackPACK knows no attention")
    extended, loss = backpack.extend(net), backpack.extend(nn.CrossEntropyLoss())

    def run() -> tuple[Tensor, Tensor]:
        extended.zero_grad()
        out = extended(x)
        value = loss(out.flatten(0, -2), y.flatten())
        with backpack.backpack(getattr(extensions, extension)()):
            value.backward()
        found = [getattr(p, attribute) for p in extended.parameters()]
        norms = torch.stack([f if f.ndim == 1 else f.flatten(1).square().sum(1) for f in found]).sum(0)
        return norms, get_total_norm([p.grad for p in extended.parameters()])

    return run


def bare(task: Task, quick: bool, device: str = "cpu", only: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the time of each contestant: more often of small networks, whose times differ more than what they show.

    On a processor all are built several times: where their tensors happen to lie is worth one or two per cent.
    """
    builds = _BUILDS if device == "cpu" else 1  # a GPU is lent for minutes
    found: dict[str, list[tuple[float, float]]] = {}
    for build in range(builds):
        runs = contestants(task, device, only)
        plain = statistics.median(timed(runs["plain step"]) for _ in range(5))
        repeats = max(15, min(150, int(_SECONDS / plain))) if device == "cpu" else 15
        share = -(-(repeats if quick else 3 * repeats) // builds)
        for name, pairs in interleaved(runs, share, order=Random(build)).items():
            found.setdefault(name, []).extend(pairs)
    return {
        name: {
            **spread([own for own, _ in pairs]),
            "over_plain": statistics.median(own / plain for own, plain in pairs),
        }
        for name, pairs in found.items()
    }


def interleaved(
    runs: Mapping[str, Callable[[], Any]], repeats: int, order: Random
) -> dict[str, list[tuple[float, float]]]:
    """Time each after a plain step, as in training, which both see the same moment of the machine and of its caches.

    Each time in another order, since whoever follows one of its kind finds its code at hand; those that take long, only
    a few times.

    Returns:
        For each its seconds and those of the plain step before.
    """
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for repeat in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            if repeat >= _REPEATS_OF_SLOW and found[name][0][0] > 4 * found[name][0][1]:
                continue
            plain, own = timed(runs["plain step"]), timed(runs[name])
            found[name].append((own, plain))
    return found


def timed(run: Callable[[], Any]) -> float:
    start = now()
    run()
    return now() - start


def calls(task: Task) -> dict[str, int]:
    """Return how many operators a step calls, when it measures and when not, on the way that an accelerator takes."""
    processors, devices._PROCESSORS = devices._PROCESSORS, frozenset()
    try:
        found = {}
        for name, run in contestants(task, "cpu", ("plain step", "ours, in-band")).items():
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                run()
            found[name] = sum(is_operator(event) and not is_operator(event.cpu_parent) for event in profile.events())
        return found
    finally:
        devices._PROCESSORS = processors


def is_operator(event: Any) -> bool:
    return event is not None and event.name.startswith("aten::")


def growth_of_cost(quick: bool) -> dict[str, dict[str, float]]:
    """Return a measured step over a plain one, on the bare network, as one size grows."""
    sizes = {
        "examples (MLP)": (mlp_of_batch, (32, 128, 512)),
        "width (MLP, 128 examples)": (mlp_of_width, (256, 1024, 2048)),
        "tokens in a sequence (GPT, 8 sequences)": (gpt_of_length, (32, 64, 128, 256)),
    }
    only = ("plain step", "ours, in-band")
    return {
        what: {str(n): bare(make(n), quick, only=only)["ours, in-band"]["over_plain"] for n in values}
        for what, (make, values) in sizes.items()
    }


def peak_memory(name: str, every_n_steps: int, first: int) -> float:
    """Return the most that training in a process of its own holds beyond what it held before, in MiB.

    The middle one of three, with an allocator (glibc's) that gives back at once what is freed: what it keeps otherwise
    differs by a third from one process to the next.
    """
    command = [sys.executable, __file__, "--memory-of", name, "--every-n-steps", str(every_n_steps)]
    command += ["--from-step", str(first)]
    env = {**os.environ, "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": str(2**16)}
    runs = [subprocess.run(command, env=env, capture_output=True, text=True, check=True) for _ in range(3)]
    return statistics.median(float(run.stdout.split()[-1]) for run in runs)


def memory(name: str) -> dict[str, float]:
    """Return the peaks of a training without measurements, with some, and from where none is checked on."""
    found = {"plain": peak_memory(name, 10**6, 0)}
    found |= {"with_checks": peak_memory(name, 2, 0), "measured": peak_memory(name, 2, AFTER_CHECKS)}
    return with_ratios(found)


def memory_of_gpu(task: Task) -> dict[str, float]:
    """Return the same peaks of what PyTorch holds on the GPU."""
    found = {}
    for which, every_n_steps, first in (("plain", 10**6, 0), ("with_checks", 2, 0), ("measured", 2, AFTER_CHECKS)):
        gc.collect()
        train(task, 20, every_n_steps, "cuda", callbacks=[PeakFrom(first)])
        found[which] = torch.cuda.max_memory_allocated() / 2**20
    return with_ratios(found)


def with_ratios(peaks: dict[str, float]) -> dict[str, float]:
    return peaks | {
        "ratio": peaks["measured"] / peaks["plain"],
        "ratio_with_checks": peaks["with_checks"] / peaks["plain"],
    }


AFTER_CHECKS = 10
"""Of every second step, the first measurement is the last that is checked for a while."""

FIRST_CHECKS = 3
"""Short trainings whose first measurement, which is checked, is in the fourth step."""


def held_by_training(name: str, every_n_steps: int, first: int) -> float:
    task = TASKS[name]
    train(replace(task, batch=lambda: tuple(part[:4] for part in task.batch())), 8, 2)  # loads the libraries' code
    gc.collect()
    give_back_what_is_free()
    before = kilobytes("VmRSS")
    train(task, 20, every_n_steps, callbacks=[PeakFrom(first)])
    return (kilobytes("VmHWM") - before) / 1024


def kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field)))


def versions() -> dict[str, str]:
    found = {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": str(torch.get_num_threads()),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "float32 products": torch.get_float32_matmul_precision(),
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
    parser.add_argument("--models", help="some of them, with commas between")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--calls", action="store_true", help="count the operators that an accelerator is called for")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--every-n-steps", type=int, default=2, help=argparse.SUPPRESS)
    parser.add_argument("--from-step", type=int, default=0, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(2)
    if arguments.memory_of:
        print(held_by_training(arguments.memory_of, arguments.every_n_steps, arguments.from_step))
        return
    if arguments.calls:
        names = arguments.models.split(",") if arguments.models else ON_ACCELERATORS
        print({name: calls(ON_ACCELERATORS[name]) for name in names})
        return
    is_cpu = arguments.device == "cpu"
    tasks = TASKS if is_cpu else ON_ACCELERATORS
    if not is_cpu:
        torch.set_float32_matmul_precision("high")  # on tensor cores, as Lightning advises
    results: dict[str, Any] = {"versions": versions(), "models": {}}
    for name in (arguments.models or ",".join(tasks)).split(","):
        task, found = tasks[name], results["models"].setdefault(name, {})
        for part, measured in parts_of(task, arguments.quick, arguments.device):
            found[part] = measured
            write(results, arguments.out, is_cpu)
        print(f"{name}: measured over plain {found['training']['measured_over_plain']:.2f}", flush=True)
    if is_cpu:
        results["growth"] = growth_of_cost(arguments.quick)
        write(results, arguments.out, is_cpu)


def parts_of(task: Task, quick: bool, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Measure one thing after another: what is measured is there if the next is cut off."""
    is_cpu = device == "cpu"
    yield "training", in_training(task, quick, device)
    yield "peak_MiB", memory(task.name) if is_cpu else memory_of_gpu(task)
    if not is_cpu:
        yield "training_bf16", in_training(task, quick, device, "bf16-mixed")
    yield "engines", bare(task, quick, device)


def write(results: dict[str, Any], folder: Path, is_cpu: bool) -> None:
    name = "overhead.json" if is_cpu else "overhead_cuda.json"
    (folder / name).write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
