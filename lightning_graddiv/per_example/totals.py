"""Several uses of one parameter by the same examples, added up before norms are taken."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from lightning_graddiv.per_example.factors import Contributions, Lookup
from lightning_graddiv.per_example.linear_maps import Outer, Rows
from lightning_graddiv.per_example.probes import Probe


@dataclass(eq=False)
class Total(Contributions):
    """The sum of several uses of one parameter, taken before the norm."""

    parts: tuple[Contributions, ...]

    @property
    @override
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.parts[0].shape

    @property
    @override
    def by_example(self) -> Tensor:
        return self.parts[0].by_example

    @override
    def at(self, examples: slice) -> "Total":
        return Total(tuple(part.at(examples) for part in self.parts))

    @override
    def explicit(self) -> Tensor:
        total = self.parts[0].explicit().clone()
        for part in self.parts[1:]:
            total += part.explicit()
        return total

    @property
    @override
    def formed_at_once(self) -> int:
        return sum(part.formed_at_once for part in self.parts)

    @property
    @override
    def are_formed(self) -> bool:
        return self._table_and_head is None

    @property
    def _table_and_head(self) -> tuple[Outer, Lookup] | None:
        outer = next((part for part in self.parts if isinstance(part, Outer)), None)
        lookup = next((part for part in self.parts if isinstance(part, Lookup)), None)
        return None if outer is None or lookup is None or len(self.parts) != 2 else (outer, lookup)

    @override
    def sketches(self, probe: Probe) -> Tensor:
        return torch.stack([part.sketches(probe) for part in self.parts]).sum(0)

    @override
    def measure(self, right: Tensor) -> tuple[Tensor, Tensor]:
        """|u + v|^2 = |u|^2 + |v|^2 + 2 <u, v> where table and head share a weight; else what adds up."""
        pair = self._table_and_head
        if pair is None:
            return super().measure(right)
        outer, lookup = pair
        (u, image_of_u), (v, image_of_v) = outer.measure(right), lookup.measure(right)
        return (u + v + 2 * _inner(outer, lookup)).clamp_(min=0), image_of_u + image_of_v


def added(uses: Sequence[Contributions]) -> Contributions:
    """Return the sum of several uses of a parameter by the same examples."""
    if len(uses) == 1:
        return uses[0]
    uses = [use.at_one_position() if isinstance(use, Rows) else use for use in uses]
    outers = [use for use in uses if isinstance(use, Outer)]
    lookups = [use for use in uses if isinstance(use, Lookup)]
    parts: list[Contributions] = [use for use in uses if not isinstance(use, Outer | Lookup)]
    if outers:
        inputs = torch.cat([use.inputs for use in outers], 1)
        parts.append(Outer(inputs, torch.cat([use.output_gradients for use in outers], 1), outers[0].shape))
    if lookups:
        index = torch.cat([use.index for use in lookups], 1)
        parts.append(Lookup(index, torch.cat([use.output_gradients for use in lookups], 1), lookups[0].shape))
    return parts[0] if len(parts) == 1 else Total(tuple(parts))


def _inner(outer: Outer, lookup: Lookup) -> Tensor:
    """Return <c_i, c'_i> of a linear map and a lookup in the same weight: a token's row of the map's gradient."""
    a, b = outer.inputs, outer.output_gradients
    index = lookup.index[:, None, :].expand(-1, b.shape[1], -1)
    products = b.gather(2, index) * (a @ lookup.output_gradients.transpose(1, 2))  # (n, T, S)
    return products.sum((1, 2), dtype=torch.float64)
