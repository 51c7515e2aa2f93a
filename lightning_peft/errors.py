"""The one exception type for what a user gave us and can mend."""


class PEFTError(ValueError):
    """Wrong input: the message says what was given, what was expected and what to do.

    The command line prints the message of this type alone, without a traceback.
    """


class NotFiniteError(PEFTError):
    """An adapter holds NaN or infinity: the run that trained it has diverged."""
