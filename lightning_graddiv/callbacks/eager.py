"""Compiled code runs eagerly while a step is measured: hooks that came after its compilation would not be called."""

import sys
from typing import Any

import torch


class ForcedEager:
    """Forces ``torch.compile``d code to run eagerly while at least one of these is on; nothing is recompiled."""

    _on = 0
    _stance: Any = None

    def __init__(self) -> None:
        self._is_on = False

    def start(self) -> None:
        """Begin; may be called more than once."""
        if self._is_on or "torch._dynamo" not in sys.modules:
            return
        self._is_on = True
        if ForcedEager._on == 0:
            ForcedEager._stance = torch.compiler.set_stance("force_eager")
        ForcedEager._on += 1

    def stop(self) -> None:
        """End; may be called more than once."""
        if not self._is_on:
            return
        self._is_on = False
        ForcedEager._on -= 1
        if ForcedEager._on == 0:
            ForcedEager._stance.__exit__(None, None, None)
