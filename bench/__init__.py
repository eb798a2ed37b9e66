"""Benchmarks: what the losses cost in time and memory, side by side with what else computes them."""

import time

STARTED = time.monotonic()  # of the process that runs one of them; to import torch alone takes seconds
