"""Products of large matrices and vectors, on all threads of a processor: libraries compute them on one."""

import math

import torch
from torch import Tensor

from lightning_graddiv.per_example.devices import is_accelerator

_FEW = 2**20
"""Entries of a matrix that one thread has read by the time that the calls for another are made, in the midst of a pass:
on two threads 2^20 took it 296 us and both 302, half as many 80 and 118, three times as many 434 and 370."""


def matrix_vector(matrix: Tensor, vector: Tensor) -> Tensor:
    """Return ``matrix @ vector``, shape (rows,); the threads share the rows."""
    pieces = _pieces(matrix)
    if pieces == 1:
        return torch.mv(matrix, vector)
    shared = vector.expand(pieces, 1, -1)
    return torch.bmm(shared, matrix.view(pieces, -1, matrix.shape[1]).mT).view(-1)


def vector_matrix(vector: Tensor, matrix: Tensor) -> Tensor:
    """Return ``vector @ matrix``, shape (columns,); the threads share the rows."""
    pieces = _pieces(matrix)
    if pieces == 1:
        return torch.mv(matrix.T, vector)
    return torch.bmm(vector.view(pieces, 1, -1), matrix.view(pieces, -1, matrix.shape[1])).sum((0, 1))


def _pieces(matrix: Tensor) -> int:
    """Return into how many equal pieces the rows are divided."""
    if matrix.numel() <= _FEW or is_accelerator(matrix.device) or not matrix.is_contiguous():
        return 1
    return math.gcd(matrix.shape[0], torch.get_num_threads())
