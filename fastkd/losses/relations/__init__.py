"""Losses that read pooled features, and most of which compare the samples of a batch with each other."""
