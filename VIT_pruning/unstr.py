"""Prune a vision transformer to unstructured sparsity.

With no flags: the small ViT that ships in checkpoints/, on scikit-learn's handwritten digits, half of it zero.

    python unstr.py --arch timm/deit_small_patch16_224 --dset imagenet --ngrads 1024 --target_sparsity 0.6
"""

import utils

from snows.cli import experiment, flags
from snows.cli.shell import shell


def main():
    parser = flags.parser(__doc__, arch="vit_digits")
    flags.add_unstructured_flags(parser, default=0.5)
    utils.add_layer_flag(parser)
    settings = flags.parse(parser, flags.unstructured)
    parts = settings.flags["layers_to_prune"]
    experiment.run(settings, utils.KNOWN, utils.chosen(parts), {"--layers_to_prune": utils.patterns(parts)})


if __name__ == "__main__":
    shell(main)
