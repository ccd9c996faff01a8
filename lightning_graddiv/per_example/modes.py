"""Watching every operator of a pass, and our own work within it, which is neither watched nor differentiated."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch._C import _len_torch_dispatch_stack
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

Result = TypeVar("Result")


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


@contextmanager
def own_work() -> Iterator[None]:
    """Leave every mode for the block, and enter them again; build no graph."""
    left = [_pop_mode() for _ in range(_len_torch_dispatch_stack())]
    try:
        with torch.no_grad():
            yield
    finally:
        for mode in reversed(left):
            _push_mode(mode)


def as_own_work(function: Callable[..., Result], *arguments: Any) -> Result:
    """Call a function within :func:`own_work`: with few calls where no mode was entered, as in most training steps."""
    if _len_torch_dispatch_stack() > 0:
        with own_work():
            return function(*arguments)
    if not torch.is_grad_enabled():  # as in most backward passes
        return function(*arguments)
    torch._C._set_grad_enabled(False)
    try:
        return function(*arguments)
    finally:
        torch._C._set_grad_enabled(True)
