"""Errors with the words a user needs."""


class LoadError(Exception):
    """The worker cannot serve this model here; the message is one line and says what would help."""
