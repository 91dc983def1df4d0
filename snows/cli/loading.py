"""Ctrl-C and SIGTERM while torch is still being imported. The scripts run this file before anything else.

By its path, since importing it as a part of snows would import torch first; it needs the standard library alone. The
package imports it first of all for `python -m snows...`, and to no effect where it is a library.
"""

import os
import signal
import sys


def end(number: int, frame: object) -> None:
    """The handler of a signal: one line, and the exit code that a shell expects."""
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


asked_for = __name__ != "snows.cli.loading" or sys.argv[:1] == ["-m"]  # as long as Python looks for the module to run
for number in (signal.SIGINT, signal.SIGTERM) if asked_for else ():
    if signal.getsignal(number) is not signal.SIG_IGN:  # as a job in the background inherits it
        signal.signal(number, end)
