"""From a pruned network to one that runs somewhere: what it costs, on which runtime, and what its zeros do there."""
