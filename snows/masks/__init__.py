"""Which weights survive: patterns, allocations, saliencies, and masks from files."""
