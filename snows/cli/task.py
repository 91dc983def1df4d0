"""What the runs of one command share: the dense network, its images, what is pruned of it, and the accuracies."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils.data import Subset

from snows.checksum import checksum
from snows.cli import console
from snows.cli.resume import read_metrics
from snows.cli.settings import RunSettings
from snows.deploy import macs
from snows.distributed import current
from snows.errors import SnowsError
from snows.masks.files import check_pattern, read_masks
from snows.masks.patterns import NM, Pattern
from snows.masks.permute import permute
from snows.masks.rules import check_patterns
from snows.masks.selection import Selection
from snows.memory import is_gpu
from snows.network.layers import Masks
from snows.network.network import Network
from snows.pipeline import choose_masks, prune
from snows.result import Pruned, sparsity
from snows.zoo import evaluate
from snows.zoo.classifiers import Classifier
from snows.zoo.evaluate import Score
from snows.zoo.images import Data
from snows.zoo.registry import Known, load_classifier, load_data, twin_of

Layers = Callable[[str], bool]  # whether to prune a layer, by its name
TWIN_IMAGES = 256  # of the test images, on which two networks that take the same file are compared
FAR_FROM_STATED = 1.0  # percent points between measured and stated dense accuracy that call for a warning


class Task:
    """A dense network, its images, its layers to prune and the pattern; `common` is what metrics.json says of them."""

    def __init__(self, settings: RunSettings, known: Known, layers: Layers, named: Mapping[str, Sequence[str]] = {}):
        self.settings = settings
        self.layers = lambda name: layers(name) and not any(fnmatchcase(name, skipped) for skipped in settings.skip)
        self.group = current()
        with self.group.in_turn():
            classifier = classifier_of(settings, known)
            self.data = load_data(
                settings.arch,
                classifier,
                settings.dset,
                settings.data_dir,
                settings.num_workers,
                settings.classes,
                settings.skip_broken,
            )
        if any(settings.needs_images(algo) for algo in settings.algo):
            self.data.check_enough(settings.ngrads)
        self.model = classifier.model
        if settings.arch not in known and not settings.skip_evaluation and settings.resume is None:
            warn_of_twin(settings, self.model, self.data)
        if isinstance(settings.pattern, NM) and settings.permute:
            self.model = permuted(self.model, settings.pattern, self.layers, self.example)
        for flag, patterns in {**named, "--skip": settings.skip}.items():
            if patterns:
                names = [*(layer.name for layer in self.network.layers), *self.network.refused]
                check_patterns(patterns, names, flag)
        self.pattern: Pattern | Masks = settings.pattern
        if settings.masks is not None:
            self.pattern = self.masks_of_file(settings.masks)
        self.name = name_of(settings)
        self.selections: dict[int | None, Selection] = {}  # by seed, the last
        self.drawn: dict[int, tuple[Tensor, list[int]]] = {}
        self.masked_scores: dict[int | None, Score] = {}  # by seed; None: by magnitude, without images
        self.common = self.measure(classifier.stated_accuracy)

    @cached_property
    def network(self) -> Network:
        """The dense network, traced: the one place where it is."""
        return Network(self.model, self.settings.device, self.example)

    def example(self) -> Tensor:
        """An image, for networks that cannot be traced without."""
        return self.first_image

    @cached_property
    def first_image(self) -> Tensor:
        """The first of the training set that can be read, (1, channels, height, width)."""
        first = next(self.data.sound(self.data.train, range(len(self.data.train))))
        return self.data.train[first][0][None]

    @cached_property
    def macs(self) -> dict[str, int]:
        """Multiply-accumulates of the dense network for an image, by layer."""
        return macs.count(self.model, self.example())

    def masks_of_file(self, file: Path) -> Masks:
        """The masks of --masks for the layers to prune."""
        pattern = self.settings.pattern
        masks = {name: mask for name, mask in read_masks(file, self.network).items() if self.layers(name)}
        if isinstance(pattern, NM):
            check_pattern(file, masks, pattern)
        return masks

    def measure(self, stated_accuracy: float | None) -> dict:
        """Measure the dense and the masked network, or read what the run that goes on had measured; say so."""
        settings, seed = self.settings, self.settings.seed[0]
        measured = {} if settings.resume is None else read_metrics(settings.resume)
        chosen = self.selection(seed)  # before the images that test: what does not fit is said at once
        dense = measured["dense_accuracy"] if measured else self.dense[0].accuracy
        print(f"{settings.arch} on {settings.dset}: dense accuracy {console.percent(dense)}, pattern {self.name}")
        warn_if_far(dense, stated_accuracy)
        print(f"pruning {len(chosen.masks)} layers: {console.kinds(chosen.masks)}", flush=True)
        if measured:
            known = (measured[f"masked_{each.name}"] for each in fields(Score))
            self.masked_scores[self.mask_seed(seed)] = Score(*known)
        self.masked_score(seed)
        return {
            "arch": settings.arch,
            "dset": settings.dset,
            "pattern": self.name,
            "image_shape": list(self.example().shape[1:]),
            "weights_checksum": checksum(self.model.state_dict().values()),
            "masks_checksum": checksum([] if not isinstance(self.pattern, dict) else self.pattern.values()),
            "dense_accuracy": dense,
            "dense_sparsity": sparsity(self.model),
        }

    def mask_seed(self, seed: int) -> int | None:
        """The seed that the masks depend on; None where no images choose them."""
        return seed if self.settings.needs_images("MP") else None

    def selection(self, seed: int) -> Selection:
        """The masks that a seed's images choose: the one place where they are, once for each set of images."""
        key = self.mask_seed(seed)
        if key not in self.selections:
            settings, options = self.settings, self.settings.options_of(seed)
            looks = any(map(settings.needs_images, settings.algo))  # magnitudes need none, but the network's trace does
            images = self.calibration(seed)[0] if looks else None
            chosen = choose_masks(
                *(self.network, images, self.pattern, options),
                mask_alg=settings.mask_alg,
                layers=self.layers,
                keep_zeros=settings.keep_zeros,
                device=settings.device,
            )
            self.selections = {key: chosen}
        return self.selections[key]

    def prune(self, algo: str, seed: int, images: Tensor | None, **hooks: Any) -> Pruned:
        """The network, pruned on a seed's images: the one place where the command calls the library's `prune`."""
        options, device = self.settings.options_of(seed), self.settings.device
        return prune(self.network, images, self.selection(seed), options, algo=algo, device=device, **hooks)

    def calibration(self, seed: int) -> tuple[Tensor, list[int]]:
        """(images, their indices in the training set) that a seed draws; the last ones are kept."""
        if seed not in self.drawn:
            settings = self.settings
            self.drawn.clear()  # before others take as much memory
            self.drawn[seed] = self.data.calibration(settings.ngrads, seed, settings.mirror, settings.options.cache_dir)
        return self.drawn[seed]

    def masked_score(self, seed: int) -> Score:
        """How the masked network does with nothing solved, measured once for each set of masks."""
        key = self.mask_seed(seed)
        if key not in self.masked_scores:
            images = None if key is None else self.calibration(seed)[0]
            skip = self.settings.skip_evaluation
            self.masked_scores[key] = Score() if skip else self.score(self.prune("MP", seed, images).model)
        return self.masked_scores[key]

    @cached_property
    def dense(self) -> tuple[Score, Tensor | None]:
        """How the dense network does on the test images, and its logits; nothing with --skip_evaluation."""
        if self.settings.skip_evaluation:
            return Score(), None
        return evaluate.score(self.model, self.test_batches(), self.settings.device, group=self.group)

    def score(self, model: nn.Module) -> Score:
        """How a network does on the test images, beside the dense one; nothing with --skip_evaluation."""
        _, logits = self.dense
        if logits is None:
            return Score()
        return evaluate.score(model, self.test_batches(), self.settings.device, logits, self.group)[0]

    def test_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's test images; on the host, as many at a time as pass through a network there."""
        size = self.settings.test_batch_size
        if not is_gpu(self.settings.device):
            size = min(size, evaluate.at_a_time(self.data.test[0][0]))
        count = len(self.data.test)
        if self.group.size == 1 or count < self.group.size:  # if all take all, their shares are the same
            return self.data.test_batches(size)
        return self.data.batches(Subset(self.data.test, range(count)[self.group.share(0, count)]), size)


def classifier_of(settings: RunSettings, known: Known) -> Classifier:
    """The network of --arch with its weights and its transform."""
    return load_classifier(
        settings.arch,
        known,
        settings.checkpoint,
        settings.random_weights,
        settings.num_classes,
        seed=settings.options.seed,
        checkpoint_key=settings.checkpoint_key,
    ).adapted(settings.mean, settings.std, settings.resize)


def name_of(settings: RunSettings) -> str:
    """What the pattern is called where a run is named."""
    if settings.masks is not None:
        return f"masks {settings.masks.stem}"
    return str(settings.pattern) if settings.mask_alg == "MP" else f"{settings.pattern} by {settings.mask_alg}"


def permuted(model: nn.Module, pattern: NM, layers: Layers, example: Callable[[], Tensor]) -> nn.Module:
    """A network that computes the same with its channels in a better order; says what that is worth."""
    result = permute(model, pattern, layers, example=example)
    if not result.kept:
        print("permuted nothing: no layer's input channels can be followed and have a better order")
        return model
    before, after = (sum(shares) / len(shares) for shares in zip(*result.kept.values()))
    print(
        f"permuted the inputs of {len(result.kept)} layers: {pattern} keeps {after:.1%} of their magnitude, not "
        f"{before:.1%}; the others' channels cannot be followed, or have no better order"
    )
    return result.model


def warn_of_twin(settings: RunSettings, model: nn.Module, data: Data) -> None:
    """Warn where a checkpoint does better, on some of the test images, in the network that takes the same file."""
    twin = twin_of(settings.arch)
    if twin is None or settings.checkpoint is None:
        return
    try:
        key = settings.checkpoint_key
        other = load_classifier(
            twin, {}, settings.checkpoint, num_classes=settings.num_classes, checkpoint_key=key
        ).model
    except SnowsError:  # it does not take this file
        return
    some = Subset(data.test, range(min(TWIN_IMAGES, len(data.test))))
    own, others = (
        evaluate.accuracy(each, data.batches(some, min(32, settings.test_batch_size)), settings.device)
        for each in (model, other)
    )
    if own is not None and others is not None and others > own + FAR_FROM_STATED:
        print(
            f"warning: {settings.checkpoint} also fits {twin}, which pads otherwise: {others:.1f} % of the first "
            f"{len(some)} test images there, {own:.1f} % in {settings.arch}. Give --arch {twin} if it is that.",
            file=sys.stderr,
        )


def warn_if_far(measured: float | None, stated: float | None) -> None:
    """Warn where the dense accuracy is not what the weights are known for."""
    if stated is not None and measured is not None and measured < stated - FAR_FROM_STATED:
        print(
            f"warning: these weights are stated to reach {stated:.2f} %, far above the {measured:.2f} % measured here. "
            f"The usual cause is a wrong normalisation (--mean, --std) or another test set.",
            file=sys.stderr,
        )
