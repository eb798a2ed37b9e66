"""Kernels of the contrast operation: one softmax per query."""
