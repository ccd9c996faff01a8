"""One forward and backward pass, as hooks show it: uses of layers are measured as it comes by, or when it is over."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_graddiv.errors import MeasurementError
from lightning_graddiv.per_example.factors import Contributions, Factor
from lightning_graddiv.per_example.layers import LayerType, Layout
from lightning_graddiv.per_example.ledger import Ledger
from lightning_graddiv.per_example.modes import as_own_work
from lightning_graddiv.per_example.precision import rounds_products
from lightning_graddiv.per_example.records import Recorded, Use
from lightning_graddiv.per_example.totals import added

Layouts = Mapping[tuple[int, int], Layout]
"""How the examples lie in a use of a parameter: (its index, the how-manieth use) -> layout."""

_WAITING_BYTES = 4 * 2**20
"""What uses of layers may hold together until the pass is over, to be measured at once, beside those that have to wait:
a processor that has just multiplied large matrices takes up to three times as long for a few small operations as it
does for the same ones again."""

_SECOND_PASS = "it takes part in more than one backward pass"


class Pass:
    """What is seen of one pass. Each parameter is known by its index.

    Args:
        ledger: enters contributions and gradients.
        examples: n.
        layouts: where the examples lie, proven before. None: not known; uses are kept, and nothing is measured.
        shared: parameters that are known to be used more than once, which wait for the end.
        assumed: whether a leading dimension of the right size is taken for the examples, without proof.

    Attributes:
        uses: that are still to be measured.
        error: what went wrong first; nothing more is looked at then.
        is_awaiting_end: whether :meth:`look_at_end` is still to come.
    """

    def __init__(
        self,
        ledger: Ledger,
        examples: int,
        layouts: Layouts | None,
        *,
        shared: frozenset[int] = frozenset(),
        assumed: bool = False,
    ) -> None:
        self.uses: list[Use] = []
        self.error: Exception | None = None
        self.is_awaiting_end = False
        self._ledger = ledger
        self._examples = examples
        self._layouts = layouts
        self._shared = shared
        self._assumed = assumed
        self._calls: dict[int, int] = defaultdict(int)
        self._waiting_bytes = 0.0
        self._noted: set[tuple[torch.dtype, torch.device]] = set()

    def attempt(self, record: Callable[..., None], *what: Any) -> None:
        """Run our part of somebody's pass, which must not end the pass."""
        if self.error is None:
            try:
                as_own_work(record, *what)
            except Exception as error:
                self.error = error

    def await_end(self) -> None:
        """Expect the gradients by :meth:`look_at_end`, except for those that :meth:`receive` is given."""
        self.is_awaiting_end = True
        self._ledger.expect_all_at_end()

    def called(
        self,
        layer: nn.Module,
        kind: LayerType,
        held: dict[str, int],
        inputs: tuple[Tensor | None, ...],
        output: Tensor,
    ) -> Use:
        """Note a call of a layer."""
        ordinals = {}
        for name, index in held.items():
            ordinals[name] = self._calls[index]
            self._calls[index] += 1
        use = Use(layer, kind, held, ordinals, inputs, output if kind.keeps_output else None)
        self.uses.append(use)
        return use

    def reached(self, use: Use, gradients: Sequence[Tensor | None]) -> None:
        """Take the gradients of what came out of a call, and measure what it shows if that need not wait."""
        if use.is_reached:
            for index in use.parameters.values():
                self._ledger.misses[index] = _SECOND_PASS
            return
        use.receive(gradients)
        if self._layouts is None or not self._shared.isdisjoint(use.parameters.values()) or self._put_off(use):
            return
        self._measure([use], self._layouts)

    def _put_off(self, use: Use) -> bool:
        """Leave a use to the end of the pass if that is waited for, and little is held until then; tell whether."""
        if not self.is_awaiting_end:
            return False
        held = self._waiting_bytes + use.held_bytes()
        if held > _WAITING_BYTES:
            return False
        self._waiting_bytes = held
        return True

    def receive(self, index: int, gradient: Tensor) -> None:
        """Enter a parameter's gradient, which is about to be added to what it has."""
        self._ledger.receive(index, gradient)

    def look_at(self, index: int, gradient: Tensor) -> None:
        """Read a large gradient on its way to a parameter that is looked at in the end."""
        if self.is_awaiting_end:
            self._ledger.look_at(index, gradient)
        else:
            self._ledger.misses[index] = _SECOND_PASS

    def look_at_end(self, parameters: Sequence[Tensor]) -> None:
        """Look at what parameters were given, before anybody else can; a pass that gave them nothing is another one."""
        if not self.is_awaiting_end:
            return
        given = {index: parameter.grad for index, parameter in enumerate(parameters)}
        found = {index: gradient for index, gradient in given.items() if gradient is not None}
        if found:
            self._measure_waiting()
            self.is_awaiting_end = False
            self._ledger.receive_all(found)

    def finish(self, parameters: Sequence[Tensor]) -> Recorded:
        """Measure what waits, and return what the pass showed.

        Raises:
            MeasurementError: something could not be recorded, or is not finite.
        """
        self.attempt(self.look_at_end, parameters)  # the end of another loss
        self.attempt(self._measure_waiting)
        if self.error is not None:
            raise MeasurementError(f"Recording the backward pass failed: {self.error}") from self.error
        return as_own_work(self._ledger.balance)

    def _measure_waiting(self) -> None:
        """Measure what was kept until the whole backward pass was seen."""
        together = [use for use in self.uses if use.is_measurable]
        if self._layouts is not None and together:
            self._measure(together, self._layouts)

    def _measure(self, uses: Sequence[Use], layouts: Layouts) -> None:
        found = self._contributions(uses, layouts)
        if len(uses) > 1:
            alone = [parts[0] for parts in found.values() if len(parts) == 1]
            Factor.take_sq_norms([factor for of_one in alone for factor in of_one.factors])
        for index, parts in found.items():
            self._ledger.contribute(index, added(parts))
        for use in uses:
            self.uses.remove(use)
            use.release()

    def _contributions(self, uses: Sequence[Use], layouts: Layouts) -> dict[int, list[Contributions]]:
        found: dict[int, list[Contributions]] = defaultdict(list)
        for use in uses:
            leading = use.leading
            for name, index in use.parameters.items():
                layout = Layout.FIRST if self._assumed else layouts.get((index, use.ordinals[name]))
                if layout is None or not layout.fits(leading, self._examples):
                    self._ledger.misses.setdefault(
                        index, f"the leading dimensions {leading} of its layer's input do not hold the examples"
                    )
                    continue
                of_each = use.contributions(layout, self._examples)
                if name in of_each:
                    found[index].append(of_each[name])
            self._note_precision(use)
        return found

    def _note_precision(self, use: Use) -> None:
        for gradient in use.output_gradients:
            if gradient is not None and (gradient.dtype, gradient.device) not in self._noted:
                self._noted.add((gradient.dtype, gradient.device))
                bits = torch.finfo(gradient.dtype).bits
                rounds = bits == 32 and rounds_products(gradient.device)
                self._ledger.note_precision(16 if rounds else bits)
