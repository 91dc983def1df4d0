"""From a pruned network to one that runs somewhere."""
