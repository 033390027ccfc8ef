"""What is wrong with a checkpoint, told apart from what is wrong with a call."""

import pickle


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: broken, incomplete, or of a format from the future. An older one may be whole.

    A whole checkpoint of another model is a plain ValueError: an older one would be of that model too.
    """


def tellable(error: Exception) -> Exception:
    """The error, or one that says the same and can be sent to other ranks."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    return error
