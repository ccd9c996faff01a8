"""Accumulation windows that may begin at any batch."""


class OffsetInt(int):
    """A number of batches whose multiples are counted from ``origin``: ``(batch_idx % n)`` is 0 at ``origin + i * n``.

    Lightning asks ``batch_idx % trainer.accumulate_grad_batches`` where a window begins and where it ends, and so do
    users. A plain number can open a window only at its own multiples: it cannot begin one right after what the workers
    have prefetched, nor give the last window of an epoch the number of micro-batches that it has. In any other
    arithmetic it is the number itself.

    Args:
        number: batches, at least 1.
        origin: a batch where a window begins.
    """

    origin: int

    def __new__(cls, number: int, origin: int) -> "OffsetInt":
        """Make the number."""
        made = super().__new__(cls, number)
        made.origin = origin
        return made

    def __rmod__(self, other: int) -> int:
        return (other - self.origin) % int(self)

    def __getnewargs__(self) -> tuple[int, int]:  # type: ignore[override]
        return int(self), self.origin


def every(number: int, origin: int) -> int:
    """Return a number whose multiples are counted from ``origin``; a plain one where that makes no difference."""
    return number if origin % number == 0 else OffsetInt(number, origin)
