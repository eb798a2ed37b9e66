"""A run folder of an earlier version, whose configuration has another name for a setting, still loads and resumes."""

from fastkd.trainer import MSDCRDConfig, ObjectiveConfig, TrainConfig
from fastkd.trainer.config import differences


def test_the_old_name_of_msdcrds_term_weight_is_read_and_is_no_difference() -> None:
    config = TrainConfig(objective=ObjectiveConfig(msdcrd=MSDCRDConfig(sample_term_weight=0.5)))
    current, old = config.to_dict(), config.to_dict()
    old["objective"]["msdcrd"]["sample_weight"] = old["objective"]["msdcrd"].pop("sample_term_weight")
    assert TrainConfig.from_dict(old) == config
    assert differences(old, current) == []
    old["objective"]["msdcrd"]["sample_weight"] = 2.0
    assert differences(old, current) == ["objective.msdcrd.sample_term_weight: 2.0 -> 0.5"]
