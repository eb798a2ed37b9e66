"""Detectors and what is distilled of them."""
