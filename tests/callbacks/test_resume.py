"""A run that goes on from a checkpoint is the run that was interrupted, wherever the checkpoint was made."""

import copy
import random
import signal
import warnings
from datetime import timedelta

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, Sampler, WeightedRandomSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from lightning_graddiv import GradientDiversityMonitor
from tests.audit import quiet_trainer, warned
from tests.resuming import (
    EPOCHS,
    EXAMPLES,
    Augmented,
    Saves,
    Traced,
    differences,
    growing,
    numbered_rows,
    run,
    train_loader,
)

pytestmark = pytest.mark.filterwarnings("ignore:AdaptiveBatchSize. the learning-rate schedule has reached the end")

WITH_STEPS = {"max_epochs": -1, "max_steps": 40}


def own_generator():
    return {"generator": torch.Generator().manual_seed(11)}


CASES = {
    "plain": ({}, {}, {}),
    "idle": ({}, {"every_n_steps": 10**9}, {"accumulate_grad_batches": 4}),
    "workers": ({"num_workers": 2}, {}, {}),
    "persistent workers": ({"num_workers": 2, "persistent_workers": True}, {}, {"accumulate_grad_batches": 2}),
    "windows": ({}, {}, {"accumulate_grad_batches": 4}),
    "windows that grow": ({}, {"max_micro_batch_size": 8}, {"accumulate_grad_batches": 2}),
    "windows and workers": ({"num_workers": 2}, {"max_micro_batch_size": 8}, {"accumulate_grad_batches": 2}),
    "max_steps": ({}, {}, WITH_STEPS),
    "validations": ({"drop_last": True}, {}, {"val_check_interval": 0.5, "accumulate_grad_batches": 2}),
    "generator": (own_generator, {}, {}),
    "generator and workers": (lambda: {**own_generator(), "num_workers": 2}, {}, {}),
    "python": ({"dataset": Augmented(numbered_rows(), "python")}, {}, {}),
    "numpy": ({"dataset": Augmented(numbered_rows(), "numpy")}, {}, {}),
    "torch": ({"dataset": Augmented(numbered_rows(), "torch")}, {}, {}),
    "half": ({}, {}, {"limit_train_batches": 0.5}),
    "two groups": ({}, {"engine": "microbatch", "every_n_steps": 2}, {"accumulate_grad_batches": 2}),
    "loop": ({}, {"engine": "loop"}, {"gradient_clip_val": 0.1}),
}


SLOWER = ("persistent workers", "windows and workers", "generator and workers", "python", "torch", "half")


def options(case):
    of_loader, of_callback, of_trainer = CASES[case]
    return (of_loader if callable(of_loader) else lambda: of_loader), of_callback, of_trainer


def resume_from_everywhere(case, folder, picks=None):
    """Hold runs from checkpoints in every hook, or from some of them, against the run that wrote them."""
    of_loader, of_callback, of_trainer = options(case)
    saves, reference = Saves(folder), growing(**of_callback)
    module, _ = run(reference, train_loader(**of_loader()), saves, **of_trainer)
    undisturbed, _ = run(growing(**of_callback), train_loader(**of_loader()), **of_trainer)
    assert torch.equal(undisturbed.steps[-1].weights, module.steps[-1].weights)
    assert (case == "idle") == (not reference.history)
    files = saves.files if picks is None else random.Random(case).sample(saves.files, picks)
    found = {}
    for file in files:
        callback = growing(**of_callback)
        again, _ = run(callback, train_loader(**of_loader()), ckpt_path=file, seed=99, **of_trainer)
        wrong = differences((module, reference), (again, callback))
        if wrong:
            found[file.name] = wrong
    return found


@pytest.mark.parametrize("case", [case for case in CASES if case not in SLOWER])
def test_from_checkpoints_in_any_hook(case, tmp_path):
    assert resume_from_everywhere(case, tmp_path, picks=3) == {}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_from_checkpoints_in_every_hook(case, tmp_path):
    assert resume_from_everywhere(case, tmp_path) == {}


class Interrupts(Callback):
    """Raises in a hook of one batch, whether or not the step has been taken."""

    def __init__(self, hook, epoch, batch):
        self.when = epoch, batch
        setattr(self, hook, self._raise)

    def _raise(self, trainer, *_, **__):
        if (trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_idx) >= self.when:
            raise RuntimeError("the power went out")


class Keeps(Callback):
    """Does what Lightning's checkpoints of an exception do, in each of its versions."""

    def __init__(self, file):
        self.file = file

    def on_exception(self, trainer, *_):
        trainer.save_checkpoint(self.file)


@pytest.mark.parametrize("first", [False, True], ids=["before it", "after it"])
@pytest.mark.parametrize("when", [(0, 5), (1, 0)])
@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"])
def test_from_a_checkpoint_of_an_exception(hook, when, first, tmp_path):
    """In another callback's hook, before or after that of this one, which may not have heard of the step that ended."""
    kwargs = {"accumulate_grad_batches": 2}
    reference, crashed = growing(), growing()
    module, _ = run(reference, train_loader(), **kwargs)
    stops = Interrupts(hook, *when)
    keeps = Keeps(tmp_path / "exception.ckpt")
    callbacks = (crashed, stops) if first else (stops, crashed)
    with pytest.raises(RuntimeError, match="the power went out"):
        run(callbacks[0], train_loader(), callbacks[1], keeps, **kwargs)
    callback = growing()
    again, _ = run(callback, train_loader(), ckpt_path=keeps.file, seed=99, **kwargs)
    assert differences((module, reference), (again, callback)) == []


def test_from_a_checkpoint_of_a_signal_handler(tmp_path):
    """As under SLURM: it writes wherever the program happens to be."""
    reference, module = growing(), Traced()

    class Signalled(Traced):
        def training_step(self, batch, batch_idx):
            if (self.current_epoch, batch_idx) == (1, 3):
                signal.raise_signal(signal.SIGUSR1)
            return super().training_step(batch, batch_idx)

    def handler(*_):
        module.trainer.save_checkpoint(tmp_path / "signal.ckpt")

    module = Signalled()
    before = signal.signal(signal.SIGUSR1, handler)
    try:
        run(reference, train_loader(), module=module, accumulate_grad_batches=2)
    finally:
        signal.signal(signal.SIGUSR1, before)
    callback = growing()
    again, _ = run(callback, train_loader(), ckpt_path=tmp_path / "signal.ckpt", seed=99, accumulate_grad_batches=2)
    assert differences((module, reference), (again, callback)) == []


def test_from_a_checkpoint_by_time(tmp_path):
    keeps = ModelCheckpoint(tmp_path, "{step}", train_time_interval=timedelta(microseconds=1), save_top_k=-1)
    kwargs = {"accumulate_grad_batches": 4, "enable_checkpointing": True}
    reference = growing()
    module, _ = run(reference, train_loader(), keeps, **kwargs)
    for file in sorted(tmp_path.glob("*.ckpt"))[::3]:
        callback = growing()
        again, _ = run(callback, train_loader(), copy.copy(keeps), ckpt_path=file, seed=99, **kwargs)
        assert differences((module, reference), (again, callback)) == [], file


def test_a_resumed_run_can_be_interrupted_again(tmp_path):
    reference = growing()
    module, _ = run(reference, train_loader(), accumulate_grad_batches=2)
    file = None
    for number, stop in enumerate([(0, 5), (0, 11), (1, 0), (1, 3), (2, 1)]):
        saves = Saves(tmp_path, ("on_before_backward",))
        with pytest.raises(RuntimeError, match="the power went out"):
            run(
                growing(),
                train_loader(),
                saves,
                Interrupts("on_after_backward", *stop),
                ckpt_path=file,
                seed=number,
                accumulate_grad_batches=2,
            )
        file = saves.files[-1]
    callback = growing()
    again, _ = run(callback, train_loader(), ckpt_path=file, seed=99, accumulate_grad_batches=2)
    assert differences((module, reference), (again, callback)) == []


def checkpoints(tmp_path, hook, *, loader=train_loader, module=None, **kwargs):
    saves, reference = Saves(tmp_path, (hook,)), growing()
    module, _ = run(reference, loader(), saves, module=module and module(), **kwargs)
    return saves.files, (module, reference)


class ByEpoch(Sampler):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return EXAMPLES

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.epoch)
        return iter(torch.randperm(EXAMPLES, generator=generator).tolist())


@pytest.mark.parametrize("ends", [{}, WITH_STEPS], ids=["max_epochs", "max_steps"])
def test_t7_an_epoch_after_a_checkpoint_of_an_epochs_end_has_its_own_order(ends, tmp_path):
    """Two workers have drawn their first batches before the sampler is told which epoch it is.

    With `max_steps`, Lightning ends the checkpoint's epoch once more, and would count it twice.
    """

    def loader():
        return train_loader(shuffle=False, sampler=ByEpoch(), num_workers=2)

    files, whole = checkpoints(tmp_path, "on_train_epoch_end", loader=loader, **ends)
    callback = growing()
    again, _ = run(callback, loader(), ckpt_path=files[1], **ends)
    assert differences(whole, (again, callback)) == []


class Estimates(Traced):
    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return super().configure_optimizers()


@pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")
@pytest.mark.filterwarnings("ignore:AdaptiveBatchSize. the batch grows by gradient accumulation only")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("module", [Traced, Estimates])
def test_t8_a_loader_that_keeps_its_own_state_goes_on_by_it(module, workers, tmp_path):
    def loader():
        return StatefulDataLoader(numbered_rows(), 4, shuffle=True, num_workers=workers)

    kwargs = {"max_epochs": 1, "module": module}
    files, (whole, reference) = checkpoints(tmp_path, "on_train_batch_end", loader=loader, **kwargs)
    assert reference.history
    for file in (files[3], files[9], files[11]):
        callback = growing()
        again, _ = run(callback, loader(), ckpt_path=file, seed=99, **{**kwargs, "module": module()})
        wrong = differences((whole, reference), (again, callback))
        assert wrong == [], file.name


@pytest.mark.parametrize("workers", [0, 2])
def test_t9_a_window_that_was_under_way_is_trained_on_again_as_a_whole(workers, tmp_path):
    def loader():
        return train_loader(num_workers=workers)

    files, whole = checkpoints(tmp_path, "on_train_batch_end", loader=loader, accumulate_grad_batches=4, max_epochs=2)
    for file in files[:: 2 if workers == 0 else 7]:
        callback = growing()
        again, _ = run(callback, loader(), ckpt_path=file, seed=99, accumulate_grad_batches=4, max_epochs=2)
        assert differences(whole, (again, callback)) == [], file.name


def test_t10_the_state_is_tensors_and_primitives(tmp_path):
    files, _ = checkpoints(tmp_path, "on_train_batch_end", max_epochs=1)
    for file in files:
        state = torch.load(file, weights_only=True)["callbacks"]["AdaptiveBatchSize"]
        assert only_primitives(state)


def only_primitives(value):
    if isinstance(value, dict):
        return all(only_primitives(item) for item in (*value, *value.values()))
    if type(value) in (list, tuple):
        return all(map(only_primitives, value))
    return value is None or type(value) in (int, float, bool, str, torch.Tensor)


def test_t11_there_is_no_state_before_training_has_begun():
    assert growing().state_dict() == {}
    assert GradientDiversityMonitor().state_dict() == {}


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
@pytest.mark.parametrize("finder", ["learning rate", "batch size"])
def test_t11_tuners_save_and_load_before_it_has(finder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    states = []

    class Tuned(Traced):
        def __init__(self):
            super().__init__()
            self.batch_size = 4

        def train_dataloader(self):
            return train_loader(batch_size=self.batch_size)

        def val_dataloader(self):
            return train_loader(shuffle=False)

        def on_save_checkpoint(self, checkpoint):
            states.append(checkpoint["callbacks"].get("AdaptiveBatchSize"))

    finders = {
        "learning rate": lambda: LearningRateFinder(num_training_steps=5, attr_name="rate"),
        "batch size": lambda: BatchSizeFinder(steps_per_trial=2, max_trials=1, init_val=4),
    }
    callback, module = growing(), Tuned()
    torch.manual_seed(5)
    trainer = quiet_trainer(max_epochs=2, callbacks=[finders[finder](), callback])
    trainer.fit(module)
    assert states == [None]
    assert callback.history
    assert trainer.global_step == len(module.steps)


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("validations", [{}, {"limit_val_batches": 0}, {"check_val_every_n_epoch": 3}], ids=str)
def test_t12_an_epoch_that_had_ended_is_not_trained_on_again(validations, epoch, tmp_path):
    """With `max_steps`, Lightning takes it up again; where it had not validated, it asks for one batch more."""
    kwargs = {**WITH_STEPS, **validations}
    files, whole = checkpoints(tmp_path, "on_train_epoch_end", **kwargs)
    callback = growing()
    again, _ = run(callback, train_loader(), ckpt_path=files[epoch], seed=99, **kwargs)
    assert differences(whole, (again, callback)) == []


def test_lightnings_warning_of_loaders_that_begin_anew_is_not_given(tmp_path):
    files, _ = checkpoints(tmp_path, "on_train_batch_end")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", ".*does not have many workers.*")
        _, trainer = run(growing(), train_loader(), ckpt_path=files[5])
    assert not hasattr(trainer.train_dataloader, "state_dict")


class Shifting(Sampler):
    """Another order each time, from a generator that nobody knows of."""

    passes = 0

    def __len__(self):
        return EXAMPLES

    def __iter__(self):
        Shifting.passes += 1
        return iter(torch.arange(EXAMPLES).roll(Shifting.passes).tolist())


def test_an_order_that_cannot_be_drawn_again_is_said(tmp_path):
    def loader():
        return train_loader(shuffle=False, sampler=Shifting())

    files, (module, _) = checkpoints(tmp_path, "on_train_batch_end", loader=loader)
    callback = growing()
    with warned("`Shifting` in another order"):
        again, _ = run(callback, loader(), ckpt_path=files[4])
    assert len(again.steps) == len(module.steps) - again.first_step


@pytest.mark.parametrize("make", [WeightedRandomSampler, RandomSampler], ids=lambda make: make.__name__)
def test_samplers_that_draw_with_replacement(make, tmp_path):
    def loader():
        source = torch.ones(EXAMPLES) if make is WeightedRandomSampler else range(EXAMPLES)
        return train_loader(shuffle=False, sampler=make(source, num_samples=48, replacement=True, **own_generator()))

    files, whole = checkpoints(tmp_path, "on_train_batch_end", loader=loader)
    for file in files[2::7]:
        callback = growing()
        again, _ = run(callback, loader(), ckpt_path=file, seed=99)
        assert differences(whole, (again, callback)) == []


class Pairs(BatchSampler):
    """A batch sampler of the user's."""


@pytest.mark.parametrize("workers", [0, 2])
def test_merged_batches_of_another_sampler(workers, tmp_path):
    def loader():
        pairs = Pairs(RandomSampler(range(EXAMPLES)), 2, drop_last=False)
        return DataLoader(numbered_rows(), batch_sampler=pairs, num_workers=workers)

    saves, reference = Saves(tmp_path, ("on_before_backward",)), growing(merge_batches=True)
    module, _ = run(reference, loader(), saves, max_epochs=2)
    assert reference.batch_size > 4
    for file in saves.files[3::9]:
        callback = growing(merge_batches=True)
        again, _ = run(callback, loader(), ckpt_path=file, seed=99, max_epochs=2)
        assert differences((module, reference), (again, callback)) == []


def test_a_change_that_workers_have_yet_to_reach(tmp_path):
    """It was decided on; the batches that were drawn before go on with the old size."""

    def loader():
        return train_loader(num_workers=2, prefetch_factor=2)

    files, whole = checkpoints(tmp_path, "on_train_batch_end", loader=loader, max_epochs=2)
    states = [torch.load(file)["callbacks"]["AdaptiveBatchSize"] for file in files]
    waiting = [file for file, state in zip(files, states, strict=True) if state["position"]["change"]]
    assert len(waiting) >= 3
    for file in waiting:
        callback = growing()
        again, _ = run(callback, loader(), ckpt_path=file, seed=99, max_epochs=2)
        assert differences(whole, (again, callback)) == []


def test_loaders_made_anew_each_epoch(tmp_path):
    class OwnLoader(Traced):
        def train_dataloader(self):
            return train_loader(**own_generator())

    kwargs = {"reload_dataloaders_every_n_epochs": 1}
    for hook in ("on_train_batch_end", "on_train_epoch_end"):
        saves, reference = Saves(tmp_path / hook, (hook,)), growing()
        module, _ = run(reference, None, saves, module=OwnLoader(), **kwargs)
        for file in saves.files[1::8]:
            callback = growing()
            again, _ = run(callback, None, ckpt_path=file, seed=99, module=OwnLoader(), **kwargs)
            assert [step.examples for step in again.steps] == [s.examples for s in module.steps[again.first_step :]]


@pytest.mark.filterwarnings("ignore:AdaptiveBatchSize. the batch grows by gradient accumulation only")
@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended")
def test_data_that_begins_anew_keeps_sizes_and_the_epochs_length(tmp_path):
    """Of batches that are made elsewhere nobody knows the size before the first."""

    class Batches:
        def __len__(self):
            return 15

        def __iter__(self):
            return iter(train_loader(shuffle=False, drop_last=True))

    files, (_, reference) = checkpoints(tmp_path, "on_train_batch_end", loader=Batches, max_epochs=2)
    assert reference.batch_size == 16
    for file in files[3::7]:
        callback = growing()
        again, _ = run(callback, Batches(), ckpt_path=file, max_epochs=2)
        done = int(file.name.partition("batch")[2].partition("batch")[2].partition(".")[0])
        epochs = [[batch for step in again.steps if step.epoch == epoch for batch in step.batches] for epoch in (0, 1)]
        first = list(range(done, 15))
        assert epochs == ([first, list(range(15))] if "epoch0" in file.name else [[], first])
        assert callback.batch_size == reference.batch_size


def test_a_validation_that_was_due_is_run(tmp_path):
    """Lightning itself takes one that had not begun for one that has ended."""
    kwargs = {"val_check_interval": 4, "max_epochs": 1}
    files, (module, _) = checkpoints(tmp_path, "on_train_batch_end", **kwargs)
    again, _ = run(growing(), train_loader(), ckpt_path=files[3], seed=99, **kwargs)
    assert again.validations == module.validations


@pytest.mark.parametrize("name", ["epoch0-batch5", "epoch0-batch9", "epoch1-batch1"])
def test_a_validation_that_has_been_run_is_not_begun_again(name, tmp_path):
    """Not even to count its batches: its loader would draw a random number for that, and training another then."""
    kwargs = {"val_check_interval": 4, "max_epochs": 2}
    files, whole = checkpoints(tmp_path, "on_before_backward", **kwargs)
    (file,) = [file for file in files if name in file.name]
    callback = growing()
    again, _ = run(callback, train_loader(), ckpt_path=file, seed=99, **kwargs)
    assert differences(whole, (again, callback)) == []


class OnPlateau(Traced):
    """Its rate falls after every optimizer step whose loss is no better."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), self.rate)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.9, patience=0)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step", "monitor": "loss", "strict": False},
        }


def test_a_schedule_that_waits_for_a_plateau_takes_no_step_twice(tmp_path):
    """After a validation that has been run, Lightning ends the batch before it once more."""
    kwargs = {"val_check_interval": 4, "max_epochs": 1, "module": OnPlateau}
    files, whole = checkpoints(tmp_path, "on_before_backward", **kwargs)
    (file,) = [file for file in files if "batch5" in file.name]
    callback = growing()
    again, _ = run(callback, train_loader(), ckpt_path=file, seed=99, **{**kwargs, "module": OnPlateau()})
    assert differences(whole, (again, callback)) == []


def test_a_measurement_that_could_not_be_made_is_still_due(tmp_path):
    """The epoch's last batch holds one example: the next epoch's first is measured in its place."""

    def monitor():
        return GradientDiversityMonitor(every_n_steps=16)

    saves, reference = Saves(tmp_path, ("on_train_epoch_end",)), monitor()
    run(reference, train_loader(shuffle=False), saves, max_epochs=2)
    assert reference.measurements == 1
    callback = monitor()
    run(callback, train_loader(shuffle=False), ckpt_path=saves.files[0], max_epochs=2)
    assert callback.measurements == 1


def test_a_growth_waits_for_as_many_measurements(tmp_path):
    """How many there were since the last one is in the checkpoint."""

    class Steady(Traced):  # a rate that falls by half would empty the window before the second measurement
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), self.rate)

    def callback():
        return growing(every_n_steps=40, cooldown=2, window=4)

    saves, reference = Saves(tmp_path, ("on_train_epoch_end",)), callback()
    module, _ = run(reference, train_loader(), saves, module=Steady(), max_epochs=18)
    assert [growth.to_batch_size for growth in reference.history] == [8, 16]
    for file in saves.files[1:15:2]:  # measurements come after these
        resumed = callback()
        again, _ = run(resumed, train_loader(), ckpt_path=file, seed=99, module=Steady(), max_epochs=18)
        assert differences((module, reference), (again, resumed)) == [], file.name


def test_a_monitor_goes_on_with_its_window(tmp_path):
    def monitor():
        return GradientDiversityMonitor(every_n_steps=2, window=8)

    saves, reference = Saves(tmp_path, ("on_train_epoch_end",)), monitor()
    run(reference, train_loader(shuffle=False), saves, max_epochs=3)
    callback = monitor()
    run(callback, train_loader(shuffle=False), ckpt_path=saves.files[0], max_epochs=3)
    assert callback.measurements == reference.measurements
    assert callback.optimizer_steps == reference.optimizer_steps == 48
    assert len(callback._window) == 8


@pytest.mark.filterwarnings("ignore:SWA is currently only supported every epoch", "ignore:Swapping scheduler")
def test_averaged_weights_get_their_statistics_as_ever():
    """Their last epoch is one window that trains nothing: the accumulation in it is not ours."""
    seen = []

    class Normed(Traced):
        def __init__(self):
            super().__init__()
            self.net.insert(1, torch.nn.BatchNorm1d(8))

        def training_step(self, batch, batch_idx):
            if self.current_epoch == EPOCHS:
                seen.append((int(self.trainer.accumulate_grad_batches), self.trainer.num_training_batches))
            return super().training_step(batch, batch_idx)

    callback = growing(engine="microbatch", every_n_steps=2, cooldown=3)
    swa = StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=2)
    module, _ = run(callback, train_loader(drop_last=True), swa, module=Normed())
    assert callback.history
    assert [accumulate for accumulate, _ in seen] == [batches for _, batches in seen]
    assert len(seen) == module.net[1].num_batches_tracked > 0
