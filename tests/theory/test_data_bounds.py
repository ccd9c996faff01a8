"""Bounds from the data alone: never above what a search over weights finds, and met where they are said to be tight."""

import math

import pytest
import torch

from lightning_graddiv import batch_size_bound
from lightning_graddiv.theory import (
    data_bounds,
    differential_batch_size_bound,
    glm_batch_size_bound,
    rademacher_batch_size_bound,
    sparse_batch_size_bound,
    sub_gaussian_batch_size_bound,
)


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def glm_gradients(x: torch.Tensor, w: torch.Tensor, targets: torch.Tensor, loss: str) -> torch.Tensor:
    """By autograd, one example at a time."""
    rows = []
    for row, target in zip(x, targets, strict=True):
        weights = w.clone().requires_grad_()
        score = row @ weights
        value = {
            "squares": lambda s, t: (s - t) ** 2 / 2,
            "logistic": lambda s, t: torch.nn.functional.softplus(-s * t.sign()),
            "absolute": lambda s, t: (s - t).abs(),
        }[loss](score, target)
        rows.append(torch.autograd.grad(value, weights)[0])
    return torch.stack(rows)


class TestGeneralisedLinearModels:
    @pytest.mark.parametrize("loss", ["squares", "logistic", "absolute"])
    @pytest.mark.parametrize("shape", [(12, 4), (4, 9)])
    def test_no_weights_are_below_it(self, loss, shape):
        x, targets = drawn(*shape), drawn(shape[0], seed=1)
        bound = glm_batch_size_bound(x)
        found = [float(batch_size_bound(glm_gradients(x, w, targets, loss))) for w in 2 * drawn(60, shape[1], seed=2)]
        assert min(found) >= bound * (1 - 1e-12)

    def test_it_is_met_by_residuals_along_the_top_singular_vector(self):
        x = torch.nn.functional.normalize(drawn(10, 4), dim=1)  # rows of one length
        left = torch.linalg.svd(x)[0][:, 0]
        gradients = glm_gradients(x, torch.zeros(4, dtype=torch.float64), -left, "squares")
        assert glm_batch_size_bound(x) > 2
        assert float(batch_size_bound(gradients)) == pytest.approx(glm_batch_size_bound(x), rel=1e-12)

    def test_and_a_search_downhill_gets_there_but_not_below(self):
        x = torch.nn.functional.normalize(drawn(6, 3), dim=1)
        slopes = drawn(6, seed=3).requires_grad_()  # any l_i' is that of some loss
        optimizer = torch.optim.LBFGS([slopes], max_iter=300, line_search_fn="strong_wolfe")

        def bound():
            optimizer.zero_grad()
            value = 6 * slopes.square().sum() / (slopes @ x).square().sum()
            value.backward()
            return value

        optimizer.step(bound)
        value = bound().detach()
        assert float(value) == pytest.approx(glm_batch_size_bound(x), rel=1e-4)
        assert float(value) >= glm_batch_size_bound(x) * (1 - 1e-9)

    def test_several_outputs_and_differences_are_not_below_it_either(self):
        x = drawn(9, 4)
        bound = glm_batch_size_bound(x)
        outputs = [torch.einsum("nk,nd->nkd", drawn(9, 3, seed=s), x).flatten(1) for s in range(40)]
        assert min(float(batch_size_bound(g)) for g in outputs) >= bound
        pairs = zip(outputs[::2], outputs[1::2], strict=True)
        assert min(float(differential_batch_size_bound(a, b)) for a, b in pairs) >= bound

    def test_orthogonal_rows_give_n_and_equal_ones_one(self):
        assert glm_batch_size_bound(3 * torch.eye(5)) == pytest.approx(5)
        assert glm_batch_size_bound(torch.ones(5, 3)) == pytest.approx(1)

    def test_a_row_of_zeros_leaves_nothing_to_say(self):
        assert glm_batch_size_bound(torch.cat([torch.zeros(1, 3), torch.eye(3)])) == 1.0

    @pytest.mark.parametrize("shape", [(80, 30), (30, 80), (1, 7), (7, 1)])
    def test_the_truncated_decomposition_agrees_with_the_exact_one(self, shape, monkeypatch):
        x = drawn(*shape) + 0.5
        exact = float(torch.linalg.matrix_norm(x, 2)) ** 2
        assert data_bounds._largest_sq_singular_value(x) == pytest.approx(exact, rel=1e-10)
        expected = max(1.0, shape[0] * float(x.square().sum(1).min()) / exact)
        assert glm_batch_size_bound(x) == pytest.approx(expected, rel=1e-10)
        monkeypatch.setattr(data_bounds, "_LARGEST_GRAM", 0)
        assert glm_batch_size_bound(x) == pytest.approx(expected, rel=1e-10)
        assert glm_batch_size_bound(x.to_sparse()) == pytest.approx(expected, rel=1e-10)

    def test_a_flat_spectrum_is_resolved_too(self, monkeypatch):
        monkeypatch.setattr(data_bounds, "_LARGEST_GRAM", 0)
        x = torch.linalg.qr(drawn(60, 60))[0] * (1 + 1e-3 * torch.arange(60.0, dtype=torch.float64) / 60)
        assert data_bounds._largest_sq_singular_value(x) == pytest.approx((1 + 1e-3 * 59 / 60) ** 2, rel=1e-10)

    @pytest.mark.parametrize("x", [torch.zeros(3, 2), torch.ones(3), torch.full((2, 2), math.nan)])
    def test_what_has_no_bound_is_refused(self, x):
        with pytest.raises(ValueError, match="Expected argument `features` to be"):
            glm_batch_size_bound(x)


class TestPredictions:
    @pytest.mark.parametrize(("n", "d"), [(2000, 200), (1000, 1000), (400, 800)])
    def test_random_signs_come_to_it(self, n, d):
        signs = drawn(n, d).sign()
        assert glm_batch_size_bound(signs) == pytest.approx(rademacher_batch_size_bound(n, d), rel=0.04)

    @pytest.mark.parametrize(("n", "d"), [(2000, 500), (1000, 1000)])
    def test_normal_features_are_a_little_above_it(self, n, d):
        found, predicted = glm_batch_size_bound(drawn(n, d)), sub_gaussian_batch_size_bound(n, d)
        assert predicted <= found * 1.02
        assert predicted > 0.85 * found

    def test_both_grow_as_the_features_do(self):
        for predict in (rademacher_batch_size_bound, sub_gaussian_batch_size_bound):
            assert predict(10**6, 2000) / predict(10**6, 1000) == pytest.approx(2, rel=0.1)
        assert rademacher_batch_size_bound(100, 100) == pytest.approx(25)

    def test_few_features_say_nothing(self):
        assert sub_gaussian_batch_size_bound(10**6, 10) == 1.0


def brute_force_degree(supports: list[set[int]]) -> int:
    return max(sum(bool(a & b) for j, b in enumerate(supports) if j != i) for i, a in enumerate(supports))


class TestSparseConflicts:
    @pytest.mark.parametrize("seed", range(5))
    def test_no_gradients_with_these_supports_are_below_it(self, seed):
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(12, 20, generator=generator) < 0.1
        supports = [set(row.nonzero().flatten().tolist()) for row in mask]
        bound = sparse_batch_size_bound(mask)
        assert bound == 12 / (brute_force_degree(supports) + 1)
        assert bound == sparse_batch_size_bound([sorted(s) for s in supports])
        assert bound == sparse_batch_size_bound(mask.float().to_sparse())
        gradients = [drawn(12, 20, seed=s).abs() * mask for s in range(50)]
        assert min(float(batch_size_bound(g)) for g in gradients if g.any()) >= bound

    @pytest.mark.parametrize("r", [0, 1, 4])
    def test_groups_of_identical_examples_meet_it(self, r):
        gradients = torch.eye(3, dtype=torch.float64).repeat_interleave(r + 1, 0)
        assert sparse_batch_size_bound(gradients) == 3
        assert float(batch_size_bound(gradients)) == pytest.approx(3)

    def test_examples_without_a_gradient_conflict_with_none(self):
        assert sparse_batch_size_bound([[], [], [5]]) == 3

    def test_many_examples_go_in_parts(self, monkeypatch):
        mask = torch.rand(40, 30, generator=torch.Generator().manual_seed(0)) < 0.05
        whole = sparse_batch_size_bound(mask)
        monkeypatch.setattr(data_bounds, "_ROWS_AT_A_TIME", 7)
        assert sparse_batch_size_bound(mask) == whole
        assert whole == 40 / (brute_force_degree([set(row.nonzero().flatten().tolist()) for row in mask]) + 1)

    def test_no_example_is_refused(self):
        with pytest.raises(ValueError, match="Expected argument `supports`"):
            sparse_batch_size_bound([])
