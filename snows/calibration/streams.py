"""The calibration images: checked, in micro-batches, on their way through the pruned and through the dense network."""

from __future__ import annotations

import copy
import itertools
import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from snows.budget import Budget, halved_to_fit
from snows.calibration.outlook import check_fits, outlook, works
from snows.calibration.plan import Plan
from snows.calibration.samples import Samples
from snows.calibration.store import Store
from snows.calibration.stream import Shares, Stream
from snows.distributed import ALONE, Group
from snows.errors import UsageError
from snows.network.layers import Layer, Masks
from snows.network.network import Network
from snows.options import Options

log = logging.getLogger("snows")  # without a handler of the caller's own, a warning is a line on stderr


class Streams:
    """The calibration images on their way through the pruned and the dense network.

    They are split into micro-batches that fit the memory, anew for each layer that needs other ones: `fit`. Where one
    does not fit all the same, `halve` lowers what they may need, for this layer and for those that need as much.

    batches: mini-batches, each of which is split into micro-batches of its own.
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
        # All the processes take the least: with room of their own each would split the images in its own way.
        device_bytes, host_bytes = group.least(budget.device), group.least(budget.host)
        self.budget = replace(budget, device=device_bytes, host=host_bytes, processes=group.size)
        self.store = Store(device, self.budget.features("device"), self.budget.features("host"), options.cache_dir)
        self.ceiling = self.budget.shared_micro_batch  # bytes that a micro-batch may need
        self.need = self.plan.passing  # bytes per image of the work at hand
        self.samples = Samples(self.plan, self.images)
        self.split(halved_to_fit(max(self.lengths), self.need, self.ceiling))

    def _own(self, batches: list[Tensor]) -> list[Tensor]:
        """This process's images of each mini-batch; copies, for views would keep the others' images."""
        if self.group.size == 1:
            return batches
        starts = itertools.accumulate(self.lengths, initial=0)
        return [batch[self.group.share(start, len(batch))].clone() for start, batch in zip(starts, batches)]

    def split(self, size: int) -> None:
        """Micro-batches of `size` images at most, those of a mini-batch of even sizes, at the start of the network."""
        parts = [evenly(length, size) for length in self.lengths]
        sizes, numbers = list(itertools.chain(*parts)), itertools.count()
        self.groups = [[next(numbers) for _ in each] for each in parts]  # the micro-batches of each mini-batch
        own = list(map(self.group.share, itertools.accumulate(sizes, initial=0), sizes))
        counts = [len(range(count)[part]) for count, part in zip(sizes, own)]
        parted = (batch.split([counts[i] for i in each]) for batch, each in zip(self.mini_batches, self.groups))
        self.batches, self.shared = list(itertools.chain(*parted)), Shares(self.group, sizes, own)
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

    def fit(self, need: int) -> None:
        """Split the images for work that needs so many bytes per image.

        Both streams start anew where that is done: into smaller parts when it must be, larger ones when it pays.
        """
        self.need = need
        wanted = halved_to_fit(max(self.lengths), need, self.ceiling)
        if wanted < self.batch_size or wanted >= 4 * self.batch_size:
            self.split(wanted)

    def fit_layer(self, layer: Layer, options: Options) -> None:
        """Split the images for the solution of a layer."""
        self.fit(self.plan.need([layer], options.k_step, options.curvature))

    def fit_jointly(self, layers: list[Layer], options: Options) -> None:
        """Split the images for the joint steps of these layers."""
        self.fit(self.plan.need(layers, len(self.network.nodes), options.curvature))

    def halve(self) -> None:
        """Let the micro-batches of the work at hand be half as large from now on."""
        self.allow((self.batch_size + 1) // 2)

    def allow(self, batch_size: int) -> None:
        """Let the work at hand, and what needs as much, have micro-batches of so many images at most."""
        self.ceiling = self.need * batch_size
        self.split(batch_size)

    def check_fits(self, layers: list[Layer], options: Options) -> None:
        """Refuse a job of which not even one image fits.

        Raises:
            SnowsError: it says of what, with the numbers.
        """
        check_fits(self.budget, works(self.plan, self.budget, layers, options, 1))

    def outlook(self, masks: Masks, options: Options, inverts: bool) -> str:
        """What solving the layers of `masks` will hold; inverts: the second moments of their inputs too.

        Raises:
            SnowsError: not even one image fits, or they do not.
        """
        return outlook(self.plan, self.budget, masks, options, max(self.lengths), inverts)

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
