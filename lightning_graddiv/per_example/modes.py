"""Watching every operator of a pass, and our own work within it, which is neither watched nor differentiated."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode


class OperatorMode(TorchDispatchMode):
    """Sees every operator below autograd and vmap, in passes that run eagerly.

    Without the wrapper that hides a mode from the compiler, which costs more than a small operator.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def own_work() -> AbstractContextManager[None]:
    """Leave every mode for the block, and enter them again; build no graph."""
    is_plain = _len_torch_dispatch_stack() == 0 and not torch.is_grad_enabled()  # as in most backward passes
    return _ALREADY if is_plain else _left_alone()


_ALREADY = nullcontext()


@contextmanager
def _left_alone() -> Iterator[None]:
    left = [_pop_mode() for _ in range(_len_torch_dispatch_stack())]
    try:
        with torch.no_grad():
            yield
    finally:
        for mode in reversed(left):
            _push_mode(mode)
