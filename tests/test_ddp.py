"""Two real processes measure what one would, decide alike, and never wait for each other in vain."""

import pytest
import torch

from lightning_graddiv import GradientMoments, measure_moments
from tests import ddp_runs
from tests.processes import results_of


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return results_of(ddp_runs, tmp_path_factory.mktemp("ddp"))


def reference_probes():
    """Plain per-example gradients of the union of both processes' batches."""
    module = ddp_runs.Regression()
    x, y = ddp_runs.regression_data()
    for i in range(4):
        rows = [
            (a, b)
            for rank, size in enumerate(ddp_runs.SHARDS)
            for a, b in zip(
                ddp_runs.shard(x, rank)[i * size : (i + 1) * size],
                ddp_runs.shard(y, rank)[i * size : (i + 1) * size],
                strict=True,
            )
        ]
        gradients = []
        for a, b in rows:
            loss = (module.net(a[None])[:, 0] - b).square().mean()
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(module.parameters()))]))
        yield GradientMoments.from_gradients(torch.stack(gradients))


def test_uneven_shards_give_the_moments_of_one_process(runs):
    first, second = runs(ddp_runs.uneven_shards)
    assert first == second
    for probe, reference in zip(first["probes"], reference_probes(), strict=True):
        assert probe["count"] == 8
        assert probe["sum_sq_norms"] == pytest.approx(reference.sum_sq_norms, rel=1e-12)
        assert probe["sq_norm_of_sum"] == pytest.approx(reference.sq_norm_of_sum, rel=1e-12)
        assert probe["group_sq_counts"] == 5**2 + 3**2


def test_and_those_of_our_own_single_process_engine(runs):
    x, y = ddp_runs.regression_data()
    first, second = (ddp_runs.shard(x, rank) for rank in range(2))
    targets, others = (ddp_runs.shard(y, rank) for rank in range(2))
    batch = (torch.cat([first[:5], second[:3]]), torch.cat([targets[:5], others[:3]]))
    single = measure_moments(ddp_runs.Regression(), batch)
    probe = runs(ddp_runs.uneven_shards)[0]["probes"][0]
    assert probe["sum_sq_norms"] == pytest.approx(single.sum_sq_norms, rel=1e-12)
    assert probe["sq_norm_of_sum"] == pytest.approx(single.sq_norm_of_sum, rel=1e-12)


def test_each_process_draws_masks_of_its_own(runs):
    for probe in runs(ddp_runs.masks)[0]["probes"]:
        with_equal_masks = 2 * probe["group_sq_norms_of_sums"]
        assert probe["sq_norm_of_sum"] < 0.999 * with_equal_masks


def test_a_last_batch_with_a_pair_on_one_process_only_is_measured_by_both(runs):
    assert runs(ddp_runs.leftovers) == [{"measurements": 2, "steps": 6}] * 2


def test_the_batch_grows_alike_and_every_example_is_in_one_step(runs):
    first, second = runs(ddp_runs.growth)
    assert {key: first[key] for key in first} == second
    assert first["history"] == [(8, 16, 2.0), (16, 32, 4.0)]
    assert first["sizes"] == [8] * 4 + [16] * 2 + [16] * 2 + [32] + [32] * 2 * 2
    assert first["micro_batches"] == [4] * 4 + [8] * 2 + [8] * 2 + [16] + [16] * 2 * 2
    assert first["seen_each_epoch"] == [[1]] * 4
    assert first["sums"] == pytest.approx([1.0] * len(first["sums"]))
    assert first["examples_seen"] == 4 * 64


def test_so_it_does_with_workers_and_windows_that_are_not_full(runs):
    first, second = runs(ddp_runs.growth_with_workers_and_tails)
    assert first == second
    assert [to for _, to, _ in first["history"]] == [16, 32]
    assert first["seen_each_epoch"] == [[1]] * 4
    assert first["sums"] == pytest.approx([1.0] * len(first["sums"]))
    assert max(first["micro_batches"]) == 8


@pytest.mark.parametrize("at", range(len(ddp_runs.CORNERS)), ids=lambda at: str(ddp_runs.CORNERS[at]))
def test_on_every_kind_of_data_idle_changes_nothing_and_growth_loses_nothing(runs, at):
    first, second = (of_rank[at] for of_rank in runs(ddp_runs.corners))
    assert first["is_idle"]
    assert second["is_idle"]
    first["micro_batches"] = second["micro_batches"] = max(first["micro_batches"] + second["micro_batches"])
    assert first == second
    corner = ddp_runs.CORNERS[at]
    assert first["history"]
    assert first["micro_batches"] == (4 if corner.data == "two" else 8)
    assert first["validations"][0] == first["validations"][1]
    assert all(expected == taken for expected, taken in first["lengths"])
    for (once, twice), of_grown in zip(*first["seen"], strict=True):
        # Of 61 examples, one is dealt out twice; what is left of 31 by micro-batches of 8 is dropped with drop_last.
        assert once + twice == 61 if corner.limit == "none" and not corner.drop_last else once + twice < 61
        assert of_grown[1] <= twice
        assert sum(of_grown) >= once + twice - (16 if corner.drop_last or corner.limit == "half" else 0)


def test_processes_of_which_one_has_fewer_of_the_larger_batches_end_together(runs):
    first, second = runs(ddp_runs.lengths_that_would_part)
    assert first == second
    assert first["history"] == [18]
    assert first["steps"][1:] == [1, 1]


def test_processes_with_shards_of_two_sizes_end_together_before_growth_and_after(runs):
    first, second = runs(ddp_runs.shards_of_two_sizes)
    assert first["history"] == second["history"]
    assert first["steps"] == second["steps"]
    assert len(first["history"]) >= 2
    assert first["steps"][0] > first["steps"][1] >= first["steps"][2] > 0
    assert "the fewest 7. Each epoch ends after those" in first["said"][0]


def test_a_process_without_data_ends_the_training_of_all(runs):
    for result in runs(ddp_runs.an_empty_shard):
        assert result["steps"] == [0, 0, 0]
    assert "the fewest 0" in runs(ddp_runs.an_empty_shard)[0]["said"][0]


def test_batches_of_two_sizes_are_refused_by_both(runs):
    for result in runs(ddp_runs.batches_of_two_sizes):
        assert "needs the same batch size on every process" in result["refused"]


def test_processes_that_see_the_same_examples_are_warned_of_once(runs):
    assert [result["warned"] for result in runs(ddp_runs.same_data)] == [1, 0]


def test_processes_with_a_distributed_sampler_are_not(runs):
    assert [result["warned"] for result in runs(ddp_runs.sampled_data)] == [0, 0]


def test_t28_policies_that_differ_between_processes_cannot_make_them_differ(runs):
    first, second = runs(ddp_runs.divergent_policies)
    assert first == second
    assert first["history"] == [16]
    assert first["allowed"] == [16.0]


def test_what_one_process_refuses_is_dropped_by_both(runs):
    first, second = runs(ddp_runs.one_process_refuses)
    assert first["measurements"] == second["measurements"] == 7
    assert "Another process could not measure" in first["said"][0]
    assert "is not finite" in second["said"][0]


def test_a_step_with_collectives_is_measured_between_consecutive_steps(runs):
    first, second = runs(ddp_runs.collectives)
    assert first["measurements"] == second["measurements"] == 4
    assert "`self.all_gather`" in first["said"][0]
    assert len(first["said"]) == 1


def test_a_micro_batch_that_one_process_has_no_room_for_is_made_up_on_both(runs):
    first, second = runs(ddp_runs.no_room_on_one_process)
    assert first["history"] == second["history"] == [16, 32, 64]
    assert first["micro_batches"] == second["micro_batches"] == 8
    assert first["cap"] == second["cap"] == 15
    assert first["seen"] == second["seen"] == [(ddp_runs.EXAMPLES, 0)] * 3


def test_a_micro_batch_is_tried_without_the_other_processes(runs):
    alone, _ = runs(ddp_runs.tried_by_one_process_alone)
    assert alone["verdicts"] == ["FITS", "UNTRIED"]
    assert "calls a collective" in alone["reason"]
