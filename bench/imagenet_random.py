"""Any network: random weights on real ImageNet images, pruned 2:4 through the scripts.

    python bench/imagenet_random.py --dset imagenet_sample

Random weights say nothing of accuracy; this checks that each run ends, that the loss falls at every solved layer and
that the zeros are where they should be, and records time and memory in results/imagenet_random_weights.json.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from snows.cli import run_folder  # noqa: E402
from snows.cli.shell import shell  # noqa: E402
from snows.errors import SnowsError  # noqa: E402

SHARED = "--ngrads 64 --batch_size 16 --NM_N 2 --NM_M 4 --sweeps 1 --schedule 0"
CNN = f"CNN_pruning/prune_NM.py {SHARED} --k_step 1 --max_CG_iterations 2"
VIT = f"VIT_pruning/prune_NM.py {SHARED} --k_step 3 --max_CG_iterations 3 --layers_to_prune in_proj out_proj mlp"
NETWORKS = ["mobilenet_v2", "timm/efficientnet_b0", "timm/densenet121", "timm/resnet50", "timm/convnext_tiny"]
NETWORKS = dict.fromkeys(NETWORKS, CNN) | {"vit_b_16": VIT}


def measure(arch: str, dset: Path, device: str) -> dict:
    """One run of the network's script and what its folder says."""
    script, *settings = NETWORKS[arch].split()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        command = [sys.executable, str(ROOT / script), *settings, "--arch", arch, "--random_weights"]
        command += ["--dset", str(dset), "--device", device, "--out_dir", str(run), "--skip_evaluation"]
        if subprocess.run(command).returncode:
            raise SnowsError(f"{arch}: its run failed, for the reason above.")
        metrics = json.loads((run / "metrics.json").read_text())
        environment = json.loads((run / "environment.json").read_text())
        layers = list(csv.DictReader((run / "layers.csv").open()))
        state = safetensors.torch.load_file(run / "model.safetensors")
        masks = safetensors.torch.load_file(run / "masks.safetensors")
    for name in masks:
        weight = state[f"{name}.weight"] if f"{name}.weight" in state else state[f"{name}_weight"]
        groups = (weight != 0).movedim(1, -1).unflatten(-1, (-1, 4))
        assert (groups.sum(-1) <= 2).all(), name
    return {
        "network": arch,
        "settings": NETWORKS[arch],
        "images": metrics["calibration_images"],
        "layers_solved": len(layers),
        "layers_whose_loss_fell": sum(float(x["loss_after"]) < float(x["loss_before"]) for x in layers),
        "median_loss_ratio": sorted(float(x["loss_after"]) / float(x["loss_before"]) for x in layers)[len(layers) // 2],
        "sparsity": metrics["sparsity"],
        "left_dense": metrics["left_dense"],
        "seconds": metrics["seconds"],
        "layer_seconds": {layer["name"]: float(layer["seconds"]) for layer in layers},
        "layer_peak_memory_bytes": {layer["name"]: int(layer["peak_memory_bytes"]) for layer in layers},
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "machine": environment["machine"],
        "torch": environment["torch"],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dset", type=Path, required=True, help="a folder in ImageFolder layout")
    parser.add_argument(
        "--networks",
        nargs="+",
        default=list(NETWORKS),
        choices=NETWORKS,
        help="only these; the file keeps the others' rows",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "imagenet_random_weights.json")
    args = parser.parse_args()
    rows = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    for arch in args.networks:
        rows = [row for row in rows if row["network"] != arch] + [measure(arch, args.dset, args.device)]
        run_folder.write_json(args.out, {"rows": rows})
        print(rows[-1], flush=True)


if __name__ == "__main__":
    shell(main)
