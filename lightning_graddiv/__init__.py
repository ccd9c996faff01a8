"""Gradient diversity for PyTorch Lightning: batches that grow as far as the gradients allow."""

__version__ = "0.1.0"
