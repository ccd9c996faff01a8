"""Per-example gradients: a module and a batch in, gradient moments out."""

from lightning_graddiv.per_example.select import measure_moments, per_example_squared_norms

__all__ = ["measure_moments", "per_example_squared_norms"]
