"""Lemma 1 and what follows from it: what one mini-batch step is worth, and every published rule as one number."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_graddiv.theory._checks import check


def excess(batch_size: float, bound: float) -> float:
    """Lemma 1's ``delta = (B - 1) / B_S(w)``: by how much more noise a step of ``B`` has than ``B`` serial steps.

    The examples are drawn with replacement; see :func:`without_replacement_excess` for the other case.

    Args:
        batch_size: Effective batch size ``B``.
        bound: Batch-size bound ``B_S(w)``; ``inf`` gives 0.

    Raises:
        ValueError: If one of them is below 1.

    Example:
        >>> excess(101, 200)
        0.5

    """
    check(batch_size >= 1, "batch_size", "at least 1", batch_size)
    check(bound >= 1, "bound", "at least 1", bound)
    return (batch_size - 1) / bound


def without_replacement_excess(batch_size: float, bound: float, dataset_size: int) -> float:
    """Lemma 1's delta for a batch of distinct examples: ``(B-1)/(n-1) * (n/B_S - 1)`` (derived).

    That is what ``shuffle=True`` draws. The mean inner product of two *different* examples takes the place of
    ``|G|^2``: ``rho M2`` with ``rho = (n/B_S - 1) / (n - 1)``, hence ``delta = (B - 1) rho``. It is never above
    :func:`excess`, so that a rule on ``B_S`` is the conservative one, and negative where ``B_S > n``.

    Args:
        batch_size: Effective batch size ``B``, at most ``n``.
        bound: Batch-size bound ``B_S(w)`` of the whole data set.
        dataset_size: ``n``, at least 2.

    Raises:
        ValueError: If one of them is out of range.

    Example:
        >>> without_replacement_excess(51, 50, 101)  # excess: 1.0
        0.51

    """
    check(dataset_size >= 2, "dataset_size", "at least 2", dataset_size)
    check(1 <= batch_size <= dataset_size, "batch_size", f"between 1 and {dataset_size}", batch_size)
    check(bound >= 1, "bound", "at least 1", bound)
    return (batch_size - 1) / (dataset_size - 1) * (dataset_size / bound - 1)


def without_replacement_limit(delta: float, rho: float) -> float:
    """Largest ``B`` whose batches of distinct examples have an excess of at most ``delta``: ``delta / rho + 1``.

    Derived from :func:`without_replacement_excess`, ``delta = (B - 1) rho``; ``rho`` is that of
    :class:`~lightning_graddiv.DiversityEstimate`, whatever the size of the data set. ``rho <= 0`` sets no limit.
    """
    check(delta > 0, "delta", "positive", delta)
    return delta / rho + 1 if rho > 0 else float("inf")


def expected_sq_distance(
    sq_distance: float, progress: float, second_moment: float, *, step_size: float, batch_size: float, delta: float
) -> float:
    """Lemma 1: the expected squared distance to ``w*`` after one mini-batch step, exactly.

    ``E|w+ - w*|^2 = |w - w*|^2 - 2 gamma B <G, w - w*> + (1 + delta) gamma^2 B M2(w)``, for the step
    ``w+ = w - gamma * (sum of the batch's gradients)``.

    Args:
        sq_distance: ``|w - w*|^2``.
        progress: ``<G(w), w - w*>``, with ``G`` the gradient of the mean loss.
        second_moment: ``M2(w)``, the mean of ``|g_i|^2``.
        step_size: ``gamma``, on the *sum*: PyTorch's learning rate on a mean loss is ``gamma * B``.
        batch_size: ``B``.
        delta: :func:`excess`, or :func:`without_replacement_excess` for distinct examples.

    """
    drift = 2 * step_size * batch_size * progress
    return sq_distance - drift + (1 + delta) * step_size**2 * batch_size * second_moment


def gain(batch_size: float, bound: float) -> float:
    """Serial steps that one mini-batch step is worth: ``B B_S / (B_S + B - 1)`` (derived from Lemma 1).

    Lemma 1 gives a step of batch ``B`` the noise of ``1 + delta`` serial ones, ``delta = (B - 1) / B_S``,
    hence a gain of ``B / (1 + delta)``. It is about ``B`` while ``B << B_S`` and saturates at ``B_S``. AdaScale's
    ``r`` and Pollux's efficiency times ``B`` are the same number.

    Args:
        batch_size: Effective batch size ``B``, examples per optimizer step.
        bound: Batch-size bound ``B_S``; ``inf`` gives ``B``.

    Raises:
        ValueError: If one of them is below 1.

    Example:
        >>> gain(101, 100)
        50.5

    """
    return batch_size / (1 + excess(batch_size, bound))


def sample_efficiency(batch_size: float, bound: float) -> float:
    """What one example of a batch is worth, in examples of serial SGD: ``gain / B = 1 / (1 + delta)`` (derived).

    Arguments and errors are those of :func:`gain`.

    Example:
        >>> sample_efficiency(101, 100)
        0.5

    """
    return 1 / (1 + excess(batch_size, bound))


@dataclass(frozen=True)
class Dial:
    """Every published batch-size rule is a value of ``delta = (B - 1) / B_S``; this turns one into another (derived).

    The noise of a batch's mean gradient, ``tr(Sigma) / B``, against its signal ``|G|^2`` is ``N / B`` with the noise
    scale ``N = tr(Sigma) / |G|^2 = B_S - 1`` of a stream. Up to terms of order ``1 / B_S`` (there ``B / N`` stands for
    ``(B - 1) / B_S``)::

        noise-scale multiple   B / N           = delta
        norm test              N / B <= eta^2  at    delta = 1 / eta^2
        cosine of two halves   1 / (1 + 2 N/B) = delta / (delta + 2)
        sample efficiency      1 / (1 + delta)

    The norm test is a lower limit on B where Yin et al. set an upper one; both meet at equality.

    Args:
        delta: Positive.

    Raises:
        ValueError: If a number is out of range.

    Example:
        >>> Dial.from_cosine(0.75).delta, Dial.from_noise_scale_multiple(1).sample_efficiency
        (6.0, 0.5)

    """

    delta: float

    def __post_init__(self) -> None:
        check(self.delta > 0, "delta", "positive", self.delta)

    @classmethod
    def from_norm_test(cls, eta: float) -> Dial:
        """Norm test at ``eta``: the batch at which ``E|mean - G|^2 = eta^2 |G|^2`` (NE-GNS: theta = .6, 2.8)."""
        check(eta > 0, "eta", "positive", eta)
        return cls(1 / eta**2)

    @classmethod
    def from_cosine(cls, cosine: float) -> Dial:
        """Cosine ``phi`` between the mean gradients of the batch's two halves (SimiGrad: .75, 6)."""
        check(0 < cosine < 1, "cosine", "between 0 and 1", cosine)
        return cls(2 * cosine / (1 - cosine))

    @classmethod
    def from_noise_scale_multiple(cls, multiple: float) -> Dial:
        """``B`` as a multiple of McCandlish's simple noise scale (their advice: about 1)."""
        return cls(multiple)

    @classmethod
    def from_sample_efficiency(cls, efficiency: float) -> Dial:
        """Sample efficiency ``1 / (1 + delta)`` (Pollux's statistical efficiency)."""
        check(0 < efficiency < 1, "efficiency", "between 0 and 1", efficiency)
        return cls(1 / efficiency - 1)

    @property
    def norm_test(self) -> float:
        """``eta = 1 / sqrt(delta)``."""
        return 1 / math.sqrt(self.delta)

    @property
    def cosine(self) -> float:
        """``phi = delta / (delta + 2)``."""
        return self.delta / (self.delta + 2)

    @property
    def noise_scale_multiple(self) -> float:
        """``B / N = delta``."""
        return self.delta

    @property
    def sample_efficiency(self) -> float:
        """``1 / (1 + delta)``."""
        return 1 / (1 + self.delta)
