"""Ctrl-C and SIGTERM while torch is still being imported. The scripts run this file before anything else.

By its path, since importing it as a part of snows would import torch first; it needs the standard library alone.
"""

import os
import signal


def end(number: int, frame: object) -> None:
    """The handler of a signal: one line, and the exit code that a shell expects."""
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)


for number in (signal.SIGINT, signal.SIGTERM):
    if signal.getsignal(number) is not signal.SIG_IGN:  # as a job in the background inherits it
        signal.signal(number, end)
