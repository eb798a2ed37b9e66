"""What single classical losses promise beside their formulas: traps of their public code, options, state."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import kd_loss
from fastkd.losses import (
    ATLoss,
    CCLoss,
    CRDIndices,
    CRDLoss,
    CTKDLoss,
    DISTLoss,
    DKDLoss,
    FSPLoss,
    IPWDLoss,
    LSKDLoss,
    MLKDLoss,
    NSTLoss,
    OFDLoss,
    PKTLoss,
    RKDLoss,
    SimKDLoss,
    SPLoss,
    activation_margin,
    total_loss,
)
from tests.helpers.checks import assert_close, value_and_grads


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


ALIKE = {
    "at": lambda x: ATLoss()([x], [x]),
    "at paper": lambda x: ATLoss(reading="paper")([x], [x]),
    "cc raw": lambda x: CCLoss(6, 6, None, "kernel-raw")(x[:, :, 0, 0], x[:, :, 0, 0]),
    "ctkd": lambda x: CTKDLoss()(x[:, :, 0, 0], x[:, :, 0, 0], 3),
    "dkd": lambda x: DKDLoss()(x[:, :, 0, 0], x[:, :, 0, 0], torch.arange(4)),
    "fsp": lambda x: FSPLoss()([x, x], [x, x]),
    "nst": lambda x: NSTLoss()([x], [x]),
    "rkd": lambda x: RKDLoss()(x[:, :, 0, 0], x[:, :, 0, 0]),
    "sp": lambda x: SPLoss()(x, x),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(name: str) -> None:
    for found in value_and_grads(lambda x: total_loss(ALIKE[name](x)), rows(4, 6, 3, 3)):
        assert found.abs().max() < 1e-12


# -- logits


def test_the_parts_of_dkd_are_those_of_kd() -> None:
    student, teacher, labels = rows(6, 5), rows(6, 5, seed=1), torch.arange(6) % 5
    for i in range(6):
        row = slice(i, i + 1)
        terms = DKDLoss(2.0, alpha=1, beta=1)(student[row], teacher[row], labels[row])
        others = 1 - F.softmax(teacher[i] / 2, dim=0)[labels[i]]
        assert_close(terms["target"] + others * terms["non_target"],
                     kd_loss(student[row], teacher[row], 2.0), torch.float64)  # fmt: skip


@pytest.mark.parametrize("margin", [100.0, 120.0, 1000.0])
def test_dkd_is_finite_where_a_network_is_certain(margin: float) -> None:
    student, teacher = torch.zeros(2, 4), rows(2, 4).float()
    student[0, 1], student[1, 2] = margin, margin  # the label of row 0, another class in row 1
    labels = torch.tensor([1, 0])

    def loss(s: Tensor) -> Tensor:
        return total_loss(DKDLoss(1.0)(s, teacher.to(s.dtype), labels))

    for narrow, wide in zip(value_and_grads(loss, student), value_and_grads(loss, student.double()), strict=True):
        assert narrow.isfinite().all()
        assert_close(narrow, wide, torch.float32)


def test_ctkd_climbs_in_temperature_while_the_student_descends() -> None:
    student, teacher = rows(6, 5), rows(6, 5, seed=1)
    grads = {}
    for epoch in (0, 5, 10, 99):
        ctkd = CTKDLoss(epochs=10).double()
        leaf = student.clone().requires_grad_()
        ctkd(leaf, teacher, epoch)["ctkd"].backward()
        grads[epoch] = ctkd.theta.grad.item()
        T = ctkd.temperature().item()
        expected = value_and_grads(lambda s, T=T: kd_loss(s, teacher, T), student)[1]
        assert_close(leaf.grad, expected, torch.float64)
    ctkd = CTKDLoss().double()
    scaled = student / ctkd.temperature(), teacher / ctkd.temperature()
    divergence = F.kl_div(F.log_softmax(scaled[0], 1), F.softmax(scaled[1], 1), reduction="batchmean")
    (ctkd.temperature() ** 2 * divergence).backward()
    assert grads[0] == 0
    assert grads[99] == grads[10] == pytest.approx(-ctkd.theta.grad.item())
    assert grads[5] == pytest.approx(-ctkd.theta.grad.item() / 2)


def test_lskd_ignores_shift_and_scale_of_both_networks() -> None:
    student, teacher = rows(6, 5), rows(6, 5, seed=1)
    expected = LSKDLoss()(student, teacher)["kd"]
    assert_close(LSKDLoss()(3 * student + 7, 0.5 * teacher - 2)["kd"], expected, torch.float32)
    assert expected > 0.01


def test_dist_ignores_the_scale_of_probabilities_and_weighs_its_parts() -> None:
    student, teacher = rows(6, 5), rows(6, 5, seed=1)
    once, twice = DISTLoss(2.0)(student, teacher), DISTLoss(2.0, beta=2, gamma=3)(student, teacher)
    assert_close(twice["inter"], 2 * once["inter"], torch.float64)
    assert_close(twice["intra"], 3 * once["intra"], torch.float64)
    assert_close(total_loss(DISTLoss()(teacher, teacher)), torch.zeros((), dtype=torch.float64), torch.float32, floor=1)


def test_the_papers_reading_of_mlkd_is_the_sum_over_its_views_and_temperatures() -> None:
    weak, strong = (rows(6, 5), rows(6, 5, seed=1)), (rows(6, 5, seed=2), rows(6, 5, seed=3))
    one = MLKDLoss([2.0, 4.0], "paper")(*weak, *strong)
    parts = [MLKDLoss([T], "paper")(*view) for T in (2.0, 4.0) for view in (weak, strong)]
    for name, term in one.items():
        assert_close(term, sum(part[name] for part in parts), torch.float64)
    assert_close(parts[0]["instance"], kd_loss(*weak, 2.0), torch.float64)


def test_ipwd_weighs_by_either_ratio() -> None:
    student, head, teacher, labels = rows(6, 5), rows(6, 5, seed=1), rows(6, 5, seed=2), torch.arange(6) % 5
    ce, ce_head = (F.cross_entropy((z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True), labels, reduction="none")
                   for z in (student, head))  # fmt: skip
    for ratio, weight in (("kd/class", 1 + ce / ce_head), ("class/kd", 1 + ce_head / ce)):
        expected = kd_loss(student, teacher, sample_weight=weight / weight.mean())
        assert_close(IPWDLoss(ratio=ratio)(student, head, teacher, labels)["ipwd"], expected, torch.float64)


# -- relations


def test_rkd_does_not_depend_on_the_mean_of_the_features() -> None:
    student, teacher = rows(8, 16), rows(8, 16, seed=1)
    expected = value_and_grads(lambda s: total_loss(RKDLoss()(s, teacher)), student)
    shifted = (0.1 * student + 10).float()
    actual = total_loss(RKDLoss()(shifted, teacher.float()))
    exact = total_loss(RKDLoss()(shifted.double(), teacher.float().double()))
    assert_close(actual, exact, torch.float32)
    assert_close(actual, expected[0], torch.bfloat16)


def test_rkd_has_digits_for_distances_within_clusters() -> None:
    student = (rows(2, 16).repeat_interleave(4, dim=0) + 1e-2 * rows(8, 16, seed=1)).float()
    loss, teacher = RKDLoss(1, 0), rows(8, 16, seed=2).float()
    exact = value_and_grads(lambda s: loss(s, teacher.double())["distance"], student.double())
    for actual, expected in zip(value_and_grads(lambda s: loss(s, teacher)["distance"], student), exact, strict=True):
        assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("distance", [0.0, 1e-9])
def test_rkd_has_small_gradients_where_rows_nearly_agree(distance: float) -> None:
    student = rows(6, 4)
    student[1] = student[0] + distance
    _, grad = value_and_grads(lambda s: total_loss(RKDLoss()(s, rows(6, 5, seed=1))), student)
    assert grad.isfinite().all()
    assert grad.abs().max() < 1e3


def test_the_sum_of_pkt_is_its_mean_times_the_pairs() -> None:
    student, teacher = rows(6, 4), rows(6, 5, seed=1)
    assert_close(PKTLoss("sum")(student, teacher)["pkt"], 36 * PKTLoss()(student, teacher)["pkt"], torch.float64)


def crd_call(seed: int, index: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    contrast = torch.randint(12, (len(index), 4), generator=torch.Generator().manual_seed(seed))
    contrast[:, 0] = torch.tensor(index)
    return rows(len(index), 3, seed=seed), rows(len(index), 5, seed=seed + 1), torch.tensor(index), contrast


def test_crd_goes_on_from_its_state_dict() -> None:
    torch.manual_seed(0)
    one, other = (CRDLoss(3, 5, samples=12, negatives=3, embedding_dim=4).double() for _ in range(2))
    one(*crd_call(0, [1, 2, 3]))
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert (one.normalizers > 0).all()
    for name, term in one(*crd_call(5, [3, 4])).items():
        assert torch.equal(term, other(*crd_call(5, [3, 4]))[name]) if name == "student" else term > 0
    assert torch.equal(one.memory_teacher, other.memory_teacher)


def test_crd_remembers_in_training_mode_alone_and_the_last_of_equal_indices() -> None:
    torch.manual_seed(0)
    crd = CRDLoss(3, 5, samples=12, negatives=3, embedding_dim=4).double().eval()
    before = crd.memory_student.clone()
    crd(*crd_call(0, [7, 7, 2]))
    assert torch.equal(crd.memory_student, before)
    assert not crd.normalizers.any()
    student, *others = crd_call(0, [7, 7, 2])
    crd.train()(student, *others)
    row = F.normalize(crd.embed_student(student[1:2]))
    assert_close(crd.memory_student[7], F.normalize(0.5 * before[7:8] + 0.5 * row)[0], torch.float64)
    assert torch.equal(crd.memory_student[3], before[3])


def test_crd_of_the_paper_has_no_normaliser() -> None:
    torch.manual_seed(0)
    options = {"samples": 12, "negatives": 3, "embedding_dim": 4, "temperature": 0.5}
    crd = CRDLoss(3, 5, **options, reading="paper").double()
    student, teacher, index, contrast = crd_call(0, [1, 2])
    u, memory = F.normalize(crd.embed_student(student)), crd.memory_teacher.clone()
    p = ((u[:, None] * memory[contrast]).sum(dim=2) / 0.5).exp()
    expected = -((p[:, :1] / (p[:, :1] + 0.25)).log().sum(1) + (0.25 / (p[:, 1:] + 0.25)).log().sum(1)).mean()
    assert_close(crd(student, teacher, index, contrast)["student"], expected, torch.float32)


def test_crd_draws_by_itself_without_indices() -> None:
    torch.manual_seed(0)
    terms = CRDLoss(3, 5, samples=12, negatives=3)(torch.randn(4, 3), torch.randn(4, 5), torch.arange(4))
    assert total_loss(terms).isfinite()


@pytest.mark.parametrize("negatives", [3, 50])
def test_crd_indices_are_of_other_classes(negatives: int) -> None:
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0])
    generator = torch.Generator().manual_seed(0)
    exact, relax = CRDIndices(labels, negatives), CRDIndices(labels, negatives, "relax")
    positives = set()
    for index, label in enumerate(labels):
        drawn = exact(index, generator)
        assert drawn[0] == index
        assert len(drawn) == negatives + 1
        assert (labels[drawn[1:]] != label).all()
        assert negatives == 50 or len(drawn[1:].unique()) == negatives
        if negatives == 50:
            assert set(drawn[1:].tolist()) == set((labels != label).nonzero()[:, 0].tolist())
        positives |= {(int(label), int(relax(index, generator)[0])) for _ in range(20)}
    assert positives == {(int(label), index) for index, label in enumerate(labels)}


# -- maps


@pytest.mark.parametrize("shape", [(3, 2), (9, 5)], ids=["by channels", "by positions"])
def test_nst_by_the_smaller_matrices_is_its_definition(shape: tuple[int, int]) -> None:
    channels, side = (3, 5) if shape[0] == 3 else (12, 2)
    student, teacher = rows(2, channels, side, side), rows(2, channels + 1, side, side, seed=1)
    S, T = (F.normalize(x.flatten(2), dim=2) for x in (student, teacher))
    k = [(a[:, :, None] * b[:, None]).sum(dim=3).square().mean() for a, b in ((T, T), (S, S), (S, T))]
    assert_close(NSTLoss()([student], [teacher])["nst"], k[0] + k[1] - 2 * k[2], torch.float64)


def test_the_margin_is_the_mean_of_the_negative_half() -> None:
    weight, bias = torch.tensor([1.5, -0.5, 0.0, 0.0, 0.1]), torch.tensor([0.3, 0.2, -2.0, 2.0, 1.0])
    margin = activation_margin(weight, bias)
    samples = rows(1_000_000)
    for channel in range(2):
        x = weight[channel].abs() * samples + bias[channel]
        assert margin[channel].item() == pytest.approx(x[x < 0].mean().item(), abs=0.005)
    assert margin[2:].tolist() == pytest.approx([-2.0, 0.0, -0.3])


def test_ofd_ignores_what_the_relu_hides() -> None:
    ofd = OFDLoss([2], [torch.tensor([-0.5, -0.5])])
    teacher = torch.full((2, 2, 2, 2), -3.0)  # below the margin: the target is the margin
    with torch.no_grad():
        ofd.connectors[0] = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1, bias=False), torch.nn.Identity())
        ofd.connectors[0][0].weight.copy_(torch.eye(2)[:, :, None, None])
    for value, expected in ((-2.0, 0.0), (1.5, 1e-3 / 2 * 16 * 2.0**2)):
        student = torch.full((2, 2, 2, 2), value)
        assert ofd([student], [teacher])["ofd"].item() == pytest.approx(expected)


def test_simkd_predicts_with_the_teachers_classifier() -> None:
    torch.manual_seed(0)
    simkd, classifier = SimKDLoss(3, 4).eval(), torch.nn.Linear(4, 5)
    student = torch.randn(2, 3, 6, 6)
    expected = classifier(simkd.projector(F.adaptive_avg_pool2d(student, 3)).mean(dim=(2, 3)))
    assert torch.equal(simkd.logits(student, classifier, teacher_height=3), expected)
    assert not torch.equal(simkd.logits(student, classifier), expected)
