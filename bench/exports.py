"""What each export holds, beside the pruned network in PyTorch: logits, accuracy, zeros, pattern and bytes.

    python bench/exports.py --dset cifar10.npz --checkpoint resnet20_cifar10.pt [--networks NAME ...] [--images 1000]

The networks that ship, pruned from their real weights, and others with random weights and random images. Solving is not
the matter: most are pruned by magnitude, and the row says by what. A row that the results file holds is not measured
again; a refusal (int8 that loses too much) is a row too.
"""

import argparse
import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from common import ROOT, Parser, Results, pattern_of
from networks import NETWORKS as CIFAR10
from networks import cifar10, fill_zero_weights, trained, weights
from resnet_cifar import ResNet
from torch import Tensor, nn
from vit_small import vit_digits

import snows
from snows.cli.shell import shell
from snows.deploy.checks import Logits
from snows.deploy.deployable import Deployable, ExportOptions
from snows.deploy.exports import EXPORTS, export
from snows.errors import SnowsError, UsageError
from snows.zoo.classifiers import from_library, load_checkpoint
from snows.zoo.evaluate import at_a_time
from snows.zoo.images import Data, digits, normalised

CALIBRATION = 300  # images for int8, and for MP+
RANDOM_IMAGES = 16  # of random pixels, for networks with random weights
TWO_OF_FOUR = ("2:4", "MP", "")
# network -> (pattern, what sets the survivors, which layers: a part of their names)
RUNS = {
    "resnet20_digits": [("unstructured 0.8", "MP+", "")],
    "vit_digits": [("unstructured 0.5", "MP+", "blocks")],
    "resnet20_cifar10": [("2:4", "MP+", ""), ("unstructured 0.8", "MP+", "")],
    "vit_cifar10": [("2:4", "MP+", "blocks")],
    "timm/tf_efficientnet_lite0": [TWO_OF_FOUR],
    "torchvision/vit_b_16": [TWO_OF_FOUR],
    "torchvision/mobilenet_v2": [TWO_OF_FOUR],
    "timm/swin_tiny_patch4_window7_224": [TWO_OF_FOUR],
    "timm/convnext_tiny": [TWO_OF_FOUR],
}
DIGITS = {"resnet20_digits": lambda: ResNet(20, 10, channels=1), "vit_digits": vit_digits}
WAYS = [{"export": name, "flags": ""} for name in EXPORTS]
WAYS += [{"export": "onnx", "flags": "--half"}, {"export": "int8", "flags": "--int8_float none"}]
HOW = {
    "": ExportOptions(),
    "--half": ExportOptions(half=True),
    "--int8_float none": ExportOptions(int8_float=("none",)),
}


def of_random_pixels(arch: str) -> tuple[nn.Module, Data]:
    """A library's network with random weights, and images of noise without labels."""
    torch.manual_seed(0)
    model = fill_zero_weights(from_library(arch, pretrained=False).model.eval())
    images = torch.randn(RANDOM_IMAGES, 3, 224, 224)
    data = torch.utils.data.TensorDataset(images, torch.full((RANDOM_IMAGES,), -1))
    return model, Data(data, data)


def network(name: str, args: argparse.Namespace) -> tuple[nn.Module, Data]:
    """A network with its weights, and its images."""
    if name in DIGITS:
        model = DIGITS[name]()
        load_checkpoint(model, ROOT / "checkpoints" / f"{name}.safetensors")
        return model.eval(), Data(*digits(normalised((0.5,), (0.5,))))
    if name in CIFAR10:
        if args.dset is None:
            raise UsageError(f"--dset is required for {name}.")
        given = args.checkpoint if name == "resnet20_cifar10" else None
        data = cifar10(args.dset)
        data.test = torch.utils.data.Subset(data.test, range(min(args.images, len(data.test))))
        return trained(name, weights(name, given)), data
    return of_random_pixels(name)


def pruned(model: nn.Module, data: Data, pattern: str, algo: str, part: str) -> Deployable:
    """A network, pruned, with what its exports need."""
    images = data.calibration(min(CALIBRATION, len(data.train)), seed=0)[0]
    asked = pattern_of(pattern.split()[-1])
    found = snows.prune(model, images, asked, algo=algo, layers=lambda name: part in name)
    rule = asked if isinstance(asked, snows.NM) else None
    size = at_a_time(data.test[0][0])

    def test() -> Callable[[], Tensor]:
        return data.test_batches(min(128, size))

    return Deployable(found.model.eval(), found.masks, test, lambda: images, rule)


def measure(deployable: Deployable, before: Logits, name: str, how: ExportOptions) -> dict:
    """The figures of one export, or why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            found = export(deployable, name, Path(folder, EXPORTS[name].file), how, before)
        except SnowsError as error:
            return {"refused": str(error).replace("`int8_tolerance`", "--int8_tolerance")}
    return dataclasses.asdict(found)


def main():
    parser = Parser(__doc__, "exports.csv", "--checkpoint")
    parser.add_argument("--dset", type=Path, help="an .npz of CIFAR-10")
    parser.add_argument("--networks", nargs="+", default=list(RUNS), choices=RUNS, help="only these")
    parser.add_argument("--images", type=int, default=10**9, help="test images of CIFAR-10 (default: all)")
    args = parser.parse()
    results = Results(args.out)
    for name in args.networks:
        for pattern, algo, part in RUNS[name]:
            shared = {"network": name, "pattern": pattern, "algo": algo}
            deployable = before = None
            for _, run in results.claimed([{**shared, **way} for way in WAYS]):
                if deployable is None:
                    deployable = pruned(*network(name, args), pattern, algo, part)
                    before = Logits(deployable.model, deployable)
                bytes_before = sum(tensor.nbytes for tensor in deployable.model.state_dict().values())
                found = measure(deployable, before, run["export"], HOW[run["flags"]])
                results.add({**run, "bytes_of_tensors": bytes_before, **found})
                print(*run.values(), found, flush=True)


if __name__ == "__main__":
    shell(main)
