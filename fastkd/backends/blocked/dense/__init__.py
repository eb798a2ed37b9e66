"""The similarity operations at sizes whose whole matrix fits the cache: no tiles, and the gradients come at once.

Below about a thousand rows the calls of torch cost as much as the arithmetic. So the forward computes the gradients
too, as long as it has the exponentials, for an upstream gradient of one. The backward multiplies them by the real one.
With few rows even starting torch's operations costs as much as what they do. There the C++ extension computes the same
in loops that run over a row once (``csrc/dense*.cpp``). Those loops run on one thread.
"""

from typing import Any

import torch

from fastkd import native

MAX_LOOP = 1 << 16  # elements of a matrix that the loops go through sooner than torch's operations on many threads
MANY_THREADS = 4  # with fewer, the loops are faster at any size: torch's operations take four times the passes


def loops(elements: int) -> Any:
    """The extension, if there is one and its loops should serve a matrix of so many elements; else None."""
    return native.extension() if elements <= MAX_LOOP or torch.get_num_threads() <= MANY_THREADS else None
