"""Gradient diversity for PyTorch Lightning: a training run that measures, and chooses, its own batch size."""

from lightning_graddiv.callbacks.adaptive_batch_size import AdaptiveBatchSize
from lightning_graddiv.callbacks.finder import BatchSizeBoundFinder
from lightning_graddiv.callbacks.growth import Growth
from lightning_graddiv.callbacks.mechanisms import DropConnect, GradientQuantization, LangevinNoise
from lightning_graddiv.callbacks.monitor import GradientDiversityMonitor
from lightning_graddiv.callbacks.stability import DifferentialDiversityMonitor
from lightning_graddiv.differential import (
    DifferentialMoments,
    LearningRateCap,
    StabilityEstimate,
    estimate_stability,
)
from lightning_graddiv.diversity import (
    DiversityEstimate,
    GradientMoments,
    GradientSums,
    batch_size_bound,
    estimate_diversity,
    gradient_diversity,
)
from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.finder import find_batch_size
from lightning_graddiv.finding import BatchSizeFinding
from lightning_graddiv.metric import BatchSizeBound, GradientDiversity
from lightning_graddiv.per_example import measure_moments, per_example_squared_norms
from lightning_graddiv.policies import (
    CABS,
    DiversityBound,
    Doubling,
    Goodput,
    NoiseScale,
    NormTest,
    Policy,
    RunState,
)

__version__ = "0.1.0"

__all__ = [
    "CABS",
    "AdaptiveBatchSize",
    "BatchSizeBound",
    "BatchSizeBoundFinder",
    "BatchSizeFinding",
    "DifferentialDiversityMonitor",
    "DifferentialMoments",
    "DiversityBound",
    "DiversityEstimate",
    "Doubling",
    "DropConnect",
    "Goodput",
    "GradientDiversity",
    "GradientDiversityMonitor",
    "GradientMoments",
    "GradientQuantization",
    "GradientSums",
    "Growth",
    "LangevinNoise",
    "LearningRateCap",
    "MeasurementError",
    "NoiseScale",
    "NormTest",
    "Policy",
    "RunState",
    "StabilityEstimate",
    "batch_size_bound",
    "estimate_diversity",
    "estimate_stability",
    "find_batch_size",
    "gradient_diversity",
    "measure_moments",
    "per_example_squared_norms",
]
