"""What differs between a processor and an accelerator, on which calls cost more than the work of most of them."""

import torch

_PROCESSORS = frozenset({"cpu"})
"""Types of devices on which a call costs little."""

_CHUNK_BYTES = 4 * 2**20
"""Temporary numbers that are held at a time: on a processor, what its allocator keeps rather than gives back."""

_ACCELERATOR_CHUNK_BYTES = 96 * 2**20
"""A tenth of what a small residual network trains with, at which larger chunks begin to be seen."""


def is_accelerator(device: torch.device) -> bool:
    """Tell whether few calls matter more than little work."""
    return device.type not in _PROCESSORS


def chunk_bytes(device: torch.device) -> int:
    """Return how much memory temporary numbers may take."""
    return _ACCELERATOR_CHUNK_BYTES if is_accelerator(device) else _CHUNK_BYTES
