"""Benchmarks: what the losses cost in time and memory, side by side with what else computes them."""
