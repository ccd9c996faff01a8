"""How many distinct examples a training loader draws from."""

from typing import Any

from torch.utils.data import DistributedSampler, IterableDataset, RandomSampler, SequentialSampler

from lightning_graddiv.batching.sampler import draws_plainly


def distinct_examples(loader: Any, batches: float, processes: int) -> int | None:
    """Return the number of distinct examples that are drawn without replacement; None for a stream, or if unknown.

    Args:
        loader: what the trainer trains on.
        batches: batches per epoch and process. In a fixed order, the examples after those are never seen.
        processes: the number of processes.
    """
    if not draws_plainly(loader) or isinstance(loader.dataset, IterableDataset):
        return None
    if processes > 1 and not isinstance(loader.batch_sampler.sampler, DistributedSampler):
        return None  # shared out by hand: whether the processes' data sets are parts or copies cannot be known
    sampler = _innermost(loader.batch_sampler.sampler)
    total = len(loader.dataset)
    if type(sampler) is RandomSampler:
        return total if not sampler.replacement and sampler.num_samples <= total else None
    if type(sampler) is DistributedSampler and sampler.shuffle:
        return total
    if type(sampler) in (SequentialSampler, DistributedSampler):
        return int(min(total, batches * loader.batch_sampler.batch_size * processes))
    return None


def _innermost(sampler: Any) -> Any:
    """Return the user's sampler where Lightning has wrapped it to share it out among processes."""
    wrapped = getattr(getattr(sampler, "dataset", None), "_sampler", None)
    return sampler if wrapped is None else wrapped
