"""What the surviving weights become: the K-step loss, its curvature, and the solver."""
