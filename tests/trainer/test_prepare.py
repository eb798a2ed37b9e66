"""Models made ready for training: their own normalisation, precision, layout, torch.compile, the teacher's floor."""

import copy
import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fastkd.trainer import (
    DataConfig,
    Distiller,
    FeatureModel,
    ModelConfig,
    Objective,
    ObjectiveConfig,
    TensorImages,
    TrainConfig,
    build_model,
    evaluate_checkpoint,
    train,
)
from fastkd.trainer.data.labels import normalization_of
from fastkd.trainer.data.loader import eval_loader
from fastkd.trainer.data.options import IMAGENET_MEAN, IMAGENET_STD
from fastkd.trainer.models.build import torchvision_weights, trained_normalization
from fastkd.trainer.models.features import ModelOutput, measure_shapes
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.run.check import check_teacher
from fastkd.trainer.run.distiller import Trained, build_distiller, weights_hash
from fastkd.trainer.run.prepare import prepare
from fastkd.trainer.tasks.base import find_task
from tests.helpers.checks import assert_close

CPU = torch.device("cpu")
NET = "tests.trainer.test_prepare:Net"
DATA = (IMAGENET_MEAN, IMAGENET_STD)
OWN = ((0.5, 0.4, 0.3), (0.5, 0.25, 0.125))


class Net(nn.Module):
    """Convolution, batch norm and dropout before a linear classifier."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(width, 5)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(self.relu(self.bn(self.conv(images))).mean((2, 3)))


class Images(TensorImages):
    normalization = DATA


def config(*, teacher: dict | None = None, **changes) -> TrainConfig:
    return TrainConfig(
        student=ModelConfig(name=NET),
        teacher=ModelConfig(name=NET, options={"width": 6}, **(teacher or {})),
        objective=ObjectiveConfig(terms=changes.pop("terms", "kd+dcd")),
        quiet=True,
        **changes,
    )


def build(settings: TrainConfig) -> Distiller:
    torch.manual_seed(0)
    models = [Net(), Net(6)]
    for model in models:  # running statistics that are not those of a new batch norm
        model.bn.running_mean.uniform_(-1, 1)
        model.bn.running_var.uniform_(0.5, 2)
        model.fc.weight.data *= 20  # so that not all images look alike to it
    return build_distiller(settings, images(), student=models[0], teacher=models[1])


def images(rows: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def test_a_teacher_sees_images_normalised_as_in_its_own_training():
    raw = torch.rand(8, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    as_data, as_own = (
        (raw - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1) for mean, std in (DATA, OWN)
    )
    distiller = build(config())
    model = distiller.teacher.model.model.eval()
    expected = model(as_own)
    assert (model(as_data) - expected).abs().max() > 1e-2
    names = set(distiller.state_dict())
    lines = prepare(distiller, config(teacher={"normalization": OWN}), CPU, Ranks(), DATA)
    assert_close(distiller.teach(as_data).logits, expected, torch.float32)
    assert lines == [
        "teacher input: normalised with its own mean 0.5 0.4 0.3, std 0.5 0.25 0.125; the student's with the data's "
        "mean 0.485 0.456 0.406, std 0.229 0.224 0.225"
    ]
    assert set(distiller.state_dict()) == names
    assert torch.equal(distiller.student(as_data).logits, build(config()).student(as_data).logits)


@pytest.mark.parametrize("normalization", [None, DATA])
def test_a_teacher_that_is_normalised_as_the_data_gets_the_images_as_they_are(normalization):
    distiller = build(config())
    assert prepare(distiller, config(teacher={"normalization": normalization}), CPU, Ranks(), DATA) == []
    assert torch.equal(distiller.teach(images()).logits, build(config()).teach(images()).logits)


def test_a_normalization_that_cannot_be_applied_is_an_error():
    settings = config(teacher={"normalization": OWN})
    with pytest.raises(ValueError, match=r"teacher\.normalization: .*the data do not say how they are normalised"):
        prepare(build(config()), settings, CPU, Ranks(), None)
    with pytest.raises(ValueError, match=r"teacher\.normalization: got 3 channels, expected 1, as the data have"):
        prepare(build(config()), settings, CPU, Ranks(), ((0.5,), (0.5,)))
    for wrong in (((0.5,), (0.5, 0.5)), ((), ()), ((0.5,),)):
        with pytest.raises(ValueError, match=r"model\.normalization: got .*, expected \(means, standard deviations\)"):
            ModelConfig(name=NET, normalization=wrong)
    with pytest.raises(ValueError, match=r"model\.normalization: got 0\.0"):
        ModelConfig(name=NET, normalization=((0.5,), (0.0,)))


def test_published_weights_say_how_their_images_were_normalised():
    with torch.device("meta"):
        vit, resnet = (
            build_model(ModelConfig(name=name)) for name in ("timm:vit_tiny_patch16_224", "torchvision:resnet18")
        )
    half = ((0.5,) * 3, (0.5,) * 3)
    assert trained_normalization(ModelConfig(name="vit_tiny_patch16_224", pretrained=True), vit) == half
    assert trained_normalization(ModelConfig(name="torchvision:resnet18", pretrained=True), resnet) == DATA
    assert trained_normalization(ModelConfig(name="vit_tiny_patch16_224"), vit) is None
    assert trained_normalization(ModelConfig(name=NET, normalization=OWN), vit) == OWN


def test_a_pretrained_student_with_another_normalization_is_warned_of():
    settings = config()
    settings = dataclasses.replace(settings, student=ModelConfig(name=NET, normalization=OWN))
    with pytest.warns(RuntimeWarning, match=r"student: its weights were trained with normalization \(\(0\.5, .*data"):
        prepare(build(settings), settings, CPU, Ranks(), DATA)


def test_datasets_tell_their_normalization():
    data = Images(images(), torch.zeros(8, dtype=torch.long))
    assert normalization_of(torch.utils.data.Subset(data, [0, 1])) == DATA
    assert normalization_of(TensorImages(images(), torch.zeros(8, dtype=torch.long))) is None


def test_torchvision_weights_are_chosen_by_name():
    assert torchvision_weights("resnet50.IMAGENET1K_V1").name == "IMAGENET1K_V1"
    assert torchvision_weights("resnet50").name == "IMAGENET1K_V2"
    with torch.device("meta"):
        assert build_model(ModelConfig(name="torchvision:resnet18.IMAGENET1K_V1")).fc.out_features == 1000
        with pytest.raises(
            ValueError, match=r"got 'torchvision:resnet18\.V9', expected weights among \['IMAGENET1K_V1"
        ):
            build_model(ModelConfig(name="torchvision:resnet18.V9"))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_teacher_in_half_precision_gives_its_logits_to_that_precision(dtype):
    settings = config(teacher={"dtype": dtype})
    distiller, full = build(config()), build(config())
    assert prepare(distiller, settings, CPU, Ranks(), DATA) == [f"teacher in {dtype}"]
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    assert {parameter.dtype for parameter in distiller.teacher.parameters()} == {kind}
    assert_close(distiller.teach(images()).logits, full.teach(images()).logits, kind)
    loss, _ = distiller(images(), torch.arange(8) % 5)
    loss.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in distiller.student.parameters())
    assert weights_hash(distiller.teacher.model.model) != weights_hash(full.teacher.model.model)


def test_what_only_a_teacher_has_is_refused_for_a_student():
    with pytest.raises(ValueError, match=r"student\.dtype: got 'bf16'"):
        TrainConfig(student=ModelConfig(name=NET, dtype="bf16"))
    with pytest.raises(ValueError, match=r"student\.min_accuracy: got 0\.5, expected None"):
        TrainConfig(student=ModelConfig(name=NET, min_accuracy=0.5))


def test_the_teacher_must_reach_its_floor_on_the_evaluation_set(capsys):
    distiller = build(config())
    right = distiller.teach(images(40)).logits.argmax(1)
    labels = torch.where(torch.arange(40) < 30, right, (right + 1) % 5)
    loader = eval_loader(TensorImages(images(40), labels), DataConfig(eval_batch_size=16), CPU)
    settings = dataclasses.replace(config(teacher={"min_accuracy": 0.75}), quiet=False)
    assert check_teacher(distiller, find_task(settings), loader, CPU, Ranks()) == 0.75
    assert capsys.readouterr().out == "teacher accuracy 0.7500 (at least 0.75)\n"
    with pytest.raises(ValueError, match=r"teacher\.min_accuracy: the teacher reaches 0\.7500 .* at least 0\.76"):
        check_teacher(distiller, find_task(config(teacher={"min_accuracy": 0.76})), loader, CPU, Ranks())
    assert check_teacher(distiller, find_task(config()), loader, CPU, Ranks()) == 0.75


def test_the_floor_is_checked_with_the_teachers_own_normalization():
    settings = config(teacher={"normalization": OWN, "min_accuracy": 1.0})
    distiller, plain = build(config()), build(config())
    prepare(distiller, settings, CPU, Ranks(), DATA)
    batch = images(100) + 3 * torch.randn(100, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    loader = eval_loader(TensorImages(batch, distiller.teach(batch).logits.argmax(1)), DataConfig(), CPU)
    assert check_teacher(distiller, find_task(settings), loader, CPU, Ranks()) == 1.0
    with pytest.raises(ValueError, match=r"teacher\.min_accuracy"):
        check_teacher(plain, find_task(settings), loader, CPU, Ranks())


def test_sync_batchnorm_needs_several_ranks_on_cuda():
    with pytest.raises(ValueError, match=r"sync_batchnorm: got True with 1 rank\(s\) on cpu, expected several on CUDA"):
        prepare(build(config()), config(sync_batchnorm=True), CPU, Ranks())
    with pytest.raises(ValueError, match="2 rank"):
        prepare(build(config()), config(sync_batchnorm=True), CPU, Ranks(0, 2))


def test_sync_batchnorm_replaces_the_students_batch_norms_and_keeps_its_parameters():
    distiller = build(config())
    before = dict(distiller.named_parameters())
    prepare(distiller, config(sync_batchnorm=True), torch.device("cuda"), Ranks(0, 2))
    assert isinstance(distiller.student.model.bn, nn.SyncBatchNorm)
    assert type(distiller.teacher.model.model.bn) is nn.BatchNorm2d
    assert all(before[name] is parameter for name, parameter in distiller.named_parameters())


def test_channels_last_changes_the_layout_and_not_the_result():
    distiller, plain = build(config()), build(config())
    assert prepare(distiller, config(channels_last=True), CPU, Ranks()) == ["models: channels_last"]
    for model in (distiller.student.model, distiller.teacher.model.model):
        assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    distiller.student.model.conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert_close(distiller.student(images()).logits, plain.student(images()).logits, torch.float32)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)
    assert_close(distiller.teach(images()).features, plain.teach(images()).features, torch.float32)


@pytest.fixture
def compilations(monkeypatch):
    """What torch.compile compiled, by a backend that traces as the default one does but needs no C++ compiler."""
    from torch._dynamo.backends.debugging import aot_eager

    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    torch._dynamo.reset()
    given = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: given(function, backend=backend, **options))
    yield graphs
    torch._dynamo.reset()


def outputs_and_gradients(distiller: Distiller, batch: torch.Tensor) -> tuple[ModelOutput, ModelOutput, list]:
    distiller.zero_grad()
    student, teacher = distiller.student(batch), distiller.teach(batch)
    loss, _ = distiller.objective(student, teacher, torch.arange(len(batch)) % 5)
    (loss + student.feature_map.square().mean()).backward()
    return student, teacher, [parameter.grad.clone() for parameter in distiller.parameters() if parameter.requires_grad]


@pytest.mark.timeout(300)
def test_compiled_models_give_the_same_features_maps_and_gradients_without_compiling_again(compilations):
    settings = config(terms="kd+dcd+msdcrd", compile=True)
    compiled, eager = build(settings), build(settings)
    assert prepare(compiled, settings, CPU, Ranks()) == ["models: compile"]
    assert set(compiled.state_dict()) == set(eager.state_dict())
    assert set(compiled.student.model.state_dict()) == set(Net().state_dict())
    counts = []
    for step in range(5):
        compiled.train()
        eager.train()
        batch = images(8, seed=step)
        found, expected = outputs_and_gradients(compiled, batch), outputs_and_gradients(eager, batch)
        for one, other in zip(found[:2], expected[:2], strict=True):
            for name in ("logits", "features", "feature_map"):
                assert_close(getattr(one, name), getattr(other, name), torch.float32)
        for one, other in zip(found[2], expected[2], strict=True):
            assert_close(one, other, torch.float32)
        counts.append(len(compilations))
        compiled.eval()
        assert_close(compiled.student(batch).features, eager.eval().student(batch).features, torch.float32)
    # The student in training and the teacher; then the student in evaluation.
    assert counts == [2, 3, 3, 3, 3]
    assert_close(compiled.student.model.bn.running_mean, eager.student.model.bn.running_mean, torch.float32)
    for layer in (*compiled.student.modules(), *compiled.teacher.modules()):
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks


def test_a_copy_of_a_compiled_student_is_a_plain_model(compilations):
    settings = config(compile=True)
    distiller = build(settings)
    prepare(distiller, settings, CPU, Ranks())
    distiller(images(), torch.arange(8) % 5)
    average = FeatureModel(copy.deepcopy(distiller.student.model).eval(), distiller.student.classifier_name)
    before = len(compilations)
    assert_close(average(images()).logits, distiller.student.model.eval()(images()), torch.float32)
    assert len(compilations) == before


def test_an_error_in_a_forward_pass_leaves_nothing_for_the_next_one():
    model = FeatureModel(Net())
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 4, 6, 6))
    good = images()
    model.model.relu.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("no")))
    with pytest.raises(RuntimeError, match="no"):
        model(good)
    model.model.relu._forward_hooks.clear()
    assert model(good).features.shape == (8, 4)


# At the size they are made for: a CNN, one with layers between pooling and classes, tokens with and without a class's.
FAMILIES = {
    "timm:resnet10t": (512, 7, 7),
    "timm:convnext_atto": (320, 7, 7),
    "timm:vit_tiny_patch16_224": (197, 192),
    "timm:gmlp_ti16_224": (196, 128),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_and_tokens_of_families_in_msdcrd(name):
    torch.manual_seed(0)
    model = build_model(ModelConfig(name=name, num_classes=5))
    batch = torch.randn(2, 3, 224, 224)
    settings = ObjectiveConfig(terms="msdcrd")
    teacher = FeatureModel(model)
    found = measure_shapes(teacher, batch, feature_map=True)
    assert found.feature_map.shape == FAMILIES[name]
    student = FeatureModel(Net())
    own = measure_shapes(student, batch, feature_map=True)
    objective = Objective(settings, own, found)
    small = torch.nn.functional.avg_pool2d(batch, 16)
    with torch.no_grad():
        taught = teacher.eval()(batch)
    loss, terms = objective(student(small), taught, torch.tensor([0, 1]))
    loss.backward()
    assert loss.isfinite()
    assert set(terms) == {"ce", "msdcrd/sample", "msdcrd/feature"}
    assert student.model.conv.weight.grad.abs().sum() > 0


def data() -> tuple[Images, Images]:
    centres = 3 * torch.randn(5, 3, 1, 1, generator=torch.Generator().manual_seed(4))
    labels = torch.arange(40) % 5
    made = Images(centres[labels] + images(40), labels)
    return made, made


def run_settings(tmp_path, **teacher) -> TrainConfig:
    """A run with a teacher whose weights are in a file."""
    torch.manual_seed(1)
    save_file(Net(6).state_dict(), tmp_path / "teacher.safetensors")
    return dataclasses.replace(
        config(teacher={"weights": str(tmp_path / "teacher.safetensors"), **teacher}),
        data=DataConfig(name="tests.trainer.test_prepare:data", batch_size=8),
        epochs=2,
        device="cpu",
        run_dir=str(tmp_path / "run"),
        tensorboard=False,
        progress=False,
    )


@pytest.mark.timeout(300)
def test_a_run_with_every_option_is_saved_under_plain_names_and_resumed(tmp_path, capsys, compilations):
    settings = run_settings(tmp_path, normalization=OWN, dtype="bf16", min_accuracy=0.0)
    settings = dataclasses.replace(settings, compile=True, channels_last=True, quiet=False)
    whole = train(settings)
    out = capsys.readouterr().out
    for line in ("teacher accuracy", "teacher input: normalised", "teacher in bf16", "models: channels_last, compile"):
        assert line in out
    saved = load_file(whole.path / "student.safetensors")
    assert saved.keys() == Net().state_dict().keys()
    assert evaluate_checkpoint(whole.path, trust_code=True).accuracy == whole.accuracy
    shutil.rmtree(whole.path)
    resumed = train(dataclasses.replace(settings, resume=True))
    assert resumed.resumed_from == 5
    for name, tensor in load_file(resumed.path / "student.safetensors").items():
        assert_close(tensor, saved[name], torch.float32, floor=1e-2)


def test_chunks_of_a_compiled_student_give_the_gradients_of_the_whole_batch(compilations):
    settings = config(compile=True)
    chunked, whole = build(settings), build(settings)
    prepare(chunked, settings, CPU, Ranks())
    for distiller, chunks in ((chunked, 2), (whole, 1)):
        distiller.student.eval()  # batch norm would normalise with a chunk's own rows
        trained = Trained(distiller, find_task(settings), chunks)
        trained((images(), torch.arange(8) % 5))[0].backward()
    for one, other in zip(chunked.parameters(), whole.parameters(), strict=True):
        if one.requires_grad:
            assert_close(one.grad, other.grad, torch.float32)


def test_a_run_whose_teacher_misses_its_floor_leaves_nothing_behind(tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.min_accuracy: the teacher reaches 0\.\d+ "):
        train(run_settings(tmp_path, min_accuracy=1.0))
    assert not (tmp_path / "run").exists()
