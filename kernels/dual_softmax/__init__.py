"""Kernels of the dual_softmax operation: two softmaxes per row."""
