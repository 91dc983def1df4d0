"""What SNOWS is compared with, on the same unlabelled images: distillation, global AdaPrune, BatchNorm.

    distillation      the whole network trained on the dense network's logits, the zeros staying zero
    global AdaPrune   the relative errors of all the layers' outputs together, by Adam (SPDY, arXiv 2201.13096, which
                      begins where each layer by itself has been solved: at MP+)
    BatchNorm         the mask alone, with the statistics of the pruned network's own features

The first two are one loop, `train`, with a loss each. How many steps fit a budget is timed beforehand, by `within`, so
that the seed decides what a training gives, and the clock nothing.
"""

import time
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import partial
from itertools import product, starmap

import torch
import torch.nn.functional as F
from networks import views
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from snows.calibration.stream import channels_last_on_cpu
from snows.memory import is_gpu
from snows.network.layers import Masks

TEMPERATURE = 4.0  # that softens the logits of both networks, as in Hinton et al. 2015
TIMED = 4  # steps, the first of which warms up


@dataclass(frozen=True)
class Training:
    """How a pruned network is trained; the learning rate falls to zero along a cosine.

    loss: of LOSSES. optimizer: of OPTIMIZERS. views: whether each step sees its images mirrored and cut out anew.
    batch_norm: "training", with each batch's statistics, or "evaluation", with the dense network's.
    """

    loss: str = "MSE"
    optimizer: str = "Adam"
    views: bool = True
    batch_norm: str = "training"
    lr: float = 1e-3
    steps: int = 100
    batch_size: int = 128
    seed: int = 0

    def __str__(self) -> str:
        return f"{self.optimizer}, {self.loss}, {'views' * self.views or 'no views'}, BatchNorm in {self.batch_norm}"


def squared(found: list[Tensor], dense: list[Tensor]) -> Tensor:
    """The squared errors of some outputs, each relative to the dense network's, summed."""
    return sum((f - y).square().sum() / y.square().sum() for f, y in zip(found, dense, strict=True))


def softened(found: list[Tensor], dense: list[Tensor]) -> Tensor:
    """The Kullback-Leibler divergence of the classes' softened probabilities, in the scale of its gradients at 1."""
    (f,), (y,) = ([(each / TEMPERATURE).log_softmax(1) for each in outputs] for outputs in (found, dense))
    return TEMPERATURE**2 * F.kl_div(f, y, reduction="batchmean", log_target=True)


LOSSES: dict[str, Callable[[list[Tensor], list[Tensor]], Tensor]] = {
    "MSE": squared,
    "KL": softened,
    "layers": squared,  # of the outputs of all the pruned layers beside the logits
}
OPTIMIZERS = {"Adam": torch.optim.Adam, "SGD": partial(torch.optim.SGD, momentum=0.9, nesterov=True)}
RATES = {"Adam": (3e-4, 1e-3, 3e-3), "SGD": (1e-2, 3e-2, 1e-1)}  # that are tried
ADAPRUNE = Training("layers", views=False, batch_norm="evaluation")
KINDS = product(("MSE", "KL"), OPTIMIZERS, (True, False), ("training", "evaluation"))
# name -> (the algorithm that it begins with, the training)
TRAININGS = {f"distillation: {each}": ("MP", each) for each in starmap(Training, KINDS)}
TRAININGS |= {"global AdaPrune": ("MP+", ADAPRUNE), "global AdaPrune from the mask": ("MP", ADAPRUNE)}


class Outputs:
    """What a network computes of images: the outputs of some of its modules, in execution order, and the logits."""

    def __init__(self, model: nn.Module, names: list[str]):
        self.model, self.found = model, []
        for name, module in model.named_modules():
            if name in names:
                module.register_forward_hook(lambda module, inputs, output: self.found.append(output.clone()))

    def __call__(self, images: Tensor) -> list[Tensor]:
        self.found.clear()
        logits = self.model(images)
        return [*self.found, logits]


def train(
    dense: nn.Module, start: nn.Module, masks: Masks, images: Tensor, training: Training, device: str = "cpu"
) -> nn.Module:
    """A trained copy of the pruned network `start`, in evaluation mode; what the masks remove stays zero."""
    student, teacher = deepcopy(start).eval().to(device), deepcopy(dense).eval().to(device)
    for module in student.modules():
        if isinstance(module, BatchNorm):
            module.train(training.batch_norm == "training")
    names = list(masks) if training.loss == "layers" else []
    found, wanted, loss = Outputs(student, names), Outputs(teacher, names), LOSSES[training.loss]
    support = [(weight_of(student, name), mask.to(device)) for name, mask in masks.items()]
    optimizer = OPTIMIZERS[training.optimizer](student.parameters(), lr=training.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, training.steps)
    generator = torch.Generator().manual_seed(training.seed)
    held = None if training.views or names else logits_of(teacher, images, training.batch_size, device)
    for _, chosen in zip(range(training.steps), batches(len(images), training.batch_size, generator)):
        batch = (views(images[chosen], generator) if training.views else images[chosen]).to(device)
        batch = channels_last_on_cpu(batch, device)
        with torch.no_grad():
            targets = wanted(batch) if held is None else [held[chosen]]
        optimizer.zero_grad()
        loss(found(batch), targets).backward()
        for weight, mask in support:  # without a gradient neither optimiser moves a weight
            weight.grad.masked_fill_(~mask, 0)
        optimizer.step()
        schedule.step()
    trained = deepcopy(start).eval().to(device)  # without the hooks
    trained.load_state_dict(student.state_dict())
    return trained


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor, batch_size: int, device: str) -> Tensor:
    """The logits of all images, on the device."""
    return torch.cat([model(batch.to(device)) for batch in images.split(batch_size)])


def batches(count: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Indices of images, without end: all of them in a new order each epoch, but for a last batch that is short."""
    while True:
        for chosen in torch.randperm(count, generator=generator).split(size):
            if len(chosen) == min(size, count):
                yield chosen


def weight_of(model: nn.Module, layer: str) -> nn.Parameter:
    """The weight of a layer by its name in the masks; attention's in_proj is a parameter and no module."""
    parameters = dict(model.named_parameters())
    return parameters.get(f"{layer}.weight", parameters.get(f"{layer}_weight"))


def within(
    seconds: float, dense: nn.Module, start: nn.Module, masks: Masks, images: Tensor, training: Training, device="cpu"
) -> Training:
    """The training with as many steps as fit so many seconds of `clock`, at least one; a few are tried for it."""
    spent = []
    for steps in (1, TIMED):
        started = clock(device)
        train(dense, start, masks, images, replace(training, steps=steps), device)
        spent.append(clock(device) - started)
    first, all_of_them = spent
    each = max(all_of_them - first, 1e-9) / (TIMED - 1)
    return replace(training, steps=max(1, round((seconds - first) / each) + 1))


def clock(device: str = "cpu") -> float:
    """Seconds of the processor that this process has taken, which other jobs do not stretch; of a GPU, of the wall."""
    if is_gpu(device):
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


@torch.no_grad()
def reestimated(pruned: nn.Module, images: Tensor, batch_size: int = 128, device: str = "cpu") -> nn.Module:
    """A copy of a pruned network whose BatchNorms have the mean statistics of its own batches."""
    model = deepcopy(pruned).eval().to(device)
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.reset_running_stats()
            module.momentum = None  # all batches count the same
            module.train()
    for batch in images.split(batch_size):
        model(batch.to(device))
    return model.eval()
