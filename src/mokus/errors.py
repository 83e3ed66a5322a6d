"""The exception of a user's mistake, and the one that stops what is running."""


class MokusError(ValueError):
    """Bad input: one sentence with what was given, what was expected and what to do. The CLI prints it and exits with 2."""


class Stopped(Exception):
    """Raised by a progress callback to stop what is running. Nothing is written, but for the checkpoint of `learn`."""
