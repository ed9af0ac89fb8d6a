"""What a verb raises when the user asked for something that cannot be."""

from __future__ import annotations


class UsageError(Exception):
    """``lion-dist`` prints it as one line on stderr and exits with 2: fact, value, remedy."""
