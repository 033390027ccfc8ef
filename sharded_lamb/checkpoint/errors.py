"""Errors of a checkpoint, as opposed to errors of a call."""

import pickle


class CheckpointError(ValueError):
    """The checkpoint is damaged, incomplete or in a newer format; an older checkpoint may still be whole.

    A whole checkpoint of another model raises a plain ValueError: older ones would not fit either.
    """


def picklable(error: Exception) -> Exception:
    """Returns the error, or a RuntimeError with the same text if the error cannot be sent to other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    return error
