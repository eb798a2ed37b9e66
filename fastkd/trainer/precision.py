"""The dtypes a run may compute in, and the device it runs on."""

from __future__ import annotations

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str, precision: str = "fp32") -> torch.device:
    """``auto``: CUDA when present, else CPU. ValueError when the device is unknown, absent or lacks the precision."""
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(f"device: got {name!r}, expected 'auto' or a torch device ({error})") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {name!r}, but torch sees no CUDA device")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, NotImplementedError, AssertionError) as error:  # mps on Linux, xla without its package
        reason = str(error).split(".")[0].strip()
        raise ValueError(f"device: got {name!r}, which is not there ({reason}); expected auto, cpu or cuda") from None
    if device.type == "cuda" and precision == "bf16" and not torch.cuda.is_bf16_supported():
        raise ValueError("precision: got 'bf16', which this CUDA device does not support; use 'fp16' or 'fp32'")
    return device


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """The context in which models compute in ``precision``; it changes nothing in fp32."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")
