"""From what examples contribute to a step's gradient to their own gradients: the one place that knows of scales."""

from dataclasses import dataclass

from lightning_graddiv.diversity import GradientMoments


@dataclass(frozen=True)
class ContributionSums:
    """What the contributions c_i = a_i g_i of a step's examples add up to, over all processes.

    ``sum c_i`` is the gradient that the optimizer applies. For a mean loss ``a_i = 1 / (world k m)``, with m the size
    of i's micro-batch and k the divisor before its loss; for a sum ``a_i = 1 / (world k)``.

    Attributes:
        sum_sq_norms: ``sum |c_i|^2``.
        sq_norm_of_sum: ``|sum c_i|^2``.
        sum_weights: ``sum a_i``.
        sum_sq_weights: ``sum a_i^2``.
        group_sq_norms: ``sum_r |s_r|^2`` with s_r the sum of the contributions of process r; None where not known.
        group_sq_weights: ``sum_r A_r^2`` with A_r the sum of the weights of process r.
    """

    sum_sq_norms: float
    sq_norm_of_sum: float
    sum_weights: float
    sum_sq_weights: float
    group_sq_norms: float | None = None
    group_sq_weights: float | None = None

    @property
    def count(self) -> float:
        """``M_eff = (sum a)^2 / sum a^2``: of so many examples with equal weights the gradient has the noise (derived).

        A micro-batch of 8 beside one of 64 counts for more than it holds: M_eff = 28.4, not 72.
        """
        return self.sum_weights**2 / self.sum_sq_weights if self.sum_sq_weights > 0 else 0.0

    def moments(self) -> GradientMoments:
        """Return the moments of M_eff unit gradients, which have the same diversity.

        Raises:
            ValueError: a sum is not finite.
        """
        scale = (self.sum_weights / self.sum_sq_weights) ** 2
        is_grouped = self.group_sq_norms is not None and self.group_sq_weights is not None
        return GradientMoments(
            self.count,
            scale * self.sum_sq_norms,
            scale * self.sq_norm_of_sum,
            scale * self.group_sq_norms if is_grouped and self.group_sq_norms is not None else None,
            scale * self.group_sq_weights if is_grouped and self.group_sq_weights is not None else None,
        )
