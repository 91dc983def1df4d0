"""Any network: random weights on real ImageNet images, pruned 2:4 through the scripts.

    python bench/imagenet_random.py --dset imagenet_sample

Random weights say nothing of accuracy; this checks that each run ends, that the loss falls at every solved layer and
that the zeros are where they should be, and records time and memory: one row per network, which takes the place of the
one before, and in a second file, NAME_layers.csv, one per layer.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import safetensors.torch
from common import ROOT, Parser, Results, read, write
from transformers import AutoConfig, ViTImageProcessor

from snows.cli.shell import shell
from snows.errors import SnowsError
from snows.zoo.hugging_face import PREFIX

SHARED = "--ngrads 64 --batch_size 16 --NM_N 2 --NM_M 4 --sweeps 1 --schedule 0 --min_samples 0"
CNN = f"CNN_pruning/prune_NM.py {SHARED} --k_step 1 --max_CG_iterations 2"
VIT = f"VIT_pruning/prune_NM.py {SHARED} --k_step 3 --max_CG_iterations 3 --layers_to_prune in_proj out_proj mlp"
NETWORKS = ["mobilenet_v2", "timm/efficientnet_b0", "timm/densenet121", "timm/resnet50", "timm/convnext_tiny"]
NETWORKS = dict.fromkeys(NETWORKS, CNN) | {"vit_b_16": VIT}
# Kinds that others are built of: branches that can be merged, attention among convolutions, global response norms, ...
FEW = "--ngrads 16 --batch_size 16 --NM_N 2 --NM_M 4 --schedule 0 --k_step 2 --max_CG_iterations 2 --min_samples 0"
KINDS = ["repvgg_a0", "mobilenetv4_conv_small", "levit_128s", "convnextv2_atto", "maxvit_rmlp_pico_rw_256"]
JOINT = f"CNN_pruning/prune_NM.py {FEW} --joint_steps 1 --joint_CG_iterations 2"
NETWORKS |= {f"timm/{name}": JOINT for name in KINDS}
# Families of the package transformers, each of the size that it takes unless it is told another.
NETWORKS |= {f"transformers:{family}": JOINT for family in ("segformer", "swin")}


def described(arch: str, folder: Path) -> str:
    """The --arch of a folder that describes a family of transformers', and its images as ImageNet's mostly are."""
    AutoConfig.for_model(arch.removeprefix(PREFIX), num_labels=1000).save_pretrained(folder)
    ViTImageProcessor().save_pretrained(folder)
    return f"{PREFIX}{folder}"


def measure(arch: str, dset: Path, device: str) -> tuple[dict, list[dict]]:
    """One run of the network's script and what its folder says: of the network, and of each layer."""
    script, *settings = NETWORKS[arch].split()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        place = described(arch, Path(folder, "described")) if arch.startswith(PREFIX) else arch
        command = [sys.executable, str(ROOT / script), *settings, "--arch", place, "--random_weights"]
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
    ratios = sorted(float(layer["loss_after"]) / float(layer["loss_before"]) for layer in layers)
    row = {
        "network": arch,
        "settings": NETWORKS[arch],
        "images": metrics["calibration_images"],
        "layers_solved": len(layers),
        "layers_whose_loss_fell": sum(ratio < 1 for ratio in ratios),
        "median_loss_ratio": ratios[len(ratios) // 2],
        "sparsity": metrics["sparsity"],
        "seconds": metrics["seconds"],
        "peak_memory_bytes": metrics["peak_memory_bytes"],
        "environment": environment,
    }
    figures = {"seconds": float, "peak_memory_bytes": int}
    parts = [{"layer": each["name"], **{name: kind(each[name]) for name, kind in figures.items()}} for each in layers]
    parts += [{"layer": name, "left_dense": reason} for name, reason in metrics["left_dense"].items()]
    return row, [{"network": arch, **part} for part in parts]


def main():
    parser = Parser(__doc__, "imagenet_random_weights.csv", "--device")
    parser.add_argument("--dset", type=Path, required=True, help="a folder in ImageFolder layout")
    chosen = "only these; the file keeps the others' rows"
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, help=chosen)
    args = parser.parse()
    results, layers_file = Results(args.out, args.device), args.out.with_name(f"{args.out.stem}_layers.csv")
    for arch in args.networks:
        row, layers = measure(arch, args.dset, args.device)
        results.replace([*(each for each in results.rows() if each["network"] != arch), row])
        write(layers_file, [*(each for each in read(layers_file) if each["network"] != arch), *layers])
        print(row, flush=True)


if __name__ == "__main__":
    shell(main)
