"""The one error class of this room."""


class CheckpointError(RuntimeError):
    """A checkpoint that could not be written, is not there, not whole, damaged, or of another model.

    Every rank raises it when one rank fails. Unless the message says otherwise nothing has been loaded, and older
    checkpoints are as they were.
    """
