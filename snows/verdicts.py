"""What processes that share a job make of an error in one of them: how bad it is, what the others hear and raise."""

from __future__ import annotations

from snows.errors import SnowsError, Unsolvable, first_line
from snows.memory import is_out_of_memory

WELL, OUT_OF_MEMORY, UNSOLVABLE, ENDS = range(4)  # what a process says of itself, the worst last


class Lost(SnowsError):
    """A process of the group is gone, or answers no more."""


class Ended(SnowsError):
    """An error in another process ends the job in all of them."""


def marked(error: SnowsError | MemoryError) -> Exception:
    """An error that all the processes know of."""
    error.settled = True  # type: ignore[union-attr]
    return error


def is_settled(error: BaseException | None) -> bool:
    """Whether all the processes know of an error, or of what it came of."""
    while error is not None:
        if getattr(error, "settled", False):
            return True
        error = error.__cause__
    return False


def verdict(error: BaseException | None) -> int:
    """What an error means for a piece of work that all the processes share."""
    if error is None:
        return WELL
    if is_out_of_memory(error):
        return OUT_OF_MEMORY
    return UNSOLVABLE if isinstance(error, Unsolvable) else ENDS


def description(error: BaseException | None) -> tuple[str, str, int]:
    """(message, problem, exit code) of an error, for the others."""
    text = str(error) if isinstance(error, SnowsError) else f"{type(error).__name__}: {first_line(error or Ended())}"
    return text, getattr(error, "problem", text), getattr(error, "exit_code", 1)


def retold(state: int, who: int, message: str, problem: str, code: int) -> SnowsError | MemoryError:
    """The error of another process, as this one raises it."""
    if state == OUT_OF_MEMORY:
        return MemoryError(f"out of memory in process {who}")
    if state == UNSOLVABLE:
        return Unsolvable(message, problem)
    error = Ended(f"process {who}: {message}")
    error.exit_code = code
    return error
