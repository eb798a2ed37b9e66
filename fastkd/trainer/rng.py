"""The random number generators of a run: seeded, saved and restored."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.validate import check_choice, check_int, check_number, check_type


def rng_state(device: torch.device) -> dict[str, Any]:
    """The states of torch's, CUDA's, Python's and numpy's global generators, in plain types and tensors.

    All four are saved, because a model or an augmentation may draw from any of them.
    """
    version, words, gauss = random.getstate()
    generator: Any = np.random.get_state()  # noqa: NPY002 (the global generator is what is saved)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(words), gauss],
        "numpy": [
            str(generator[0]),
            torch.from_numpy(generator[1].astype(np.int64)),
            int(generator[2]),
            int(generator[3]),
            float(generator[4]),
        ],
    }


def restore_rng(state: dict[str, Any], device: torch.device) -> None:
    """Set the generators to what ``rng_state`` returned; TypeError or ValueError for anything else.

    Everything is checked first: numpy, for one, takes any position and reads there.
    """
    version, words, gauss = state["python"]
    kind, keys, index, has_gauss, cached = state["numpy"]
    for name in ("torch", "cuda"):
        check_type(f"rng.{name}", state[name], Tensor if name == "torch" else (Tensor, type(None)))
    check_type("rng.python", gauss, (float, type(None)))
    for word in (version, *words):
        check_int("rng.python", word, 0)
    check_choice("rng.numpy", kind, ("MT19937",))
    check_type("rng.numpy", keys, Tensor)
    if keys.dtype != torch.int64 or keys.shape != (624,) or not 0 <= int(keys.min()) <= int(keys.max()) < 2**32:
        raise ValueError(f"rng.numpy: got {keys.dtype} {list(keys.shape)}, expected 624 words of 32 bits")
    for number, largest in ((index, 624), (has_gauss, 1)):
        check_int("rng.numpy", number, 0)
        check_number("rng.numpy", number, 0, largest)
    check_number("rng.numpy", cached)
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((kind, keys.numpy().astype(np.uint32), index, has_gauss, cached))  # noqa: NPY002


def seed_everything(seed: int, rank: int = 0) -> None:
    """Seed the generators of torch (CUDA too), Python and numpy, differently on every rank."""
    seed = mix_seed(seed, rank) if rank else seed
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several integers, without the collisions of a sum."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


def sample_seeds(seed: int, epoch: int, indices: Sequence[int], draw: int = 0) -> np.ndarray:
    """A 63-bit seed for each sample, int64 [B], which depends on (seed, epoch, index, draw) alone.

    ``draw`` tells several uses of one sample in an epoch apart. The seeds of an epoch are a stream of SplitMix64
    (Steele, Lea and Flood, 2014), of which ``indices`` chooses the places: it costs a tenth of ``mix_seed`` per sample.
    """
    x = np.uint64(mix_seed(seed, epoch, draw)) + np.asarray(indices, np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(1)).astype(np.int64)


def seed_generators(seed: int) -> None:
    """Seed the global generators that an augmentation on the CPU may draw from. Takes 13 us, torch.manual_seed 90."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 (augmentations of others use it)
    torch.default_generator.manual_seed(seed)


@contextmanager
def kept_generators() -> Iterator[None]:
    """Runs its block, and then puts the generators of the CPU back into the states that they had before."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])  # noqa: NPY002
        torch.set_rng_state(before[2])
