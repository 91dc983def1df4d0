"""Prune a CNN to N:M sparsity: N of every M consecutive input channels survive, at each kernel position.

With no flags: the ResNet-20 that ships in checkpoints/, on scikit-learn's handwritten digits, to 2:4.

    python prune_NM.py --arch resnet50_cifar100 --dset cifar100 --ngrads 3000 --NM_N 1 --NM_M 4 --k_step 30
"""

import utils

from snows.cli import experiment, flags
from snows.cli.shell import shell


def main():
    parser = flags.parser(__doc__, arch="resnet20_digits")
    flags.add_nm_flags(parser)
    settings = flags.parse(parser, flags.nm)
    experiment.run(settings, utils.KNOWN)


if __name__ == "__main__":
    shell(main)
