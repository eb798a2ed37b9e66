"""The fused pass that packs rows: the extension equals the Python path; it builds, or is left out with a notice."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from bench import measure
from fastkd import native
from fastkd.distributed import pack
from fastkd.numerics import unit_rows
from tests.helpers.checks import TOLERANCES, assert_close, embeddings
from tests.helpers.gpu import bandwidth, gpu, sanitizer
from tests.helpers.processes import ROOT, run_setup

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 5), (0, 4), (17, 16), (65, 128), (5, 1000)]


@pytest.fixture
def extension(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``pack_rows`` goes through the extension."""
    yield from with_library(library, monkeypatch)


@pytest.fixture
def python_path(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """``pack_rows`` does without the extension."""
    yield from with_library(Path("absent"), monkeypatch)


def with_library(path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(native, "LIBRARY", path)
    pack.extension_covers.cache_clear()
    native.extension.cache_clear()
    assert pack.extension_covers("cpu") == path.exists()
    yield
    pack.extension_covers.cache_clear()
    native.extension.cache_clear()


def check_against_definition(first: Tensor, second: Tensor, dtype: torch.dtype, normalize: bool) -> None:
    copies = first.clone(), second.clone()
    packed, inverse_norm = pack.pack_rows((first, second), dtype, normalize)
    alone = pack.pack_rows((second,), dtype, normalize)
    assert all(torch.equal(x, y[1:]) for x, y in zip(alone, (packed, inverse_norm), strict=True))
    assert packed.dtype == dtype
    assert packed.is_contiguous()
    assert inverse_norm.dtype == (torch.float64 if first.dtype == torch.float64 else torch.float32)
    assert inverse_norm.shape == (2, len(first), 1)
    tolerance = max(first.dtype if normalize else dtype, dtype, key=lambda kind: TOLERANCES[kind])
    for side, x in enumerate((first, second)):
        if normalize:
            units, inverse = unit_rows(x.double())
            assert_close(inverse_norm[side], inverse, torch.float32 if dtype != torch.float64 else inverse_norm.dtype)
        else:
            units = x
            assert (inverse_norm[side] == 1).all()
        assert_close(packed[side], units.double(), tolerance)
        assert torch.equal(x, copies[side])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["extension", "python_path"])
def test_packed_rows_equal_the_definition(
    path: str, dtype: torch.dtype, to: torch.dtype, shape: tuple[int, int], request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(path)
    first, second = embeddings(*shape, dtype=dtype)
    check_against_definition(first, second, to, normalize=True)
    check_against_definition(first, second, to, normalize=False)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_with_and_without_the_extension_the_bits_are_the_same(
    dtype: torch.dtype, shape: tuple[int, int], extension: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = embeddings(*shape, dtype=dtype)
    for to in DTYPES:
        fast = pack.pack_rows(rows, to)
        with monkeypatch.context() as without:
            without.setattr(pack, "extension_covers", lambda device_type: False)
            plain = pack.pack_rows(rows, to)
        assert all(torch.equal(x, y) for x, y in zip(fast, plain, strict=True))


@pytest.mark.parametrize("path", ["extension", "python_path"])
def test_whole_numbers_travel_as_they_are(path: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(path)
    labels = torch.tensor([[1 << 62], [-7]])
    packed, _ = pack.pack_rows((labels,), torch.int64, normalize=False)
    assert torch.equal(packed, labels[None])
    assert packed.data_ptr() != labels.data_ptr()


@pytest.mark.parametrize("path", ["extension", "python_path"])
def test_sliced_and_transposed_rows(path: str, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(path)
    first, second = embeddings(12, 40)
    check_against_definition(first[::2, 3:20], second[1::2, 5:22], torch.float64, normalize=True)
    check_against_definition(first.T, second.T, torch.float64, normalize=True)
    check_against_definition(first[:, :1], second[:, 4:5], torch.float64, normalize=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("path", ["extension", "python_path"])
def test_rows_of_extreme_length(path: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    request.getfixturevalue(path)
    ones = torch.ones(1, 20, dtype=dtype)
    last = torch.zeros(1, 20, dtype=dtype)
    last[0, 19] = 1
    scales = [0.0, 1e-44, 1e-30, 2e-13, 1e-11, 1.0, 1e30, 3e38]
    rows = torch.cat([scale * pattern for scale in scales for pattern in (ones, last)])
    packed, inverse = pack.pack_rows((rows, rows.flip(0)), dtype)
    for side, x in enumerate((rows, rows.flip(0))):
        expected, expected_inverse = unit_rows(x.double())
        assert_close(packed[side], expected, dtype)
        assert_close(inverse[side], expected_inverse, dtype)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("others", [0.0, 1.0])
@pytest.mark.parametrize("path", ["extension", "python_path"])
def test_a_row_that_is_not_finite_is_not_a_number_and_spoils_no_other(
    path: str, bad: float, others: float, request: pytest.FixtureRequest
) -> None:
    request.getfixturevalue(path)
    rows = torch.full((3, 21), others)
    rows[1, 20] = bad
    packed, _ = pack.pack_rows((rows, rows), torch.float32)
    assert packed[:, 1].isnan().all()
    assert packed[:, [0, 2]].isfinite().all()


def fitting(
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}", interface: int = native.INTERFACE
) -> str:
    """What a library that fits says that it was built for."""
    return f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, Python {python} and interface {interface}"


@pytest.mark.parametrize(
    ("content", "stated"),
    [
        (b"\0fastkd_native built for torch 1.0.0 and CUDA 9.2\0", "torch 1.0.0 and CUDA 9.2"),
        (b"no library at all", "an unknown torch"),
        (f"\0fastkd_native built for {fitting(python='3.9')}\0".encode(), fitting(python="3.9")),
        (f"\0fastkd_native built for {fitting(interface=1)}\0".encode(), fitting(interface=1)),
        (f"\0fastkd_native built for {fitting()}\0".encode(), fitting()),
    ],
    ids=["another version", "damaged", "another Python", "another interface", "does not load"],
)
def test_an_extension_that_does_not_fit_gives_one_warning_and_the_python_path(
    content: bytes, stated: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "_native.so"
    file.write_bytes(content)
    monkeypatch.setattr(native, "LIBRARY", file)
    pack.extension_covers.cache_clear()
    native.extension.cache_clear()
    first, second = embeddings(3, 4)
    try:
        with pytest.warns(RuntimeWarning) as caught:
            packed, _ = pack.pack_rows((first, second), torch.float64)
        assert len(caught) == 1
        assert f"built for {stated}" in str(caught[0].message)
        assert f"found torch {torch.__version__}" in str(caught[0].message)
        assert_close(packed[0], unit_rows(first)[0], torch.float64)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            pack.pack_rows((first, second), torch.float64)
    finally:
        pack.extension_covers.cache_clear()
        native.extension.cache_clear()


@pytest.mark.slow
def test_without_torch_or_compiler_the_installation_goes_on_with_a_notice(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    arguments = ("build_ext", f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}")
    for reason, environment in {
        "torch is not installed": {"PYTHONPATH": str(tmp_path)},
        "there is no C++ compiler": {"PATH": str(tmp_path), "CXX": "absent"},
    }.items():
        result = run_setup(*arguments, **environment)
        assert result.returncode == 0, result.stderr
        assert f"{reason}" in result.stderr
        assert "the Python path computes the same" in result.stderr
        assert run_setup(*arguments, FASTKD_EXTENSION="1", **environment).returncode != 0
    assert not (tmp_path / "lib").exists()


@pytest.mark.slow
def test_a_failing_compiler_leaves_the_extension_out(tmp_path: Path) -> None:
    for name in ("c++", "g++", "ninja"):
        (tmp_path / name).write_text("#!/bin/sh\nexit 1\n")
        (tmp_path / name).chmod(0o755)
    arguments = ("build_ext", f"--build-lib={tmp_path / 'lib'}", f"--build-temp={tmp_path / 'temp'}")
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CXX": str(tmp_path / "c++"), "FASTKD_CUDA": "0"}
    result = run_setup(*arguments, **environment)
    assert result.returncode == 0, result.stderr
    assert "the extension could not be built" in result.stderr
    assert run_setup(*arguments, FASTKD_EXTENSION="1", **environment).returncode != 0


@pytest.mark.slow
@pytest.mark.parametrize("has_ninja", [True, False])
def test_the_extension_is_built_with_ninja_and_without(has_ninja: bool, tmp_path: Path) -> None:
    real = shutil.which("c++")
    if real is None or (has_ninja and importlib.util.find_spec("ninja") is None and shutil.which("ninja") is None):
        pytest.skip("there is no C++ compiler, or no ninja")
    compiler, broken = tmp_path / "c++", tmp_path / "bin" / "ninja"
    broken.parent.mkdir()
    # What the compiler should write is left empty: compiling takes a minute, and the fixture `library` does it.
    compiler.write_text(f"""#!/bin/sh
case "$*" in *" -o "*) ;; *) exec {real} "$@" ;; esac
while [ $# -gt 0 ]; do if [ "$1" = -o ]; then : > "$2"; fi; shift; done
""")
    broken.write_text("#!/bin/sh\nexit 1\n")
    for program in (compiler, broken):
        program.chmod(0o755)
    path = os.environ["PATH"] if has_ninja else f"{broken.parent}:{os.environ['PATH']}"
    library, objects = tmp_path / "lib", tmp_path / "temp"
    result = run_setup(
        "build_ext", f"--build-lib={library}", f"--build-temp={objects}",
        PATH=path, CXX=str(compiler), LDSHARED=str(compiler), FASTKD_EXTENSION="1", FASTKD_CUDA="0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert (library / "fastkd" / native.LIBRARY.name).exists()
    assert (objects / "build.ninja").exists() == has_ninja


def setup_module() -> ModuleType:
    specification = importlib.util.spec_from_file_location("fastkd_setup", ROOT / "setup.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_the_toolkit_is_found_behind_a_wrapper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toolkit = tmp_path / "cuda-99.0"
    (toolkit / "include").mkdir(parents=True)
    (toolkit / "include" / "cuda_runtime.h").touch()
    (toolkit / "bin").mkdir()
    (tmp_path / "wrappers").mkdir()
    real, wrapper = toolkit / "bin" / "nvcc", tmp_path / "wrappers" / "nvcc"
    real.write_text(f"#!/bin/sh\necho '#$ _HERE_={toolkit}/bin' >&2\n")
    wrapper.write_text(f'#!/bin/sh\nexec {real} "$@"\n')
    for file in (real, wrapper):
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", f"{wrapper.parent}:{os.environ['PATH']}")
    setup = setup_module()
    assert setup.find_cuda_home() == str(toolkit)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nothing"))
    assert setup.find_cuda_home() == str(toolkit)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_the_cuda_kernel_compiles_for_sm_90_without_spills_and_loads_16_bytes(tmp_path: Path) -> None:
    output = tmp_path / "pack_rows.cubin"
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-cubin"]
    result = subprocess.run(
        ["nvcc", *flags, "csrc/pack_rows_cuda.cu", "-o", str(output)], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    spills = [line.strip() for line in result.stderr.splitlines() if "spill" in line]
    assert len(spills) == 32
    assert set(spills) == {"0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"}
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        pytest.skip("the loads cannot be read: there is no Triton, which carries cuobjdump")
    cuobjdump = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([str(cuobjdump), "-sass", str(output)], capture_output=True, text=True, check=True).stdout
    functions = sass.split("Function : ")[1:]
    wide = [function for function in functions if "Li4EEEvNS_8PackRowsE" in function.splitlines()[0]]
    assert len(wide) == 16
    for function in wide:
        assert function.count("LDG.E.128") >= 4
        assert "LDL" not in function


@gpu
@sanitizer
@pytest.mark.parametrize("to", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packs_on_a_gpu(dtype: torch.dtype, to: torch.dtype) -> None:
    if not pack.extension_covers("cuda"):
        pytest.skip("the extension has no CUDA part here")
    for shape in SHAPES:
        first, second = (x.cuda() for x in embeddings(*shape, dtype=dtype))
        check_against_definition(first, second, to, normalize=True)
        check_against_definition(first, second, to, normalize=False)
    first, second = (x.cuda() for x in embeddings(12, 40, dtype=dtype))
    check_against_definition(first[::2, 3:20], second[1::2, 5:22], to, normalize=True)


@gpu
@bandwidth
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bandwidth_is_at_least_80_percent_of_a_copy(
    dtype: torch.dtype, record_property: Callable[[str, object], None]
) -> None:
    if not pack.extension_covers("cuda"):
        pytest.skip("the extension has no CUDA part here")
    first, second = (torch.randn(1 << 20, 128, device="cuda").to(dtype) for _ in range(2))
    target = torch.empty(2, 1 << 20, 128, dtype=dtype, device="cuda")

    def milliseconds(function: Callable[[], object]) -> float:
        return measure.median_ms(function, first.device, 0.1)

    def copy() -> None:
        target[0].copy_(first)
        target[1].copy_(second)

    share = milliseconds(copy) / milliseconds(lambda: pack.pack_rows((first, second), dtype))
    record_property("share of the copy bandwidth", f"{share:.2f}")
    assert share >= 0.8
