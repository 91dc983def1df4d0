#!/usr/bin/env bash
# All that is to be measured on a GPU, by one command:  bench/gpu.sh [FOLDER with resnet20_cifar10.pt and cifar10.npz]
set -euo pipefail
cd "$(dirname "$0")/.."
data=${1:-}
python bench/gpu.py ${data:+--checkpoint "$data/resnet20_cifar10.pt" --dset "$data/cifar10.npz"}
for script in CNN_pruning/unstr.py VIT_pruning/prune_NM.py; do
    python "$script" --device cuda --out_dir "$(mktemp -d)/run"
    python "$script" --device cuda --precision highest --deterministic --out_dir "$(mktemp -d)/run"
done
python bench/products.py --device cuda --out results/products_gpu.csv
python bench/gpu_semi_structured.py
