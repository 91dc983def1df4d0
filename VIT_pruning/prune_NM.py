"""Prune a vision transformer to N:M sparsity: N of every M consecutive inputs of a linear map survive.

With no flags: the small ViT that ships in checkpoints/, on scikit-learn's handwritten digits, to 2:4.

    python prune_NM.py --arch vit_b_16 --dset imagenet --ngrads 256 --NM_N 2 --NM_M 4 --k_step 3
"""

import utils

from snows.cli import experiment, flags
from snows.cli.shell import shell


def main():
    parser = flags.parser(__doc__, arch="vit_digits")
    flags.add_nm_flags(parser)
    utils.add_layer_flag(parser)
    settings = flags.parse(parser, flags.nm)
    parts = settings.flags["layers_to_prune"]
    experiment.run(settings, utils.KNOWN, utils.chosen(parts), {"--layers_to_prune": utils.patterns(parts)})


if __name__ == "__main__":
    shell(main)
