"""The paper's random quantisation, as a message between processes: one norm, and where the signs are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_graddiv.distributed import world_size
from lightning_graddiv.per_example.norms import real_view
from lightning_graddiv.streams import stream


@dataclass(frozen=True)
class QuantizedMean:
    """The mean over the processes of their quantised vectors.

    Attributes:
        gradients: of the shapes that were given, the same bits on every process.
        variance: ``E|mean - mean of the vectors|^2`` over the random numbers: ``sum_r (|v_r|_2 |v_r|_1 - |v_r|_2^2)``
            over the squared number of processes.
    """

    gradients: list[Tensor]
    variance: float


def quantized_mean(gradients: Sequence[Tensor], *counters: int) -> QuantizedMean:
    """Quantise each process's vector and average over processes. Every process must call this.

    ``[Q(v)]_l = |v|_2 sign(v_l) eta_l`` with independent ``P(eta_l = 1) = |v_l| / |v|_2``, ``v`` all gradients of the
    process together: unbiased, with about ``|v|_1 / |v|_2 <= sqrt(d)`` entries that are not zero. Only those cross
    processes, as signed positions. Each process adds up the same messages in the same order. Infinities and NaN of one
    process become NaN on all.

    Args:
        gradients: this process's, not empty.
        counters: of the random numbers; other ones on each process.
    """
    flat = [real_view(gradient).flatten() for gradient in gradients]
    dtype = torch.promote_types(torch.float32, max((g.dtype for g in flat), key=lambda d: torch.finfo(d).bits))
    device = flat[0].device
    norm = torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64).square() for g in flat]).sum().sqrt()
    absolute = torch.stack([torch.linalg.vector_norm(g, 1, dtype=torch.float64) for g in flat]).sum()
    positions = _signed_positions(flat, norm, counters) if bool(norm.isfinite()) else flat[0].new_zeros(0).long()
    numbers = torch.stack([norm, absolute, norm.new_tensor(float(len(positions)))])
    messages = _gathered(numbers, positions)
    mean = torch.zeros(sum(len(g) for g in flat), dtype=dtype, device=device)
    variance = 0.0
    for (length, total, _), signed in messages:
        if not torch.isfinite(torch.tensor(length, device="cpu")):
            mean.fill_(float("nan"))
            continue
        mean[signed.abs() - 1] += signed.sign().to(dtype) * (length / len(messages))  # no position comes twice
        variance += (length * total - length**2) / len(messages) ** 2
    parts = mean.split([len(g) for g in flat])
    return QuantizedMean(
        [_shaped(part, gradient) for part, gradient in zip(parts, gradients, strict=True)], max(0.0, variance)
    )


def _signed_positions(flat: Sequence[Tensor], norm: Tensor, counters: tuple[int, ...]) -> Tensor:
    """Return ``sign(v_l) * (l + 1)`` for each l with ``eta_l = 1``."""
    found, start = [], 0
    for index, entries in enumerate(flat):
        # In float64: 24 bits would round every probability up to 6e-8, and a million small ones with it.
        draws = torch.rand(
            len(entries),
            generator=stream(*counters, index, device=entries.device),
            dtype=torch.float64,
            device=entries.device,
        )
        chosen = (draws * norm < entries.abs()).nonzero().flatten()
        found.append(entries[chosen].sign().long() * (chosen + start + 1))
        start += len(entries)
    return torch.cat(found)


def _gathered(numbers: Tensor, positions: Tensor) -> list[tuple[list[float], Tensor]]:
    """Return each process's numbers and positions, in the order of the processes."""
    world = world_size()
    if world == 1:
        return [(numbers.tolist(), positions)]
    all_numbers = [torch.empty_like(numbers) for _ in range(world)]
    dist.all_gather(all_numbers, numbers)
    lists = [own.tolist() for own in all_numbers]
    counts = [int(own[2]) for own in lists]
    padded = positions.new_zeros(max(1, *counts))
    padded[: len(positions)] = positions
    everybody = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(everybody, padded)
    return [(own, signed[:count]) for own, signed, count in zip(lists, everybody, counts, strict=True)]


def _shaped(part: Tensor, like: Tensor) -> Tensor:
    entries = part.to(torch.empty(0, dtype=like.dtype, device="cpu").real.dtype if like.is_complex() else like.dtype)
    return torch.view_as_complex(entries.view(*like.shape, 2)) if like.is_complex() else entries.view(like.shape)
