"""Random cases of every loss agree with the definition, and the search for those that do not can find them."""

import pytest

from fastkd.backends.blocked import sums
from fastkd.backends.blocked.dense import contrast as dense_contrast
from tests.robustness import fuzz


def test_random_cases_of_every_loss_agree_with_the_definition(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--cases", "64"]) == 0, capsys.readouterr().out
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"64 cases of {len(fuzz.CASES)} losses, 0 of which differ from the definition"
    assert [line.split("  ")[0] for line in lines[:-1]] == list(fuzz.CASES)


def test_a_case_that_differs_is_shrunk_and_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of a thousandth in tiles that have more than three rows."""
    above = sums.PlainSums.beyond_positive

    def wrong(self: sums.PlainSums, positive: object) -> object:
        found = above(self, positive)
        return found * 1.001 if len(found) > 3 else found

    monkeypatch.setattr(sums.PlainSums, "beyond_positive", wrong)
    monkeypatch.setattr(dense_contrast, "MAX_ELEMENTS", 0)
    assert fuzz.main(["--cases", "30", "--losses", "given index"]) == 1
    text = capsys.readouterr().out
    assert "DIFFERS" in text
    assert "AssertionError: the loss: relative error" in text
    assert "Plan(n=4, " in text
    assert text.splitlines()[-1].endswith("1 of which differ from the definition")
