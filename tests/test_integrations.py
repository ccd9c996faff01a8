"""Beside what else a training is made of: progress bars, loggers, the command line, and Lightning's other package.

All runs are real, and the batch grows in them. The gradients are orthogonal: the bound is the number of examples.
"""

import csv
import os
import re
import runpy
import subprocess
import sys
from dataclasses import dataclass
from inspect import signature
from pathlib import Path

import lightning.pytorch
import pytest
import pytorch_lightning
import yaml
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_graddiv.pytorch_lightning
from lightning_graddiv import AdaptiveBatchSize, DiversityBound
from tests.audit import Audited, AuditModule, loader, quiet_trainer

EXAMPLES = 64
EPOCHS = 3
FIRST_EPOCH = [4] * 8 + [8] * 4
SIZES = [*FIRST_EPOCH, *[8] * 4, *[16] * 2, *[16] * 4]
"""Examples in each step: every second one is measured, and four measurements of a size make it grow."""

MEASURED = list(range(1, len(SIZES), 2))
"""Lightning counts steps from 0."""

ROOT = Path(__file__).parents[1]


class OtherAudit(Audited, pytorch_lightning.LightningModule):
    """The audit device as `pytorch_lightning` trains it."""


LIGHTNING = (lightning.pytorch, AuditModule, AdaptiveBatchSize)
OTHER = (pytorch_lightning, OtherAudit, lightning_graddiv.pytorch_lightning.AdaptiveBatchSize)
both = pytest.mark.parametrize("package", [LIGHTNING, OTHER], ids=["lightning", "pytorch_lightning"])


def adaptive(kind=AdaptiveBatchSize):
    return kind(every_n_steps=2, max_batch_size=16, delta=1.0, cooldown=4)


def fit(package=LIGHTNING, *, callbacks=(), ckpt_path=None, **kwargs):
    """Train a module of a package, by its trainer, with our callback for it."""
    its, module, kind = package
    module, callback = module(EXAMPLES), adaptive(kind)
    options = {"max_epochs": EPOCHS, "log_every_n_steps": 3, **kwargs}
    trainer = quiet_trainer(its.Trainer, callbacks=[callback, *callbacks], **options)
    trainer.fit(module, loader(EXAMPLES, 4), ckpt_path=ckpt_path)
    return module, trainer


def ours(trainer):
    (callback,) = (callback for callback in trainer.callbacks if isinstance(callback, AdaptiveBatchSize))
    return callback


def growths(callback):
    return [(growth.step, growth.from_batch_size, growth.to_batch_size) for growth in callback.history]


def sizes(module):
    return [int((step > 0).sum()) for step in module.steps]


def rows_of(logger):
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return list(csv.DictReader(file))


def measured_in(rows):
    return [row for row in rows if row["graddiv/batch_size_bound"]]


class DrawsAll(RichProgressBar):
    """Draws each time that it is told something, instead of as often as its thread comes."""

    def refresh(self, hard=False):
        super().refresh(hard=True)


BARS = {
    "tqdm": (LIGHTNING, TQDMProgressBar),
    "tqdm of pytorch_lightning": (OTHER, pytorch_lightning.callbacks.TQDMProgressBar),
    "rich": (LIGHTNING, lambda: DrawsAll(console_kwargs={"force_terminal": True, "width": 160})),
}


@pytest.mark.parametrize("name", BARS)
def test_a_bar_shows_the_bound_and_fills_up_to_the_batches_that_there_are(name, capsys):
    if name == "rich" and lightning.pytorch.__version__ < "2.6":
        pytest.skip("its Rich bar fails with this Rich, without the callback too")
    package, bar = BARS[name]
    module, _ = fit(package, callbacks=[bar()], enable_progress_bar=True)
    assert sizes(module) == SIZES
    screen = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", capsys.readouterr().out)
    frames = re.findall(r"Epoch (\d)\b.*?(\d+)/(\d+) ", screen)
    by_epoch = [[(int(done), int(total)) for of, done, total in frames if int(of) == epoch] for epoch in range(EPOCHS)]
    assert [list(dict.fromkeys(total for done, total in of if done)) for of in by_epoch] == [[16, 12], [8, 6], [4]]
    assert [max(of) for of in by_epoch] == [(12, 12), (6, 6), (4, 4)]
    last = re.split("[\r\n]", screen.strip())[-1]
    assert re.search(r"graddiv/batch_size_bound(=|: )64\.0", last)


@both
def test_a_csv_file_has_one_row_for_each_measured_step(package, tmp_path):
    logger = package[0].loggers.CSVLogger(tmp_path)
    fit(package, logger=logger)
    rows = rows_of(logger)
    measured = measured_in(rows)
    assert [int(row["step"]) for row in measured] == MEASURED
    assert [float(row["graddiv/batch_size"]) for row in measured] == [SIZES[step] for step in MEASURED]
    assert [float(row["graddiv/batch_size_bound"]) for row in measured] == pytest.approx([EXAMPLES] * len(MEASURED))
    assert all(row[name] for row in measured for name in row if name.startswith("graddiv/"))
    losses = [row for row in rows if row["train_loss"]]
    assert [int(row["step"]) for row in losses] == list(range(2, len(SIZES), 3))  # as without the callback


@both
def test_tensorboard_reads_back_every_number_at_its_step(package, tmp_path):
    logger = package[0].loggers.TensorBoardLogger(tmp_path)
    _, trainer = fit(package, logger=logger)
    events = EventAccumulator(logger.log_dir).Reload()
    published = {name for name in trainer.callback_metrics if name.startswith("graddiv/")}
    assert len(published) == 12
    assert published == {name for name in events.Tags()["scalars"] if name.startswith("graddiv/")}
    for name in published:
        assert [event.step for event in events.Scalars(name)] == MEASURED
    assert [event.value for event in events.Scalars("graddiv/batch_size")] == [SIZES[step] for step in MEASURED]
    bounds = [event.value for event in events.Scalars("graddiv/batch_size_bound")]
    assert bounds == pytest.approx([EXAMPLES] * len(MEASURED))


@both
def test_several_loggers_are_told_the_same(package, tmp_path):
    its = package[0].loggers
    first = its.CSVLogger(tmp_path, "first")
    events = its.TensorBoardLogger(tmp_path, "events")
    last = its.CSVLogger(tmp_path, "last", flush_logs_every_n_steps=1)
    fit(package, logger=[first, events, last])
    measured = measured_in(rows_of(first))
    assert [int(row["step"]) for row in measured] == MEASURED
    assert measured_in(rows_of(last)) == measured
    read = EventAccumulator(events.log_dir).Reload()
    for name in (name for name in measured[0] if name.startswith("graddiv/")):
        values = [float(row[name]) for row in measured]
        assert [event.value for event in read.Scalars(name)] == pytest.approx(values, rel=1e-6)


@pytest.mark.parametrize(
    ("begun", "resumed"),
    [(LIGHTNING, LIGHTNING), (OTHER, OTHER), (LIGHTNING, OTHER)],
    ids=["lightning", "pytorch_lightning", "from one to the other"],
)
def test_a_resumed_run_grows_and_logs_on_from_where_it_was(begun, resumed, tmp_path):
    def run(package, name, **kwargs):
        its = package[0]
        keeps = its.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        logger = its.loggers.CSVLogger(tmp_path, name)
        module, trainer = fit(package, callbacks=[keeps], enable_checkpointing=True, logger=logger, **kwargs)
        rows = [(int(row["step"]), float(row["graddiv/batch_size"])) for row in measured_in(rows_of(logger))]
        return sizes(module), rows, ours(trainer)

    taken, rows, callback = run(begun, "begun")
    assert taken == SIZES
    taken, rows_again, again = run(resumed, "resumed", ckpt_path=str(tmp_path / "epoch=0.ckpt"))
    assert taken == SIZES[len(FIRST_EPOCH) :]
    assert rows_again == [(step, size) for step, size in rows if step >= len(FIRST_EPOCH)]
    assert growths(again) == growths(callback) == [(8, 4, 8), (16, 8, 16)]
    factors = [[growth.learning_rate_factor for growth in of.history] for of in (again, callback)]
    assert factors[0] == pytest.approx(factors[1])


@pytest.mark.skipif(pytorch_lightning.__version__ < "2.6", reason="it knows no callbacks but those of its own class")
def test_pytorch_lightning_takes_any_callback_in_a_list_but_alone_its_own(capsys):
    module, trainer = fit((pytorch_lightning, OtherAudit, AdaptiveBatchSize))
    assert type(ours(trainer)) is AdaptiveBatchSize
    assert sizes(module) == SIZES
    with pytest.raises(TypeError, match="not iterable"):
        quiet_trainer(pytorch_lightning.Trainer, callbacks=adaptive())
    alone = quiet_trainer(pytorch_lightning.Trainer, callbacks=adaptive(OTHER[2]), max_epochs=1)
    alone.fit(module := OtherAudit(EXAMPLES), loader(EXAMPLES, 4))
    assert sizes(module) == FIRST_EPOCH


@pytest.mark.parametrize("name", lightning_graddiv.pytorch_lightning.__all__)
def test_each_callback_is_one_of_pytorch_lightning_too(name):
    kind, plain = getattr(lightning_graddiv.pytorch_lightning, name), getattr(lightning_graddiv, name)
    assert issubclass(kind, plain)
    assert issubclass(kind, pytorch_lightning.Callback)
    assert kind.__qualname__ == plain.__qualname__  # a checkpoint finds a callback's state by it


def test_no_callback_is_left_out_for_pytorch_lightning():
    public = {name: getattr(lightning_graddiv, name) for name in lightning_graddiv.__all__}
    callbacks = {
        name
        for name, value in public.items()
        if isinstance(value, type) and issubclass(value, lightning.pytorch.Callback)
    }
    assert set(lightning_graddiv.pytorch_lightning.__all__) == callbacks


SCRIPT = """\
import sys

import {package}
from {package}.cli import LightningCLI
from tests.audit import Audited, loader


class Module(Audited, {package}.LightningModule):
    def train_dataloader(self):
        return loader(64, 4)


if __name__ == "__main__":
    cli = LightningCLI(Module, seed_everything_default=False)
    print("imported:", *sorted({{"lightning", "pytorch_lightning"}} & sys.modules.keys()))
"""

RULE = """\
from lightning_graddiv import DiversityEstimate, RunState


def at_most_eight(estimate: DiversityEstimate, run: RunState) -> float:
    return 8.0
"""

CONFIG = """\
model:
  examples: 64
trainer:
  accelerator: cpu
  max_epochs: 3
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: {callbacks}.AdaptiveBatchSize
      init_args:
        max_batch_size: 16
        every_n_steps: 2
        cooldown: 4
        scale_lr: sqrt
        delta: 0.01
        policy:
          class_path: lightning_graddiv.policies.DiversityBound
          init_args:
            delta: 1.0
"""


ENVIRONMENTS = {
    "lightning": ("lightning.pytorch", "lightning_graddiv"),
    "pytorch_lightning": ("pytorch_lightning", "lightning_graddiv.pytorch_lightning"),
}

only_lightning = pytest.mark.parametrize("user", ["lightning"], indirect=True)

# What Lightning's command line calls of jsonargparse, in both its packages, jsonargparse 4.53 deprecates.
old_calls = pytest.mark.filterwarnings(
    r"ignore:\s*(.*deprecated in v4|By default only one Jsonargparse)"
    r":DeprecationWarning:(lightning\.pytorch|pytorch_lightning)\.cli"
)


@dataclass
class User:
    callback: str
    monkeypatch: pytest.MonkeyPatch

    def edits(self, old, new):
        text = Path("adaptive.yaml").read_text()
        assert text.count(old) == 1
        Path("adaptive.yaml").write_text(text.replace(old, new))

    def runs(self, arguments):
        """As `python train.py ...` would, but in this process."""
        self.monkeypatch.setattr(sys, "argv", ["train.py", *arguments.split()])
        return ours(runpy.run_path("train.py", run_name="__main__")["cli"].trainer)


@pytest.fixture(params=ENVIRONMENTS)
def user(request, tmp_path, monkeypatch):
    """A user who has a script, a rule and a configuration in the present folder, for either package."""
    package, callbacks = ENVIRONMENTS[request.param]
    (tmp_path / "train.py").write_text(SCRIPT.format(package=package))
    (tmp_path / "rules.py").write_text(RULE)
    (tmp_path / "adaptive.yaml").write_text(CONFIG.format(callbacks=callbacks))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return User(f"{callbacks}.AdaptiveBatchSize", monkeypatch)


def callbacks_in(path):
    return yaml.safe_load(Path(path).read_text())["trainer"]["callbacks"]


@only_lightning
def test_a_real_command_line_takes_the_callback_from_yaml(user):
    path = os.pathsep.join([str(ROOT), *filter(None, sys.path)])  # it finds what is found here
    run = subprocess.run(
        [sys.executable, "train.py", "fit", "--config", "adaptive.yaml"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    grown = re.findall(r"AdaptiveBatchSize: (\d+) -> (\d+) from step (\d+)", run.stderr)
    assert grown == [("4", "8", "8"), ("8", "16", "16")]
    assert run.stdout.splitlines()[-1] == "imported: lightning"  # and not the other package, which nobody asked for


@old_calls
def test_what_the_command_line_saves_is_what_it_was_given_and_runs_again(user):
    first = user.runs("fit --config adaptive.yaml")
    (saved,), (given,) = callbacks_in("config.yaml"), callbacks_in("adaptive.yaml")
    assert saved["class_path"] == given["class_path"] == user.callback
    assert given["init_args"].items() <= saved["init_args"].items()
    assert saved["init_args"]["stability"] is None
    again = user.runs("fit --config config.yaml --trainer.default_root_dir again")
    assert callbacks_in("again/config.yaml") == [saved]
    for callback in (first, again):
        assert growths(callback) == [(8, 4, 8), (16, 8, 16)]
        assert (callback.max_batch_size, callback.scale_lr, callback.policy) == (16, "sqrt", DiversityBound(1.0))


@old_calls
def test_the_printed_configuration_is_whole_and_runs(user, capsys):
    with pytest.raises(SystemExit) as exit_:
        user.runs("fit --config adaptive.yaml --print_config")
    assert exit_.value.code == 0
    Path("printed.yaml").write_text(capsys.readouterr().out)
    (printed,) = callbacks_in("printed.yaml")
    assert printed["init_args"].keys() == signature(AdaptiveBatchSize).parameters.keys()
    assert growths(user.runs("fit --config printed.yaml")) == [(8, 4, 8), (16, 8, 16)]


@old_calls
def test_the_command_line_explains_each_argument(user, capsys):
    with pytest.raises(SystemExit) as exit_:
        user.runs(f"fit --trainer.callbacks.help {user.callback}")
    assert exit_.value.code == 0
    explained = " ".join(capsys.readouterr().out.split())
    for name in signature(AdaptiveBatchSize).parameters:
        assert f"--trainer.callbacks.{name} " in explained
    assert "measurements after a growth before the next" in explained


@old_calls
def test_a_rule_of_the_users_own_is_named_by_its_path(user):
    rule = """
          class_path: lightning_graddiv.policies.DiversityBound
          init_args:
            delta: 1.0"""
    user.edits(rule, " rules.at_most_eight")
    assert growths(user.runs("fit --config adaptive.yaml")) == [(8, 4, 8)]


@old_calls
@only_lightning
@pytest.mark.parametrize(
    ("old", "new", "complaint"),
    [
        ("cooldown: 4", "cooldwon: 4", "Option 'cooldwon' is not accepted"),
        ("    delta: 1.0", "    dleta: 1.0", "Option 'dleta' is not accepted"),
        ("scale_lr: sqrt", "scale_lr: cube", "scale_lr.*Given value: cube"),
        ("max_batch_size: 16", "max_batch_size: many", "max_batch_size.*Got value: many"),
        ("max_batch_size: 16", "growth_factor: 2", "arguments are required: max_batch_size"),
    ],
)
def test_a_wrong_argument_in_the_configuration_is_named(user, capsys, old, new, complaint):
    user.edits(old, new)
    with pytest.raises(SystemExit) as exit_:
        user.runs("fit --config adaptive.yaml")
    assert exit_.value.code == 2
    assert re.search(complaint, capsys.readouterr().err, re.DOTALL)


@old_calls
def test_an_argument_out_of_range_is_named(user):
    user.edits("every_n_steps: 2", "every_n_steps: 0")
    with pytest.raises(ValueError, match="Expected argument `every_n_steps` to be at least 1 but got 0"):
        user.runs("fit --config adaptive.yaml")


@old_calls
@pytest.mark.parametrize("user", ["pytorch_lightning"], indirect=True)
def test_the_command_line_of_pytorch_lightning_needs_its_own_callback(user, capsys):
    user.edits("lightning_graddiv.pytorch_lightning.AdaptiveBatchSize", "lightning_graddiv.AdaptiveBatchSize")
    with pytest.raises(SystemExit):
        user.runs("fit --config adaptive.yaml")
    assert re.search("lightning_graddiv.AdaptiveBatchSize.*subclass of Callback", capsys.readouterr().err)


@old_calls
@only_lightning
def test_the_configuration_in_the_documentation_is_taken(user, capsys):
    (text,) = re.findall("```yaml\n(.*?)```", (ROOT / "docs/adaptive-batch-size.md").read_text(), re.DOTALL)
    Path("documented.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        user.runs("fit --config documented.yaml --model.examples 64 --print_config")
    assert exit_.value.code == 0, capsys.readouterr().err
