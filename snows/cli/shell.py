"""How a script ends: in one line and with an exit code, whatever went wrong and whoever stopped it."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from snows import memory
from snows.cli import launch
from snows.cli.flags import as_flags
from snows.errors import Interrupted, SnowsError, Terminated, Unfinished, exit_code, first_line

SIGNALS: dict[int, type[KeyboardInterrupt]] = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}
asked: list[KeyboardInterrupt] = []  # the signals that this process was given, as what they raised


def shell(main: Callable[[], object]) -> None:
    """Run a script's main: every error ends in one line. 2 is wrong usage, 130 Ctrl-C, 143 SIGTERM, 1 the rest."""
    memory.keep_freed_memory()
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115, where it was closed
    if launch.follows():
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115, the first process says the same
    answer_signals()
    log = logging.getLogger("snows")
    log.handlers = [Spoken()]
    log.setLevel(logging.WARNING if "--quiet" in sys.argv else logging.INFO)
    message, code = "", 0
    try:
        with own_stops():
            main()
            sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        message, code = told(error)
    finally:
        ignore_signals()  # what is left is to say so
    if code:  # outside of the handler: the error is forgotten, and what its frames held is closed
        fail(message, code)


class Spoken(logging.Handler):
    """What the library has to say, as lines above a progress bar: warnings on stderr, the rest on stdout."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(as_flags(record.getMessage()), file=sys.stderr if record.levelno >= logging.WARNING else sys.stdout)


def told(error: BaseException) -> tuple[str, int]:
    """What is said of the error that ended a script, and its exit code."""
    if isinstance(error, Unfinished) and "--verbose" in sys.argv:
        traceback.print_exception(error)
    if isinstance(error, SnowsError) and not hides_out_of_memory(error):
        return as_flags(str(error)), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", exit_code(error)
    if isinstance(error, BrokenPipeError):
        return "nobody reads the output any more", 1
    if hides_out_of_memory(error) or memory.is_out_of_memory(error) or getattr(error, "errno", None) == errno.ENOMEM:
        return f"out of memory: {first_line(error)}. Lower --batch_size, --test_batch_size or --ngrads.", 1
    if isinstance(error, OSError):
        return str(error).strip().splitlines()[-1], 1  # a loading process puts its traceback above it
    if isinstance(error, OverflowError):
        return f"a number is too large: {error}", 2
    if "--verbose" in sys.argv:
        traceback.print_exception(error)
    return f"unexpected {type(error).__name__}: {first_line(error)} (a defect; --verbose shows where)", 1


def hides_out_of_memory(error: BaseException) -> bool:
    """Whether an error says of memory that ran out that something else is wrong: that images do not fit a network."""
    cause = error.__cause__
    told = isinstance(error, SnowsError) and "out of memory" not in str(error)
    return told and cause is not None and memory.is_out_of_memory(cause)


def fail(message: str, code: int) -> None:
    """End the process, saying why, unless another one of the command does."""
    line = " ".join(message.split()).encode(errors="backslashreplace").decode()  # names need not be text
    if launch.speaks():
        print("error:", line, file=sys.__stderr__ if launch.follows() else sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:  # it would fail once more at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(code)


def answer_signals() -> None:
    """Let Ctrl-C and SIGTERM raise where the process is; those that it was told to ignore stay ignored."""
    asked.clear()
    owner = os.getpid()

    def stop(number: int, frame: object) -> None:
        if os.getpid() != owner:  # a process that loads images
            os._exit(128 + number)
        asked.append(SIGNALS[number]() if number in SIGNALS else type(asked[-1])())
        raise asked[-1]

    def unraisable(ignored: sys.UnraisableHookArgs) -> None:
        """An error in a destructor says nothing that can be mended; a signal that came in one is given once more."""
        if isinstance(ignored.exc_value, KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.01)
        elif "--verbose" in sys.argv:
            sys.__unraisablehook__(ignored)

    sys.unraisablehook = unraisable
    signal.signal(signal.SIGALRM, stop)
    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def ignore_signals() -> None:
    """From now on Ctrl-C and SIGTERM do nothing: what is under way is all that is left to do."""
    for number in (*SIGNALS, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def own_stops() -> Iterator[None]:
    """An error that a signal caused inside a library, which may hide it behind one of its own, as that signal again."""
    try:
        yield
    except Exception as error:
        if not asked or isinstance(error, Interrupted):
            raise
        raise asked[-1] from error
