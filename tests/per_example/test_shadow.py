"""Measuring leaves no trace: not in the module, not in the batch, not in a generator, also when the step raises."""

import copy
import functools
import pickle
import random
import warnings
import weakref
from types import MethodType

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.compile import from_compiled
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import per_example_squared_norms
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.functional import functional_gradients
from lightning_graddiv.per_example.losses import StepLoss, measuring
from lightning_graddiv.per_example.select import PerExampleEngine
from lightning_graddiv.per_example.shadow import is_lightning_module, shadow_copy
from tests.models import (
    CASES,
    MLP,
    Base,
    Case,
    Hoarder,
    Metrics,
    N,
    TiedWeights,
    random_states,
    reachable,
    reference_norms,
    relative_error,
    state_of,
    transformed_tensors,
)

ENGINES = ["auto", "functional", "loop"]


def shadow(module, **keywords):
    return shadow_copy(module, **keywords)[0]


def measure_whatever_happens(module, batch, engine):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return per_example_squared_norms(module, batch, engine=engine)
        except MeasurementError as error:
            return error


def with_gradients(module):
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.numel() % 2:
            parameter.grad = torch.ones_like(parameter)
    return module


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", [*CASES, "hoarder"])
def test_nothing_of_the_module_changes(name, engine):
    module, batch = (Case(Hoarder) if name == "hoarder" else CASES[name]).build()
    with_gradients(module)
    before = state_of(module), state_of(batch), random_states()
    measure_whatever_happens(module, batch, engine)
    assert state_of(module) == before[0]
    assert state_of(batch) == before[1]
    assert random_states() == before[2]
    assert not transformed_tensors(module)


def test_the_walker_sees_what_a_step_leaves_behind():
    """The tests here are worth what this one is."""
    module, batch = Case(Hoarder).build()
    before = state_of(module)
    module.training_step(batch, 0)
    changed = {path.split(".")[1] for path, state in before.items() if state_of(module).get(path) != state}
    after = {path.split(".")[1] for path, _ in reachable(module) if path and path not in before}
    left = {"partial", "recent", "masks", "names", "calls", "running", "statistics", "bound", "array", "generator"}
    left |= {"numpy_generator", "python_generator", "blocks", "by_module", "_buffers", "everyone"}
    assert left <= changed | after
    del module.everyone[:]


def test_the_hoarder_is_measured_by_the_loop():
    module, (x, y) = Case(Hoarder).build()
    norms = per_example_squared_norms(module, (x, y), engine="loop")
    assert relative_error(norms, reference_norms(Plain(module.net), (2 * x, y))) < 1e-12


class Plain(Base):
    def __init__(self, net):
        super().__init__()
        self.net = nn.Sequential(*net)
        for layer in self.net:
            layer._forward_hooks.clear()


class RaisesInTheMiddle(Hoarder):
    """After everything has been written to, and with a submodule that has two names."""

    def __init__(self):
        super().__init__()
        self.again = self.net

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise RuntimeError("in the middle")


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_of_the_module_changes_when_the_step_raises(engine):
    module, batch = Case(RaisesInTheMiddle).build()
    with_gradients(module)
    before = state_of(module), state_of(batch), random_states()
    with pytest.raises(MeasurementError):
        per_example_squared_norms(module, batch, engine=engine)
    assert (state_of(module), state_of(batch), random_states()) == before
    assert not transformed_tensors(module)


class RaisesUnderVmap(TiedWeights):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.last = loss
        if torch._C._functorch.is_functorch_wrapped_tensor(loss):
            raise RuntimeError("inside vmap")
        return loss


def test_shared_submodules_still_train_after_a_step_raised_inside_vmap():
    module, batch = Case(RaisesUnderVmap, CASES["tied"].make_batch).build()
    optimizer = module.configure_optimizers()
    before = state_of(module)
    with pytest.warns(UserWarning, match="inside vmap"):
        norms = PerExampleEngine().measure(StepLoss(module), batch).sq_norms
    assert state_of(module) == before
    assert {id(p) for p in module.parameters()} == {id(p) for p in optimizer.param_groups[0]["params"]}
    assert relative_error(norms, reference_norms(module, batch)) < 1e-12


def test_training_goes_on_bit_for_bit_after_measuring():
    torch.manual_seed(0)
    weights = []
    for measured in (False, True):
        module, batch = Case(lambda: Metrics()).build()
        module.net[2].p = 0.3
        module.log = module.log_dict = module.print = lambda *_, **__: None
        optimizer = module.configure_optimizers()
        torch.manual_seed(1)
        for step in range(4):
            if measured:
                per_example_squared_norms(module, batch, engine=ENGINES[step % 3])
            optimizer.zero_grad()
            module.training_step(batch, step).backward()
            optimizer.step()
        weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
    assert torch.equal(*weights)


class PopsFromItsBatch(MLP):
    def training_step(self, batch, batch_idx):
        y = batch.pop("y")
        names = batch["names"]
        while names:
            names.pop()
        batch["weight"] *= 2
        batch["array"] += 1
        batch["x"].requires_grad_()
        batch["new"] = y
        return F.cross_entropy(self.logits(batch["x"].clone().mul_(2)) * batch["weight"].mean(), y)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_batch_that_training_gets_is_untouched(engine):
    module, (x, y) = Case(PopsFromItsBatch).build()
    batch = {"x": x, "y": y, "names": ["a", "b"], "weight": torch.ones(3), "array": np.ones(2)}
    before = state_of(batch)
    measure_whatever_happens(module, batch, engine)
    assert state_of(batch) == before
    assert not x.requires_grad


class ScalesInPlace(MLP):
    """Passes through every engine, so that each gets the chance to write to the batch."""

    def training_step(self, batch, batch_idx):
        batch[0].mul_(2)
        batch[2].mul_(2)
        return F.cross_entropy(self.logits(batch[0]) * batch[2], batch[1])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_step_may_write_to_its_batch(engine):
    module, (x, y) = Case(ScalesInPlace).build()
    batch = x, y, torch.ones(3, dtype=x.dtype)
    before = state_of(batch)
    norms = per_example_squared_norms(module, batch, engine=engine)
    assert state_of(batch) == before
    assert relative_error(norms, reference_norms(module, batch)) < 1e-12


def test_loggers_and_the_progress_bar_stay_silent_in_a_real_fit(tmp_path, capsys):
    class Measures(L.Callback):
        norms = None

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            logged = copy.copy(trainer.callback_metrics), len(trainer.logger.experiment.written)
            results = trainer._results
            capsys.readouterr()
            before = state_of(pl_module)
            self.norms = per_example_squared_norms(pl_module, batch)
            with pytest.raises(MeasurementError):
                per_example_squared_norms(pl_module, [batch[0], batch[1][:-1]])
            assert state_of(pl_module) == before
            assert capsys.readouterr().out == ""
            assert trainer.callback_metrics == logged[0]
            assert len(trainer.logger.experiment.written) == logged[1]
            assert trainer._results is results

    class Listening(CSVLogger):
        experiment = type("Written", (), {"written": [], "append": lambda self, item: self.written.append(item)})()

        def log_metrics(self, metrics, step=None):
            self.experiment.append(metrics)

        def save(self):
            pass

    module, batch = Case(Metrics).build(dtype=torch.float32)
    measures, logger = Measures(), Listening(tmp_path)
    trainer = L.Trainer(
        max_steps=2,
        callbacks=[measures],
        logger=[logger],
        accelerator="cpu",
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    trainer.fit(module, DataLoader(TensorDataset(*batch), batch_size=N))
    assert trainer.loggers == [logger]
    assert logger.experiment.written
    assert len(measures.norms) == N


def test_loggers_come_back_when_the_step_raises():
    class Stub:
        loggers = ("logger",)

    module, batch = Case(MLP).build()
    module.__dict__["_trainer"] = Stub()
    with pytest.raises(MeasurementError):
        per_example_squared_norms(module, (batch[0], batch[1] + 100))
    assert module._trainer.loggers == ("logger",)


def test_autocast_is_off_and_gradients_are_on():
    seen = []

    class Looks(MLP):
        def training_step(self, batch, batch_idx):
            seen.append(
                (torch.is_autocast_enabled("cpu"), torch.is_grad_enabled(), self.training, self.net[2].training)
            )
            return super().training_step(batch, batch_idx)

    module, batch = Case(lambda: Looks()).build()
    module.net[2].eval()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        norms = per_example_squared_norms(module, batch)
    assert set(seen) == {(False, True, True, False)}
    assert relative_error(norms, reference_norms(module, batch)) < 1e-12


# What a shadow is


def test_a_shadow_shares_parameters_and_nothing_else():
    module, _ = Case(Hoarder).build()
    copied = shadow(module)
    assert type(copied) is Hoarder
    assert {id(p) for p in copied.parameters()} == {id(p) for p in module.parameters()}
    assert copied.net is not module.net
    assert copied.recorder is copied.net[0]._forward_hooks[next(iter(copied.net[0]._forward_hooks))]
    assert next(iter(copied.by_module)) is copied.net[0]
    assert copied.partial.args[0] is copied.losses
    assert copied.bound.__self__ is copied.recorder
    for name in (
        "steps",
        "losses",
        "recent",
        "masks",
        "names",
        "running",
        "statistics",
        "array",
        "generator",
        "blocks",
    ):
        assert getattr(copied, name) is not getattr(module, name)
    assert copied.recent.maxlen == 3


def test_shared_references_stay_shared():
    class Shares(MLP):
        def __init__(self):
            super().__init__()
            self.a = self.b = []
            self.net2 = [self.net]
            self.pair = (self.net[0], 1)
            self.constants = (1, (2, 3))
            self.parent = weakref.ref(self)
            self.held = {"me": self}
            self.__dict__["proxy"] = weakref.proxy(self)
            self.modules_set = {self.net[0]}

    module = Shares()
    copied = shadow(module)
    assert copied.a is copied.b
    assert copied.net2[0] is copied.net
    assert copied.pair == (copied.net[0], 1)
    assert copied.constants is module.constants
    assert copied.parent() is copied
    assert copied.held["me"] is copied
    assert copied.proxy is copied
    assert copied.modules_set == {copied.net[0]}


def test_values_stand_in_for_parameters_wherever_they_are_held():
    class Holds(TiedWeights):
        def __init__(self):
            super().__init__()
            self.list = [self.embed.weight]
            self.regulariser = lambda: self.embed.weight.square().sum()
            self.alias = {"weight": self.first.weight}

    module = Holds()
    value = torch.zeros_like(module.embed.weight)
    copied = shadow(module, values={id(module.embed.weight): value})
    assert copied.embed.weight is value
    assert copied.decoder.weight is value
    assert copied.list[0] is value
    assert copied.regulariser() == 0
    assert copied.alias["weight"] is module.first.weight


def test_functions_without_state_keep_their_identity():
    class Chooses(MLP):
        def __init__(self):
            super().__init__()
            self.activation = F.relu
            self.kind = torch.tanh

    module = Chooses()
    assert shadow(module).activation is F.relu
    assert shadow(module).kind is torch.tanh


def test_objects_of_other_packages_are_shared():
    class Owns(MLP):
        def __init__(self):
            super().__init__()
            self.optimizer = torch.optim.SGD(self.net.parameters(), 0.1)
            self.data = TensorDataset(torch.zeros(3))
            self.lock = __import__("threading").Lock()
            self.memory = np.zeros(3)
            self.memory.flags.writeable = False
            self.file = Closes()

    class Closes:
        closed = False

        def __del__(self):
            Closes.closed = True

    module = Owns()
    copied = shadow(module)
    for name in ("optimizer", "data", "lock", "memory", "file"):
        assert getattr(copied, name) is getattr(module, name)
    del copied
    assert not Closes.closed


def test_what_cannot_be_copied_is_refused():
    class Stubborn(dict):
        def __copy__(self):
            raise TypeError("not me")

    class Holds(MLP):
        def __init__(self):
            super().__init__()
            self.stubborn = Stubborn()

    module, batch = Case(lambda: Holds()).build()
    with pytest.raises(MeasurementError, match=r"Holds.*cannot be copied \(TypeError: not me\)"):
        per_example_squared_norms(module, batch)


def test_frozen_parameters_are_shared_unless_asked():
    module, _ = CASES["bare"].build()
    assert shadow(module).frozen is module.frozen
    copied = shadow(module, copy_frozen=True)
    assert copied.frozen is not module.frozen
    assert isinstance(copied.frozen, nn.Parameter)
    assert copied.codes.dtype == torch.uint8
    assert copied.a is module.a


def test_modules_of_both_namespaces_are_lightning_modules():
    import pytorch_lightning

    assert is_lightning_module(MLP())
    assert is_lightning_module(pytorch_lightning.LightningModule())
    assert not is_lightning_module(nn.Linear(1, 1))


@pytest.mark.parametrize("name", ["all_gather", "manual_backward", "toggle_optimizer", "clip_gradients"])
@pytest.mark.parametrize("engine", ENGINES)
def test_coupling_ranks_and_stepping_optimizers_is_refused(name, engine):
    class Calls(MLP):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            getattr(self, name)(loss)
            return loss

    module, batch = Case(lambda: Calls()).build()
    with pytest.raises(MeasurementError, match=rf"training_step calls `self.{name}`") as refused:
        per_example_squared_norms(module, batch, engine=engine)
    assert refused.value.lasting


def test_torchscript_is_refused():
    class Scripted(MLP):
        def __init__(self):
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.net = torch.jit.trace(nn.Linear(5, 3), torch.zeros(1, 5))

    module, batch = Case(lambda: Scripted(), CASES["mlp"].make_batch).build(dtype=torch.float32)
    with pytest.raises(MeasurementError, match=r"TorchScript.*Use the plain nn.Module"):
        per_example_squared_norms(module, batch)


class Draws(MLP):
    """Unlabelled examples come from an iterator of the module's own."""

    def __init__(self):
        super().__init__()
        self.iterator = (torch.full((), float(i), dtype=torch.float64) for i in range(100))

    def logits(self, x):
        return self.net(x) * next(self.iterator)


@pytest.mark.parametrize("engine", ENGINES)
def test_iterators_are_not_drawn_from(engine):
    module, batch = Case(Draws).build()
    with pytest.raises(MeasurementError, match="draws from an iterator") as refused:
        per_example_squared_norms(module, batch, engine=engine)
    assert refused.value.lasting
    assert next(module.iterator) == 0


class KeepsAGraph(MLP):
    """A hook before the step computes with parameters what the step then uses."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def on_train_batch_start(self, batch, batch_idx):
        self.normalised = F.normalize(self.scale, dim=0)

    def logits(self, x):
        return self.net(x) * self.normalised


@pytest.mark.parametrize("engine", ENGINES)
def test_a_graph_that_began_before_the_step_is_refused_rather_than_cut(engine):
    module, batch = Case(KeepsAGraph).build()
    module.on_train_batch_start(batch, 0)
    with pytest.raises(MeasurementError, match="computed before training_step began") as refused:
        per_example_squared_norms(module, batch, engine=engine)
    assert refused.value.lasting
    module.training_step(batch, 0).backward()  # its graph is still there
    module.normalised = module.normalised.detach()
    per_example_squared_norms(module, batch, engine=engine)


@pytest.mark.parametrize("engine", ENGINES)
def test_losses_that_are_only_kept_are_no_part_of_the_graph(engine):
    class Keeps(MLP):
        def training_step(self, batch, batch_idx):
            self.last = super().training_step(batch, batch_idx)
            return self.last

    module, batch = Case(lambda: Keeps()).build()
    module.training_step(batch, 0)
    norms = per_example_squared_norms(module, batch, engine=engine)
    module.last = None
    assert relative_error(norms, reference_norms(module, batch)) < 1e-12


# Generators: independent for every example, and never the user's own


class OwnGenerators(MLP):
    """Dropout whose noise comes from generators that the module holds."""

    kind = "torch"

    def __init__(self):
        super().__init__()
        self.torch = torch.Generator().manual_seed(1)
        self.numpy = np.random.default_rng(1)
        self.old = np.random.RandomState(1)
        self.python = random.Random(1)

    def logits(self, x):
        if self.kind == "torch":
            noise = torch.rand(x.shape, generator=self.torch, dtype=x.dtype)
        elif self.kind == "python":
            noise = self.python.random()
        else:
            noise = (self.numpy if self.kind == "numpy" else self.old).uniform()
        return self.net(x * noise)


@pytest.mark.parametrize("kind", ["torch", "numpy", "old", "python"])
def test_held_generators_give_each_example_its_own_noise(kind):
    module, (x, y) = Case(OwnGenerators).build(2)
    module.kind = kind
    same = x[:1].expand(16, -1).contiguous(), y[:1].expand(16).contiguous()
    before = state_of(module)
    norms = per_example_squared_norms(module, same, engine="loop")
    assert len(norms.unique()) == 16
    assert state_of(module) == before


# Compiled modules, parametrizations, things that hold the net


class CompiledChild(MLP):
    backend = "eager"

    def __init__(self):
        super().__init__()
        self.net = torch.compile(self.net, backend=self.backend)


class CompiledInPlace(MLP):
    def __init__(self):
        super().__init__()
        self.net.compile(backend="eager")


class CompiledFunction(MLP):
    def __init__(self):
        super().__init__()
        self.compiled = torch.compile(self.uncompiled, backend="eager")

    def uncompiled(self, x):
        return self.net(x)

    def logits(self, x):
        return self.compiled(x)


class WeightNorm(MLP):
    def __init__(self):
        super().__init__()
        parametrizations.weight_norm(self.net[0])
        parametrizations.orthogonal(self.net[3])


class SpectralNorm(MLP):
    def __init__(self):
        super().__init__()
        parametrizations.spectral_norm(self.net[0])


class OldWeightNorm(MLP):
    def __init__(self):
        super().__init__()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.nn.utils.weight_norm(self.net[0])


class OldSpectralNorm(MLP):
    def __init__(self):
        super().__init__()
        torch.nn.utils.spectral_norm(self.net[0])


class StoredCallables(MLP):
    def __init__(self):
        super().__init__()
        net = self.net
        self.method = net.forward
        self.part = functools.partial(nn.Module.__call__, net)
        self.closure = lambda x: net(x)
        self.default = lambda x, net=net: net(x)
        self.keyword = eval("lambda x, *, net=net: net(x)", {"net": net})
        self.patched = MethodType(lambda self, x: self.net(x), self)

    def logits(self, x):
        return sum(f(x) for f in (self.method, self.part, self.closure, self.default, self.keyword, self.patched))


class HelperOfOurOwn:
    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)


class HeldByHelper(MLP):
    def __init__(self):
        super().__init__()
        self.helper = HelperOfOurOwn(self.net)

    def logits(self, x):
        return self.helper(x)


class PlainList(MLP):
    """The user forgot nn.ModuleList, and registered the layers under another name."""

    def __init__(self):
        super().__init__()
        self.layers = list(self.net)

    def logits(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


class DataParallelChild(MLP):
    def __init__(self):
        super().__init__()
        self.net = nn.DataParallel(self.net)


class Hooks(MLP):
    def __init__(self):
        super().__init__()
        self.net[3].register_full_backward_hook(lambda module, inputs, outputs: (inputs[0] * 0.5,))
        self.net[1].register_forward_pre_hook(lambda module, inputs: (inputs[0] * module.scale,))
        self.net[1].scale = 2.0


MEASURED_BY_FUNCTIONAL = {
    "compiled child": CompiledChild,
    "compiled in place": CompiledInPlace,
    "compiled function": CompiledFunction,
    "weight norm": WeightNorm,
    "old weight norm": OldWeightNorm,
    "stored callables": StoredCallables,
    "helper": HeldByHelper,
    "plain list": PlainList,
    "data parallel": DataParallelChild,
}


@pytest.mark.parametrize("engine", ["functional", "loop"])
@pytest.mark.parametrize("name", MEASURED_BY_FUNCTIONAL)
def test_awkward_modules_are_measured_by_both_engines(name, engine):
    case = Case(MEASURED_BY_FUNCTIONAL[name])
    module, batch = case.build()
    before = state_of(module)
    norms = per_example_squared_norms(module, batch, engine=engine)
    assert state_of(module) == before
    # Built anew from the same seed: deepcopy does not reach into closures, nor copy every one of these.
    assert relative_error(norms, reference_norms(module, batch, clone_of=lambda _: case.build()[0])) < 1e-10


def test_backward_hooks_act_as_they_do_in_training():
    module, batch = Case(Hooks).build()
    with pytest.warns(UserWarning, match="Falling back to the engine `loop`"):
        norms = PerExampleEngine().measure(StepLoss(module), batch).sq_norms
    assert relative_error(norms, reference_norms(module, batch)) < 1e-12


def _uncompiled(module):
    plain = MLP().to(torch.float64)
    plain.load_state_dict({name.replace("_orig_mod.", ""): value for name, value in module.state_dict().items()})
    return plain


def test_a_shadow_holds_nothing_that_was_compiled():
    assert type(shadow(CompiledChild()).net) is nn.Sequential
    assert shadow(CompiledInPlace()).net._compiled_call_impl is None
    unwrapped = from_compiled(torch.compile(MLP(), backend="eager"))
    copied = shadow(unwrapped)
    assert {"forward", "training_step"} <= set(vars(unwrapped))
    assert not {"forward", "training_step", "_compiler_ctx"} & set(vars(copied))


def test_measuring_compiles_nothing():
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    class Compiles(MLP):
        def __init__(self):
            super().__init__()
            self.function = torch.compile(self.net.forward, backend=backend)

        def logits(self, x):
            return self.function(x)

    module, batch = Case(lambda: Compiles()).build()
    for engine in ENGINES:
        per_example_squared_norms(module, batch, engine=engine)
    assert not compiled
    module.training_step(batch, 0)
    assert compiled


@pytest.mark.parametrize("make", [SpectralNorm, OldSpectralNorm])
def test_power_iterations_leave_the_buffers_alone(make):
    module, batch = Case(make).build()
    before = state_of(module)
    norms = measure_whatever_happens(module, batch, "auto")
    assert state_of(module) == before
    assert relative_error(norms, reference_norms(module, batch)) < 1e-10


@pytest.mark.slow
def test_a_module_compiled_with_aot_eager_is_measured_while_it_trains():
    class Compiled(CompiledChild):
        backend = "aot_eager"

    module, batch = Case(lambda: Compiled()).build()
    module.training_step(batch, 0).backward()
    assert (
        relative_error(
            per_example_squared_norms(module, batch, engine="functional"), reference_norms(_uncompiled(module), batch)
        )
        < 1e-10
    )
    module.training_step(batch, 0).backward()


def test_a_compiled_lightning_module_is_measured_as_lightning_unwraps_it():
    plain, batch = Case(MLP).build()
    compiled = torch.compile(copy.deepcopy(plain), backend="eager")
    expected = reference_norms(plain, batch)
    assert relative_error(per_example_squared_norms(compiled, batch), expected) < 1e-12
    unwrapped = from_compiled(compiled)
    before = state_of(unwrapped)
    assert relative_error(per_example_squared_norms(unwrapped, batch), expected) < 1e-12
    assert state_of(unwrapped) == before


class ForeignHelper(list):
    """Stands for an object of another package that holds the net: it cannot be copied along."""


def hide(net):
    """Return a callable that is not copied: a builtin method bound to the net."""
    return operator_of(net)


class operator_of:  # noqa: N801
    def __init__(self, net):
        self.net = net

    def __call__(self, x):
        return self.net(x)

    def __del__(self):
        """An object that cleans up after itself is never copied."""


class HeldByForeigner(MLP):
    def __init__(self):
        super().__init__()
        self.foreign = operator_of(self.net)

    def logits(self, x):
        return self.foreign(x) + self.net(x)


def test_a_net_that_escapes_the_shadow_is_noticed_and_measured_by_the_loop():
    module, batch = Case(HeldByForeigner).build()
    expected = reference_norms(module, batch)
    with pytest.warns(UserWarning, match="other gradients than the plain loop.*Falling back") as warned:
        norms = per_example_squared_norms(module, batch)
    assert len(warned) == 1
    assert relative_error(norms, expected) < 1e-12
    with pytest.raises(MeasurementError, match="other gradients than the plain loop"):
        per_example_squared_norms(module, batch, engine="functional")


def test_a_net_that_escapes_the_shadow_is_right_for_one_example_too():
    module, batch = Case(HeldByForeigner).build(1)
    for engine in ENGINES:
        norms = per_example_squared_norms(module, batch, engine=engine)
        assert relative_error(norms, reference_norms(module, batch, 1)) < 1e-12


def test_functional_leaves_no_transformed_tensor_alive_after_it_fails():
    module, batch = Case(Hoarder).build()
    with measuring(module), pytest.raises(MeasurementError):
        functional_gradients(StepLoss(module), batch, N)
    assert not transformed_tensors(module)


def test_the_module_can_be_pickled_and_copied_afterwards():
    module, batch = Case(Metrics).build()
    per_example_squared_norms(module, batch)
    copy.deepcopy(module)
    pickle.loads(pickle.dumps(module))
