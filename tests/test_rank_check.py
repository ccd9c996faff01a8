"""Within and between processes, the mean inner product of two gradients must be the same."""

import math

import numpy as np
import pytest
import torch

from lightning_graddiv.diversity import GradientMoments
from lightning_graddiv.rank_check import between_rank_excess


def gaussian(n: int, d: int, seed: int = 0, mean: float = 0.3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) + mean


class TestRanksAsACheck:
    def grouped(self, shards: torch.Tensor) -> GradientMoments:
        """One probe of shape (world, examples, d)."""
        world, examples, _ = shards.shape
        sums = shards.sum(dim=1)
        return GradientMoments(
            world * examples,
            shards.square().sum().item(),
            sums.sum(dim=0).square().sum().item(),
            group_sq_norms_of_sums=sums.square().sum().item(),
            group_sq_counts=world * examples**2,
        )

    def shards(self, kind: str, seed: int, world: int = 4, examples: int = 8, d: int = 20) -> torch.Tensor:
        gradients = gaussian(world * examples, d, seed).view(world, examples, d)
        if kind == "same":
            return gradients[:1].expand(world, -1, -1)
        if kind == "heterogeneous":
            return gradients + gaussian(world, d, seed=10_000, mean=0.0)[:, None]
        return gradients

    def excess(self, kind: str, first_seed: int = 0, probes: int = 16) -> float:
        return between_rank_excess([self.grouped(self.shards(kind, first_seed + i)) for i in range(probes)])

    def test_independent_shards_agree(self):
        values = torch.tensor([self.excess("independent", 100 * i) for i in range(200)])
        assert values.mean().item() == pytest.approx(0, abs=0.3)
        assert values.std().item() == pytest.approx(1.1, abs=0.2)
        assert values.abs().max() < 5

    def test_ranks_that_see_the_same_data_stand_out(self):
        assert self.excess("same") > 8

    def test_heterogeneous_shards_stand_out_on_the_other_side(self):
        assert self.excess("heterogeneous") < -8

    def test_it_is_the_difference_in_jackknife_standard_errors(self):
        shards = [self.shards("independent", seed) for seed in range(6)]
        pairs_b, pairs_w = 32**2 - 4 * 64, 4 * 64 - 32
        between, within = [], []
        for g in shards:
            gram = (g.flatten(0, 1) @ g.flatten(0, 1).T).view(4, 8, 4, 8)
            same_rank = sum(gram[r, :, r].sum() for r in range(4))
            between.append((gram.sum() - same_rank).item())
            within.append((same_rank - g.square().sum()).item())

        def difference(keep):
            return sum(between[i] for i in keep) / (len(keep) * pairs_b) - sum(within[i] for i in keep) / (
                len(keep) * pairs_w
            )

        deleted = np.array([difference([i for i in range(6) if i != j]) for j in range(6)])
        se = math.sqrt(5 / 6 * ((deleted - deleted.mean()) ** 2).sum())
        expected = difference(range(6)) / se
        assert between_rank_excess([self.grouped(g) for g in shards]) == pytest.approx(expected, rel=1e-9)

    def test_fewer_than_four_probes_with_groups_say_nothing(self):
        plain = [GradientMoments.from_gradients(gaussian(32, 20, seed)) for seed in range(9)]
        grouped = [self.grouped(self.shards("same", seed)) for seed in range(4)]
        assert between_rank_excess([]) == 0
        assert between_rank_excess(plain) == 0
        assert between_rank_excess([*plain, *grouped[:3]]) == 0
        assert between_rank_excess([*plain, *grouped]) == between_rank_excess(grouped) != 0

    def test_one_rank_or_one_example_a_rank_have_nothing_to_compare(self):
        one_rank = [self.grouped(self.shards("independent", seed, world=1)) for seed in range(6)]
        one_example = [self.grouped(self.shards("independent", seed, examples=1)) for seed in range(6)]
        assert between_rank_excess(one_rank) == 0
        assert between_rank_excess(one_example) == 0

    def test_a_difference_without_spread_is_infinite_and_signed(self):
        # M = 4 on two ranks; within and between both sum 4 or 8 pairs.
        agree = GradientMoments(4, 4.0, 10.0, group_sq_norms_of_sums=6.0, group_sq_counts=8.0)
        above = GradientMoments(4, 4.0, 16.0, group_sq_norms_of_sums=6.0, group_sq_counts=8.0)
        below = GradientMoments(4, 4.0, 7.0, group_sq_norms_of_sums=6.0, group_sq_counts=8.0)
        assert between_rank_excess([agree] * 5) == 0
        assert between_rank_excess([above] * 5) == math.inf
        assert between_rank_excess([below] * 5) == -math.inf

    def test_rounding_is_no_evidence(self):
        gradients = gaussian(8, 20)  # one gradient a probe, the same for all its examples on all ranks
        probes = [self.grouped(gradient.expand(4, 8, 20)) for gradient in gradients]
        assert between_rank_excess(probes) == 0
