"""Out of memory: how to tell it, and what to say of it in a real step."""

from collections.abc import Iterator

import torch
from lightning.pytorch.utilities.memory import is_oom_error

from lightning_graddiv.batching.resizer import BatchResizer


def is_out_of_memory(error: BaseException) -> bool:
    """Tell an error for want of memory, also where it is the cause of another."""
    return any(isinstance(e, (torch.OutOfMemoryError, MemoryError)) or is_oom_error(e) for e in _causes(error))


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def name_cures(error: BaseException, resizer: BatchResizer, earlier: list[int], engine: str | None) -> None:
    """Say in the message of an error for want of memory what of ours took memory, and how to make that less.

    Args:
        error: changed in place; whoever raises it goes on with the same object.
        resizer: of the batch that was trained on.
        earlier: the effective batch sizes before.
        engine: that was measuring the step; None if none was.
    """
    said = [_smaller_micro_batch(resizer, earlier)] if resizer.has_larger_micro_batch else []
    if engine is not None:
        said.append(
            f"AdaptiveBatchSize: this step was being measured (engine `{engine}`), which takes memory of its own. "
            'Measure fewer examples (`engine="functional"` with `max_examples`), or leave more room; a larger '
            "`every_n_steps` measures more rarely, but with as much memory."
        )
    if said:
        first, *rest = error.args or ("",)
        error.args = ("\n".join([str(first), *said]), *rest)


def _smaller_micro_batch(resizer: BatchResizer, earlier: list[int]) -> str:
    now, own = resizer.plan.micro_batch_size, resizer.known_base.micro_batch_size
    trained = max([own, *(size for size in map(resizer.micro_batch_of, earlier) if size < now)])
    return (
        f"AdaptiveBatchSize: this happened with a micro-batch of {now} examples, which has grown from {own}. Set "
        f"`max_micro_batch_size={trained}`, the last that was trained on before: gradient accumulation makes up the "
        "effective batch, also when training goes on from a checkpoint."
    )
