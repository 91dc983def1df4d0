"""The model as a sequence of operations: its trace, its layers, and windows from a layer on with their derivatives."""
