"""Work that is done again in smaller micro-batches where it runs out of memory, in all the processes alike."""

from __future__ import annotations

import logging
from collections.abc import Iterator

from snows.calibration.streams import Streams
from snows.distributed import Group
from snows.errors import Unsolvable
from snows.memory import is_out_of_memory

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr


def retry_on_out_of_memory(
    streams: Streams, place: str, advice: str = "lower `k_step` or raise `memory_budget`"
) -> Iterator[Attempt]:
    """Attempts at a piece of work, each with micro-batches of half the size, as long as they need too much memory.

        for attempt in retry_on_out_of_memory(streams, place):
            with attempt:
                work()

    Raises:
        Unsolvable: single images do not fit either; the message ends in the advice.
    """
    ceiling, size = streams.ceiling, streams.batch_size
    while True:
        attempt = Attempt(streams.group)
        yield attempt
        if attempt.error is None:
            return
        if streams.batch_size == 1:
            streams.ceiling = ceiling  # it is not the others' fault
            streams.split(size)
            problem = f"out of memory with one image at a time: {advice}"
            error, attempt.error = attempt.error, None  # else its frames, which hold the attempt, hold themselves
            raise Unsolvable(f"out of memory at {place} with one image at a time: {advice}.", problem) from error
        streams.halve()
        log.warning("out of memory at %s: going on with micro-batches of %d images", place, streams.batch_size)


class Attempt:
    """A piece of work that may run out of memory: that error ends it, and is kept; others are raised.

    Processes that share the work end it alike: what one of them meets, all do.
    """

    def __init__(self, group: Group):
        self.group = group
        self.error: BaseException | None = None

    def __enter__(self) -> Attempt:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> bool:
        found = self.group.settle(error)
        self.error = found if found is not None and is_out_of_memory(found) else None
        if self.error is None and found is not None and found is not error:
            raise found from error
        return self.error is not None
