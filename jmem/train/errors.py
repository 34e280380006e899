"""How a run ends before its last update."""


class TrainingError(ValueError):
    """A run that cannot start, or cannot go on."""


class DivergedError(TrainingError):
    """The loss or the gradient's norm is no longer a finite number."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C (or SIGTERM) during training: all updates done are in a checkpoint."""
