"""A batch sampler that draws whole accumulation windows, and whose sizes may change in the middle of a pass."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any, NamedTuple

from lightning.fabric.utilities.data import sized_len
from lightning_utilities.core.rank_zero import rank_zero_warn
from torch import Generator
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, Sampler

from lightning_graddiv.batching.plan import BatchPlan
from lightning_graddiv.batching.position import PassOrigin, PassPlace, mark
from lightning_graddiv.random_states import RandomStates

_ANOTHER_ORDER = (
    "AdaptiveBatchSize: the epoch that goes on after the checkpoint is drawn by `{sampler}` in another order than "
    "before it, so that some of its examples come twice and others not at all. Let the order follow from the epoch "
    "alone (a sampler with `set_epoch`) or from torch's, NumPy's or Python's global generator, the same on every "
    "process; or checkpoint at the end of epochs."
)


@dataclass(frozen=True)
class Window:
    """The micro-batches of one optimizer step on this process.

    Attributes:
        plan: what they were drawn by.
        sizes: examples in each.
    """

    plan: BatchPlan
    sizes: tuple[int, ...]


class Drawn(NamedTuple):
    """A micro-batch on its way to the trainer: its examples, and the mark of its last item."""

    examples: int
    last: int


class Pass(Iterator[Any]):
    """One pass over the data, window by window.

    Attributes:
        plan: of the windows that it draws now.
        origin: how it began; None before its first item is drawn, and if the sampler does not record.
        emitted: micro-batches drawn so far. Workers prefetch: the trainer may have seen fewer.
        windows: those drawn that the trainer has not begun yet, if the sampler records.
        drawn: the micro-batches drawn that the trainer has not begun yet, likewise.
    """

    def __init__(self, sampler: "AdaptiveBatchSampler") -> None:
        self.plan = sampler.plan
        self.emitted = 0
        self.origin: PassOrigin | None = None
        self.windows: deque[Window] = deque()
        self.drawn: deque[Drawn] = deque()
        self._sampler = sampler
        self._splits_tail = sampler.splits_tail
        self._total = sized_len(sampler.counted)
        self._items_taken = 0
        self._open: deque[int] = deque()
        self._items: Iterator[Any] | None = None
        self._change: tuple[BatchPlan, int] | None = None
        self._place: PassPlace | None = None

    def __next__(self) -> Any:
        """Return the indices of the next micro-batch."""
        if self._items is None:  # not before: samplers take their random numbers here
            self._items = self._begun()
        if not self._open:
            self._open_window()
        wanted = self._open.popleft() // self._sampler.item_size
        items = list(islice(self._items, wanted))
        if not items or (len(items) < wanted and self._sampler.drop_last):
            raise StopIteration
        batch = _merged(items) if self._sampler.merges else items
        self.emitted += 1
        self._items_taken += len(items)
        if self._sampler.records:
            self.drawn.append(Drawn(len(batch), mark(items[-1])))
        return batch

    @property
    def begins_after(self) -> int:
        """The examples that it leaves out at its beginning, since they are in optimizer steps already."""
        return 0 if self._place is None else self._place.examples

    @property
    def boundary(self) -> int:
        """The first micro-batch of a window that is not drawn yet."""
        return self.emitted + len(self._open)

    def left(self, at: int) -> int | None:
        """Return how many examples are left from micro-batch ``at`` on, under the present plan; None for a stream."""
        if self._total is None:
            return None
        windows_between = (at - self.boundary) * self.plan.micro_batch_size
        not_drawn = (self._total - self._items_taken) * self._sampler.item_size
        return max(0, not_drawn - sum(self._open) - windows_between)

    def batches_left(self, plan: BatchPlan, at: int) -> int | None:
        """Return how many micro-batches of ``plan`` the examples from micro-batch ``at`` on make; None for a stream."""
        left = self.left(at)
        return None if left is None else _batches(left, plan.micro_batch_size, self._sampler.drop_last)

    def change(self, plan: BatchPlan, at: int) -> None:
        """Draw by another plan from micro-batch ``at`` on, where a window begins that is not drawn yet."""
        self._change = plan, at

    def _begun(self) -> Iterator[Any]:
        """Begin to draw items: the first ones, or those that a checkpoint has left."""
        sampler = self._sampler  # loaders with workers begin two passes and draw by the second
        self._place, sampler.place = sampler.place, None
        self._change, sampler.change = sampler.change or self._change, None
        if self._place is not None:
            return self._gone_on(self._place)
        if not self._sampler.records:
            return iter(self._sampler.source)
        generators = self._sampler.generators
        before = RandomStates.now(generators)
        items, first = self._first()
        drew = not before.is_equal_to(RandomStates.now(generators))
        self.origin = PassOrigin(mark(first), before if drew else None)
        return items

    def _gone_on(self, place: PassPlace) -> Iterator[Any]:
        """Draw the items of an earlier pass again and leave out those that are in optimizer steps already."""
        origin, taken = place.origin, -(-place.examples // self._sampler.item_size)
        self.origin, self._items_taken = origin, taken
        with _as_then(origin, self._sampler.generators):
            items, first = self._first()
            is_same = origin.is_known and origin.first in (None, mark(first))
            last = place.last
            for item in islice(items, taken if is_same else 0):
                last = mark(item)
        if not is_same or place.last not in (None, last):
            rank_zero_warn(_ANOTHER_ORDER.format(sampler=type(self._sampler.source).__name__))
        return items

    def _first(self) -> tuple[Iterator[Any], list[Any]]:
        """Begin with the source; return all of its items, and the first in a list, which is empty if there is none."""
        items = iter(self._sampler.source)
        first = list(islice(items, 1))
        return chain(first, items), first

    def _open_window(self) -> None:
        if self._change is not None and self.emitted >= self._change[1]:
            self.plan, self._change, self._splits_tail = self._change[0], None, True
        sizes = self._sizes()
        self._open.extend(sizes)
        if self._sampler.records:
            self.windows.append(Window(self.plan, tuple(sizes)))

    def _sizes(self) -> list[int]:
        """Return the sizes of a window's micro-batches: equal, and in an epoch's last window as equal as can be."""
        size, count = self.plan.micro_batch_size, self.plan.accumulate
        left = self.left(self.boundary)
        if not self._splits_tail or not left or left >= size * count:
            return [size] * count
        if self._sampler.drop_last:
            return [size] * max(1, left // size)
        batches, item = -(-left // size), self._sampler.item_size
        items = left // item
        return [item * (items // batches + (i < items % batches)) for i in range(batches)]


class AdaptiveBatchSampler(Sampler[Any]):
    """Draws what ``torch.utils.data.BatchSampler`` draws, until its plan changes.

    It can also merge the batches of another batch sampler, several to one. It runs in the main process also when
    workers load the data, so that a new size needs no message to them. It takes no random numbers of its own: with an
    unchanged size, training is bit-identical.

    Args:
        source: yields indices; its length may be unknown. If ``merges``: yields batches, each a list of indices.
        batch_size: examples per batch, at least 1; of ``source`` if ``merges``.
        drop_last: leave out a last batch that is not full.
        counted: its length is the number of items of a pass; None: that of ``source``.
        records: keep what was drawn until the trainer takes it; see :class:`Pass`.
        merges: ``source`` is a batch sampler. What else is asked of this one is asked of that.
        generators: that ``source`` may draw from.

    Attributes:
        plan: of the passes to come.
        splits_tail: whether those share out the examples of an epoch's last window equally.
        own_batch_size: examples in a micro-batch to begin with.
        batch_size: examples in a micro-batch that is not the last, as it is trained on now.
        item_size: examples in an item of ``source`` that is not the last.
        trained_on: examples in the micro-batch that is trained on now; None where that is not known.
        latest: the pass begun last; None before the first.
        place: where the next pass to be drawn from goes on, after a checkpoint; None: at its beginning.
        change: another plan for that pass, and the micro-batch from which on it holds; see :meth:`Pass.change`.
    """

    def __init__(
        self,
        source: Iterable[Any],
        batch_size: int,
        drop_last: bool,
        *,
        counted: Any = None,
        records: bool = False,
        merges: bool = False,
        generators: Sequence[Generator] = (),
    ) -> None:
        if not merges:
            self.sampler = source
        self.source = source
        self.merges = merges
        self.item_size = batch_size if merges else 1
        self.counted = source if counted is None else counted
        self.own_batch_size = self.batch_size = batch_size
        self.drop_last = drop_last
        self.records = records
        self.generators = generators
        self.plan = BatchPlan(batch_size)
        self.splits_tail = False
        self.trained_on: int | None = None
        self.latest: Pass | None = None
        self.place: PassPlace | None = None
        self.change: tuple[BatchPlan, int] | None = None

    def __getattr__(self, name: str) -> Any:
        """Be also what the user's batch sampler is: its sampler, its ``set_epoch``."""
        if name.startswith("__") or not vars(self).get("merges"):
            raise AttributeError(f"`{type(self).__name__}` has no attribute `{name}`")
        return getattr(self.source, name)

    def __iter__(self) -> Pass:
        """Begin a pass."""
        self.latest = Pass(self)
        return self.latest

    def __len__(self) -> int:
        """Return the number of micro-batches of a whole pass by the present plan.

        Raises:
            TypeError: the source has no length.
        """
        examples = len(self.source) * self.item_size  # type: ignore[arg-type]
        return _batches(examples, self.plan.micro_batch_size, self.drop_last)


def draws_plainly(loader: Any) -> bool:
    """Tell whether the loader makes each batch of the next indices of a sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    is_ours = isinstance(batch_sampler, AdaptiveBatchSampler) and not batch_sampler.merges
    return isinstance(loader, DataLoader) and (is_ours or type(batch_sampler) is BatchSampler)


def draws_mergeably(loader: Any) -> bool:
    """Tell whether the loader draws by another batch sampler, that says the size and the number of its batches."""
    if not isinstance(loader, DataLoader) or loader.batch_sampler is None or draws_plainly(loader):
        return False
    size = drawn_batch_size(loader)
    return size is not None and size > 0 and sized_len(loader.batch_sampler) is not None


def is_followed(loader: Any) -> bool:
    """Tell whether an adaptable loader's batches arrive one for one, in the order in which they were drawn.

    Not so where workers share a stream, each of which ends by itself, where they hand over what is ready first, or
    where a subclass iterates in its own way.
    """
    is_plain = type(loader).__iter__ is DataLoader.__iter__
    in_order = loader.num_workers == 0 or getattr(loader, "in_order", True)
    return is_plain and in_order and (loader.num_workers == 0 or not isinstance(loader.dataset, IterableDataset))


def drawn_batch_size(loader: Any) -> int | None:
    """Return how many examples the loader draws for one full batch; None where it does not say."""
    size = getattr(_batch_sampler(loader), "batch_size", None)
    return size if isinstance(size, int) else None


def drawn_examples(loader: Any, batch_idx: int) -> int | None:
    """Return how many examples batch ``batch_idx`` of a pass holds; None where the loader does not say its size."""
    sampler, size = _batch_sampler(loader), drawn_batch_size(loader)
    if size is None:
        return None
    known: int | None = getattr(sampler, "trained_on", None)
    if known is not None:
        return known
    try:
        left = len(sampler.sampler) - batch_idx * size
    except (AttributeError, TypeError):  # not a plain batch sampler, or a stream
        return size
    return left if 0 < left < size else size


def _batch_sampler(loader: Any) -> Any:
    """Return what draws batches; with ``batch_size=None`` that may have been passed as the sampler."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    return getattr(loader, "sampler", None) if batch_sampler is None else batch_sampler


def _batches(examples: int, size: int, drop_last: bool) -> int:
    batches, rest = divmod(examples, size)
    return batches + bool(rest and not drop_last)


def _as_then(origin: PassOrigin, generators: Sequence[Generator]) -> AbstractContextManager[None]:
    return nullcontext() if origin.random is None else origin.random.restored(generators)


def _merged(batches: list[Any]) -> Any:
    """Return one batch of all examples; a single batch as it is."""
    is_single = len(batches) == 1 and isinstance(batches[0], Sized)
    return batches[0] if is_single else [index for batch in batches for index in batch]
