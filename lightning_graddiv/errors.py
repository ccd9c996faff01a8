"""What is raised when a number could not be trusted."""


class MeasurementError(RuntimeError):
    """Per-example gradients of this module on this batch cannot be measured; the message says why and what to do.

    ``lasting`` is True where the reason lies in the model or the loss, so that the next batch would be refused too.
    """

    def __init__(self, message: str, *, lasting: bool = False) -> None:
        super().__init__(message)
        self.lasting = lasting


class FunctionalEngineError(MeasurementError):
    """The module does not run under ``torch.func``; the plain loop may still measure it."""


class MixingError(MeasurementError):
    """The loss mixes the examples of a batch, so that an example has no gradient of its own."""


class CouplingError(MeasurementError):
    """The loss couples the processes, so that not even a process's share of a batch has a gradient of its own."""
