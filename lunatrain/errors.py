"""The errors a user can meet. Each message is one line: what, where, got, expected, what to do."""


class LunatrainError(Exception):
    """Base of all errors that are the input's or the machine's, not a bug; ``exit_code`` is the command's."""

    exit_code = 1


class UsageError(LunatrainError, ValueError):
    """The command or call was given something that cannot work as it stands."""

    exit_code = 2


class TableError(LunatrainError, ValueError):
    """A CSV file cannot be used: a figure made from the rest of it would be another figure."""


class CheckpointError(LunatrainError, ValueError):
    """A checkpoint is damaged, or of something else."""


class TrainingError(LunatrainError, ArithmeticError):
    """Training cannot go on: the loss is no number."""
