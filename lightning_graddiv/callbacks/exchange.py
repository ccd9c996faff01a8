"""A DDP communication hook that exchanges whole worker gradients instead of reducing them bucket by bucket."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

Exchange = Callable[[list[Tensor]], list[Tensor]]
"""From this process's gradients, parameter by parameter, to what all processes apply instead of their mean."""


class WorkerExchange:
    """Collects DDP's buckets of one backward pass, and exchanges them at once, in the order of the module.

    The order of the buckets changes after the first backward pass and so would random numbers drawn for each bucket; a
    resumed run would not be the same.

    Args:
        parameters: of the module, in its order.
        exchange: called once for each backward pass that is synchronised, on every process.
        needs_mean: asked then, alike on every process, whether the plain mean is wanted as well: at the cost of a
            reduction, ``.grad`` becomes that, and what :attr:`replacements` holds is to be put there later.
        callback: whose name is said in errors.

    Attributes:
        replacements: gradients by the parameter's ``id``.
    """

    def __init__(
        self, parameters: Sequence[Tensor], exchange: Exchange, needs_mean: Callable[[], bool], callback: str
    ) -> None:
        self.replacements: dict[int, Tensor] = {}
        self._order = {id(parameter): i for i, parameter in enumerate(parameters)}
        self._exchange = exchange
        self._needs_mean = needs_mean
        self._callback = callback
        self._pending: list[tuple[Any, Any]] = []

    def attach(self, strategy: Any) -> None:
        """Become the hook of the strategy's model.

        Raises:
            MisconfigurationException: it has one already.
        """
        model = strategy.model
        if getattr(strategy, "_ddp_comm_hook", None) is not None or model._comm_hooks:
            raise MisconfigurationException(
                f"{self._callback} exchanges gradients by a DDP communication hook, but there is one already and DDP "
                "takes no second: remove `ddp_comm_hook` from the strategy."
            )
        model.register_comm_hook(self, lambda exchange, bucket: exchange._on_bucket(bucket))

    def _on_bucket(self, bucket: Any) -> Any:
        buffer = bucket.buffer()
        devices = [] if buffer.device.type == "cpu" else [buffer.device]
        future: Any = torch.futures.Future(devices=devices)
        self._pending.append((bucket, future))
        if bucket.is_last():
            pending, self._pending = self._pending, []
            self._finish(pending)
        return future

    def _finish(self, pending: list[tuple[Any, Any]]) -> None:
        found = [
            (self._order[id(parameter)], parameter, gradient)
            for bucket, _ in pending
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]
        found.sort(key=lambda item: item[0])
        applied = self._exchange([gradient for _, _, gradient in found])
        if self._needs_mean():
            self.replacements = {id(parameter): new for (_, parameter, _), new in zip(found, applied, strict=True)}
            for bucket, _ in pending:
                dist.all_reduce(bucket.buffer().div_(dist.get_world_size()))
        else:
            for (_, _, gradient), new in zip(found, applied, strict=True):
                gradient.copy_(new)
        for bucket, future in pending:
            future.set_result(bucket.buffer())


def is_distributed(strategy: Any) -> bool:
    """Tell whether the strategy's processes reduce gradients through DDP."""
    return isinstance(strategy.model, DistributedDataParallel)
