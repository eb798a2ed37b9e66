"""Triton's own launcher, and fastkd's, on a stub in the place of libcuda. For a process of its own.

A program that imports this must not ask PyTorch for CUDA: it would find the stub.
"""

import ctypes
import subprocess
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia

HERE = Path(__file__).parent


def built(folder: Path) -> ctypes.CDLL:
    """The stub, compiled with the cuda.h that Triton carries, and loaded for everything that asks for libcuda."""
    library = folder / "libcuda.so.1"
    flags = ["-shared", "-fPIC", f"-I{Path(nvidia.__file__).parent / 'include'}", f"-Wl,-soname,{library.name}"]
    subprocess.run(["cc", *flags, str(HERE / "stub_cuda.c"), "-o", str(library)], check=True)
    triton.knobs.nvidia.libcuda_path = str(folder)
    return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)


def activate(capability: int, stream: int = 77) -> None:
    """Let Triton compile for this compute capability and launch tensors in the host's memory."""

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.get_current_device = lambda: 0
            self.get_current_stream = lambda device: stream

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", capability, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())


def parameter_bytes(compiled: Any) -> list[int]:
    """The sizes of the compiled kernel's parameters, from the PTX, which is what runs."""
    declared = compiled.asm["ptx"].split(".entry", 1)[1].split(")", 1)[0]
    sizes = []
    for line in declared.splitlines():
        words = line.replace(",", " ").split()
        if ".param" in words:
            bits = next(word for word in words if word[:2] in (".b", ".u", ".s", ".f") and word[2:3].isdigit())
            count = words[-1].partition("[")[2].rstrip("]") or 1
            sizes.append(int(bits[2:]) // 8 * int(count))
    return sizes


class Stub:
    """What the stub received last, and how often it was called."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library

    def expect(self, compiled: Any) -> None:
        """Keep the parameters of the next launch, which is of this kernel."""
        sizes = parameter_bytes(compiled)
        self._library.stub_sizes((ctypes.c_size_t * len(sizes))(*sizes), ctypes.c_size_t(len(sizes)))

    def received(self) -> bytes:
        """Grid, block, shared bytes, attributes, stream, function and all parameters of the last launch."""
        buffer = ctypes.create_string_buffer(8192)
        count = self._library.stub_kept(buffer)
        return buffer.raw[:count]

    def answer(self, result: int) -> None:
        """Let launches and encodings give this CUresult."""
        self._library.stub_answer(result)

    @property
    def encodes(self) -> int:
        return self._library.stub_encodes()

    @property
    def contexts(self) -> int:
        return self._library.stub_contexts()

    @property
    def launches(self) -> int:
        return self._library.stub_launches()
