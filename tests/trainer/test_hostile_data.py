"""What a data set of strangers holds is read as images and labels, or refused in a line."""

import io
import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile

from fastkd.trainer.data.readers import encoded as encoded_images
from fastkd.trainer.data.readers.encoded import BrokenImagesError, decode
from fastkd.trainer.data.readers.folder import FolderImages
from fastkd.trainer.data.readers.shards import ShardImages
from tests.trainer.test_images import NORMALIZATION, add, encoded, identity, write_folder, write_shards


def test_an_image_of_another_format_starts_no_program(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[object] = []
    monkeypatch.setattr("subprocess.check_call", lambda *args, **_: started.append(args))
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args, **_: started.append(args))
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    with pytest.raises(OSError, match="cannot identify image file"):
        decode(postscript)
    assert not started


def test_every_extension_has_its_format_and_no_other_format_is_opened() -> None:
    Image.init()
    of_extension = {Image.EXTENSION[extension] for extension in encoded_images.EXTENSIONS}
    assert set(encoded_images.FORMATS) == of_extension
    for kind in encoded_images.FORMATS:
        assert decode(encoded(0, kind=kind)).shape == (3, 24, 28)
    for kind in sorted(set(Image.SAVE) & {"GIF", "ICO", "TGA", "EPS", "PDF", "PCX"}):
        with pytest.raises(OSError, match="cannot identify image file"):
            decode(encoded(0, kind=kind))


def test_more_pixels_than_allowed_are_never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda *_: pytest.fail("decoded"))
    buffer = io.BytesIO()
    Image.new("1", (8193, 8192)).save(buffer, "PNG")
    with pytest.raises(ValueError, match="has 8193 x 8192 pixels, expected at most 67108864"):
        decode(buffer.getvalue())


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.open(path.parent, os.O_RDONLY)  # the name of a socket may not be long
        try:
            bound.bind(f"/proc/self/fd/{here}/{path.name}")
        finally:
            os.close(here)


@pytest.mark.parametrize("make", [_fifo, _socket])
@pytest.mark.timeout(20)
def test_pipes_and_sockets_are_no_images_and_no_shards(tmp_path: Path, make: Callable[[Path], None]) -> None:
    root = write_folder(tmp_path / "folder") / "train"
    make(root / "bee" / "x.jpg")
    with pytest.raises(ValueError, match=r"bee/x\.jpg' is not a regular file"):
        FolderImages(root, identity, NORMALIZATION)
    (tmp_path / "shards").mkdir()
    make(tmp_path / "shards" / "0.tar")
    with pytest.raises(ValueError, match=r"0\.tar: cannot be read \(is not a regular file\)"):
        ShardImages(tmp_path / "shards", identity, NORMALIZATION)


@pytest.mark.timeout(20)
def test_a_file_that_became_a_pipe_or_grew_counts_as_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = write_folder(tmp_path) / "train"
    monkeypatch.setattr("fastkd.trainer.data.readers.folder.MAX_BYTES", 5000)
    dataset = FolderImages(root, identity, NORMALIZATION)
    (root / "ant" / "0.png").unlink()
    os.mkfifo(root / "ant" / "0.png")
    (root / "ant" / "1.png").unlink()
    (root / "ant" / "1.png").symlink_to("/dev/zero")
    os.truncate(root / "ant" / "2.png", 1 << 33)
    with pytest.warns(RuntimeWarning, match=r"\(OSError: (is not a regular file|has 8589934592 bytes)"):
        assert dataset[0][1] == 1
    assert dataset.broken == 3


@pytest.mark.parametrize("target", ["..", "../..", "../../../..", ".", "../bee"])
@pytest.mark.timeout(20)
def test_folders_that_links_reach_twice_are_refused(tmp_path: Path, target: str) -> None:
    root = write_folder(tmp_path) / "train"
    (root / "ant" / "more").symlink_to(target)
    with pytest.raises(ValueError, match=r"(ant/more|bee)' leads to a folder that was read already"):
        FolderImages(root, identity, NORMALIZATION)


def test_links_to_images_and_to_folders_elsewhere_are_followed(tmp_path: Path) -> None:
    root = write_folder(tmp_path / "folder") / "train"
    (tmp_path / "elsewhere" / "b").mkdir(parents=True)
    (tmp_path / "elsewhere" / "b" / "0.png").write_bytes(encoded(7))
    (tmp_path / "elsewhere" / "b-0.png").write_bytes(encoded(8))
    (root / "ant" / "0.more").symlink_to(tmp_path / "elsewhere")
    (root / "cat" / "3.png").symlink_to(tmp_path / "elsewhere" / "b" / "0.png")
    dataset = FolderImages(root, identity, NORMALIZATION)
    assert dataset.labels.tolist() == [0] * 5 + [1] * 3 + [2] * 4
    names = [dataset.describe(index).removeprefix(f"{root}/") for index in (2, 3, 4, 11)]
    assert names == ["ant/2.png", "ant/0.more/b-0.png", "ant/0.more/b/0.png", "cat/3.png"]
    assert (dataset[4][0] == dataset[11][0]).all()


def test_a_link_to_itself_is_named(tmp_path: Path) -> None:
    root = write_folder(tmp_path) / "train"
    (root / "ant" / "x.png").symlink_to("x.png")
    with pytest.raises(ValueError, match=r"data\.options\.root: cannot read '.*x\.png' \(Too many levels"):
        FolderImages(root, identity, NORMALIZATION)


def _with(root: Path, **members: bytes) -> Path:
    root.mkdir(exist_ok=True)
    with tarfile.open(root / "new", "w") as archive:
        for name, content in members.items():
            add(archive, name.replace("_", "."), content)
    return root / "new"


@pytest.mark.parametrize("in_place", [False, True])
def test_shards_that_are_replaced_never_give_old_pixels_with_new_labels(tmp_path: Path, in_place: bool) -> None:
    first, second = encoded(1), encoded(2)
    second = second[: len(first)] if len(second) > len(first) else second + bytes(len(first) - len(second))
    shard = tmp_path / "0.tar"
    _with(tmp_path, a_png=first, a_cls=b"1").rename(shard)
    before = ShardImages(tmp_path, identity, NORMALIZATION, max_broken=0)
    assert (before[0][0] == identity(decode(first))).all()
    made, new = shard.stat(), _with(tmp_path, a_png=second, a_cls=b"2")
    if in_place:
        shard.write_bytes(new.read_bytes())
        new.unlink()
        with pytest.raises(BrokenImagesError, match="the shard has changed since its labels were read"):
            before[0]
    else:
        os.utime(new, ns=(made.st_atime_ns, made.st_mtime_ns))
        new.rename(shard)
        assert (before[0][0] == identity(decode(first))).all()
    after = ShardImages(tmp_path, identity, NORMALIZATION)
    assert after.labels.tolist() == [2]
    assert (after[0][0] == identity(decode(second))).all()


def test_a_huge_label_is_not_read_and_leaves_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 3 GB of holes, and every way in which a tar file claims a size that it does not have."""
    monkeypatch.setattr("tarfile.ExFileObject.read", lambda *_: pytest.fail("read"))
    big = tarfile.TarInfo("a.cls")
    big.size = 3 << 30
    for kind, message in (
        (tarfile.REGTYPE, "a label has more than 8192 bytes"),
        (tarfile.XHDTYPE, "a header has 3221225472 bytes"),
        (tarfile.GNUTYPE_LONGNAME, "a header has 3221225472 bytes"),
    ):
        big.type = kind
        shard = tmp_path / "0.tar"
        content = big.tobuf(tarfile.GNU_FORMAT)
        image = tarfile.TarInfo("a.png")
        shard.write_bytes(content)
        with open(shard, "r+b") as file:
            file.seek(len(content) + big.size)
            file.write(image.tobuf() + bytes(1024))
        with pytest.raises(ValueError, match=rf"0\.tar: is not a WebDataset shard .*{message}"):
            ShardImages(tmp_path, identity, NORMALIZATION)


@pytest.mark.timeout(20)
def test_a_negative_size_in_a_tar_file_does_not_loop(tmp_path: Path) -> None:
    member = tarfile.TarInfo("a.png")
    member.size = -512
    (tmp_path / "0.tar").write_bytes(member.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(ValueError, match=r"'a\.png' has -512 bytes"):
        ShardImages(tmp_path, identity, NORMALIZATION)


def test_a_kept_index_that_claims_more_than_the_shards_hold_is_not_read(tmp_path: Path) -> None:
    root = write_shards(tmp_path) / "train"
    before = ShardImages(root, identity, NORMALIZATION)
    (kept,) = root.glob(".fastkd-index-*.npz")
    right, many = kept.read_bytes(), np.zeros(10_000, np.int64)
    np.savez_compressed(kept, shard=many, offset=many, size=many, label=many)
    after = ShardImages(root, identity, NORMALIZATION)
    assert after.labels.tolist() == before.labels.tolist()
    assert kept.read_bytes() == right
