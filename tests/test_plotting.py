"""Pictures show what was logged, all of it, and nothing else."""

import math
import sys

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

from lightning_graddiv import GradientDiversityMonitor
from lightning_graddiv.plotting import plot_accuracy, plot_batch_size, read_metrics

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")

from matplotlib.figure import Figure  # noqa: E402

INF = math.inf
STEPS = [3, 7, 11, 15]
METRICS = {
    "graddiv/batch_size": (STEPS, [16.0, 16.0, 32.0, 64.0]),
    "graddiv/batch_size_bound": (STEPS, [40.0, 60.0, INF, 80.0]),
    "graddiv/bound_lower": (STEPS, [1.0, 34.0, 66.0, 50.0]),
    "graddiv/bound_upper": (STEPS, [INF, 90.0, INF, 130.0]),
    "val_accuracy": ([9, 19], [0.5, 0.75]),
}


@pytest.fixture
def ax():
    return Figure().subplots()


def line(ax, label):
    (found,) = [line for line in ax.get_lines() if line.get_label().startswith(label)]
    return found


def band(ax):
    """The lower and the upper edge of the band at each step."""
    (vertices,) = [path.vertices for path in ax.collections[0].get_paths()]
    edges = {step: sorted(y for x, y in vertices if x == step) for step in STEPS}
    return [edges[step][0] for step in STEPS], [edges[step][-1] for step in STEPS]


def test_the_staircase_is_the_batch_size_that_was_logged_and_lasts_to_the_end_of_the_run(ax):
    assert plot_batch_size(METRICS, ax=ax) is ax
    stairs = line(ax, "batch size")
    assert stairs.get_drawstyle() == "steps-post"
    assert list(stairs.get_xdata()) == [*STEPS, 19]
    assert list(stairs.get_ydata()) == [16, 16, 32, 64, 64]


def test_the_bound_has_a_gap_and_a_triangle_where_it_is_infinite(ax):
    plot_batch_size(METRICS, ax=ax)
    drawn = list(line(ax, "bound").get_ydata())
    assert drawn[:2] == [40, 60]
    assert math.isnan(drawn[2])
    assert drawn[3] == 80
    (triangles,) = [line for line in ax.get_lines() if line.get_marker() == "^"]
    assert list(triangles.get_xdata()) == [11]
    assert triangles.get_transform() == ax.get_xaxis_transform()  # its height is a share of the axis,
    assert 0.9 < triangles.get_ydata()[0] < 1  # just below the top


def test_the_band_is_the_interval_and_reaches_the_top_where_the_upper_end_is_infinite(ax):
    plot_batch_size(METRICS, ax=ax)
    lower, upper = band(ax)
    assert lower == [1, 34, 66, 50]
    assert upper[1::2] == [90, 130]
    top = ax.get_ylim()[1]
    assert all(top < value < INF for value in upper[0::2])


def test_an_infinite_lower_end_is_drawn_too(ax):
    metrics = {**METRICS, "graddiv/bound_lower": (STEPS, [1.0, 34.0, INF, 50.0])}
    plot_batch_size(metrics, ax=ax)
    assert ax.get_ylim()[1] < band(ax)[0][2] < INF


def test_the_axis_holds_every_size_and_every_usual_bound_but_no_outlier(ax):
    metrics = {**METRICS, "graddiv/batch_size_bound": (STEPS, [40.0, 60.0, 1e9, 80.0])}
    plot_batch_size(metrics, ax=ax)
    bottom, top = ax.get_ylim()
    assert ax.get_yscale() == "log"
    assert bottom < 16
    assert 80 < top < 1e4
    assert ax.get_xlim() == (0, 19)


def test_a_run_whose_every_bound_is_infinite_can_be_drawn(ax):
    nothing_but_infinity = (STEPS, [INF] * 4)
    metrics = {
        **METRICS,
        "graddiv/batch_size_bound": nothing_but_infinity,
        "graddiv/bound_upper": nothing_but_infinity,
    }
    assert plot_batch_size(metrics, ax=ax).get_ylim()[1] >= 64


def test_axes_are_labelled_with_units_and_a_legend(ax):
    plot_batch_size(METRICS, ax=ax)
    assert ax.get_xlabel() == "optimizer steps"
    assert ax.get_ylabel() == "examples per optimizer step"
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["batch size", "bound $B_S(w)$", "its interval"]


def test_the_prefix_is_the_callbacks(ax):
    renamed = {name.replace("graddiv", "mine"): series for name, series in METRICS.items()}
    plot_batch_size(renamed, ax=ax, log_prefix="mine")
    assert line(ax, "batch size").get_ydata()[0] == 16
    with pytest.raises(ValueError, match=r"logged `graddiv/batch_size` but it logged mine/batch_size, .*val_accuracy"):
        plot_batch_size(renamed, ax=ax)


@pytest.mark.parametrize("name", ["batch_size", "batch_size_bound", "bound_lower", "bound_upper"])
def test_a_missing_or_empty_column_is_named(name, ax):
    without = {key: series for key, series in METRICS.items() if key != f"graddiv/{name}"}
    with pytest.raises(ValueError, match=f"`graddiv/{name}`"):
        plot_batch_size(without, ax=ax)
    with pytest.raises(ValueError, match=f"`graddiv/{name}`"):
        plot_batch_size({**METRICS, f"graddiv/{name}": ([], [])}, ax=ax)


def test_accuracy_has_a_curve_and_a_dot_at_the_end_for_every_run(ax):
    runs = {"adaptive": METRICS, "small": {"val_accuracy": ([9, 39], [0.25, 0.5])}}
    assert plot_accuracy(runs, ax=ax) is ax
    for label, metrics in runs.items():
        curve = line(ax, label)
        assert (list(curve.get_xdata()), list(curve.get_ydata())) == metrics["val_accuracy"]
    dots = [(*line.get_xdata(), *line.get_ydata()) for line in ax.get_lines() if line.get_marker() == "o"]
    assert dots == [(19, 0.75), (39, 0.5)]
    colours = [line(ax, label).get_color() for label in runs]
    assert len(set(colours)) == 2
    assert [text.get_text() for text in ax.get_legend().get_texts()] == list(runs)
    assert ax.yaxis.get_major_formatter()(0.975) == "97.5 %"


def test_accuracy_needs_a_run_and_its_metric(ax):
    with pytest.raises(ValueError, match="at least one run"):
        plot_accuracy({}, ax=ax)
    with pytest.raises(ValueError, match="`acc` but it logged graddiv/batch_size"):
        plot_accuracy({"a": METRICS}, name="acc", ax=ax)


def test_without_axes_a_new_figure_is_made():
    import matplotlib.pyplot as plt

    one, two = plot_batch_size(METRICS), plot_accuracy({"a": METRICS})
    assert one.figure is not two.figure
    plt.close("all")


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ModuleNotFoundError, match=r"lightning_graddiv\[examples\]"):
        plot_batch_size(METRICS)


def test_columns_are_sparse_and_numbers_may_be_infinite(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,graddiv/bound_upper,step,val_accuracy\n,inf,3,\n0,,9,0.5\n,12.5,11,\n")
    expected = {"epoch": ([9], [0.0]), "graddiv/bound_upper": ([3, 11], [INF, 12.5]), "val_accuracy": ([9], [0.5])}
    assert read_metrics(tmp_path) == expected
    assert read_metrics(str(tmp_path / "metrics.csv")) == expected


def test_a_file_of_another_kind_and_a_missing_one_are_refused(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column `step`"):
        read_metrics(tmp_path)
    with pytest.raises(FileNotFoundError, match="other"):
        read_metrics(tmp_path / "other.csv")


class Regression(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(3, 1)

    def training_step(self, batch):
        inputs, targets = batch
        return (self.layer(inputs) - targets).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Recorder(GradientDiversityMonitor):
    def on_estimate(self, trainer, pl_module, estimate):
        self.seen = [*getattr(self, "seen", []), (self._opened_step, estimate)]


def test_what_a_real_csv_logger_wrote_comes_back(tmp_path, ax):
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(48, 3), torch.randn(48, 1))
    recorder = Recorder(every_n_steps=2)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=CSVLogger(tmp_path),
        callbacks=[recorder],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Regression(), DataLoader(data, batch_size=8))
    metrics = read_metrics(trainer.logger.log_dir)
    steps = [step for step, _ in recorder.seen]
    assert steps == [1, 3, 5, 7, 9, 11]
    bounds = [estimate.bound for _, estimate in recorder.seen]
    assert metrics["graddiv/batch_size_bound"] == (steps, pytest.approx(bounds))
    assert metrics["graddiv/bound_upper"].values == pytest.approx([estimate.upper for _, estimate in recorder.seen])
    assert metrics["graddiv/bound_upper"].values[0] == INF
    assert metrics["graddiv/batch_size"].values == [8] * 6
    plot_batch_size(metrics, ax=ax)
    ax.figure.savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 5000
