"""Small LightningModules that do what real ones do, and what tests ask of all of them."""

import copy
import functools
import random
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from types import FunctionType, MethodType
from typing import Any

import lightning as L
import numpy as np
import torch
import torch.nn.functional as F
import torchmetrics
from torch import Tensor, nn

N = 6
CLASSES = 3


class Base(L.LightningModule):
    """What all models share: a batch of (x, y) and a classifier."""

    net: nn.Module

    def logits(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return F.cross_entropy(self.logits(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class MLP(Base):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, CLASSES))


class SummedMLP(MLP):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return {"loss": F.cross_entropy(self.logits(x), y, reduction="sum")}


class GroupNormCNN(Base):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(2, 4, 3, padding=1),
            nn.GroupNorm(2, 4),
            nn.ReLU(inplace=True),
            nn.Conv2d(4, 4, 3, groups=2),
            nn.ReLU(inplace=True),
            nn.Flatten(),
            nn.Linear(4 * 16, CLASSES),
        )


class LSTMClassifier(Base):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 5, num_layers=2, batch_first=True, bidirectional=True)
        self.head = nn.Linear(10, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(Base):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(8, CLASSES)

    def logits(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).mean(1))


class TiedWeights(Base):
    """A language model whose output layer is its embedding, and a submodule that has two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 6, padding_idx=0)
        self.first = nn.Linear(6, 6)
        self.second = self.first
        self.decoder = nn.Linear(6, 7, bias=False)
        self.decoder.weight = self.embed.weight

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        tokens, targets = batch
        logits = self.decoder(self.second(torch.tanh(self.first(self.embed(tokens)))))
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class BareParameters(Base):
    """Bare parameters of which two get one gradient tensor, one is frozen, one unused and one empty."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(5, CLASSES))
        self.b = nn.Parameter(torch.randn(5, CLASSES))
        self.scales = nn.ParameterList([nn.Parameter(torch.rand(())), nn.Parameter(torch.rand(CLASSES))])
        self.frozen = nn.Parameter(torch.randn(CLASSES), requires_grad=False)
        self.unused = nn.Parameter(torch.randn(4))
        self.empty = nn.Parameter(torch.randn(0))
        self.codes = nn.Parameter(torch.ones(3, dtype=torch.uint8), requires_grad=False)
        self.register_buffer("bits", torch.ones(3, dtype=torch.uint8))

    def logits(self, x: Tensor) -> Tensor:
        return self.scales[0] * (x @ (self.a + self.b)) * self.scales[1] + self.frozen


class DictBatches(MLP):
    def training_step(self, batch: Any) -> Any:
        return {"loss": F.cross_entropy(self.logits(batch["x"]), batch["target"]["y"]), "other": 1}


class Metrics(MLP):
    """Logs everything, and keeps metrics of every kind."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=CLASSES)
        self.collection = torchmetrics.MetricCollection(
            [torchmetrics.F1Score("multiclass", num_classes=CLASSES), torchmetrics.MeanMetric()][:1]
        )
        self.mean = torchmetrics.MeanMetric()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        logits = self.logits(x)
        loss = F.cross_entropy(logits, y)
        self.accuracy(logits, y)
        self.log("accuracy", self.accuracy)
        self.log_dict(self.collection(logits, y))
        self.mean.update(loss.detach())
        self.log("loss", loss, prog_bar=True)
        self.print("never shown")
        if self._trainer is not None:
            self.logger.experiment.append("written")
            self.logger.log_metrics({"loss": 1.0})
        return loss


@dataclass
class Statistics:
    last: Any = None
    all: list = field(default_factory=list)


class Recorder:
    """A plain helper object whose method is a hook."""

    def __init__(self) -> None:
        self.seen: list = []
        self.mean: Any = 0.0

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.seen.append(output)
        self.mean = 0.9 * self.mean + 0.1 * output.detach().mean()

    def hook(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self(module, inputs, output)


class Hoarder(MLP):
    """Leaves something behind, wherever that is possible, in every step."""

    everyone: list = []  # noqa: RUF012 - shared by all instances, as some users do without noticing

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(()))
        self.losses: list = []
        self.recent: deque = deque(maxlen=3)
        self.masks: dict = {}
        self.names: set = set()
        self.calls = 0
        self.running: Any = torch.zeros(())
        self.statistics = Statistics()
        self.recorder = Recorder()
        self.array = np.zeros(2)
        self.generator = torch.Generator().manual_seed(1)
        self.numpy_generator = np.random.default_rng(1)
        self.python_generator = random.Random(1)
        self.blocks = [nn.BatchNorm1d(8, dtype=torch.float64)]
        self.by_module = {self.net[0]: 0}
        counts: list = []
        self.closure = lambda value: counts.append(value)
        self.default = lambda value, kept=counts: kept.append(value)
        self.bound = self.recorder.hook
        self.partial = functools.partial(lambda kept, value: kept.append(value), self.losses)
        self.net[0].register_forward_hook(self.recorder)
        self.net[1].register_forward_hook(self.recorder.hook)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        random.random(), np.random.rand(), torch.rand(1)
        torch.rand(1, generator=self.generator), self.numpy_generator.random(), self.python_generator.random()
        x.mul_(2)
        loss = F.cross_entropy(self.net(x), y)
        self.blocks[0](torch.cat([x, x], 0)[:, :1].expand(-1, 8))
        self.losses.append(loss)
        self.recent.append(x)
        self.masks[len(x)] = x.isnan()
        self.names.add(f"{self.calls}")
        self.calls += 1
        self.running = 0.9 * self.running + 0.1 * loss.detach()
        self.statistics.last = loss
        self.statistics.all.append(x)
        self.array += 1
        self.by_module[self.net[0]] += 1
        self.closure(x)
        self.default(x)
        self.partial(x)
        self.steps = self.steps + 1
        self.mean = 0.9 * self.mean + 0.1 * x.mean()
        self.everyone.append(loss)
        return loss


def classes(n: int) -> Tensor:
    return torch.arange(n) % CLASSES


def pairs(*shape: int) -> Callable[[int, torch.dtype], Any]:
    return lambda n, dtype: (torch.randn(n, *shape, dtype=dtype), classes(n))


vectors = pairs(5)


def tokens(n: int, dtype: torch.dtype) -> Any:
    return torch.randint(1, 7, (n, 4)), torch.randint(1, 7, (n, 4))


def nested(n: int, dtype: torch.dtype) -> Any:
    return {"x": torch.randn(n, 5, dtype=dtype), "target": {"y": classes(n)}, "id": [f"image {i}" for i in range(n)]}


@dataclass(frozen=True)
class Case:
    """A module with batches that it trains on."""

    make: Callable[[], Any]
    make_batch: Callable[[int, torch.dtype], Any] = vectors

    def build(self, n: int = N, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            module = self.make().to(dtype)
            return module, self.make_batch(n, dtype)


CASES = {
    "mlp": Case(MLP),
    "sum": Case(SummedMLP),
    "cnn": Case(GroupNormCNN, pairs(2, 6, 6)),
    "lstm": Case(LSTMClassifier, pairs(3, 4)),
    "transformer": Case(Transformer, pairs(4, 8)),
    "tied": Case(TiedWeights, tokens),
    "bare": Case(BareParameters),
    "dict": Case(DictBatches, nested),
    "metrics": Case(Metrics),
}


def example_of(batch: Any, i: int, n: int) -> Any:
    """Cut example i out of tuples, dicts and tensors: written anew, so that no test relies on what it tests."""
    if isinstance(batch, dict):
        return {key: example_of(value, i, n) for key, value in batch.items()}
    if isinstance(batch, tuple):
        return tuple(example_of(value, i, n) for value in batch)
    if isinstance(batch, Tensor):
        return batch[i : i + 1].clone() if batch.ndim and len(batch) == n else batch.clone()
    return [batch[i]] if isinstance(batch, list) and len(batch) == n else batch


def reference_gradients(
    module: nn.Module, batch: Any, n: int = N, loss_fn: Any = None, clone_of: Any = copy.deepcopy
) -> Tensor:
    """Per-example gradients of shape (n, d), one clone and one ``backward`` for each."""
    rows = []
    for i in range(n):
        clone = clone_of(module)
        clone.log = clone.log_dict = clone.print = lambda *_, **__: None
        clone.zero_grad()
        part = example_of(batch, i, n)
        output = loss_fn(clone, part) if loss_fn else clone.training_step(part, *[0] * (type(clone) is not DictBatches))
        (output["loss"] if isinstance(output, dict) else output).backward()
        rows.append(
            torch.cat(
                [
                    torch.zeros(p.numel(), dtype=p.dtype) if p.grad is None else p.grad.to_dense().flatten()
                    for p in clone.parameters()
                    if p.requires_grad
                ]
            )
        )
    return torch.stack(rows)


def reference_norms(module: nn.Module, batch: Any, n: int = N, **keywords: Any) -> Tensor:
    gradients = reference_gradients(module, batch, n, **keywords)
    return gradients.abs().double().square().sum(1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest relative error of any entry: an absolute floor would hide a wrong small one."""
    return float(((found - expected).abs() / expected.abs()).max())


def reachable(root: Any) -> Iterator[tuple[str, Any]]:
    """Yield everything that can be reached from an object's attributes, with the path to it."""
    seen: set[int] = set()
    kept = []
    stack = [("", root)]
    while stack:
        path, value = stack.pop()
        if id(value) in seen and not isinstance(value, (bool, int, float, str)):
            continue
        seen.add(id(value))
        kept.append(value)
        yield path, value
        stack.extend((f"{path}.{name}", part) for name, part in _parts(value))


def _parts(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        return [*((f"[{key!r:.30}]", item) for key, item in value.items()), *(("key", key) for key in value)]
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return [(f"[{i}]", item) for i, item in enumerate(value)]
    if isinstance(value, MethodType):
        return [("self", value.__self__)]
    if isinstance(value, functools.partial):
        return [("func", value.func), ("args", value.args), ("keywords", value.keywords)]
    if isinstance(value, FunctionType):
        cells = tuple(cell.cell_contents for cell in value.__closure__ or ())
        return [("cells", cells), ("defaults", value.__defaults__), ("dict", value.__dict__)]
    if isinstance(value, (Tensor, type, L.Trainer)):
        return []
    slots = [(f.name, getattr(value, f.name)) for f in fields(value)] if is_dataclass(value) else []
    shared = [(k, v) for cls in type(value).__mro__[:1] for k, v in vars(cls).items() if isinstance(v, list)]
    return [*slots, *shared, *getattr(value, "__dict__", {}).items()]


def state_of(root: Any) -> dict[str, Any]:
    """Everything about an object that measuring must not change: identities, values, versions, gradients."""
    return {path: _state(value) for path, value in reachable(root)}


def _state(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = value.detach().cpu().resolve_conj().numpy().tobytes() if value.layout is torch.strided else None
        return id(value), value._version, value.data_ptr(), data, id(value.grad) if value.is_leaf else None
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, np.random.Generator):
        return id(value), str(value.bit_generator.state)
    if isinstance(value, random.Random):
        return id(value), value.getstate()
    if isinstance(value, np.ndarray):
        return id(value), value.tobytes()
    if isinstance(value, (dict, list, deque, set)):
        return id(value), len(value), [str(key) for key in value] if isinstance(value, dict) else None
    if isinstance(value, (bool, int, float, str)):
        return value
    # Bound methods and temporary containers are made anew by every access; what they hold is visited by itself.
    return type(value) if isinstance(value, (MethodType, tuple)) else id(value)


def random_states() -> tuple[Any, ...]:
    """Return the states of all global random generators."""
    return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())


def transformed_tensors(root: Any) -> list[str]:
    """Return the paths of tensors that belong to a torch.func transform."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return [path for path, value in reachable(root) if isinstance(value, Tensor) and wrapped(value)]
