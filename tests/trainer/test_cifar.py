"""CIFAR's files are read right in both layouts, and augmented."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from fastkd.trainer.data.readers.cifar import PIXELS, load_cifar, shift_and_flip


def records(classes: int, n: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels [n, 3072], coarse and fine labels [n]."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (n, PIXELS), dtype=np.uint8)
    return pixels, generator.integers(0, 20, n, dtype=np.uint8), generator.integers(0, classes, n, dtype=np.uint8)


def python2_pickle(pixels: np.ndarray, name: bytes, labels: list[int]) -> bytes:
    """As Python 2 wrote the published files: byte strings everywhere, the array by numpy's ``_reconstruct``."""

    def string(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    def number(value: int) -> bytes:
        return b"J" + value.to_bytes(4, "little")

    rows, columns = pixels.shape
    dtype = b"cnumpy\ndtype\n" + string(b"u1") + number(0) + number(1) + b"\x87R"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + number(0) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b") + b"\x87R"
    array += b"(" + number(1) + number(rows) + number(columns) + b"\x86" + dtype + b"\x89" + string(pixels.tobytes())
    array += b"tb"
    listed = b"](" + b"".join(number(label) for label in labels) + b"e"
    return b"\x80\x02}(" + string(b"data") + array + string(name) + listed + b"u."


def write_cifar(root: Path, kind: str, classes: int) -> tuple[Path, np.ndarray, np.ndarray]:
    """Returns the folder, and pixels and labels of the training set."""
    folder = {
        ("binary", 10): "cifar-10-batches-bin",
        ("binary", 100): "cifar-100-binary",
        ("python", 10): "cifar-10-batches-py",
        ("python", 100): "cifar-100-python",
    }[kind, classes]
    end = ".bin" if kind == "binary" else ""
    train = ["train"] if classes == 100 else [f"data_batch_{i}" for i in range(1, 6)]
    (root / folder).mkdir()
    everything = []
    for seed, name in enumerate([*train, "test" if classes == 100 else "test_batch"]):
        pixels, coarse, fine = records(classes, 7, seed)
        everything.append((pixels, fine))
        if kind == "binary":
            columns = (coarse[:, None], fine[:, None], pixels) if classes == 100 else (fine[:, None], pixels)
            np.concatenate(columns, axis=1).tofile(root / folder / f"{name}{end}")
        else:
            key = b"fine_labels" if classes == 100 else b"labels"
            (root / folder / name).write_bytes(python2_pickle(pixels, key, fine.tolist()))
    pixels, labels = (np.concatenate(parts) for parts in zip(*everything[:-1], strict=True))
    return root / folder, pixels, labels


@pytest.mark.parametrize("classes", [10, 100])
@pytest.mark.parametrize("kind", ["binary", "python"])
def test_cifar_is_read_in_both_layouts(tmp_path: Path, kind: str, classes: int) -> None:
    folder, pixels, labels = write_cifar(tmp_path, kind, classes)
    for root in (tmp_path, folder):
        train, test = load_cifar(str(root), classes=classes)
        assert torch.equal(train.images, torch.from_numpy(pixels).view(-1, 3, 32, 32))
        assert train.labels.tolist() == labels.tolist()
        assert len(test) == 7
        images, chosen = test.__getitems__([3, 1])
        assert torch.equal(chosen, test.labels[[3, 1]])
        assert torch.equal(images, test.images[[3, 1]])


def test_a_pickle_that_names_code_is_refused_before_it_runs(tmp_path: Path) -> None:
    folder, _, _ = write_cifar(tmp_path, "python", 100)

    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.mkdir, (tmp_path / "ran",)

    (folder / "train").write_bytes(pickle.dumps({b"data": Bomb(), b"fine_labels": []}))
    with pytest.raises(ValueError, match=r"train: is not a file of CIFAR-100 \(ValueError: names "):
        load_cifar(str(tmp_path))
    assert not (tmp_path / "ran").exists()


def array(shape: bytes, dtype: bytes, content: bytes) -> bytes:
    """The opcodes of an array; ``shape`` and ``dtype`` are opcodes that leave these on the stack."""
    made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
    return made + b"(K\x01" + shape + dtype + b"\x89T" + len(content).to_bytes(4, "little") + content + b"tb"


def rebuilt(dtype: bytes) -> bytes:
    """A test set of one image."""
    return b"\x80\x02}(U\x04data" + array(b"K\x01M\x00\x0c\x86", dtype, b"A" * PIXELS) + b"U\x0bfine_labels](K\x01eu."


U1 = b"cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
# The flags of this object dtype are cleared: numpy takes the bytes of its arrays for addresses, and follows them.
POINTERS = U1.replace(b"u1", b"O8") + b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


@pytest.mark.parametrize(
    "content",
    [
        rebuilt(U1).replace(b"](K\x01e", b"](" + array(b"K\x02\x85", POINTERS, b"A" * 16) + b"e"),
        rebuilt(POINTERS),
        rebuilt(U1.replace(b"u1", b"O8")),
        rebuilt(U1)[:-1],
        rebuilt(U1).replace(b"M\x00\x0c\x86", b"M\x01\x0c\x86"),
        rebuilt(U1).replace(b"K\x01M\x00\x0c\x86", b"J\xff\xff\xff\x7fM\x00\x0c\x86"),
        rebuilt(U1).replace(b"](K\x01e", b"](K\x01K\x02e"),
        rebuilt(U1).replace(b"](K\x01e", b"](K\x64e"),
        rebuilt(U1).replace(b"](K\x01e", b"](U\x011e"),
        b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        b"\x80\x02]" + b"q\x01h\x01h\x01\x86" * 60 + b"}h\x01K\x00s.",  # a key that takes 2^60 steps to hash
        b"\x80\x02]r\xff\xff\xff\xff.",  # the four-billionth entry of the memo
        b"\x80\x02T\xff\xff\xff\x7fabc.",
        b"",
        b".",
        b"not a pickle",
        rebuilt(U1).replace(b"A" * PIXELS, b"").replace(b"T\x00\x0c", b"T\x00\x00").replace(b"K\x01M", b"K\x00M")
        .replace(b"](K\x01e", b"]"),  # no image at all
    ],
)  # fmt: skip
def test_a_malformed_pickle_is_one_line_that_names_the_file(tmp_path: Path, content: bytes) -> None:
    folder, _, _ = write_cifar(tmp_path, "python", 100)
    (folder / "test").write_bytes(rebuilt(U1))
    assert load_cifar(str(tmp_path))[1].images.unique().tolist() == [ord("A")]
    (folder / "test").write_bytes(content)
    with pytest.raises(ValueError, match="test: ") as error:
        load_cifar(str(tmp_path))
    assert "\n" not in str(error.value)


def test_damaged_cifar_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"found no CIFAR-100 in .*cifar-100-binary or cifar-100-python"):
        load_cifar(str(tmp_path))
    folder, _, _ = write_cifar(tmp_path, "binary", 100)
    content = (folder / "train.bin").read_bytes()
    (folder / "train.bin").write_bytes(content[:-1])
    with pytest.raises(ValueError, match="expected a multiple of 3074"):
        load_cifar(str(tmp_path))
    os.truncate(folder / "train.bin", 1 << 30)
    with pytest.raises(ValueError, match=r"train\.bin: cannot be read \(has 1073741824 bytes, expected at most"):
        load_cifar(str(tmp_path))
    (folder / "train.bin").write_bytes(content[:1] + b"\xc8" + content[2:])
    with pytest.raises(ValueError, match=r"expected one each in \[0, 100\)"):
        load_cifar(str(tmp_path))


def test_augmented_images_are_shifted_windows_and_their_mirrors() -> None:
    torch.manual_seed(0)
    images = torch.randint(1, 256, (64, 3, 6, 5), dtype=torch.uint8)
    result = shift_and_flip(images, 2, torch.randint(2**62, (64,)))
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    found = set()
    for before, after in zip(padded, result, strict=True):
        matches = {
            (top, left, flip)
            for top in range(5)
            for left in range(5)
            for flip in (False, True)
            if torch.equal(after.flip(2) if flip else after, before[:, top : top + 6, left : left + 5])
        }
        assert len(matches) == 1
        found |= matches
    assert {flip for *_, flip in found} == {False, True}
    assert {top for top, *_ in found} == {left for _, left, _ in found} == set(range(5))
