"""A look at the arguments of the next training step, where it receives them."""

from collections.abc import Callable
from typing import Any


class TrainingStepTap:
    """Calls a function with the arguments of the next ``training_step``, right before it runs, once.

    The arguments are those that the module will see: later callbacks and hooks may have replaced the batch that
    ``on_train_batch_start`` was given. The parameters have not moved yet. Only the strategy object is touched, and only
    between arming and the step.

    Args:
        strategy: the trainer's strategy, whose ``training_step`` every step goes through.
        function: called with the step's positional arguments.
    """

    def __init__(self, strategy: Any, function: Callable[[tuple[Any, ...]], None]) -> None:
        self._strategy = strategy
        self._is_armed = True
        step = strategy.training_step

        def tapped(*args: Any, **kwargs: Any) -> Any:
            """Call the function once, and then the step that it stands before."""
            is_armed = self._is_armed
            self.remove()
            if is_armed:
                function(args)
            return step(*args, **kwargs)

        self._tapped = tapped
        strategy.training_step = tapped

    def remove(self) -> None:
        """Disarm; may be called more than once. Another tap that was put on later stays."""
        self._is_armed = False
        if self._strategy.__dict__.get("training_step") is self._tapped:
            del self._strategy.training_step
