"""Errors that a user can cause: the message says which thing, what was found, what was expected and what to do."""


class InputError(ValueError):
    """A mistake in what the caller handed in (a file, a row, a key, a tensor, an argument)."""


class CheckpointError(InputError):
    """A checkpoint directory that is missing, damaged or does not fit its own config."""


class NotBuiltError(InputError):
    """Something that can be asked for by its documented name but is not built yet."""
