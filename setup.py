"""Maps the repository's folders to packages (``kernels/`` is installed as ``fastkd.kernels``) and builds ``csrc/``.

Everything declarative is in pyproject.toml. The C++/CUDA extension is optional. The package is installed without it,
with a notice, where torch is not installed (an isolated build), where there is no compiler and where compiling fails;
``fastkd.distributed.pack`` then computes the same in Python. The extension is built here and never at import. It is
built by ninja where there is one, and by setuptools otherwise.

    python setup.py build_ext --inplace      builds fastkd/_native.so in the repository (``make ext``)

FASTKD_EXTENSION=0 leaves the extension out. FASTKD_EXTENSION=1 makes its absence an error. FASTKD_CUDA=0 leaves out its
CUDA part. TORCH_CUDA_ARCH_LIST is respected.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0+PTX"


def notice(text: str) -> None:
    print(f"fastkd: {text}", file=sys.stderr)


def without_extension(reason: str) -> dict[str, Any]:
    """No arguments for ``setup``, after a notice; ends the program if the extension was asked for."""
    if os.environ.get("FASTKD_EXTENSION") == "1":
        sys.exit(f"fastkd: FASTKD_EXTENSION=1, but {reason}")
    notice(f"{reason}; installing without the extension, the Python path computes the same")
    return {}


def find_cuda_home() -> str | None:
    """The folder of the CUDA toolkit: CUDA_HOME, or what nvcc says (nvcc on PATH may be a wrapper), or the default."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    if nvcc:
        try:
            dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60)
            here = re.search(r"_HERE_=(.+)", dry.stderr)
            candidates.append(str(Path(here.group(1).strip()).parent) if here else None)
        except (OSError, subprocess.TimeoutExpired):
            pass
    candidates.append("/usr/local/cuda")
    for home in candidates:
        if home and (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            return home
    return None


def cuda_version(home: str) -> str | None:
    """The version ``major.minor`` of the toolkit's compiler."""
    answer = subprocess.run([f"{home}/bin/nvcc", "--version"], capture_output=True, text=True)
    found = re.search(r"release (\d+\.\d+)", answer.stdout)
    return found.group(1) if found else None


def interface() -> str:
    """The number that fastkd.native compares before it loads what is built here."""
    source = Path(__file__).parent / "fastkd" / "native.py"
    found = re.search(r"^INTERFACE = (\d+)", source.read_text(), re.M)
    assert found is not None
    return found.group(1)


def cuda_home_for(torch_cuda: str | None) -> str | None:
    """The toolkit to build the CUDA part with. None where no toolkit fits, and then the reason is on stderr."""
    if torch_cuda is None or os.environ.get("FASTKD_CUDA") == "0":
        return None
    home = find_cuda_home()
    if home is None:
        notice("no CUDA toolkit found, building the extension for CPU only")
        return None
    version = cuda_version(home)
    if version is None or version.split(".")[0] != torch_cuda.split(".")[0]:
        notice(f"{home} is CUDA {version}, torch needs {torch_cuda}: building the extension for CPU only")
        return None
    return home


def extension() -> dict[str, Any]:
    """The arguments of ``setup`` that build the extension. Empty where it cannot be built."""
    if os.environ.get("FASTKD_EXTENSION") == "0":
        return {}
    try:
        import torch
    except ImportError:
        return without_extension("torch is not installed in the build environment (see `make ext`)")
    if not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        return without_extension("there is no C++ compiler")
    home = cuda_home_for(torch.version.cuda)
    if home is not None:
        # Set before torch looks for it, because torch guesses wrong where nvcc is a wrapper.
        os.environ["CUDA_HOME"] = home
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", DEFAULT_ARCHITECTURES)
    # torch looks for ninja on PATH, which lacks the programs of this Python's environment if it was not activated.
    os.environ["PATH"] = os.pathsep.join((os.environ.get("PATH", os.defpath), sysconfig.get_path("scripts")))
    from torch.utils import cpp_extension

    class Build(cpp_extension.BuildExtension):
        """Builds the extension; where that fails, it is left out."""

        def run(self) -> None:
            try:
                super().run()
            except Exception as error:
                without_extension(f"the extension could not be built ({type(error).__name__}: {str(error)[:500]})")
                self.extensions: list[Any] = []

    parts = (
        *("module", "pack_rows", "driver", "launcher"),
        *("dense", "dense_contrast", "dense_dual_softmax", "dense_soft_target", "dense_soft_target_rows"),
        *("dual_softmax_tiles", "gram_tiles", "triplet_angles"),
    )
    sources = [f"csrc/{name}.cpp" for name in parts]
    macros: list[tuple[str, str | None]] = [
        ("FASTKD_TORCH", torch.__version__),
        ("FASTKD_CUDA", torch.version.cuda or "none"),
        ("FASTKD_INTERFACE", interface()),
    ]
    if torch.distributed.is_available():
        sources.append("csrc/gather.cpp")
        macros.append(("FASTKD_WITH_GATHER", None))
    # Without fused multiply-add, so that the extension and the Python path give the same bits.
    flags = {"cxx": ["-O3", "-g0", "-std=c++17", "-ffp-contract=off"], "nvcc": ["-O3", "-std=c++17"]}
    # What the loops of few rows need to become vector instructions. None of it changes a result.
    flags["cxx"] += ["-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"]
    kind = cpp_extension.CppExtension
    if home is not None:
        kind = cpp_extension.CUDAExtension
        sources.append("csrc/pack_rows_cuda.cu")
        macros.append(("FASTKD_WITH_CUDA", None))
    else:
        del flags["nvcc"]
    headers = [*map(str, Path("csrc").glob("*.h"))]
    built = kind(
        "fastkd._native",
        sources,
        depends=headers,
        define_macros=macros,
        extra_compile_args=flags,
        extra_link_args=["-s"] if sys.platform == "linux" else [],  # without a symbol table
    )
    return {"ext_modules": [built], "cmdclass": {"build_ext": Build.with_options(no_python_abi_suffix=True)}}


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["fastkd*"]),
            *(f"fastkd.{name}" for name in find_packages(include=["kernels*"])),
        ],
        package_dir={"fastkd": "fastkd", "fastkd.kernels": "kernels"},
        package_data={"fastkd": ["py.typed", "demo/*.html", "study/*.html", "trainer/report/*.html"]},
        **extension(),
    )
