"""What a run of the lab says instead of going on. Imports nothing, so that a command can know it without the lab."""

from __future__ import annotations


class RunError(Exception):
    """A run cannot start or go on. The message says what to do; what the folder holds is intact."""
