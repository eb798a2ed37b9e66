"""Mixup and CutMix: labels become the shares of what is in an image, and a resumed run mixes the same."""

import dataclasses
import shutil

import pytest
import torch

from fastkd.trainer import DataConfig, MSDCRDConfig, ObjectiveConfig, TrainConfig, load_weights, train
from fastkd.trainer.data.mix import BatchMix
from tests.helpers.trainer_runs import one_thread, same, tiny_config  # noqa: F401


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_labels_are_the_shares_of_the_two_images(options):
    labels = torch.arange(6)
    images = torch.eye(6)[:, :, None, None].expand(6, 6, 8, 8)  # channel c of an image is the share of class c in it
    torch.manual_seed(0)
    mix = BatchMix(DataConfig(**options), 6)
    kinds = set()
    for _ in range(8):
        mixed, shares = mix(images, labels)
        torch.testing.assert_close(mixed.mean((2, 3)), shares)
        assert set((shares > 0).sum(1).tolist()) <= {1, 2}
        kinds.add("cutmix" if set(mixed.unique().tolist()) <= {0.0, 1.0} else "mixup")
    assert kinds == set(options)


def test_without_either_a_batch_passes_unchanged_and_no_random_number_is_drawn():
    images, labels = torch.rand(4, 3, 2, 2), torch.arange(4)
    state = torch.get_rng_state()
    mixed = BatchMix(DataConfig(), 4)(images, labels)
    assert mixed[0] is images
    assert mixed[1] is labels
    assert torch.equal(torch.get_rng_state(), state)


def test_a_resumed_run_mixes_as_the_uninterrupted_one(tmp_path):
    config = tiny_config(tmp_path, save_every_steps=5, keep=9)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, mixup=0.5, cutmix=0.5))
    whole = train(config)
    expected = load_weights(whole.path)
    for path in (tmp_path / "run" / "checkpoints").glob("step-*"):
        if int(path.name[5:]) > 5:
            shutil.rmtree(path)
    resumed = train(dataclasses.replace(config, resume=True))
    assert resumed.resumed_from == 5
    assert same(load_weights(resumed.path), expected)
    plain = train(tiny_config(tmp_path, run_dir=None))
    assert plain.history[-1]["ce"] < whole.history[-1]["ce"]


def test_terms_that_read_labels_refuse_mixed_ones():
    for objective in (
        ObjectiveConfig(terms="pckd"),
        ObjectiveConfig(terms="msdcrd", msdcrd=MSDCRDConfig(positives="label")),
    ):
        with pytest.raises(
            ValueError, match=r"data\.cutmix: got 1\.0 with the term '(pckd|msdcrd)', which reads labels"
        ):
            TrainConfig(objective=objective, data=DataConfig(cutmix=1.0))
    TrainConfig(objective=ObjectiveConfig(terms="msdcrd + kd"), data=DataConfig(cutmix=1.0))
    with pytest.raises(ValueError, match=r"data\.mixup: got 0\.2 with data\.unlabelled, expected 0"):
        TrainConfig(data=DataConfig(mixup=0.2, unlabelled=True))
