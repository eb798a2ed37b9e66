"""Which packages an extra of pyproject.toml brings, and one line that says what to install where they are missing."""

import importlib.util

# The names to import. tests/commands/test_cli.py compares them with what is imported.
EXTRAS = {
    "train": ("timm", "torchvision", "safetensors", "rich", "tyro", "yaml", "numpy", "PIL", "huggingface_hub"),
    "report": ("matplotlib", "jinja2", "sklearn", "scipy", "threadpoolctl", "tensorboard"),
    "detection": ("torchmetrics", "faster_coco_eval"),
    "export": ("onnx", "onnxscript", "onnxruntime"),
}


def is_missing(package: str) -> bool:
    return importlib.util.find_spec(package) is None


class MissingExtraError(ImportError):
    """A package of an extra is not installed. The message says how to install it."""


def require_extras(*extras: str, by: str) -> None:
    """Raise MissingExtraError, which says what ``by`` needs, unless all packages of ``extras`` are installed.

    fastkd is on no package index, so the advice is for a checkout of the repository.
    """
    missing = {extra: [package for package in EXTRAS[extra] if is_missing(package)] for extra in extras}
    packages = [package for names in missing.values() for package in names]
    if packages:
        lacking = ",".join(extra for extra, names in missing.items() if names)
        advice = f"in a checkout of fastkd, run: pip install '.[{lacking}]'"
        raise MissingExtraError(f"{by} needs {', '.join(packages)}; {advice}")
