"""The calibration images on their way through the network, and the memory that they and the work on them take."""
