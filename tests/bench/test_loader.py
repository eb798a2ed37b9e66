"""``python -m bench.loader``: the ratio to torchvision's loader is its last line and decides its exit status."""

from pathlib import Path

import pytest
import torch

from bench.loader import __main__ as loader


def test_the_last_line_is_the_ratio_and_too_small_a_one_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "received", lambda dtype: 1.0)
    threads = torch.get_num_threads()
    try:
        assert loader.main(["--images", "4", "--rounds", "1", "--output", str(tmp_path)]) in (0, 1)
        out = capsys.readouterr().out
        for lowest, status in ((1.71, 0), (1.69, 1)):
            rates = {loader.BASELINE: 1.0, loader.OURS["folder"]: 2.0, loader.OURS["shards"]: lowest}
            monkeypatch.setattr(loader, "images_per_second", lambda *_, rates=rates: rates)
            assert loader.main(["--images", "2", "--rounds", "1"]) == status
            last = f"ratio to ImageFolder + v2 (float) on one core: folder 2.00, shards {lowest}"
            assert capsys.readouterr().out.splitlines()[-1] == last
    finally:
        torch.set_num_threads(threads)
    assert (tmp_path / "loader.md").read_text() == out
    rows = {line.split(" | ")[0][2:] for line in out.splitlines() if line.startswith("|")}
    assert {loader.BASELINE, *loader.OURS.values(), "timm create_loader, float32", "decode"} <= rows
