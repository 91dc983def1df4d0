"""The processes that share a job: the one place that knows of ranks.

The objective is a sum over images, and so are its gradient, its products, second moments, coefficients and probes:
every process holds some of the images and all of the weights, and asks its group to `sum` what it found of its own.
What is decided is decided from such sums, so that all decide alike. Before each exchange the processes say whether they
are well: an error in one of them is told to all, and met by all in the same place (`settle`, `together`).

Processes that are gone are noticed by their closed connections, at the next exchange.
"""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from snows.errors import Interrupted, SnowsError, Unsolvable
from snows.verdicts import ENDS, WELL, Ended, Lost, description, is_settled, marked, retold, verdict

T = TypeVar("T")
SILENCE = timedelta(minutes=10)  # after which a process that does not answer is given up
RANKS = 2**20  # more than there are


class Group:
    """This process alone; `Ranks` are several."""

    rank, size, neighbours = 0, 1, 1  # neighbours: the processes on this machine, this one included

    def __init__(self):
        self.moved: Counter = Counter()  # what was exchanged: bytes and number, by kind

    def share(self, start: int, count: int) -> slice:
        """Which of `count` images are this process's: of all, whose number `start` is the first, every size-th."""
        return slice((self.rank - start) % self.size, count, self.size)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes, the same bits in all; the tensor may be written to."""
        return tensor

    def count(self, number: int) -> int:
        """The sum of whole numbers."""
        return number

    def least(self, number: int) -> int:
        """The least of the processes' whole numbers."""
        return number

    def agree(self, value: T) -> T:
        """What the first process has, in all: a tensor, of a shape that all know, or anything that can be pickled."""
        return value

    def first(self, items: Iterable[T]) -> Iterator[T]:
        """The first process's items, in all, for as long as none of them is None."""
        return iter(items)

    def check_same(self, **given: Any) -> None:
        """Refuse what is not the same in all the processes.

        Raises:
            SnowsError: it says what.
        """

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """What is done within, a download, say, the first process of each machine has done before the others begin."""
        yield

    def settle(self, error: BaseException | None) -> BaseException | None:
        """The error that a piece of work ended with, in any of the processes: one's own, where it is as bad."""
        return error

    @contextmanager
    def together(self) -> Iterator[None]:
        """An error that ends the work in one process ends it in all; otherwise none leaves before the others."""
        yield


class Ranks(Group):
    """The processes of torch.distributed's default group.

    Tensors on a GPU go through that group's own backend, all else, and what the processes say of themselves, through
    gloo.

    Raises:
        Lost, Ended: by all that exchanges something. What `settle` may give back: MemoryError, Unsolvable.
    """

    def __init__(self):
        super().__init__()
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.control = dist.new_group(backend="gloo", timeout=SILENCE)
        machines: list = [None] * self.size
        dist.all_gather_object(machines, socket.gethostname(), group=self.control)
        self.neighbours = machines.count(machines[self.rank])
        self.leads = machines.index(machines[self.rank]) == self.rank  # is the first of its machine

    def sum(self, tensor: Tensor) -> Tensor:
        self._check_in(tag=8 * tensor.numel() + 1)
        tensor = tensor.detach().contiguous()
        self._note("sum", tensor)
        with lost():
            dist.all_reduce(tensor, group=self._group_of(tensor))
        return tensor

    def count(self, number: int) -> int:
        return int(self.sum(torch.tensor(number, device="cpu")))

    def least(self, number: int) -> int:
        self._check_in(tag=2)
        told = torch.tensor(number, device="cpu")
        with lost():
            dist.all_reduce(told, dist.ReduceOp.MIN, group=self.control)
        return int(told)

    def agree(self, value: T) -> T:
        self._check_in(tag=3)
        if isinstance(value, Tensor):
            return self._broadcast(value)
        told = [value]
        with lost():
            dist.broadcast_object_list(told, 0, group=self.control)
        return told[0]

    def first(self, items: Iterable[T]) -> Iterator[T]:
        own = iter(items)
        while (item := self.agree(next(own, None) if self.rank == 0 else None)) is not None:
            yield item

    def check_same(self, **given: Any) -> None:
        for what, value in self.agree(given).items():
            if value != given[what]:
                raise SnowsError(f"process {self.rank} was given other {what.replace('_', ' ')} than process 0.")

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        if not self.leads:
            self._check_in(tag=5)
        yield
        if self.leads:
            self._check_in(tag=5)

    def settle(self, error: BaseException | None) -> BaseException | None:
        if error is not None and (is_settled(error) or not isinstance(error, Exception)):
            return error
        return self._settled(error, verdict(error))

    @contextmanager
    def together(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            if not is_settled(error) and not isinstance(error, Interrupted):
                self._settled(error, ENDS)
            raise
        self._check_in(tag=4)

    def _settled(self, error: BaseException | None, state: int) -> BaseException | None:
        """Tell the others, who are at an exchange or on their way to one; what all make of it."""
        try:
            self._check_in(tag=4, state=state, error=error)
        except Lost:
            if error is None:
                raise
        except (Ended, Unsolvable, MemoryError) as theirs:
            return theirs
        if error is not None:
            error.settled = True  # type: ignore[attr-defined]
        return error

    def _check_in(self, tag: int, state: int = WELL, error: BaseException | None = None) -> None:
        """Hear how all are before they exchange something; `tag` says what.

        Raises:
            MemoryError, Unsolvable, Ended: one of them is not well, and worse than this one. Lost: one is gone.
            SnowsError: they are about to exchange different things.
        """
        told = torch.tensor([state * RANKS + self.rank, tag, -tag], device="cpu")
        with lost():
            dist.all_reduce(told, dist.ReduceOp.MAX, group=self.control)
        self.moved["check-ins"] += 1
        (worst, who), most, least = divmod(int(told[0]), RANKS), int(told[1]), -int(told[2])
        if worst == WELL:
            if most != least:
                raise marked(SnowsError("the processes have gone apart: they are not of one kind, or have other code."))
            return
        said = [description(error)]
        with lost():
            dist.broadcast_object_list(said, who, group=self.control)
        if worst > state:
            raise marked(retold(worst, who, *said[0]))

    def _group_of(self, tensor: Tensor) -> Any:
        return self.control if tensor.device.type == "cpu" else dist.group.WORLD

    def _broadcast(self, tensor: Tensor) -> Tensor:
        sent = tensor.detach().contiguous()
        self._note("agree", sent)
        flat = sent.view(torch.uint8) if sent.dtype == torch.bool else sent
        with lost():
            dist.broadcast(flat, 0, group=self._group_of(sent))
        return sent

    def _note(self, kind: str, tensor: Tensor) -> None:
        self.moved[f"{kind} bytes"] += tensor.nbytes
        self.moved[kind] += 1


@contextmanager
def lost() -> Iterator[None]:
    """An exchange, which fails where a process is gone.

    Raises:
        Lost: it has failed.
    """
    try:
        yield
    except RuntimeError as error:
        silent = "imed out" in str(error)
        what = f"does not answer for {SILENCE.seconds // 60} minutes" if silent else "has ended"
        raise marked(Lost(f"another process of the job {what}.")) from error


ALONE = Group()
_chosen: ContextVar[Group | None] = ContextVar("group", default=None)
_ranks: dict[Any, Ranks] = {}  # of the default group there is now


def current() -> Group:
    """The processes of torch.distributed's default group, where there is one; else this process alone."""
    chosen = _chosen.get()
    if chosen is not None or not (dist.is_available() and dist.is_initialized()):
        return chosen or ALONE
    world = dist.group.WORLD
    if world not in _ranks:
        _ranks.clear()
        _ranks[world] = Ranks()
    return _ranks[world]


@contextmanager
def alone() -> Iterator[None]:
    """What is called within has this process to itself, whatever group it is in."""
    token = _chosen.set(ALONE)
    try:
        yield
    finally:
        _chosen.reset(token)
