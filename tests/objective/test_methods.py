"""The classical methods of logits and relations as terms: what they read, their epochs, and what a batch needs."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd import losses
from fastkd.losses import total_loss
from fastkd.trainer import (
    CRDConfig,
    CTKDConfig,
    DataConfig,
    DISTConfig,
    Distiller,
    DKDConfig,
    FeatureModel,
    InfoNCEConfig,
    IPWDConfig,
    LSKDConfig,
    MLKDConfig,
    ObjectiveConfig,
    RKDConfig,
    TensorImages,
    TrainConfig,
    train,
)
from fastkd.trainer.data.additions import Additions, stand_ins
from fastkd.trainer.data.loader import train_loader
from fastkd.trainer.data.strong import strong_views
from fastkd.trainer.models.features import measure_shapes
from fastkd.trainer.models.small import SmallConvNet
from fastkd.trainer.objective.objective import Objective
from fastkd.trainer.recipes.methods import SUMS, objective_of
from tests.helpers.trainer_runs import batch, convolutional, networks, one_thread, same, tiny_config  # noqa: F401
from tests.run.test_resume import assert_same_run, interrupted

CRD = CRDConfig(negatives=12)
METHODS = ("dkd", "dist", "lskd", "lskd-dkd", "wsld", "ctkd", "mlkd", "mlkd-paper", "ipwd",
           "cc", "cc-kernel", "rkd", "pkt", "sp", "crd", "crd+kd")  # fmt: skip
CPU = torch.device("cpu")


def build(config: ObjectiveConfig) -> Distiller:
    models = [FeatureModel(network.double()) for network in networks()]
    shapes = [measure_shapes(model, batch()[0].double(), taps=True) for model in models]
    return Distiller(models[0], models[1], Objective(config, *shapes)).double()


@pytest.fixture(scope="module")
def digits() -> tuple[TensorImages, TensorImages]:
    from fastkd.trainer import load_digits

    train_set, eval_set = load_digits(train_size=48)
    return train_set, TensorImages(eval_set.images[:16], eval_set.labels[:16])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_on_the_digits(method: str, digits: Any) -> None:
    torch.manual_seed(0)
    student, teacher = SmallConvNet(width=4), SmallConvNet(width=6)
    before = {name: x.clone() for name, x in student.named_parameters()}
    config = TrainConfig(
        data=DataConfig(batch_size=16),
        objective=dataclasses.replace(objective_of(method), crd=CRD),
        epochs=1,
        device="cpu",
        log_every=1,
        tensorboard=False,
        quiet=True,
        max_skipped=0,
    )
    result = train(config, student=student, teacher=teacher, train_data=digits[0], eval_data=digits[1])
    assert all(not torch.equal(x, before[name]) for name, x in student.named_parameters())
    trained = dict(result.distiller.objective.named_parameters())
    assert all(x.requires_grad and x.grad is not None and x.grad.abs().sum() > 0 for x in trained.values())
    named = {name.partition("/")[0] for name in result.history[0]}
    assert named >= set(config.objective.weights)


@pytest.mark.parametrize(
    "terms",
    [
        "dcd + dkd + 2*dist + lskd + wsld + ctkd + ipwd + 0.1*ce_strong + 0.9*mlkd",
        "dcd + 0.02*cc + 0.1*rkd + 100*pkt + 10*sp + 0.8*crd + info_nce",
    ],
    ids=["logits", "relations"],
)
def test_every_method_resumes_bit_for_bit(terms: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memories of CRD, the temperature of CTKD, and what is drawn for CRD and MLKD."""
    objective = ObjectiveConfig(terms=terms, crd=CRD, dkd=DKDConfig(warmup_epochs=2), ctkd=CTKDConfig(epochs=2))
    whole = tiny_config(tmp_path, save_every_steps=5, run_dir=str(tmp_path / "whole"), objective=objective)
    train(whole, **convolutional())
    cut = dataclasses.replace(whole, run_dir=str(tmp_path / "cut"))
    resumed = interrupted(monkeypatch, cut, 19, **convolutional())
    torch.rand(7)
    assert train(resumed, **convolutional()).resumed_from == 15
    assert_same_run(whole, resumed)


def test_each_term_is_its_module_on_what_the_models_give() -> None:
    sums = {"dkd": 2.0, "dist": 0.5, "lskd": 3.0, "wsld": 1.0, "ctkd": 0.9, "mlkd": 0.7, "ipwd": 1.0,
            "ce_strong": 0.1, "cc": 0.02, "rkd": 1.0, "pkt": 300.0, "sp": 30.0, "crd": 0.8,
            "info_nce": 0.6}  # fmt: skip
    config = ObjectiveConfig(
        terms="0*ce + " + " + ".join(f"{weight}*{name}" for name, weight in sums.items()),
        dkd=DKDConfig(beta=2.0, warmup_epochs=0),
        dist=DISTConfig(temperature=4.0),
        lskd=LSKDConfig(loss="dkd", alpha=0.5, warmup_epochs=4),
        mlkd=MLKDConfig(reading="paper", temperatures=(2.0,)),
        ipwd=IPWDConfig(ratio="class/kd"),
        crd=dataclasses.replace(CRD, samples=20),
        info_nce=InfoNCEConfig(temperature=0.2, embedding_dim=3),
    )
    distiller = build(config)
    distiller.begin_epoch(2)
    terms = distiller.objective.terms
    before = {name: x.clone() for name, x in terms["crd"].loss.named_buffers()}
    images, labels = batch()
    given = stand_ins(distiller.objective.additions, batch(8)[0].flip(0).double(), samples=20, negatives=12)
    total, named = distiller(images.double(), labels, additions=given)
    terms["crd"].loss.load_state_dict({**terms["crd"].loss.state_dict(), **before})
    s, t = distiller.student(images.double()), distiller.teacher(images.double())
    strong_s, strong_t = distiller.student(given["strong"]), distiller.teacher(given["strong"])
    logits, features = (s.logits, t.logits), (s.features, t.features)
    head = terms["ipwd"].class_head(s.features)
    query, key = (F.normalize(layer(x)) for layer, x in zip(terms["info_nce"].heads, features, strict=True))
    expected = {
        "dkd": losses.DKDLoss(beta=2.0)(*logits, labels),
        "dist": losses.DISTLoss(4.0)(*logits),
        "lskd": losses.LSKDLoss(losses.DKDLoss(2.0, 0.5))(*logits, labels),
        "wsld": losses.WSLDLoss()(*logits, labels),
        "ctkd": losses.CTKDLoss().double()(*logits, epoch=3),
        "mlkd": losses.MLKDLoss((2.0,), "paper")(*logits, strong_s.logits, strong_t.logits),
        "ipwd": {**losses.IPWDLoss(ratio="class/kd")(s.logits, head, t.logits, labels),
                 "class_head": F.cross_entropy(head, labels)},
        "ce_strong": {"ce_strong": F.cross_entropy(strong_s.logits, labels)},
        "cc": terms["cc"].loss(*features),
        "rkd": losses.RKDLoss()(*features),
        "pkt": losses.PKTLoss()(*features),
        "sp": losses.SPLoss()(s.taps.maps[-1], t.taps.maps[-1]),
        "crd": terms["crd"].loss(*features, given["index"], given["contrast_index"]),
        "info_nce": {"info_nce": F.cross_entropy(query @ key.T / 0.2, torch.arange(len(query)))},
    }  # fmt: skip
    flat = {part if part == name else f"{name}/{part}": x for name, parts in expected.items()
            for part, x in parts.items()}  # fmt: skip
    assert named.keys() == flat.keys()
    for name, value in flat.items():
        torch.testing.assert_close(named[name], value.detach())
    warm = {"lskd": 3 / 4}  # in the third of four epochs
    torch.testing.assert_close(total, sum(sums[n] * warm.get(n, 1) * total_loss(x) for n, x in expected.items()))


def test_the_weight_of_dkd_rises_and_the_temperature_of_ctkd_begins_to_ascend() -> None:
    config = ObjectiveConfig(terms="0*ce + dkd + ctkd", dkd=DKDConfig(warmup_epochs=4), ctkd=CTKDConfig(epochs=4))
    distiller = build(config)
    terms = distiller.objective.terms
    (images, labels), factors, gradients = batch(), [], []
    for epoch in (0, 1, 3, 9):
        distiller.begin_epoch(epoch)
        total, named = distiller(images.double(), labels)
        dkd = named["dkd/target"] + named["dkd/non_target"]
        factors.append(((total.detach() - named["ctkd"]) / dkd).item())
        gradients.append(torch.autograd.grad(total, terms["ctkd"].loss.theta)[0].item())
    assert factors == pytest.approx([0.25, 0.5, 1, 1])
    assert torch.tensor(gradients).div(gradients[-1]).tolist() == pytest.approx([0.1464466, 0.5, 1, 1])
    assert distiller.scalars()["ctkd/temperature"] == pytest.approx(15.62, abs=0.01)


@pytest.mark.parametrize("train_backbone", [True, False])
def test_the_class_head_of_ipwd_learns_from_cross_entropy_alone(train_backbone: bool) -> None:
    distiller = build(ObjectiveConfig(terms="0*ce + ipwd", ipwd=IPWDConfig(train_backbone=train_backbone)))
    images, labels = batch()
    student = distiller.student(images.double())
    values = distiller.objective.terms["ipwd"](student, distiller.teach(images.double()), labels)
    head = distiller.objective.terms["ipwd"].class_head.weight
    assert torch.autograd.grad(values["ipwd"], head, allow_unused=True, retain_graph=True) == (None,)
    below = torch.autograd.grad(values["class_head"], (head, student.features), allow_unused=True)
    assert below[0].abs().sum() > 0
    assert (below[1] is not None) == train_backbone


def test_with_its_own_rows_a_ranks_value_counts_as_a_mean() -> None:
    values = {}
    for group in ("global", "local"):
        distiller = build(ObjectiveConfig(terms="0*ce + rkd", rkd=RKDConfig(group=group)))
        images, labels = batch()
        values[group] = distiller(images.double(), labels, 1.5)[0].item()
        assert distiller.objective.columns_sent(4) == (20 if group == "global" else 0)
    assert values["local"] == pytest.approx(1.5 * values["global"])


class Numbered(TensorImages):
    """Draws from torch's generator, as augmentations do."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index] + 0.01 * torch.rand(1, 4, 4), self.labels[index]

    def __getitems__(self, indices: Any) -> Any:
        return [self[int(index)] for index in indices]


def loaded(data: Any, epoch: int = 1, start: int = 0, place: tuple[int, int] = (0, 1), workers: int = 0) -> Any:
    """All batches of an epoch as one: images, labels, additions."""
    config = DataConfig(batch_size=7, drop_last=False, num_workers=workers)
    adds = Additions(("index", "contrast_index", "strong"), data, negatives=9)
    loader, set_epoch = train_loader(data, config, 5, CPU, *place, adds)
    set_epoch(epoch, start)
    images, labels, added = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels), {name: torch.cat([x[name] for x in added]) for name in added[0]}


def test_what_is_added_to_a_batch_depends_on_seed_epoch_and_sample_alone() -> None:
    ramp = torch.arange(16.0).view(1, 4, 4) / 16
    images, labels = torch.arange(20.0).view(-1, 1, 1, 1) + ramp, torch.arange(20) % 4
    plain, drawn = TensorImages(images, labels), Numbered(images, labels)
    seen, classes, added = loaded(plain)
    index, contrast = added["index"], added["contrast_index"]
    assert torch.equal(seen[:, 0, 0, 0].long(), index)
    assert torch.equal(classes, index % 4)
    assert torch.equal(contrast[:, 0], index)
    assert (contrast[:, 1:] % 4 != classes[:, None]).all()
    assert all(len(row.unique()) == 10 for row in contrast)  # without replacement
    assert added["strong"].shape == seen.shape
    # Other epochs draw anew. Workers, ranks and a pass that begins within the epoch do not.
    again = loaded(plain, epoch=2)
    order, other = index.argsort(), again[2]["index"].argsort()
    assert not torch.equal(contrast[order], again[2]["contrast_index"][other])
    assert not torch.equal(added["strong"][order], again[2]["strong"][other])
    assert same(loaded(drawn), loaded(drawn, workers=1))
    assert same(loaded(plain, start=2), (seen[14:], classes[14:], {name: x[14:] for name, x in added.items()}))
    parts = [loaded(plain, place=(rank, 3))[2] for rank in range(3)]
    by_index = torch.cat([part["index"] for part in parts]).argsort()
    for name, value in added.items():
        assert torch.equal(torch.cat([part[name] for part in parts])[by_index], value[order])


def test_crd_contrasts_a_sample_without_a_label_with_all_others() -> None:
    labels = torch.tensor([0, 0, 1, -1, -1, 1])
    data = TensorImages(torch.zeros(6, 1, 2, 2), labels)
    additions = Additions(("contrast_index",), data, negatives=5)
    drawn = additions([3, 0], 0, 0, lambda: data.images)["contrast_index"]
    assert sorted(drawn[0].tolist()) == [0, 1, 2, 3, 4, 5]
    assert set(drawn[1, 1:].tolist()) <= {2, 3, 4, 5}
    assert torch.equal(data.labels, torch.tensor([0, 0, 1, -1, -1, 1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_strong_views_are_the_images_changed_by_their_seeds(channels: int) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(40, channels, 12, 12, generator=generator)
    mean, std = (0.4,) * channels, (0.2,) * channels
    images = (pixels - 0.4) / 0.2
    views = strong_views(images, (mean, std), range(40))
    assert views.shape == images.shape
    assert views.dtype == images.dtype
    back = views * 0.2 + 0.4
    assert -1e-6 < back.min() < back.max() < 1 + 1e-6
    changed = (back - pixels).abs().mean((1, 2, 3))
    assert (changed > 0.01).float().mean() > 0.8
    assert changed.unique().numel() == 40
    assert torch.equal(strong_views(images.flip(0), (mean, std), range(39, -1, -1)).flip(0), views)
    scaled = strong_views(7 * images - 3, None, range(40))  # without a normalisation, by each image's range
    assert (scaled.amin((1, 2, 3)) >= 7 * images.amin((1, 2, 3)) - 3.001).all()


def test_what_a_run_cannot_do_is_said_before_it_begins(tmp_path: Path) -> None:
    class Bare(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 8

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return torch.zeros(1, 4, 4), index % 4

    config = tiny_config(tmp_path, run_dir=None, objective=ObjectiveConfig(terms="crd", crd=CRD))
    with pytest.raises(TypeError, match=r"train_data: Bare has neither 'labels' nor 'targets'.*'crd' draws"):
        train(config, **convolutional(train_data=Bare(), eval_data=Bare()))
    with pytest.raises(ValueError, match=r"crd\.samples: got None"):
        build(config.objective)
    with pytest.raises(ValueError, match=r"additions: got \[\], expected \['strong'.*which the term 'mlkd' reads"):
        build(ObjectiveConfig(terms="mlkd"))(batch()[0].double(), batch()[1])
    with pytest.raises(ValueError, match=r"objective\.mlkd: got images of 2 x 4 x 4, expected one or three"):
        strong_views(torch.zeros(1, 2, 4, 4), None, [0])
    for term in ("dkd", "wsld", "ipwd", "mlkd", "crd", "ce_strong"):
        with pytest.raises(ValueError, match=f"data.mixup: got 0.2 with the term '{term}'"):
            TrainConfig(objective=ObjectiveConfig(terms=f"ce + {term}"), data=DataConfig(mixup=0.2))
    for wrong, message in (
        (lambda: DKDConfig(warmup_epochs=-1), r"dkd\.warmup_epochs: got -1"),
        (lambda: LSKDConfig(loss="dist"), r"lskd\.loss: got 'dist', expected one of \['dkd', 'kd'\]"),
        (lambda: LSKDConfig(temperature=0.0), r"lskd\.temperature: got 0\.0"),
        (lambda: CRDConfig(negatives=0), r"crd\.negatives: got 0"),
        (lambda: CRDConfig(mode="any"), r"crd\.mode: got 'any'"),
        (lambda: InfoNCEConfig(temperature=0.0), r"info_nce\.temperature: got 0\.0"),
        (lambda: InfoNCEConfig(embedding_dim=0), r"info_nce\.embedding_dim: got 0"),
        (
            lambda: build(ObjectiveConfig(terms="info_nce", info_nce=InfoNCEConfig(embedding_dim=None))),
            r"info_nce\.embedding_dim: got None, but the student's features have \d+ dimensions and the teacher's",
        ),
        (lambda: RKDConfig(group="own"), r"rkd\.group: got 'own', expected one of \['global', 'local'\]"),
        (lambda: MLKDConfig(temperatures=(4.0,)), r"mlkd\.temperatures: got 1, expected at least 4"),
    ):
        with pytest.raises(ValueError, match=message):
            wrong()


def test_the_own_terms_of_a_user_get_what_they_ask_for(tmp_path: Path) -> None:
    class Own(nn.Module):
        additions = ("index", "strong")
        seen: list[Tensor] = []  # noqa: RUF012

        def forward(self, student: Any, teacher: Any, labels: Tensor, index: Tensor, strong: Any) -> dict[str, Tensor]:
            self.seen.append(index)
            return {"own": (student.logits - strong.logits).square().mean()}

    own = Own()
    config = tiny_config(tmp_path, run_dir=None, epochs=1, objective=ObjectiveConfig(terms="own"))
    train(config, **convolutional(), terms={"own": own})
    assert sorted(torch.cat(own.seen).tolist()) == list(range(52))


def test_the_table_of_methods_has_the_papers_weights() -> None:
    known = {name for method in SUMS for name in objective_of(method).weights}
    assert known >= {"dkd", "dist", "lskd", "wsld", "ctkd", "mlkd", "ipwd", "cc", "rkd", "pkt", "sp", "crd", "fitnet"}
    assert objective_of("crd+kd").weights == {"ce": 1, "kd": 1, "crd": 0.8}
    assert objective_of("dist").dist.temperature == 4
    with pytest.raises(ValueError, match=r"method: got 'rdk', did you mean rkd"):
        objective_of("rdk")
