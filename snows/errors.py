"""Errors that end a run with one clear line, and with an exit code of their own."""

from __future__ import annotations

from collections.abc import Iterable


class SnowsError(Exception):
    """Something that the user can mend; the message says what is wrong and what to do.

    result: where it ended a job that had solved something, the finished layers, the others still dense (a `Pruned`).
    """

    exit_code = 1
    result = None


class UsageError(SnowsError):
    """A request that makes no sense as it stands."""

    exit_code = 2


class TraceError(SnowsError):
    """A model that cannot be written as a line of operations; the message names the module."""


class WriteError(SnowsError):
    """A file that cannot be written: a full disk, mostly. What was finished before it is safe."""


class Unsolvable(SnowsError):
    """A layer, or all of them together, that cannot be solved; `problem` says why. The job goes on without it."""

    def __init__(self, message: str, problem: str):
        super().__init__(message)
        self.problem = problem


class Unfinished(SnowsError):
    """An error that nobody expected (its `__cause__`), after the first solved layer; `result` holds the finished."""

    def __init__(self, message: str, result):
        super().__init__(message)
        self.result = result


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does."""


class Interrupted(SnowsError):
    """Ctrl-C or SIGTERM (`stop`) in the middle of a job; `result` holds the layers that are finished."""

    def __init__(self, message: str, stop: KeyboardInterrupt, result=None):
        super().__init__(message)
        self.result, self.exit_code = result, exit_code(stop)


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell expects of a process that a signal ended: 128 and the signal's number."""
    return 143 if isinstance(stop, Terminated) else 130


def first_line(error: BaseException) -> str:
    """What an error says first: the rest is for those who can mend the library that raised it."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def by_reason(reasons: dict[str, str]) -> str:
    """Names with the reason that they share, "a, b: too few; c: too many"."""
    names = {reason: [name for name in reasons if reasons[name] == reason] for reason in reasons.values()}
    return "; ".join(f"{listed(each)}: {reason}" for reason, each in names.items())


def listed(names: Iterable[str]) -> str:
    """The first ten, and how many more."""
    names = list(names)
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")
