"""The two ways a run can end badly for a reason that a person can act on."""


class UserError(Exception):
    """Something the user gave is wrong. Shown as one line, exit status 2."""


class TrainingError(Exception):
    """Training itself went wrong (a non-finite loss). Shown as one line, exit status 1; the run is FAILED."""


class DivergenceError(TrainingError):
    """The loss is not finite."""
