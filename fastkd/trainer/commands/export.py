"""``fastkd export``: writes a trained student as safetensors or ONNX, and checks the file."""

from __future__ import annotations

import json
import math
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from fastkd.trainer.commands.reopen import Reopened, reopen
from fastkd.trainer.data.loader import collate, fetch
from fastkd.trainer.extras import require_extras
from fastkd.trainer.run.describe import versions

SAMPLES = 8
# Relative to the largest logit. Other kernels sum in another order, and a deep network amplifies that.
ONNX_TOLERANCE = 1e-3


class ExportError(RuntimeError):
    """What was written does not compute what the student computes. The file is removed."""


@dataclass
class Exported:
    """A checked file. ``error`` is the largest difference from the student's logits, relative to the largest logit."""

    path: Path
    bytes: int
    error: float


def export(reopened: Reopened, out: str | Path, *, image_shape: tuple[int, ...] | None = None) -> Exported:
    """Write the student to ``out``, which ends in ``.safetensors`` or ``.onnx``, and check what was written.

    A safetensors file holds the model's state dict, and as metadata the config, the accuracy and the versions. It is
    read back and compared bit for bit. An ONNX file computes the logits of images [B, C, H, W], normalised as in
    training, for any B. It is run with onnxruntime on images of the evaluation set, or on noise of ``image_shape``
    (C, H, W) if that is given.

    Raises:
        ValueError: ``out`` ends otherwise, or there are neither data nor ``image_shape``.
        FileExistsError: ``out`` exists.
        ImportError: packages of the extra ``export`` are missing, for ONNX.
        ExportError: the outputs differ.
    """
    out = Path(out)
    if out.suffix not in (".safetensors", ".onnx"):
        raise ValueError(f"out: got {str(out)!r}, expected a name that ends in .safetensors or .onnx")
    if out.exists():
        raise FileExistsError(f"out: {out} exists already; it is not overwritten")
    model = reopened.model.eval().float()
    # Written under another name first, so that a file under the name asked for is always a checked one.
    temporary = out.with_name(f".{out.stem}-{os.getpid()}{out.suffix}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        if out.suffix == ".onnx":
            error = _write_onnx(model, temporary, _images(reopened, image_shape))
        else:
            error = _write_safetensors(model, temporary, _metadata(reopened))
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(out, out.stat().st_size, error)


def _write_safetensors(model: nn.Module, path: Path, metadata: dict[str, str]) -> float:
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    save_file(state, path, metadata)
    with safe_open(path, "pt") as file:
        for name, value in state.items():
            # Compared as bytes, because NaN is not equal to itself.
            if not torch.equal(file.get_tensor(name).view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)):
                raise ExportError(f"{path}: {name} reads back differently")
    return 0.0


def _write_onnx(model: nn.Module, path: Path, images: Tensor) -> float:
    require_extras("export", by="the export to ONNX")  # torch's exporter imports onnx and onnxscript
    import onnxruntime  # type: ignore[import-not-found,unused-ignore]

    logits = _Logits(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own deprecations
        torch.onnx.export(
            logits,
            (images,),
            str(path),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    with torch.no_grad():
        # The single image is another number of images than the graph was traced with.
        largest = max(
            _difference(torch.from_numpy(session.run(None, {"images": part.numpy()})[0]), logits(part))
            for part in (images, images[:1])
        )
    if not largest <= ONNX_TOLERANCE:
        raise ExportError(
            f"{path}: its logits differ by {largest:.2g} of the largest, at most {ONNX_TOLERANCE} is right"
        )
    return largest


class _Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        output = self.model(images)
        return output if isinstance(output, Tensor) else output.logits


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return math.inf
    return ((found - expected).abs().max() / expected.abs().max().clamp_min(1e-12)).item()


def _images(reopened: Reopened, shape: tuple[int, ...] | None) -> Tensor:
    if shape is not None:
        return torch.randn(SAMPLES, *shape, generator=torch.Generator().manual_seed(0))
    if reopened.eval_data is None:
        raise ValueError("image_shape: got None, expected the shape of an image, or a run whose data can be read")
    indices = [index % len(reopened.eval_data) for index in range(SAMPLES)]
    return collate(fetch(reopened.eval_data, indices))[0].float()


def _metadata(reopened: Reopened) -> dict[str, str]:
    """What the file says about itself, as the strings that safetensors keeps."""
    manifest = reopened.checkpoint.manifest
    last = reopened.checkpoint.state["history"][-1:]
    return {
        "format": "pt",
        "model": json.dumps(manifest["config"].get("student")),
        "step": str(manifest["step"]),
        "accuracy": str(last[0].get("accuracy", "")) if last else "",
        "teacher_sha256": str(manifest.get("teacher_sha256")),
        "versions": json.dumps(versions()),
    }


def export_command(
    checkpoint: tyro.conf.Positional[str],
    out: tyro.conf.Positional[str],
    image_shape: tuple[int, ...] | None = None,
    trust_code: bool = False,
) -> None:
    """The student of a checkpoint as a file that others read, checked against its own outputs.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its newest one.
        out: the file to write: .safetensors (the state dict) or .onnx (images to logits, any batch size).
        image_shape: C H W of an image, where the run's data cannot be read. For ONNX.
        trust_code: allow the config in the checkpoint to import and call package.module:callable.
    """
    with_data = out.endswith(".onnx") and image_shape is None
    written = export(reopen(checkpoint, with_data=with_data, trust_code=trust_code), out, image_shape=image_shape)
    how = "bit for bit" if written.path.suffix == ".safetensors" else f"logits within {written.error:.1e}"
    print(f"{written.path}: {written.bytes:,} bytes, checked {how}")
