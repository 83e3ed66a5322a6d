"""The one exception of a user's mistake."""


class MokusError(ValueError):
    """Bad input: one sentence with what was given, what was expected and what to do. The CLI prints it and exits with 2."""
