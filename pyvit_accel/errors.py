"""The exceptions of this package, and what their messages share."""

from collections.abc import Collection

MOST = 8  # names in a message


class Unsupported(Exception):
    """A module cannot be converted; the message is the reason, and ends up in the report."""


def some(names: Collection[str]) -> str:
    """The first names, with dots where there are more; "none" where there are none."""
    shown = ", ".join(list(names)[:MOST])
    return f"{shown}, ..." if len(names) > MOST else shown or "none"
