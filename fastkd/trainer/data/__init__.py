"""Data sets, and the loaders whose order depends on (seed, epoch) alone."""
