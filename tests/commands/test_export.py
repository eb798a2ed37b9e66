"""Export and linear probe: what is written computes what the student does."""

import json

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from fastkd.cli import main
from fastkd.trainer import DataConfig, ModelConfig, ObjectiveConfig, train
from fastkd.trainer.commands.export import ExportError, export
from fastkd.trainer.commands.linear_probe import SGDProbe, linear_probe, linear_probe_by_sgd
from fastkd.trainer.commands.reopen import reopen
from fastkd.trainer.data.readers.memory import TensorImages, load_digits
from fastkd.trainer.models.features import FeatureModel
from tests.helpers.trainer_runs import one_thread, tiny_config  # noqa: F401


@pytest.fixture
def run(tmp_path):
    config = tiny_config(
        tmp_path,
        student=ModelConfig(name="fastkd.trainer.models.small:SmallConvNet", options={"width": 4}),
        teacher=None,
        data=DataConfig(name="digits", batch_size=64),
        objective=ObjectiveConfig(terms="ce"),
        epochs=1,
    )
    return train(config)


def test_safetensors_hold_the_weights_and_where_they_come_from(run, tmp_path, capsys, refused):
    out = tmp_path / "new" / "student.safetensors"
    assert main(["export", str(run.path), str(out)]) == 0
    assert "checked bit for bit" in capsys.readouterr().out
    with safe_open(out, "pt") as file:
        for name, value in run.distiller.student.model.state_dict().items():
            assert torch.equal(file.get_tensor(name), value)
        assert json.loads(file.metadata()["model"])["name"] == "fastkd.trainer.models.small:SmallConvNet"
        assert float(file.metadata()["accuracy"]) == run.accuracy
    content = out.read_bytes()
    assert "exists already" in refused("export", run.path, out)
    assert out.read_bytes() == content
    out.write_bytes(b"an older file")
    assert main(["export", str(run.path), str(out), "--overwrite"]) == 0
    assert len(out.read_bytes()) == len(content)


def test_a_disk_that_is_full_is_one_line_and_leaves_the_old_file(run, tmp_path, monkeypatch, refused):
    def full(*_args: object) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    out = tmp_path / "student.safetensors"
    out.write_bytes(b"an older file")
    monkeypatch.setattr("fastkd.trainer.commands.export.save_tensors", full)
    assert "student.safetensors: cannot be written (Error while" in refused("export", run.path, out, "--overwrite")
    assert out.read_bytes() == b"an older file"
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.slow
def test_onnx_gives_the_students_logits_for_any_batch(run, tmp_path, capsys):
    onnxruntime = pytest.importorskip("onnxruntime")
    out = tmp_path / "student.onnx"
    assert main(["export", str(run.path), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "logits within" in printed
    assert "images of 1 x H x W" in printed
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    for shape in ((13, 1, 8, 8), (3, 1, 14, 10)):
        images = torch.randn(shape)
        found = torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])
        with torch.no_grad():
            torch.testing.assert_close(found, run.distiller.student.model(images), rtol=1e-3, atol=1e-4)
    metadata = session.get_modelmeta().custom_metadata_map
    assert json.loads(metadata["model"])["name"] == "fastkd.trainer.models.small:SmallConvNet"
    assert float(metadata["accuracy"]) == run.accuracy
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.slow
def test_a_model_that_knows_one_size_is_exported_with_that_size(run, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    reopened = reopen(run.path)

    class OneSize(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images.flatten(1))

    reopened.model = OneSize()
    written = export(reopened, tmp_path / "student.onnx")
    assert written.sides == "1 x 8 x 8"
    session = onnxruntime.InferenceSession(str(written.path), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[1:] == [1, 8, 8]


@pytest.mark.slow
def test_a_wrong_onnx_file_is_found_and_removed(run, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    reopened = reopen(run.path)

    class Wrong(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: Tensor) -> Tensor:
            return self.model(images) * (1.5 if torch.compiler.is_exporting() else 1.0)

    reopened.model = Wrong(reopened.model)
    with pytest.raises(ExportError, match=r"differ by 0\.\d+ of the largest"):
        export(reopened, tmp_path / "student.onnx")
    assert not list(tmp_path.glob("*.onnx")) + list(tmp_path.glob(".*.onnx"))


def test_bad_export_arguments(run, tmp_path, refused):
    assert "a name that ends in .safetensors or .onnx" in refused("export", run.path, tmp_path / "student.pt")
    with pytest.raises(ValueError, match="image_shape: got None"):
        export(reopen(run.path, with_data=False), tmp_path / "student.onnx")


def test_a_probe_separates_what_the_features_separate():
    class Halves(nn.Module):
        """Features: the first four pixels. The other four, which tell classes 2 and 3 apart, are dropped."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(images.flatten(1)[:, :4])

    torch.manual_seed(0)
    labels = torch.arange(400) % 4
    images = 0.1 * torch.randn(400, 1, 2, 4)
    images[:, 0, 0, 0] += (labels == 0).float() + 2 * (labels == 1)
    images[:, 0, 1, 0] += (labels == 3).float()
    sets = TensorImages(images[:300], labels[:300]), TensorImages(images[300:], labels[300:])
    result = linear_probe(FeatureModel(Halves()), *sets, DataConfig(eval_batch_size=64), torch.device("cpu"))
    assert result.converged
    assert result.features == 4
    assert 0.6 < result.accuracy < 0.9  # two classes for certain, two by chance


def test_a_probe_by_sgd_renews_the_statistics_of_batch_norms_and_follows_the_authors_schedule():
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn = nn.BatchNorm2d(1, momentum=0.5)
            self.head = nn.Linear(4, 2)

        def forward(self, images: Tensor) -> Tensor:
            return self.head(self.bn(images).flatten(1))

    torch.manual_seed(0)
    labels = torch.arange(300) % 2
    images = 1000 + 0.1 * torch.randn(300, 1, 2, 2) + labels.view(-1, 1, 1, 1)
    sets = TensorImages(images[:200], labels[:200]), TensorImages(images[200:], labels[200:])
    model = FeatureModel(Shifted().eval())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rates = []
    watch = register_optimizer_step_pre_hook(lambda optimizer, *_: rates.append(dict(optimizer.param_groups[0])))
    settings = SGDProbe(epochs=8)
    found = linear_probe_by_sgd(model, *sets, DataConfig(), torch.device("cpu"), settings)
    watch.remove()
    assert (found.accuracy, found.train_samples, found.eval_samples) == (1.0, 200, 100)
    assert found.train_accuracy > 0.9
    four_batches = [rate for power in range(4) for rate in [0.05 * 0.1**power] * 8]  # of 64, 64, 64 and 8 images
    assert [rate["lr"] for rate in rates] == pytest.approx(four_batches)
    assert (rates[0]["momentum"], rates[0]["weight_decay"]) == (0.9, 5e-4)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.model.training
    assert linear_probe_by_sgd(model, *sets, DataConfig(), torch.device("cpu"), settings) == found
    with pytest.raises(ValueError, match=r"sgd\.epochs: got 0, expected"):
        SGDProbe(epochs=0)


def test_the_probe_command(run, capsys, refused, monkeypatch):
    for flags in ([], ["--method", "sgd", "--sgd.epochs", "20", "--sgd.lr", "1"]):
        assert main(["probe", str(run.path), "--data", "digits", "--options", '{"train_size": 600}', *flags]) == 0
        printed = capsys.readouterr().out
        accuracy = float(printed.split("linear probe on digits: accuracy ")[1].split()[0])
        assert accuracy > 0.3  # ten classes
        assert "of the 600 it was fitted to" in printed
    error = refused("probe", run.path, "--data", "digits", "--options", "[1]")
    assert "--options: got '[1]', expected a JSON object" in error
    seen = []
    build = lambda config: seen.append(config.options) or load_digits()  # noqa: E731
    monkeypatch.setattr("fastkd.trainer.commands.linear_probe.build_datasets", build)
    for flags in (["--method", "lbfgs"], ["--method", "sgd", "--sgd.epochs", "1"]):
        assert main(["probe", str(run.path), "--data", "stl10", "--options", '{"root": "x"}', *flags]) == 0
    assert seen == [{"augment": False, "root": "x"}, {"augment": True, "root": "x"}]
