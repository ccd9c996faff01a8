"""Refusals at the start, in one wording."""

from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException


def require(condition: bool, argument: str, expected: str, got: object) -> None:
    """Raise ValueError, naming the argument, unless the condition holds."""
    if not condition:
        raise ValueError(f"Expected argument `{argument}` to be {expected} but got {got!r}")


def require_replicated_parameters(strategy: Any, callback: str) -> None:
    """Refuse strategies under which a process does not hold whole parameters, or steps by itself.

    By name, since Lightning lives in two namespaces (``lightning.pytorch``, ``pytorch_lightning``).

    Raises:
        MisconfigurationException: the strategy is neither a single device nor DDP.
    """
    names = {base.__name__ for base in type(strategy).__mro__}
    is_supported = bool(names & {"SingleDeviceStrategy", "DDPStrategy"})
    if not is_supported or any("DeepSpeed" in name or "XLA" in name for name in names):
        raise MisconfigurationException(
            f"{callback} supports a single device and DDP, where each process holds whole parameters, but the strategy "
            f"is `{type(strategy).__name__}`: per-example gradients of sharded parameters would be wrong."
        )
