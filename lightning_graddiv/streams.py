"""Random numbers that depend on a few counters and on nothing else: the same in a run that was resumed."""

import hashlib

import torch


def stream(*counters: int, device: torch.device | str = "cpu") -> torch.Generator:
    """Return a generator for these counters (a seed, a step, a process, ...), unrelated to that of any others.

    What it gives is independent of everything drawn before, so that a checkpoint needs the counters only, also where
    each process draws its own.
    """
    return torch.Generator(device=device).manual_seed(seed_of(*counters))


def seed_of(*counters: int) -> int:
    """Return a seed for these counters, between 0 and 2^32: NumPy takes no larger one."""
    digest = hashlib.blake2b(repr(counters).encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little")
