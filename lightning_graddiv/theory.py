"""The paper's results as functions of numbers."""


def gain(batch_size: float, bound: float) -> float:
    """Serial steps that one mini-batch step is worth: ``B B_S / (B_S + B - 1)`` (derived from Lemma 1).

    Lemma 1 gives a step of batch ``B`` the noise of ``1 + delta`` serial ones, ``delta = (B - 1) / B_S``,
    hence a gain of ``B / (1 + delta)``. It is about ``B`` while ``B << B_S`` and saturates at ``B_S``.

    Args:
        batch_size: Effective batch size ``B``, examples per optimizer step.
        bound: Batch-size bound ``B_S``; ``inf`` gives ``B``.

    Raises:
        ValueError: If one of them is below 1.

    Example:
        >>> gain(101, 100)
        50.5

    """
    for name, value in (("batch_size", batch_size), ("bound", bound)):
        if not value >= 1:
            raise ValueError(f"Expected argument `{name}` to be at least 1 but got {value}")
    return batch_size / (1 + (batch_size - 1) / bound)
