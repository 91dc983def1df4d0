"""Prune a CNN to unstructured sparsity.

With no flags: the ResNet-20 that ships in checkpoints/, on scikit-learn's handwritten digits, to 80 % sparsity.

    python unstr.py --arch resnet20_cifar10 --dset cifar10 --ngrads 3000 --k_step 20 --target_sparsity 0.7
"""

import utils

from snows.cli import experiment, flags
from snows.cli.shell import shell


def main():
    parser = flags.parser(__doc__, arch="resnet20_digits")
    flags.add_unstructured_flags(parser, default=0.8)
    settings = flags.parse(parser, flags.unstructured)
    experiment.run(settings, utils.KNOWN)


if __name__ == "__main__":
    shell(main)
