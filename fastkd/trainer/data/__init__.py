"""Data sets, their labels, and loaders whose order depends on the seed and the epoch alone."""
