"""JPEGs are read, cut out and changed as bytes, as PIL, torchvision and timm would."""

import io
import random
from pathlib import Path

import pytest
import torch
from PIL import Image
from torchvision.transforms import RandomResizedCrop

from fastkd.trainer.data.images import RandomChange, load_images
from fastkd.trainer.data.options import ImagesOptions
from fastkd.trainer.data.readers.encoded import _pixels_of_jpeg, decode
from tests.trainer.test_images import by_pil, encoded, write_folder


def test_the_frame_header_of_a_jpeg_tells_its_pixels_and_pil_reads_what_does_not_say_them_plainly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = encoded(0, kind="JPEG")
    assert _pixels_of_jpeg(plain) == 24 * 28
    progressive = io.BytesIO()
    Image.open(io.BytesIO(plain)).save(progressive, "JPEG", progressive=True, exif=b"Exif\0\0" + bytes(500))
    assert _pixels_of_jpeg(progressive.getvalue()) == 24 * 28
    filled = plain[:2] + b"\xff" + plain[2:]  # a fill byte before a marker is allowed
    for content in (filled, plain[:2], plain[:30], b"", encoded(0), plain[:2] + b"\xff\xda" * 9):
        assert _pixels_of_jpeg(content) == 0
    assert torch.equal(decode(filled), by_pil(plain))
    monkeypatch.setattr("fastkd.trainer.data.readers.encoded.decode_jpeg", lambda *_: pytest.fail("decoded"))
    monkeypatch.setattr("fastkd.trainer.data.readers.encoded.MAX_PIXELS", 671)
    with pytest.raises(ValueError, match="has 28 x 24 pixels, expected at most 671"):
        decode(plain)


@pytest.mark.parametrize("size", [(40, 50), (50, 40), (20, 400), (1, 1)])
def test_crops_are_drawn_as_by_torchvision(size: tuple[int, int]) -> None:
    change = RandomChange(ImagesOptions(root="", min_scale=0.2, max_aspect=1.5))
    random.seed(0)
    torch.manual_seed(0)
    ours, theirs = [], []
    for _ in range(2000):
        rows, columns = change._place(*size)
        ours.append((rows.start, columns.start, rows.stop - rows.start, columns.stop - columns.start))
        theirs.append(RandomResizedCrop.get_params(torch.empty(3, *size), [0.2, 1.0], [1 / 1.5, 1.5]))
    mine, others = (torch.tensor(found).float() for found in (ours, theirs))
    assert (mine[:, :2] + mine[:, 2:] <= torch.tensor(size)).all()
    assert (mine[:, 2:] >= 1).all()
    error = 5 * ((mine.var(0) + others.var(0)) / 2000).sqrt() + 1e-6
    assert ((mine.mean(0) - others.mean(0)).abs() <= error).all()
    assert ((mine.std(0) - others.std(0)).abs() <= error + 0.02 * others.std(0)).all()


@pytest.mark.parametrize("kept", [2, 100, 700, -2])
def test_a_truncated_jpeg_cannot_be_read(kept: int) -> None:
    with pytest.raises((RuntimeError, OSError)):
        decode(encoded(0, kind="JPEG")[:kept])


def test_augmented_bytes_are_windows_mirrors_and_noise(tmp_path: Path) -> None:
    write_folder(tmp_path)
    whole = {"image_size": 24, "min_scale": 1.0, "max_aspect": 1.2}
    plain = load_images(str(tmp_path), **whole, flip=0.0)[0][0][0]
    mirrored = load_images(str(tmp_path), **whole, flip=1.0)[0][0][0]
    assert torch.equal(mirrored, plain.flip(2))
    erased = load_images(str(tmp_path), **whole, flip=0.0, erasing=1.0, mean=(1, 1, 1), std=(1e-6,) * 3)[0]
    torch.manual_seed(0)
    image = erased[0][0]
    changed = (image != plain).any(0)
    assert 0.01 < changed.float().mean() < 0.4
    assert (image[:, changed] == 255).all()
    darker = load_images(str(tmp_path), **whole, flip=0.0, color_jitter=0.9)[0]
    assert len({darker[0][0].float().mean().item() for _ in range(4)}) == 4
