"""The exceptions of this package."""


class Unsupported(Exception):
    """A module cannot be converted; the message is the reason, and ends up in the report."""
