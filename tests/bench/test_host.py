"""How many kernels and other operations a step puts on a GPU's queue: what python -m bench.host counts."""

import itertools

import pytest

pytest.importorskip("triton")

from bench import host, providers

# Launches, and other operations that launch something. Those of sup_con and masked contrast number their labels.
EXPECTED = {
    "dcd_loss": (6, 5),
    "info_nce_loss": (7, 4),
    "clip_loss": (14, 13),
    "ckd_loss": (5, 4),
    "sup_con_loss": (5, 23),
    "masked_contrast_loss": (7, 13),
    "kd_loss": (2, 3),
    "ce_kd_terms": (2, 4),
    **dict.fromkeys(providers.POOLS, (2, 0)),
}


@pytest.mark.parametrize("launcher", ["triton", "native"])
@pytest.mark.parametrize("case", host.cases(), ids=lambda case: case.name)
def test_a_step_launches_no_more_than_it_did(case: host.Case, launcher: str) -> None:
    if launcher == "native" and host.extension() is None:
        pytest.skip("the extension is not built")
    with host.stubbed(launcher) as launches:
        eager, ours = host.steps(case)
        counts = host.counted(ours, launches)
        assert tuple(counts) == EXPECTED[case.name]
        assert counts.total < host.counted(eager, launches).total
    assert host.Counts(*EXPECTED["dcd_loss"]).total <= 12


def test_the_command_prints_a_table_and_fails_where_eager_code_is_quicker(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for ours, code in ((1.0, 0), (3.0, 1)):
        times = itertools.cycle([2.0, ours])  # eager code's, then fastkd's
        monkeypatch.setattr(host, "microseconds", lambda step: next(times))  # noqa: B023
        assert host.main(["--losses", "kd_loss", "--rounds", "1"]) == code
        printed = capsys.readouterr()
        assert "| kd_loss | 2 |" in printed.out
        assert ("costs more host time than eager code: kd_loss" in printed.err) == bool(code)
