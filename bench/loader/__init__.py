"""``python -m bench.loader``: how fast images are read and augmented on one core."""
