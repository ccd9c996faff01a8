"""How an effective batch is made: micro-batch x accumulation x processes."""

from dataclasses import dataclass


@dataclass(frozen=True)
class BatchPlan:
    """An effective batch size, taken apart.

    Attributes:
        micro_batch_size: examples in one forward pass of one process.
        accumulate: micro-batches per optimizer step.
        world_size: processes.
    """

    micro_batch_size: int
    accumulate: int = 1
    world_size: int = 1

    def __str__(self) -> str:
        return f"micro-batch {self.micro_batch_size} x accumulation {self.accumulate} x processes {self.world_size}"

    @property
    def batch_size(self) -> int:
        """Examples per optimizer step."""
        return self.micro_batch_size * self.accumulate * self.world_size

    def resized(self, batch_size: int, max_micro_batch_size: int, multiple_of: int = 1) -> "BatchPlan | None":
        """Return the plan of another effective batch size, with the largest micro-batch that divides it.

        Args:
            batch_size: the new effective batch size.
            max_micro_batch_size: the most examples that one process takes at a time, at least ``multiple_of``.
            multiple_of: every micro-batch is a multiple of it.

        Returns:
            The plan; None if the processes cannot share the batch equally, in such multiples.
        """
        items, rest = divmod(batch_size, self.world_size * multiple_of)
        if rest or items < 1:
            return None
        accumulate = -(-items // (max_micro_batch_size // multiple_of))
        while items % accumulate:
            accumulate += 1
        return BatchPlan(items // accumulate * multiple_of, accumulate, self.world_size)

    def accumulated(self, batch_size: int) -> "BatchPlan | None":
        """Return the plan of another effective batch size with the same micro-batch; None if it is no multiple."""
        accumulate, rest = divmod(batch_size, self.micro_batch_size * self.world_size)
        return None if rest or accumulate < 1 else BatchPlan(self.micro_batch_size, accumulate, self.world_size)
