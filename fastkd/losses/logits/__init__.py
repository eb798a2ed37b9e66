"""Losses that read the logits of both networks."""
