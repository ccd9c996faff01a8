"""Measurements that were dropped: counted, said once, and after a while not tried again."""

import warnings

from lightning_graddiv.errors import MeasurementError

_LASTING_IN_A_ROW = 3


class Refusals:
    """Keeps an account of dropped measurements.

    Attributes:
        is_final: whether so many refusals in a row lay in the model that measuring is not tried any more.
    """

    def __init__(self) -> None:
        self._in_a_row = 0
        self._said: set[str] = set()

    @property
    def is_final(self) -> bool:
        """Whether measuring is off, because it was refused again and again for a reason that lies in the model."""
        return self._in_a_row >= _LASTING_IN_A_ROW

    def count(self, *, lasting: bool) -> None:
        """Count a measurement: refused for a lasting reason on some process, or not."""
        self._in_a_row = self._in_a_row + 1 if lasting else 0

    def say(self, callback: str, step: int, refusal: Exception | None) -> None:
        """Warn of a dropped measurement, once for each reason; None: another process has the reason."""
        if refusal is None:
            reason = "Another process could not measure."
        elif isinstance(refusal, MeasurementError):
            reason = str(refusal)
        else:
            reason = f"{type(refusal).__name__}: {refusal}"
        key = reason[:60]  # the same reason with other numbers is said once
        if self.is_final:
            key = "final"
            reason += " Measuring is now off for this fit, because the reason lies in the model or its loss."
        if self.is_new(key):
            warnings.warn(f"{callback} dropped the measurement at step {step}: {reason}", stacklevel=2)

    def is_new(self, key: str) -> bool:
        """Tell whether something is said for the first time."""
        is_new = key not in self._said
        self._said.add(key)
        return is_new
