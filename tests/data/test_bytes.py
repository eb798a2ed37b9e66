"""Images are bytes until they reach a model, which normalises them."""

import dataclasses

import pytest
import torch

from fastkd.trainer import DataConfig, ObjectiveConfig, evaluate_checkpoint, train
from fastkd.trainer.commands.export import _images as samples_of_export
from fastkd.trainer.commands.linear_probe import SGDProbe, linear_probe, linear_probe_by_sgd
from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.data.mix import BatchMix
from fastkd.trainer.data.readers.cifar import CifarImages
from fastkd.trainer.data.readers.memory import TensorImages
from fastkd.trainer.data.strong import strong_views
from fastkd.trainer.models.build import Normalization
from fastkd.trainer.models.features import FeatureModel
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.run.distiller import build_distiller
from fastkd.trainer.run.prepare import prepare
from tests.helpers.checks import assert_close
from tests.trainer.test_prepare import CPU, DATA, OWN, Net, build, config, images, run_settings


def pixels(rows: int = 8) -> torch.Tensor:
    return torch.randint(256, (rows, 3, 6, 6), generator=torch.Generator().manual_seed(5), dtype=torch.uint8)


def normalised(images: torch.Tensor, normalization: Normalization) -> torch.Tensor:
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
    return (images / 255 - mean) / std


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "folded"])
def test_each_model_normalises_bytes_for_itself(dtype):
    fold, dtype = dtype == "folded", dtype.replace("folded", "fp32")
    plain, settings = build(config()), config(teacher={"normalization": OWN, "dtype": dtype})
    distiller = build_distiller(settings, pixels(), DATA, student=Net(), teacher=Net(6))
    distiller.load_state_dict(plain.state_dict())
    if fold:
        assert "1 batch norms are folded" in distiller.teacher.fold(distiller.teacher.model.normalized(pixels()))
    prepare(distiller, settings, CPU, Ranks(), DATA)
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    distiller.eval()
    plain.eval()
    expected = plain.student(normalised(pixels(), DATA)), plain.teach(normalised(pixels(), OWN))
    assert_close(distiller.student(pixels()).logits, expected[0].logits, torch.float32)
    assert_close(distiller.teach(pixels()).logits, expected[1].logits, kind)
    assert distiller.teacher.model.scale.dtype == torch.float32
    assert set(distiller.state_dict()) == set(plain.state_dict())
    # Images that are normalised already stay as they are, and so do those of a next run on other data.
    assert torch.equal(distiller.student(images()).logits, plain.student(images()).logits)
    build_distiller(dataclasses.replace(config(terms="ce"), teacher=None), images(), DATA, student=distiller.student)
    assert not distiller.student.takes_bytes
    with pytest.raises(ValueError, match=r"cannot take .*; bytes need an attribute 'normalization' of the data set"):
        build_distiller(dataclasses.replace(config(terms="ce"), teacher=None), pixels(), None)


def test_a_run_on_bytes_sees_the_same_images_in_any_chunks_and_is_evaluated_as_it_was_trained(tmp_path):
    data = CifarImages(pixels(20), torch.arange(20) % 5, DATA, augment=True)
    held_out = CifarImages(pixels(20), torch.arange(20) % 5, DATA, augment=False)
    seen = {1: [], 4: []}
    for chunks, batches in seen.items():
        settings = dataclasses.replace(
            run_settings(tmp_path), teacher=None, objective=ObjectiveConfig(terms="ce"), epochs=1, chunks=chunks,
            ema=0.5, quiet=True, data=DataConfig(batch_size=12, mixup=0.2, cutmix=0.2),
            run_dir=str(tmp_path / f"run{chunks}"),
        )  # fmt: skip
        student = Net()
        student.conv.register_forward_pre_hook(lambda _, args, batches=batches: batches.append(args[0].detach()))
        result = train(settings, student=student, train_data=data, eval_data=held_out)
        deployed = result.deployed.model.eval()
        assert result.accuracy == (deployed(normalised(pixels(20), DATA)).argmax(1) == held_out.labels).float().mean()
        assert evaluate_checkpoint(result.path, model=Net(), eval_data=held_out).accuracy == result.accuracy
        reopened = reopen(result.path, model=Net(), eval_data=held_out)
        torch.testing.assert_close(samples_of_export(reopened, None), normalised(pixels(20)[:8], DATA))
    whole, parts = ([batch for batch in seen[chunks] if len(batch) == 12 // chunks] for chunks in (1, 4))
    assert torch.equal(torch.cat(parts[:4]), whole[0])
    levels = whole[0] * torch.tensor(DATA[1]).view(-1, 1, 1) + torch.tensor(DATA[0]).view(-1, 1, 1)
    assert -1e-6 <= levels.min() <= levels.max() <= 1 + 1e-6  # bytes that were normalised once
    assert levels.std() > 0.2


def test_probes_read_bytes_as_they_read_normalised_images():
    held_out = CifarImages(pixels(20), torch.arange(20) % 5, DATA, augment=False)
    floats = TensorImages(normalised(pixels(20), DATA), held_out.labels)
    for fit in (
        lambda data: linear_probe(FeatureModel(Net()), data, data, DataConfig(), CPU),
        lambda data: linear_probe_by_sgd(FeatureModel(Net()), data, data, DataConfig(), CPU, SGDProbe(epochs=2)),
    ):
        found = []
        for data in (held_out, floats):
            torch.manual_seed(0)
            found.append(fit(data))
        assert found[0].accuracy == found[1].accuracy
        assert found[0].train_accuracy == found[1].train_accuracy


def test_mixed_bytes_are_the_mixed_images_rounded():
    labels = torch.arange(8) % 5
    for options in ({"mixup": 0.4}, {"cutmix": 1.0}):
        mixed = []
        for batch in (pixels(), pixels().float()):
            torch.manual_seed(3)
            mixed.append(BatchMix(DataConfig(**options), 5)(batch, labels))
        assert mixed[0][0].dtype == torch.uint8
        assert torch.equal(mixed[0][0], mixed[1][0].round().to(torch.uint8))
        assert torch.equal(mixed[0][1], mixed[1][1])


def test_strong_views_of_bytes_are_those_of_the_normalised_images():
    views = strong_views(pixels(), None, range(8))
    assert views.dtype == torch.uint8
    assert_close(normalised(views, DATA), strong_views(normalised(pixels(), DATA), DATA, range(8)), torch.float32)
