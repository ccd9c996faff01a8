"""The metrics against Definitions 4 and 5: in one process, in many updates, in two real processes."""

import math
import pickle
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torchmetrics.utilities.distributed import gather_all_tensors

from lightning_graddiv.diversity import (
    GradientMoments,
    GradientSums,
    batch_size_bound,
    estimate_diversity,
    gradient_diversity,
)
from lightning_graddiv.metric import BatchSizeBound, GradientDiversity, all_reduce_sum

N, D = 24, 5


def gradients(n: int = N, d: int = D, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.3


def metrics(n: int | None = N) -> list[GradientDiversity]:
    return [GradientDiversity(), BatchSizeBound(n)]


def expected(metric: GradientDiversity, examples: torch.Tensor) -> float:
    definition = batch_size_bound if isinstance(metric, BatchSizeBound) else gradient_diversity
    return definition(examples).item()


@pytest.mark.parametrize("metric", metrics(), ids=repr)
@pytest.mark.parametrize("sizes", [[N], [10, 13, 1], [1] * N], ids=str)
@pytest.mark.parametrize("summed", [False, True], ids=["rows", "sums"])
def test_it_is_exact_over_all_updates(metric, sizes, summed):
    metric.reset()
    for part in gradients().split(sizes):
        metric.update(GradientSums.from_gradients(part) if summed else part)
    assert metric.compute().dtype == torch.float64
    assert metric.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)


@pytest.mark.parametrize("metric", metrics(), ids=repr)
def test_forward_returns_the_batch_and_keeps_the_whole(metric):
    metric.reset()
    for part in gradients().split(8):
        value = metric(part)
        if isinstance(metric, BatchSizeBound):
            one = estimate_diversity([GradientMoments.from_gradients(part)], dataset_size=N).bound
            assert value.item() == pytest.approx(one, rel=1e-12)
        else:
            assert value.item() == pytest.approx(expected(metric, part), rel=1e-12)
    assert metric.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)


def test_low_precision_gradients_are_added_up_in_float64():
    metric = BatchSizeBound(2000)
    examples = (gradients(2000) + 20).bfloat16()
    for part in examples.split(10):
        metric.update(part)
    assert metric.compute().item() == pytest.approx(batch_size_bound(examples.double()).item(), rel=1e-12)


@pytest.mark.parametrize("n", [None, 1000])
def test_a_part_of_the_data_set_gives_the_unbiased_estimate(n):
    metric = BatchSizeBound(dataset_size=n)
    metric.update(gradients())
    estimate = estimate_diversity([GradientMoments.from_gradients(gradients())], dataset_size=n)
    assert metric.compute().item() == pytest.approx(estimate.bound, rel=1e-12)
    assert metric.compute().item() != pytest.approx(batch_size_bound(gradients()).item(), rel=0.01)


@pytest.mark.parametrize(
    ("examples", "n", "diversity", "bound"),
    [
        ([[1.0, 2.0], [-1.0, -2.0]], 2, math.inf, math.inf),
        ([[0.0, 0.0], [0.0, 0.0]], 2, math.nan, math.nan),
        ([[1.0, 2.0]], 1, 1.0, 1.0),
        ([[0.0, 0.0]], 1, math.nan, math.nan),
        ([[1.0, 2.0]], 10, 1.0, math.nan),
        ([[1.0, 2.0]], None, 1.0, math.nan),
        ([[1.0, 0.0], [0.0, 1.0]], None, 1.0, math.inf),
    ],
    ids=[
        "cancel",
        "zero",
        "all one of one",
        "zero of one",
        "one of ten",
        "one of a stream",
        "orthogonal stream",
    ],
)
def test_the_edges(examples, n, diversity, bound):
    for metric, value in zip(metrics(n), (diversity, bound), strict=True):
        metric.update(torch.tensor(examples))
        assert metric.compute().item() == pytest.approx(value, nan_ok=True)


def test_without_examples_it_is_undefined():
    for metric in metrics():
        with pytest.warns(UserWarning, match="before the ``update`` method"):
            assert math.isnan(metric.compute())


@pytest.mark.parametrize("metric", metrics(), ids=repr)
@pytest.mark.parametrize("call", ["update", "forward"])
@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.ones(3, D + 1), f"of dimension d = {D}, as in the updates before, but got {D + 1}"),
        (torch.ones(3, 1), f"of dimension d = {D}, as in the updates before, but got 1"),
        (torch.ones(D), r"of shape \(n, d\)"),
        (torch.full((2, D), math.nan), "finite"),
    ],
    ids=["wider", "one wide", "1-dim", "nan"],
)
def test_a_bad_update_is_refused_and_leaves_the_state(metric, call, bad, message):
    metric.reset()
    metric.update(gradients()[:10])
    with pytest.raises(ValueError, match=message):
        getattr(metric, call)(bad)
    metric.update(gradients()[10:])
    assert metric.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)


@pytest.mark.parametrize("call", ["update", "forward"])
def test_more_examples_than_the_data_set_holds_are_refused(call):
    metric = BatchSizeBound(N)
    metric.update(gradients())
    with pytest.raises(ValueError, match=f"Expected at most `dataset_size` = {N} examples but got 25"):
        getattr(metric, call)(torch.ones(1, D))
    assert metric.compute().item() == pytest.approx(batch_size_bound(gradients()).item(), rel=1e-12)


@pytest.mark.parametrize("n", [0, -1])
def test_an_impossible_data_set_is_refused(n):
    with pytest.raises(ValueError, match="Expected argument `dataset_size` to be at least 1 or None but got"):
        BatchSizeBound(dataset_size=n)


@pytest.mark.parametrize("metric", metrics(), ids=repr)
class TestAsATorchmetric:
    def test_reset_forgets_the_dimension_too(self, metric):
        metric.reset()
        metric.update(torch.ones(2, D + 3))
        metric.reset()
        metric.update(gradients())
        assert metric.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)

    def test_it_pickles_with_its_state(self, metric):
        metric.reset()
        metric.update(gradients()[:10])
        clone = pickle.loads(pickle.dumps(metric))
        clone.update(gradients()[10:])
        assert clone.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)

    def test_its_state_survives_a_state_dict(self, metric):
        clone = metric.clone()
        for each in (metric, clone):
            each.reset()
            each.persistent(True)
        metric.update(gradients()[:10])
        clone.load_state_dict(metric.state_dict())
        clone.update(gradients()[10:])
        assert clone.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)

    def test_it_merges_with_another(self, metric):
        other = metric.clone()
        for each, part in ((metric, gradients()[:10]), (other, gradients()[10:])):
            each.reset()
            each.update(part)
        metric.merge_state(other)
        assert metric.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)

    @pytest.mark.parametrize(
        "device",
        [
            "meta",
            pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
        ],
    )
    def test_its_state_moves_to_a_device(self, metric, device):
        moved = metric.clone()
        moved.reset()
        moved.update(gradients())
        moved.to(device)
        assert {state.device.type for state in moved.metric_state.values()} == {device}
        assert {state.dtype for state in moved.metric_state.values()} == {torch.float64}
        if device == "cuda":
            assert moved.compute().device.type == "cuda"
            moved.reset()
            moved.update(gradients().cuda())
            assert moved.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)

    def test_casting_the_module_keeps_float64(self, metric):
        metric.reset()
        metric.half().update(gradients())
        assert metric.compute().item() == pytest.approx(expected(metric, gradients()), rel=1e-12)

    def test_it_holds_no_graph(self, metric):
        metric.reset()
        values = [metric(gradients()[:10].requires_grad_())]
        values.append(metric(GradientSums(2.0, 1.0, torch.ones(D, requires_grad=True))))
        assert not any(value.requires_grad for value in values)
        assert not any(state.requires_grad for state in metric.metric_state.values())

    def test_it_plots_a_value_and_a_series(self, metric):
        pytest.importorskip("matplotlib").use("Agg")
        import matplotlib.pyplot as plt

        metric.reset()
        values = [metric(part) for part in gradients().split(8)]
        for val in (None, values[0], values):
            figure, axis = metric.plot(val)
            assert axis.get_ylabel() == type(metric).__name__
            assert axis.get_ylim()[0] < metric.plot_lower_bound
            plt.close(figure)
        _, axis = plt.subplots()
        assert metric.plot(values, axis)[1] is axis
        plt.close()


# Two real processes

SHARDS = {"uneven": (7, 17), "idle": (24, 0), "idle first": (0, 24), "none": (0, 0)}


class Recorder:
    """Counts the numbers that each collective moves, by name."""

    names = ("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce")

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        for name in self.names:
            setattr(dist, name, self.wrap(name, getattr(dist, name)))

    def wrap(self, name, function):
        def recorded(*args, **kwargs):
            sent = args[1] if name.startswith("all_gather") else args[0]
            self.calls.append((name, sent.numel() if isinstance(sent, torch.Tensor) else 10**9))
            return function(*args, **kwargs)

        return recorded


def value_of(metric):
    try:
        return metric.compute().item()
    except ValueError as error:
        return str(error)


def two_process_worker(rank: int, folder: str) -> None:
    store, limit = f"file://{folder}/store", timedelta(seconds=30)  # a mismatch must fail, not hang
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=limit)
    recorder, results = Recorder(), {}

    def run(name, metric, shard):
        if len(shard):
            metric.update(shard)
        else:
            metric._update_count = 1  # torchmetrics' warning about no update is not what is tested here
        start = len(recorder.calls)
        value = value_of(metric)
        results[name] = {
            "value": value,
            "calls": recorder.calls[start:],
            "local": metric.metric_state,
            "again": value_of(metric.clone()),
        }
        return metric

    for name, sizes in SHARDS.items():
        shard = gradients()[: sum(sizes)].split(sizes)[rank] if sum(sizes) else torch.empty(0, D)
        run(f"diversity {name}", GradientDiversity(), shard)
        run(f"bound {name}", BatchSizeBound(N), shard)
    halves = gradients().split(12)
    run("gathered", GradientDiversity(dist_sync_fn=gather_all_tensors), halves[rank])
    run("dimensions", GradientDiversity(), gradients(4, D + rank))

    too_many = run("too many", BatchSizeBound(N - 1), halves[rank])
    too_many.dataset_size = N
    results["after too many"] = value_of(too_many)

    by_hand = GradientDiversity()
    by_hand.update(halves[rank])
    start = len(recorder.calls)
    by_hand.sync()
    results["by hand"] = {"calls": recorder.calls[start:], "sum": by_hand.gradient_sum}
    results["argument"] = torch.tensor([1.0 + rank, 2.0])
    results["sum"] = all_reduce_sum(results["argument"])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gloo")
    mp.spawn(two_process_worker, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("rank", [0, 1])
class TestTwoProcesses:
    @pytest.mark.parametrize("shards", ["uneven", "idle", "idle first"])
    def test_every_process_gets_the_value_of_all_examples(self, two_processes, rank, shards):
        for metric, name in zip(metrics(), ("diversity", "bound"), strict=True):
            result = two_processes[rank][f"{name} {shards}"]
            assert result["value"] == pytest.approx(expected(metric, gradients()), rel=1e-12)
            assert result["again"] == result["value"]

    def test_no_examples_anywhere_are_undefined(self, two_processes, rank):
        assert math.isnan(two_processes[rank]["diversity none"]["value"])
        assert math.isnan(two_processes[rank]["bound none"]["value"])

    @pytest.mark.parametrize("shards", ["uneven", "idle", "idle first"])
    def test_the_vector_crosses_by_all_reduce_and_nothing_is_gathered(self, two_processes, rank, shards):
        for name in ("diversity", "bound"):
            calls = two_processes[rank][f"{name} {shards}"]["calls"]
            assert calls.count(("all_reduce", D)) == 1
            assert not [call for call in calls if call[0] != "all_reduce"]

    def test_a_sync_by_hand_is_an_all_reduce_too(self, two_processes, rank):
        result = two_processes[rank]["by hand"]
        assert {name for name, _ in result["calls"]} == {"all_reduce"}
        torch.testing.assert_close(result["sum"], gradients().sum(dim=0), rtol=1e-12, atol=0)

    def test_summing_leaves_the_argument_alone(self, two_processes, rank):
        assert two_processes[rank]["sum"][0].tolist() == [3, 4]
        assert two_processes[rank]["argument"].tolist() == [1 + rank, 2]

    def test_each_process_keeps_its_own_examples(self, two_processes, rank):
        local = two_processes[rank]["bound uneven"]["local"]
        assert local["count"] == SHARDS["uneven"][rank]
        own = gradients().split(SHARDS["uneven"])[rank]
        torch.testing.assert_close(local["gradient_sum"], own.sum(dim=0), rtol=1e-12, atol=0)

    def test_the_users_own_sync_function_wins(self, two_processes, rank):
        result = two_processes[rank]["gathered"]
        assert ("all_gather", D) in result["calls"]  # also: the recorder does see a gathered vector
        assert result["value"] == pytest.approx(gradient_diversity(gradients()).item(), rel=1e-12)

    def test_vectors_of_two_dimensions_are_refused_on_both(self, two_processes, rank):
        message = two_processes[rank]["dimensions"]["value"]
        assert message == f"Expected gradients of one dimension on all processes but got {D} and {D + 1}"

    def test_more_examples_than_the_data_set_holds_are_refused_and_the_state_stays(self, two_processes, rank):
        assert "`dataset_size` = 23 examples but got 24" in two_processes[rank]["too many"]["value"]
        after = two_processes[rank]["after too many"]
        assert after == pytest.approx(batch_size_bound(gradients()).item(), rel=1e-12)
