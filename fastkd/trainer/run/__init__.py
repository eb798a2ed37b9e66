"""A training run: the loop and everything it reads and writes."""
