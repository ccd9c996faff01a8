"""Watching every operator of a pass, and our own work within it, which is not to be watched."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode, _len_torch_dispatch_stack, _pop_mode, _push_mode


class OperatorMode(TorchDispatchMode):
    """Sees every operator below autograd and vmap, in passes that run eagerly.

    Without the wrapper that hides a mode from the compiler, which costs more than a small operator.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


@contextmanager
def modes_off() -> Iterator[None]:
    """Leave every mode for the block, and enter them again."""
    left = [_pop_mode() for _ in range(_len_torch_dispatch_stack())]
    try:
        yield
    finally:
        for mode in reversed(left):
            _push_mode(mode)
