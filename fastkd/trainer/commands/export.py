"""``fastkd export``: writes a trained student as safetensors or ONNX, and checks the file."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fastkd.trainer.commands.export_detector import OUTPUTS, write_onnx_detector
from fastkd.trainer.commands.reopen import Reopened, reopen
from fastkd.trainer.data.labels import normalization_of
from fastkd.trainer.data.loader import collate, fetch
from fastkd.trainer.extras import require_extras
from fastkd.trainer.models.encoder import EncoderModel
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.models.weights import save_tensors
from fastkd.trainer.run.check import input_of
from fastkd.trainer.run.describe import versions
from fastkd.trainer.tasks.base import find_task
from fastkd.trainer.tasks.evaluate import take_images_of

SAMPLES = 8
# Relative to the largest logit. Other kernels sum in another order, and a deep network amplifies that.
ONNX_TOLERANCE = 1e-3


class ExportError(RuntimeError):
    """What was written does not compute what the student computes. The file is removed."""


@dataclass
class Exported:
    """A checked file. ``error`` is the largest difference from the student's logits, relative to the largest logit.

    ``sides`` are channels, height and width of the images that an ONNX file takes, a letter for any number. ``outputs``
    is what it gives: ``logits``, ``embeddings``, or ``boxes, scores, labels``.
    """

    path: Path
    bytes: int
    error: float
    sides: str = ""
    outputs: str = "logits"


def export(
    reopened: Reopened, out: str | Path, *, image_shape: tuple[int, ...] | None = None, overwrite: bool = False
) -> Exported:
    """Write the student to ``out``, which ends in ``.safetensors`` or ``.onnx``, and check what was written.

    Both files say as metadata what the student is (config, accuracy, versions) and what it takes and gives: ``mean``
    and ``std`` of the images' normalisation, ``image_size`` and ``crop`` for a folder of images, and the names of the
    ``classes``, as JSON, where they are known.

    A safetensors file holds the model's state dict. It is read back and compared bit for bit. An ONNX file computes the
    logits of images [B, C, H, W], normalised as in training, for any B, and for any H and W where the model allows it.
    It is run with onnxruntime on images of the evaluation set, or on noise of ``image_shape`` (C, H, W) if that is
    given, and on noise of another size. Of an encoder it computes the embeddings. Of a detector it computes boxes,
    scores and labels of one image, see ``OneImage``.

    Raises:
        ValueError: ``out`` ends otherwise, or there are neither data nor ``image_shape``.
        FileExistsError: ``out`` exists, and ``overwrite`` is False.
        ImportError: packages of the extra ``export`` are missing, for ONNX.
        ExportError: the outputs differ, or the file cannot be written.
    """
    out = Path(out)
    if out.suffix not in (".safetensors", ".onnx"):
        raise ValueError(f"out: got {str(out)!r}, expected a name that ends in .safetensors or .onnx")
    if out.is_dir() or (out.exists() and not overwrite):
        raise FileExistsError(f"out: {out} exists already; it is not overwritten without --overwrite")
    model = reopened.model.eval().float()
    # Written under another name first, so that a file under the name asked for is always a checked one.
    temporary = out.with_name(f".{out.stem}-{os.getpid()}{out.suffix}")
    error, sides, outputs = 0.0, "", "logits"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".onnx" and reopened.config.task == "detection":
            outputs = ", ".join(OUTPUTS)
            error, sides = _write_detector(reopened, temporary, image_shape)
        elif out.suffix == ".onnx":
            outputs = "embeddings" if reopened.config.task == "embeddings" else outputs
            error, sides = _write_onnx(reopened, temporary, _images(reopened, image_shape), _metadata(reopened))
        else:
            _write_safetensors(model, temporary, _metadata(reopened))
        temporary.replace(out)
    except (OSError, SafetensorError) as failure:  # a full disk, a folder that is not ours
        raise ExportError(f"{out}: cannot be written ({failure})") from failure
    finally:
        temporary.unlink(missing_ok=True)
    return Exported(out, out.stat().st_size, error, sides, outputs)


def _write_safetensors(model: nn.Module, path: Path, metadata: dict[str, str]) -> None:
    state = {name: value.detach().contiguous().clone() for name, value in model.state_dict().items()}
    save_tensors(state, path, metadata)
    with safe_open(path, "pt") as file:
        for name, value in state.items():
            # Compared as bytes, because NaN is not equal to itself.
            if not torch.equal(file.get_tensor(name).view(-1).view(torch.uint8), value.view(-1).view(torch.uint8)):
                raise ExportError(f"{path}: {name} reads back differently")


def _write_detector(reopened: Reopened, path: Path, shape: tuple[int, ...] | None) -> tuple[float, str]:
    try:
        found = write_onnx_detector(reopened.model, path, _images_alone(reopened, shape), _metadata(reopened))
    except (ImportError, OSError):  # a package is missing, a full disk
        raise
    except Exception as error:  # the exporter and the runtime raise anything
        reason = str(error).strip().partition("\n")[0]
        raise ExportError(
            f"{path}: torch's exporter cannot follow this detector ({reason}), expected a name that ends in "
            ".safetensors"
        ) from error
    if not found[0] <= ONNX_TOLERANCE:
        raise ExportError(f"{path}: what it finds differs by {found[0]:.2g}, at most {ONNX_TOLERANCE} is right")
    return found


def _write_onnx(reopened: Reopened, path: Path, images: Tensor, metadata: dict[str, str]) -> tuple[float, str]:
    """The largest error, and the sides of the images that the file takes, such as ``3 x H x W``."""
    require_extras("export", by="the export to ONNX")  # torch's exporter imports onnx and onnxscript
    import onnxruntime  # type: ignore[import-not-found,unused-ignore]

    name, computing = _computing(reopened, images)

    def write(dynamic: bool) -> list[Any]:
        """The sides of the images that the written file takes; those that any number will do for are strings."""
        shape: dict[int, Any] = {0: torch.export.Dim("batch")}
        if dynamic and images.ndim == 4:  # AUTO: a side stays what it is if the model's code asks for that
            shape |= {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch's own deprecations
            program: Any = torch.onnx.export(
                computing,
                (images,),
                input_names=["images"],
                output_names=[name],
                dynamic_shapes=(shape,),
                dynamo=True,
                verbose=False,
            )
        program.model.metadata_props.update(metadata)
        program.save(str(path), external_data=False)
        return list(program.model.graph.inputs[0].shape)

    def differ(samples: Sequence[Tensor]) -> float:
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            return max(
                _difference(torch.from_numpy(session.run(None, {"images": part.numpy()})[0]), computing(part))
                for part in samples
            )

    def check(samples: Sequence[Tensor]) -> float:
        if not (largest := differ(samples)) <= ONNX_TOLERANCE:
            raise ExportError(
                f"{path}: its {name} differ by {largest:.2g} of the largest, at most {ONNX_TOLERANCE} is right"
            )
        return largest

    usual = [images, images[:1]]  # the single image is another number of images than the graph was traced with
    try:
        sides = write(dynamic=True)
    except Exception:  # the exporter raises anything on code that it cannot follow for a size that is not fixed
        sides = write(dynamic=False)
    largest = check(usual)
    if any(not isinstance(side, int) for side in sides[1:]):
        other = [side if isinstance(sides[index], int) else side * 3 // 2 for index, side in enumerate(images.shape)]
        try:
            check([torch.randn(2, *other[1:])])
        except Exception:  # a model may only know one size, and say so in onnxruntime or in its own forward
            sides = write(dynamic=False)
            largest = check(usual)
    shown = [side if isinstance(side, int) else "CHW"[index] for index, side in enumerate(sides[1:])]
    return largest, " x ".join(map(str, shown))


def _computing(reopened: Reopened, images: Tensor) -> tuple[str, nn.Module]:
    """What the outputs are, and the module that computes them."""
    model, named = reopened.model, reopened.config.student
    if reopened.config.task != "embeddings":
        return "logits", _Logits(model)
    encoder = EncoderModel(model, None if named is None else named.classifier).eval()
    plain = encoder.plain()
    with torch.no_grad():
        if not torch.equal(plain(images), encoder(images).features):
            raise ExportError(f"student: layer {encoder.classifier_name!r} is not the last, expected that for ONNX")
    return "embeddings", plain


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
    model = FeatureModel(reopened.model, optional=True)
    take_images_of(model, reopened.eval_data)
    return model.normalized(collate(fetch(reopened.eval_data, indices))[0]).float()


def _images_alone(reopened: Reopened, shape: tuple[int, ...] | None) -> list[Tensor]:
    """Images [1, 3, H, W] of different sizes, normalised as in training."""
    if shape is not None or reopened.eval_data is None:
        return list(_images(reopened, shape).split(1))
    samples = fetch(reopened.eval_data, list(range(min(SAMPLES, len(reopened.eval_data)))))
    model = find_task(reopened.config).wrap(reopened.model, {}, True)
    model.take_images("bytes", normalization_of(reopened.eval_data))
    return [model.normalized(image[None]).float() for image, *_ in samples]


def _metadata(reopened: Reopened) -> dict[str, str]:
    """What the file says about itself, as the strings that safetensors and ONNX keep."""
    manifest = reopened.checkpoint.manifest
    found = {
        "format": "pt",
        "model": json.dumps(manifest["config"].get("student")),
        "task": manifest["config"].get("task", "classification"),
        "step": str(manifest["step"]),
        "accuracy": str(manifest.get("accuracy") or ""),
        "teacher_sha256": str(manifest.get("teacher_sha256")),
        "versions": json.dumps(versions()),
    }
    normalization = manifest.get("normalization") or normalization_of(reopened.eval_data)  # earlier runs lack it
    if normalization is not None:
        found |= {name: json.dumps(list(values)) for name, values in zip(("mean", "std"), normalization, strict=True)}
    found |= {name: json.dumps(value) for name, value in input_of(manifest).items() if name not in found}
    if reopened.classes is not None:
        found["classes"] = json.dumps(reopened.classes)
    return found


def export_command(
    checkpoint: tyro.conf.Positional[str],
    out: tyro.conf.Positional[str],
    best: bool = False,
    overwrite: bool = False,
    image_shape: tuple[int, ...] | None = None,
    trust_code: bool = False,
) -> None:
    """The student of a checkpoint as a file that others read, checked against its own outputs.

    Args:
        checkpoint: a checkpoint folder, or a run folder for its newest one.
        out: the file to write: .safetensors (the state dict) or .onnx (images to logits or
            embeddings, any batch size; of a detector one image to boxes, scores and labels).
        best: of a run folder the checkpoint with the highest accuracy, not the newest.
        overwrite: replace the file if it is there, once the new one is whole and checked.
        image_shape: C H W of an image, where the run's data cannot be read. For ONNX.
        trust_code: allow the config in the checkpoint to import and call package.module:callable.
    """
    with_data = out.endswith(".onnx") and image_shape is None
    reopened = reopen(checkpoint, best=best, with_data=with_data, trust_code=trust_code)
    written = export(reopened, out, image_shape=image_shape, overwrite=overwrite)
    how = "bit for bit" if written.path.suffix == ".safetensors" else f"{written.outputs} within {written.error:.1e}"
    takes = f", images of {written.sides}" if written.sides else ""
    print(f"{written.path}: {written.bytes:,} bytes, checked {how}{takes}")
