"""The random number generators of a run: seeded, saved, restored."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import Tensor


def _generators(device: torch.device) -> tuple[Tensor, Tensor | None, Any, Any]:
    """Torch's, the device's, Python's and numpy's: a student may draw from any (stochastic depth, masks)."""
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device, random.getstate(), np.random.get_state()  # noqa: NPY002


def _set_generators(state: tuple[Tensor, Tensor | None, Any, Any], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
    random.setstate(state[2])
    np.random.set_state(state[3])  # noqa: NPY002


def rng_state(device: torch.device) -> dict[str, Any]:
    """The generators of torch, CUDA, Python and numpy in plain types and tensors."""
    version, words, cached = random.getstate()
    generator: Any = np.random.get_state()  # noqa: NPY002 (the global generator is what is saved)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        "python": [version, list(words), cached],
        "numpy": [
            str(generator[0]),
            torch.from_numpy(generator[1].astype(np.int64)),
            int(generator[2]),
            int(generator[3]),
            float(generator[4]),
        ],
    }


def resume_generators(state: dict[str, Any], seed: int, rank: int, device: torch.device) -> None:
    """Set this rank's generators to their saved state; a rank that the saved run did not have seeds its own."""
    generators = [state["rng"], *state["rng_of_other_ranks"]]
    if rank < len(generators):
        restore_rng(generators[rank], device)
    else:
        seed_everything(mix_seed(seed, rank, state["step"]))


def restore_rng(rng: dict[str, Any], device: torch.device) -> None:
    """Set the generators of torch, CUDA, Python and numpy."""
    torch.set_rng_state(rng["torch"])
    if device.type == "cuda" and rng["cuda"] is not None:
        torch.cuda.set_rng_state(rng["cuda"], device)
    version, words, gauss = rng["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, index, has_gauss, cached = rng["numpy"]
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
