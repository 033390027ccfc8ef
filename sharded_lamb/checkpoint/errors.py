"""What is wrong with a checkpoint, told apart from what is wrong with a call."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: broken, incomplete, or of a format from the future. An older one may be whole.

    A whole checkpoint of another model is a plain ValueError: an older one would be of that model too.
    """
