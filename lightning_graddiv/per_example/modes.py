"""Watching every operator of a pass, and our own work within it, which is neither watched nor differentiated."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

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

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return self.call(func, args, kwargs or {})

    @abstractmethod
    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an operator that the pass comes to, or not, and return what the pass goes on with."""


def own_work() -> AbstractContextManager[None]:
    """Leave every mode for the block, and enter them again; build no graph."""
    if _len_torch_dispatch_stack() > 0:
        return _left_alone()
    return _WITHOUT_GRAPH if torch.is_grad_enabled() else _ALREADY  # the latter in most backward passes


class _WithoutGraph:
    """What ``torch.no_grad()`` does where a graph is built, in a tenth of the calls."""

    def __enter__(self) -> None:
        torch._C._set_grad_enabled(False)

    def __exit__(self, *_: object) -> None:
        torch._C._set_grad_enabled(True)


_WITHOUT_GRAPH = _WithoutGraph()
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
