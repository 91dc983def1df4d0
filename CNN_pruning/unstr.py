"""Prune a CNN to unstructured sparsity.

With no flags: the ResNet-20 that ships in checkpoints/, on scikit-learn's handwritten digits, to 80 % sparsity.

    python unstr.py --arch resnet20_cifar10 --dset cifar10 --ngrads 3000 --k_step 20 --target_sparsity 0.7
"""

import utils

from snows import Unstructured, experiment


def main():
    flags = experiment.parser(__doc__, arch="resnet20_digits")
    group = flags.add_argument_group("pattern")
    group.add_argument(
        "--target_sparsity", type=float, default=0.8, help="share of all parameters to set to zero (0.8)"
    )
    group.add_argument("--max_layer_sparsity", type=float, help="cap per layer (default: halfway from the target to 1)")
    group.add_argument("--allocation", default="global", choices=("global", "uniform"), help="sparsity of the layers")
    args = flags.parse_args()

    pattern = Unstructured(args.target_sparsity, args.max_layer_sparsity, args.allocation)
    classifier = utils.load_classifier(args)
    data = utils.load_data(args, classifier)
    experiment.run(args, classifier, data, pattern)


if __name__ == "__main__":
    experiment.shell(main)
