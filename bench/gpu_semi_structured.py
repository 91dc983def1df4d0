"""What 2:4 is worth on a GPU: the linear maps of a ViT-B/16, and the whole network, packed beside dense.

    python bench/gpu_semi_structured.py [--batches 1 8 32 128] [--dtypes float16 bfloat16] [--modes eager compiled]

For each number of images, of 197 tokens each: milliseconds of dense and packed, both as they are or both through
torch.compile, the least of --runs, and how far their results are apart. Not run on a GPU yet. A row that the results
file already holds is not measured again.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
import torchvision
from common import Parser, Results
from torch import Tensor, nn

import snows
from snows.cli.flags import whole
from snows.cli.shell import shell
from snows.deploy import semi_structured
from snows.masks.patterns import NM
from snows.memory import is_gpu

TOKENS = 197
SHAPES = {"in_proj": (2304, 768), "out_proj": (768, 768), "mlp.0": (3072, 768), "mlp.3": (768, 3072)}  # (out, in)
NETWORK, PIXELS = "vit_b_16", 224
MODES = {"eager": lambda call: call, "compiled": torch.compile}


def vit() -> nn.Module:
    return torchvision.models.vit_b_16()


def milliseconds(call: Callable[[], Tensor], device: str, runs: int) -> float:
    """Of a call, the least of several; the first two, in which kernels are made and chosen, do not count."""
    times = []
    for _ in range(runs + 2):
        wait(device)
        began = time.perf_counter()
        call()
        wait(device)
        times.append(1000 * (time.perf_counter() - began))
    return min(times[2:])


def wait(device: str) -> None:
    if is_gpu(device):
        torch.cuda.synchronize(device)


def compared(dense: Callable, packed: Callable, inputs: Tensor, mode: str, runs: int) -> dict:
    """Both on the same inputs, in the same mode."""
    device = str(inputs.device)
    dense, packed = MODES[mode](dense), MODES[mode](packed)
    expected, found = dense(inputs).float(), packed(inputs).float()
    return {
        "dense_ms": milliseconds(lambda: dense(inputs), device, runs),
        "packed_ms": milliseconds(lambda: packed(inputs), device, runs),
        "difference": ((found - expected).norm() / expected.norm()).item(),
    }


def of_layer(run: dict, device: str, runs: int) -> dict:
    """One linear map on the tokens of a batch."""
    torch.manual_seed(0)
    weight = torch.randn(SHAPES[run["what"]], device=device)
    weight = (weight * NM(2, 4).mask(weight)).to(getattr(torch, run["dtype"]))
    bias, packed = torch.zeros(len(weight), device=device, dtype=weight.dtype), semi_structured.pack(weight)
    tokens = torch.randn(run["batch_size"] * TOKENS, weight.shape[1], device=device, dtype=weight.dtype)
    return compared(lambda x: F.linear(x, weight, bias), lambda x: F.linear(x, packed, bias), tokens, run["mode"], runs)


def of_network(run: dict, device: str, runs: int) -> dict:
    """The whole network, pruned 2:4 by magnitude; dense is torchvision's own module."""
    torch.manual_seed(0)
    model, dtype = vit().eval(), getattr(torch, run["dtype"])
    nn.init.normal_(model.heads.head.weight, std=0.02)  # they begin as zeros
    pruned = snows.prune(model, None, snows.NM(2, 4), algo="MP").model.to(device)
    converted = snows.semi_structured.convert(pruned, dtype)
    images = torch.randn(run["batch_size"], 3, PIXELS, PIXELS, device=device, dtype=dtype)
    return compared(pruned.to(dtype), converted.model, images, run["mode"], runs)


def main():
    parser = Parser(__doc__, "gpu_semi_structured.csv", "--device")
    parser.add_argument("--batches", type=whole(1), nargs="+", default=[1, 8, 32, 128], help="numbers of images")
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"], choices=["float16", "bfloat16"])
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=MODES)
    parser.add_argument("--runs", type=whole(1), default=20, help="calls of each (default: %(default)s)")
    parser.set_defaults(device="cuda")
    args = parser.parse()
    semi_structured.check_gpu(torch.device(args.device))
    runs = [
        {"what": what, "dtype": dtype, "mode": mode, "batch_size": batch}
        for what in (*SHAPES, NETWORK)
        for dtype in args.dtypes
        for mode in args.modes
        for batch in args.batches
    ]
    results = Results(args.out, args.device)
    for place, run in results.claimed(runs):
        measured = of_network if run["what"] == NETWORK else of_layer
        with torch.no_grad():
            row = run | measured(run, args.device, args.runs)
        results.add(row)
        print(f"{place}: {row}", flush=True)


if __name__ == "__main__":
    shell(main)
