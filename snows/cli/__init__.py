"""What only a shell needs: flags, one experiment from the dense accuracy to the run folder, its report."""
