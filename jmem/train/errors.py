"""How a run ends before its last update."""

from collections.abc import Sequence


class TrainingError(ValueError):
    """A run that cannot start, or cannot go on."""


class DivergedError(TrainingError):
    """A loss, the gradient's norm or the state is no longer finite."""

    @classmethod
    def after(cls, step: int, what: str, kept: Sequence[int]) -> "DivergedError":
        """Of update `step`, in words; `kept` are the steps of the checkpoints."""
        return cls(
            f"update {step}: {what} is not finite.\n"
            "Lower the learning rate, clip the gradient, or look at the data of batch "
            f"{max(step - 1, 0)}. "
            + (f"The checkpoint of step {kept[-1]} is kept." if kept else "")
        )


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (or SIGTERM) during training: all updates done are in a checkpoint."""
