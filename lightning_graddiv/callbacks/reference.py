"""The second weight vector of a differential measurement: an earlier one of this run, an average, or another run's."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

Weights = Mapping[str, Tensor]


class Reference:
    """Keeps of the weights what a measurement compares with.

    Args:
        kind: ``"snapshot"``, ``"ema"``, weights by the parameter's name, or a function that returns them.
        lag: optimizer steps between a snapshot and the measurement.
        every_n_steps: optimizer steps from one measurement to the next.
        decay: of the moving average.
    """

    def __init__(self, kind: str | Weights | Callable[[], Weights], lag: int, every_n_steps: int, decay: float) -> None:
        self._kind = kind
        self._lag = lag
        self._every_n_steps = every_n_steps
        self._decay = decay
        self._kept: dict[str, Tensor] = {}

    @torch.no_grad()
    def keep(self, trained: Mapping[str, nn.Parameter], steps: int) -> None:
        """Keep of the present weights what is needed: before a step, and after a measurement at them.

        Args:
            trained: the parameters that train, by name.
            steps: optimizer steps taken so far.
        """
        if self._kind == "ema":
            for name, parameter in trained.items():
                wide = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32))
                kept = self._kept.get(name, wide).to(wide.device)
                self._kept[name] = torch.lerp(kept, wide, 1 - self._decay)
        elif self._kind == "snapshot" and (steps + self._lag) % self._every_n_steps == 0:
            self._kept = {name: parameter.detach().clone() for name, parameter in trained.items()}

    def values(self, trained: Mapping[str, nn.Parameter]) -> list[Tensor]:
        """Return the reference's value of each parameter.

        Raises:
            MisconfigurationException: one is missing, or has another shape.
        """
        weights = self._weights()
        values = []
        for name, parameter in trained.items():
            found = weights.get(name)
            if found is None or found.shape != parameter.shape:
                what = "missing" if found is None else f"of shape {tuple(found.shape)}"
                raise MisconfigurationException(
                    f"Expected argument `reference` to hold `{name}` of shape {tuple(parameter.shape)}, but it is "
                    f"{what}."
                )
            values.append(found.detach().to(parameter))
        return values

    @property
    def is_given(self) -> bool:
        """Whether the weights come from outside of this run."""
        return not isinstance(self._kind, str)

    def _weights(self) -> Weights:
        if isinstance(self._kind, str):
            return self._kept
        return self._kind() if callable(self._kind) else self._kind

    def state_dict(self) -> dict[str, Tensor]:
        """Return copies of what is kept: as large as the weights."""
        return {name: value.clone() for name, value in self._kept.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._kept = dict(state)


def trained_parameters(module: nn.Module, optimizer: Any) -> dict[str, nn.Parameter]:
    """Return the parameters that the optimizer trains, by name, in the module's order."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    return {name: p for name, p in module.named_parameters() if p.requires_grad and id(p) in held}
