"""Errors that end a run with one clear line."""


class SnowsError(Exception):
    """Something that the user can mend; the message says what is wrong and what to do."""


class UsageError(SnowsError):
    """A request that makes no sense as it stands (exit code 2)."""


class TraceError(SnowsError):
    """A model that cannot be written as a line of operations; the message names the module."""


class Interrupted(SnowsError):
    """Ctrl-C in the middle of a job; `result` holds the layers that are finished."""

    def __init__(self, result):
        super().__init__(f"interrupted after {len(result.layers)} layers")
        self.result = result
