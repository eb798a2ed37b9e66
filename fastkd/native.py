"""Loads the C++/CUDA extension of ``csrc/`` on first use.

Without the extension everything works in Python. Nothing is ever built here.
"""

import functools
import importlib.util
import re
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

LIBRARY = Path(__file__).with_name("_native.so")
INTERFACE = 13  # of csrc/: raised with every change of its functions or of what they compute; setup.py builds it in


@functools.cache
def extension() -> Any:
    """The module ``fastkd._native`` of ``csrc/``, loaded on the first call; None where it is not there.

    One warning, which names the versions, says that it does not fit or fails to load.
    """
    if not LIBRARY.exists():
        return None
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    found = f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, Python {python} and interface {INTERFACE}"
    stated = re.search(rb"fastkd_native built for ([ -~]+)", LIBRARY.read_bytes())
    built_for = stated.group(1).decode() if stated else "an unknown torch"
    try:
        # torch promises no stable C++ interface: another release can crash instead of failing to load.
        if built_for != found:
            raise ImportError("rebuild it: make ext")
        return _loaded(LIBRARY)
    except ImportError as error:
        warnings.warn(
            f"fastkd: {LIBRARY.name} was built for {built_for}, found {found}: it is not used ({error}); "
            "the Python path computes the same",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


@functools.cache
def _loaded(file: Path) -> ModuleType:
    """The module in ``file``; each is loaded once, because it registers its operators with torch."""
    specification = importlib.util.spec_from_file_location("fastkd._native", file)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
