"""The calibration images: checked, in micro-batches, on their way through the pruned and through the dense network."""

from __future__ import annotations

import copy
import itertools
import logging
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from snows.budget import Budget, halved_to_fit
from snows.calibration.images import PARTS
from snows.calibration.outlook import check_fits, outlook, works
from snows.calibration.plan import Plan
from snows.calibration.store import Store
from snows.calibration.stream import Cut, Stream
from snows.distributed import ALONE, Group
from snows.errors import Unsolvable, UsageError, listed
from snows.memory import is_out_of_memory
from snows.network.layers import Layer, Masks
from snows.network.network import Network
from snows.network.window import Window
from snows.options import Options

HELD_OUT = 4  # images at least, if any are held out

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr


class Streams:
    """The calibration images on their way through the pruned and the dense network.

    They are cut into micro-batches that fit the memory, anew for each layer that needs other ones: `fit`. Where one
    does not fit all the same, `halve` lowers what they may need, for this layer and for those that need as much.

    batches: mini-batches, each of which is cut into micro-batches of its own.
    dense_model: the dense network's weights; None: those of `network` as they are now.
    group: the processes that share the images, all of which are given all of them: each holds its own of every
        micro-batch, whose size counts those of all.

    Raises:
        UsageError: there are fewer images than processes.
    """

    def __init__(
        self,
        network: Network,
        batches: list[Tensor],
        device: torch.device | str,
        options: Options | None = None,
        dense_model: nn.Module | None = None,
        group: Group = ALONE,
    ):
        self.network, self.device, self.group = network, device, group
        self.lengths = list(map(len, batches))  # images in each mini-batch, those of all the processes
        if self.images < group.size:
            raise UsageError(f"{self.images} calibration images cannot be shared by {group.size} processes.")
        self.mini_batches = self._own(batches)
        options = Options() if options is None else options
        self.dense_model = copy.deepcopy(network.model) if dense_model is None else dense_model
        self.plan = Plan.of(network, batches[0][:2].to(device), sum(map(len, self.mini_batches)))
        chosen = network.layers if options.joint_steps else network.layers[:1]
        budget = Budget.of(options, device, self.plan.vectors(chosen), group.neighbours)
        device_bytes, host_bytes = group.least(budget.device), group.least(budget.host)  # else they would cut otherwise
        self.budget = replace(budget, device=device_bytes, host=host_bytes, processes=group.size)
        self.store = Store(device, self.budget.features("device"), self.budget.features("host"), options.cache_dir)
        self.ceiling = self.budget.shared_micro_batch  # bytes that a micro-batch may need
        self.need = self.plan.passing  # bytes per image of the work at hand
        self.depths: dict[tuple[str, int], list[int]] = {}  # of windows, by layer and K, that have been asked for
        self.cut(halved_to_fit(max(self.lengths), self.need, self.ceiling))

    def _own(self, batches: list[Tensor]) -> list[Tensor]:
        """This process's images of each mini-batch; copies, for views would keep the others' images."""
        if self.group.size == 1:
            return batches
        starts = itertools.accumulate(self.lengths, initial=0)
        return [batch[self.group.share(start, len(batch))].clone() for start, batch in zip(starts, batches)]

    def cut(self, size: int) -> None:
        """Micro-batches of `size` images at most, those of a mini-batch of even sizes, at the start of the network."""
        parts = [evenly(length, size) for length in self.lengths]
        sizes, numbers = list(itertools.chain(*parts)), itertools.count()
        self.groups = [[next(numbers) for _ in each] for each in parts]  # the micro-batches of each mini-batch
        own = list(map(self.group.share, itertools.accumulate(sizes, initial=0), sizes))
        counts = [len(range(count)[part]) for count, part in zip(sizes, own)]
        split = (batch.split([counts[i] for i in each]) for batch, each in zip(self.mini_batches, self.groups))
        self.batches, self.shared = list(itertools.chain(*split)), Cut(self.group, sizes, own)
        self.restart()

    def restart(self) -> None:
        """Both streams at the start of the network, for a new sweep."""
        models = (self.network.model, self.dense_model)
        self.sparse, self.dense = (
            Stream(self.network, model, self.batches, self.device, self.store, self.shared) for model in models
        )

    def advance(self, layer: Layer, targets: str = "dense") -> None:
        """The pruned network's stream up to a layer; the dense network's too where its features are the targets."""
        self.sparse.advance(layer.node)
        if targets == "dense":
            self.dense.advance(layer.node)

    def kept_bytes(self, layers: list[Layer]) -> int | None:
        """Bytes that graphs may take to be kept while these layers are solved; None: half of what is free then.

        Known where a budget was asked for, or where other processes take of what is free at the same time.
        """
        known = self.budget.asked or self.group.neighbours > 1
        return self.budget.kept(self.plan.vectors(layers)) if known else None

    @property
    def images(self) -> int:
        return sum(self.lengths)

    @property
    def batch_size(self) -> int:
        """Images in the largest micro-batch."""
        return max(self.shared.sizes)

    def fit(self, need: int, parted: bool = False) -> None:
        """Cut the micro-batches for work that needs so many bytes per image.

        Both streams start anew where that is done: smaller ones are cut when they must be, larger ones when it pays.

        parted: into so many that some can be held out, if there are as many images.
        """
        self.need = need
        wanted = halved_to_fit(max(self.lengths), need, self.ceiling)
        while parted and wanted > 1 and sum(len(evenly(length, wanted)) for length in self.lengths) < PARTS:
            wanted = (wanted + 1) // 2
        if wanted < self.batch_size or wanted >= 4 * self.batch_size:
            self.cut(wanted)

    def fit_layer(self, layer: Layer, options: Options) -> None:
        """Cut the micro-batches for the solution of a layer."""
        self.fit(self.plan.need([layer], options.k_step))

    def fit_jointly(self, layers: list[Layer], options: Options) -> None:
        """Cut the micro-batches for the joint steps of these layers: so many that some can be held out."""
        self.fit(self.plan.need(layers, len(self.network.nodes)), parted=self.suffice(options.held_out))

    def counted(self, layer: Layer, mask: Tensor, options: Options) -> list[bool]:
        """Which depths of a layer's window the images give enough samples of, for the weights that survive.

        One of few samples, such as the logits, is fitted by heart: a classifier learns from it that classes which the
        images do not show are never the answer. Images that are held out do not tell: the logits' errors shrink. Nor do
        mixtures count, which show no classes of their own.
        """
        needed = options.min_samples * int(mask.sum()) * (1 + options.mixtures)
        return [numbers * self.images >= needed for numbers in self._numbers(layer, options.k_step)]

    def _numbers(self, layer: Layer, k_step: int) -> list[int]:
        """How many numbers an image has at each depth of a layer's window."""
        place = layer.name, k_step
        if place not in self.depths:
            features = Window(self.network, [layer], k_step).features
            self.depths[place] = [self.plan.numbers(node) for node in features]
        return self.depths[place]

    def solvable(self, layer: Layer, mask: Tensor, options: Options) -> Tensor:
        """What is solved of a weight: its support; nothing where the layer's own outputs are few, as a classifier's."""
        return mask if self.counted(layer, mask, options)[0] else torch.zeros_like(mask)

    def tell_of_few(self, masks: Masks, options: Options) -> None:
        """Name the layers that the images give too few samples of."""
        layers = [layer for layer in self.network.layers if layer.name in masks]
        few = [layer.name for layer in layers if not self.counted(layer, masks[layer.name], options)[0]]
        if few:
            log.info(
                "of %d layer%s the images give fewer than %g numbers per surviving weight (`min_samples`): no weights "
                "are solved there, biases at most: %s", len(few), "s"[: len(few) > 1], options.min_samples, listed(few),
            )  # fmt: skip

    def suffice(self, share: float) -> bool:
        """Whether there are images enough to hold out that share of them."""
        return share * self.images >= HELD_OUT

    def halve(self) -> None:
        """Let the micro-batches of the work at hand be half as large from now on."""
        self.allow((self.batch_size + 1) // 2)

    def allow(self, batch_size: int) -> None:
        """Let the work at hand, and what needs as much, have micro-batches of so many images at most."""
        self.ceiling = self.need * batch_size
        self.cut(batch_size)

    def check_fits(self, layers: list[Layer], options: Options) -> None:
        """Refuse a job of which not even one image fits.

        Raises:
            SnowsError: it says of what, with the numbers.
        """
        check_fits(self.budget, works(self.plan, self.budget, layers, options, 1))

    def outlook(self, masks: Masks, options: Options) -> str:
        """What solving the layers of `masks` will hold.

        Raises:
            SnowsError: not even one image fits.
        """
        return outlook(self.plan, self.budget, masks, options, max(self.lengths))

    def recall(self, layers: list[Layer], options: Options, batch_size: int | None, joint: bool = False) -> None:
        """Pass over finished layers, in micro-batches of the size that had fitted then, if that is to be kept to."""
        if joint:
            self.fit_jointly(layers, options)
        else:
            self.fit_layer(layers[0], options)
        if batch_size is not None and batch_size < self.batch_size:
            self.allow(batch_size)


def evenly(length: int, size: int) -> list[int]:
    """The lengths of the fewest parts of `size` at most, no two of which differ by more than one."""
    count = -(-length // size)
    return [length // count + (i < length % count) for i in range(count)]


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
            streams.cut(size)
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
