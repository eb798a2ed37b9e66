"""Triton kernels, installed as ``fastkd.kernels``: one operation a file, kernel and launcher together."""
