"""Gradient diversity for PyTorch Lightning: a training run that measures, and chooses, its own batch size."""

from lightning_graddiv.callbacks.adaptive_batch_size import AdaptiveBatchSize
from lightning_graddiv.callbacks.growth import Growth
from lightning_graddiv.callbacks.monitor import GradientDiversityMonitor
from lightning_graddiv.diversity import (
    DiversityEstimate,
    GradientMoments,
    GradientSums,
    batch_size_bound,
    estimate_diversity,
    gradient_diversity,
)
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.metric import BatchSizeBound, GradientDiversity
from lightning_graddiv.per_example import measure_moments, per_example_squared_norms
from lightning_graddiv.policies import DiversityBound, Policy, RunState

__version__ = "0.1.0"

__all__ = [
    "AdaptiveBatchSize",
    "BatchSizeBound",
    "DiversityBound",
    "DiversityEstimate",
    "GradientDiversity",
    "GradientDiversityMonitor",
    "GradientMoments",
    "GradientSums",
    "Growth",
    "MeasurementError",
    "Policy",
    "RunState",
    "batch_size_bound",
    "estimate_diversity",
    "gradient_diversity",
    "measure_moments",
    "per_example_squared_norms",
]
