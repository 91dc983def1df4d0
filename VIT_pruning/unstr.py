"""Prune a vision transformer to unstructured sparsity.

With no flags: the small ViT that ships in checkpoints/, on scikit-learn's handwritten digits, half of it zero.

    python unstr.py --arch timm/deit_small_patch16_224 --dset imagenet --ngrads 1024 --target_sparsity 0.6
"""

import utils

from snows import experiment


def main():
    flags = experiment.parser(__doc__, arch="vit_digits")
    experiment.add_unstructured_flags(flags, default=0.5)
    utils.add_layer_flag(flags)
    args = experiment.parse(flags)
    experiment.run(args, utils.KNOWN, experiment.unstructured(args), layers=utils.chosen(args.layers_to_prune))


if __name__ == "__main__":
    experiment.shell(main)
