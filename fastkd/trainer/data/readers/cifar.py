"""CIFAR-10 and CIFAR-100 as they are published, held in memory and augmented a batch at a time.

torchvision reads one of the two layouts, and by an unpickler that runs what a file asks for. Here nothing is unpickled:
``read_pickle`` reads plain data.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastkd.trainer.data.readers.encoded import Normalization
from fastkd.trainer.data.readers.files import content_of, fetch_archive
from fastkd.trainer.data.readers.memory import TensorImages
from fastkd.trainer.data.readers.plain_pickle import array_of, read_pickle
from fastkd.validate import check_choice, check_type

SIDE, PIXELS = 32, 3 * 32 * 32
MAX_BYTES = 1 << 28  # of a file; the largest published one has 155 MB
# Means and standard deviations of the training images' channels, as the CIFAR distillation benchmarks use them.
NORMALIZATION = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
# The folder of each layout, the files of its training set and of its test set.
LAYOUTS: dict[tuple[str, int], tuple[str, list[str], list[str]]] = {
    ("binary", 10): ("cifar-10-batches-bin", [f"data_batch_{i}.bin" for i in range(1, 6)], ["test_batch.bin"]),
    ("binary", 100): ("cifar-100-binary", ["train.bin"], ["test.bin"]),
    ("python", 10): ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"]),
    ("python", 100): ("cifar-100-python", ["train"], ["test"]),
}


class CifarImages(TensorImages):
    """A dataset of uint8 ``images`` [N, 3, H, W]. ``classes`` has the classes' names.

    ``normalization`` has means and standard deviations of the channels, for the model that the images are given to.

    ``augment`` shifts each image by up to 4 pixels and mirrors it at random. The loader gives every sample a seed
    (``seeded_items``). Read without a loader, the seeds come from torch's global generator.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        normalization: Normalization,
        *,
        augment: bool,
        classes: Sequence[str] = (),
    ) -> None:
        super().__init__(images, labels)
        self.normalization = normalization
        self.augment = augment
        if classes:  # the binary files of CIFAR say none
            self.classes = list(classes)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        return self.seeded_items(indices, torch.randint(2**62, (len(indices),)).numpy() if self.augment else None)

    def seeded_items(self, indices: Sequence[int], seeds: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """The samples ``indices``, each augmented by its own seed, int64 [B]."""
        chosen = torch.as_tensor(indices)
        images = self.images[chosen]
        if self.augment and seeds is not None:
            images = shift_and_flip(images, 4, torch.from_numpy(seeds))
        return images, self.labels[chosen]


def shift_and_flip(images: Tensor, most: int, seeds: Tensor) -> Tensor:
    """The images [B, C, H, W], each shifted by up to ``most`` pixels over black and mirrored with probability 1/2.

    ``seeds``, int64 [B], are uniform random numbers of 62 or 63 bits. Their remainders decide on an image.
    """
    B, _, H, W = images.shape
    padded = torch.nn.functional.pad(images, (most, most, most, most))
    places = 2 * most + 1
    top, left = seeds[:, None] % places, seeds[:, None] // places % places
    rows, columns = top + torch.arange(H), left + torch.arange(W)
    columns = torch.where(seeds[:, None] // places**2 % 2 == 1, columns.flip(1), columns)
    return padded[torch.arange(B)[:, None, None], :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def load_cifar(
    root: str, *, classes: int = 100, augment: bool = True, download: bool = False
) -> tuple[CifarImages, CifarImages]:
    """(training set, test set) of CIFAR-100 or CIFAR-10 in ``root``, unpacked from the published archives.

    Both layouts are read: ``cifar-100-binary`` (C version), and ``cifar-100-python`` without running any code that its
    pickles name. ``root`` may be that folder or the one that holds it. ``download`` fetches the archive into ``root``
    if neither is there, and compares its checksum.

    Raises:
        ValueError: files are missing, cannot be downloaded, or do not hold what the layout says.
    """
    check_choice("data.options.classes", str(classes), ("10", "100"))
    check_type("data.options.augment", augment, bool)
    for kind in ("binary", "python"):
        folder, train_files, test_files = LAYOUTS[kind, classes]
        for place in (Path(root) / folder, Path(root)):
            if all((place / name).is_file() for name in (*train_files, *test_files)):
                read = _read_binary if kind == "binary" else _read_pickle
                sets = []
                for names, shown in ((train_files, augment), (test_files, False)):
                    images, labels = zip(*(read(place / name, classes) for name in names), strict=True)
                    sets.append(
                        CifarImages(torch.cat(images), torch.cat(labels), NORMALIZATION[classes], augment=shown)
                    )
                return sets[0], sets[1]
    if download:
        from torchvision import datasets

        # The python layout, whose checksum torchvision knows.
        fetch_archive(datasets.CIFAR100 if classes == 100 else datasets.CIFAR10, root)
        return load_cifar(root, classes=classes, augment=augment)
    expected = " or ".join(LAYOUTS[kind, classes][0] for kind in ("binary", "python"))
    raise ValueError(
        f"data.options.root: found no CIFAR-{classes} in {root}, expected the folder {expected}, or "
        "--data.options.download"
    )


def _read_binary(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    """Reads records of labels (CIFAR-10: one; CIFAR-100: a coarse one, then a fine one) and 3,072 pixels, all bytes."""
    before = 2 if classes == 100 else 1
    data = np.frombuffer(content_of(path, MAX_BYTES), np.uint8)
    if data.size == 0 or data.size % (before + PIXELS):
        raise ValueError(f"{path}: has {data.size} bytes, expected a multiple of {before + PIXELS}")
    records = data.reshape(-1, before + PIXELS)
    return _checked(path, records[:, before:], records[:, before - 1], classes)


def _read_pickle(path: Path, classes: int) -> tuple[Tensor, Tensor]:
    key = b"fine_labels" if classes == 100 else b"labels"
    pickled = content_of(path, MAX_BYTES)
    try:
        content = read_pickle(pickled)
        if not isinstance(content, dict) or not {b"data", key} <= content.keys():
            raise ValueError(f"has no dict with the keys 'data' and {key.decode()!r}")
        labels = content[key]
        if not isinstance(labels, list) or not all(type(label) is int and 0 <= label < classes for label in labels):
            raise ValueError(f"{key.decode()!r} are no ints in [0, {classes})")
        pixels = array_of(content[b"data"], PIXELS)
    # A damaged pickle raises almost anything.
    except Exception as error:
        raise ValueError(f"{path}: is not a file of CIFAR-{classes} ({type(error).__name__}: {error})") from error
    return _checked(path, pixels, np.array(labels, np.uint8), classes)


def _checked(path: Path, pixels: np.ndarray, labels: np.ndarray, classes: int) -> tuple[Tensor, Tensor]:
    if len(labels) == 0:
        raise ValueError(f"{path}: has no images, expected at least one")
    if len(pixels) != len(labels) or labels.max() >= classes:
        raise ValueError(f"{path}: has {len(pixels)} images, {len(labels)} labels, expected one each in [0, {classes})")
    return torch.tensor(pixels).view(-1, 3, SIDE, SIDE), torch.tensor(labels, dtype=torch.int64)
