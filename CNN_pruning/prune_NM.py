"""Prune a CNN to N:M sparsity: N of every M consecutive input channels survive, at each kernel position.

With no flags: the ResNet-20 that ships in checkpoints/, on scikit-learn's handwritten digits, to 2:4.

    python prune_NM.py --arch resnet50_cifar100 --dset cifar100 --ngrads 3000 --NM_N 1 --NM_M 4 --k_step 30
"""

import utils

from snows import NM, experiment


def main():
    flags = experiment.parser(__doc__, arch="resnet20_digits")
    group = flags.add_argument_group("pattern")
    group.add_argument("--NM_N", type=int, default=2, help="weights kept of every M (default: 2)")
    group.add_argument("--NM_M", type=int, default=4, help="consecutive input channels in a group (default: 4)")
    args = flags.parse_args()

    pattern = NM(args.NM_N, args.NM_M)
    classifier = utils.load_classifier(args)
    data = utils.load_data(args, classifier)
    experiment.run(args, classifier, data, pattern)


if __name__ == "__main__":
    experiment.shell(main)
