"""The paper's results as functions of numbers and tensors; each says under which conditions it holds.

Source: Yin et al., "Gradient Diversity: a Key Ingredient for Scalable Distributed Learning" (AISTATS 2018, arXiv
1706.05699). Theorem numbers are those of AISTATS unless arXiv is said; "derived" marks what the paper does not state.
"""

from lightning_graddiv.theory.convergence import (
    Guarantee,
    convex_guarantee,
    polyak_lojasiewicz_guarantee,
    smooth_guarantee,
    strongly_convex_guarantee,
)
from lightning_graddiv.theory.data_bounds import (
    glm_batch_size_bound,
    rademacher_batch_size_bound,
    sparse_batch_size_bound,
    sub_gaussian_batch_size_bound,
)
from lightning_graddiv.theory.efficiency import (
    Dial,
    excess,
    expected_sq_distance,
    gain,
    sample_efficiency,
    without_replacement_excess,
    without_replacement_limit,
)
from lightning_graddiv.theory.lower_bound import LowerBoundProblem, lower_bound_error
from lightning_graddiv.theory.mechanisms import (
    MechanismEffect,
    drop_connect_batch_size_bound,
    langevin_batch_size_bound,
    mechanism_batch_size_bound,
    quantization_factor,
    quantized_batch_size_bound,
)
from lightning_graddiv.theory.stability import (
    differential_batch_size_bound,
    differential_diversity,
    stability_bound,
    stability_learning_rate_cap,
    stability_step_size,
)

__all__ = [
    "Dial",
    "Guarantee",
    "LowerBoundProblem",
    "MechanismEffect",
    "convex_guarantee",
    "differential_batch_size_bound",
    "differential_diversity",
    "drop_connect_batch_size_bound",
    "excess",
    "expected_sq_distance",
    "gain",
    "glm_batch_size_bound",
    "langevin_batch_size_bound",
    "lower_bound_error",
    "mechanism_batch_size_bound",
    "polyak_lojasiewicz_guarantee",
    "quantization_factor",
    "quantized_batch_size_bound",
    "rademacher_batch_size_bound",
    "sample_efficiency",
    "smooth_guarantee",
    "sparse_batch_size_bound",
    "stability_bound",
    "stability_learning_rate_cap",
    "stability_step_size",
    "strongly_convex_guarantee",
    "sub_gaussian_batch_size_bound",
    "without_replacement_excess",
    "without_replacement_limit",
]
