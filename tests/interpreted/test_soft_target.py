"""The soft_target kernels: every flag, rows of one tile, of several, and split over programs."""

import dataclasses
import itertools
import math

import pytest
import torch
from fastkd.kernels import launch, soft_target
from torch import Tensor

from bench import tune
from fastkd.backends import reference
from fastkd.backends.triton import soft_target as triton
from fastkd.functional.kd import ce_kd_terms
from tests.helpers.checks import assert_close, logits, terms_and_gradient, value_and_grads

# Wider than the widest interpreted tile (64), so that rows are streamed; at its edges; one class; not a power of two.
SHAPES = [(5, 1), (7, 33), (5, 64), (3, 65), (2, 1000)]


@pytest.fixture(params=[False, True], ids=["whole", "split"])
def split(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With the columns of a row over several programs, and without."""
    if request.param:
        monkeypatch.setattr(soft_target, "multiprocessors", lambda device: 16)
    return request.param


def check(
    student: Tensor, teacher: Tensor, labels: Tensor, upstream: tuple[float, float] = (1.0, 1.0), **options: object
) -> None:
    weight = options.pop("sample_weight", None)
    double = None if weight is None else weight.double()
    exact = terms_and_gradient(
        student.double(), teacher.double(), labels, upstream, backend="reference", sample_weight=double, **options
    )
    options["sample_weight"] = weight
    low = terms_and_gradient(student, teacher, labels, upstream, backend="reference", **options)
    actual = terms_and_gradient(student, teacher, labels, upstream, backend="triton", **options)
    for a, e, low_value, dtype in zip(actual, exact, low, (torch.float32, torch.float32, student.dtype), strict=True):
        assert_close(a, e, dtype, low_value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("n", "classes"), SHAPES)
@pytest.mark.usefixtures("poison")
def test_equals_the_definition(n: int, classes: int, dtype: torch.dtype, split: bool) -> None:
    check(*logits(n, classes, dtype=dtype), (0.7, -1.3), temperature=4.0, label_smoothing=0.1)


@pytest.mark.parametrize(
    ("temperature", "weighted"), [(1.0, True), (2.0, False), (3.0, True), (4.0, True), (4.0, False), (0.5, False)]
)
@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
@pytest.mark.usefixtures("poison")
def test_every_flag(temperature: float, label_smoothing: float, weighted: bool, split: bool) -> None:
    student, teacher, labels = logits(3, 150, dtype=torch.float32)
    weight = torch.tensor([0.0, 2.5, 1.0]) if weighted else None
    options = {"temperature": temperature, "label_smoothing": label_smoothing, "sample_weight": weight}
    check(student, teacher, labels, (2.0, 0.1), **options)


def test_the_tables_tiles_are_streamed_and_split() -> None:
    configs = [launch.launch_config("soft_target_forward", width=c, hardware="interpreter") for c in (7, 150)]
    assert configs[0].BLOCK_N >= 7
    assert configs[1].BLOCK_N < 150
    assert launch.column_splits(2, 3, 16) > 1


@pytest.mark.parametrize(("with_labels", "with_teacher"), [(True, False), (False, True)])
@pytest.mark.parametrize("classes", [20, 100])
@pytest.mark.usefixtures("poison")
def test_one_term_alone(with_labels: bool, with_teacher: bool, classes: int, split: bool) -> None:
    student, teacher, labels = logits(4, classes, dtype=torch.float32)
    ce, kd, stats = triton.soft_target_forward(
        student, teacher if with_teacher else None, labels if with_labels else None, None, 4.0, 0.1
    )
    one = torch.ones(())
    grad = triton.soft_target_backward(
        student, teacher if with_teacher else None, labels if with_labels else None, None, stats, one, one, 4.0, 0.1
    )

    def definition(x: Tensor) -> Tensor:
        rows = reference.cross_entropy(x, labels, 0.1) if with_labels else reference.soft_target(x, teacher, 4.0)
        return rows.sum()

    value, expected = value_and_grads(definition, student)
    assert_close(ce if with_labels else kd, value, torch.float32)
    assert (kd if with_labels else ce) == 0
    assert_close(grad, expected, torch.float32)
    assert stats.isfinite().all()


@pytest.mark.parametrize("offset", [1000.0, -3e4])
def test_a_common_offset_of_the_logits_costs_no_digits(offset: float, split: bool) -> None:
    student, teacher, labels = logits(3, 150, dtype=torch.float32)
    student = (student + offset).half().float()
    check(student, teacher - offset, labels, temperature=2.0, label_smoothing=0.1)


@pytest.mark.parametrize("scale", [0.0, 1e-20, 1e4, 1e30])
def test_constant_tiny_and_huge_logits_are_finite(scale: float, split: bool) -> None:
    student, teacher, labels = logits(3, 100, dtype=torch.float32)
    results = terms_and_gradient(scale * student, scale * teacher, labels, backend="triton")
    assert all(x.isfinite().all() for x in results)
    check(scale * student, scale * teacher, labels)


def test_rising_and_falling_rows_move_the_running_maximum() -> None:
    rising = torch.arange(300.0)
    student, teacher = torch.stack([rising, -rising, rising]), torch.stack([-rising, rising, rising / 2])
    check(student, teacher, torch.tensor([299, 7, 0]), temperature=8.0, label_smoothing=0.1)


def test_strided_rows_columns_and_labels() -> None:
    student, teacher, labels = logits(12, 90, dtype=torch.float32)
    expected = terms_and_gradient(student[::2, 3:80], teacher[::2, 3:80], labels[::2] % 77, backend="reference")
    many = (labels % 77)[::2].repeat_interleave(2)[::2]
    for x, y in ((student[::2, 3:80], teacher.T.contiguous().T[::2, 3:80]), (student.T.contiguous().T[::2, 3:80],) * 2):
        leaf = x.detach().requires_grad_()
        weight = torch.ones(12)[::2]
        ce, kd = ce_kd_terms(leaf, y, many, sample_weight=weight, backend="triton")
        (ce + kd).backward()
        same = y is x
        assert_close(ce, expected[0], torch.float32)
        assert_close(leaf.grad, terms_and_gradient(x, y, many, backend="reference")[2], torch.float32)
        assert_close(kd, torch.zeros(()) if same else expected[1], torch.float32, floor=1e-5 if not same else 1.0)


def test_rows_that_share_their_storage() -> None:
    student, teacher, labels = logits(1, 70, dtype=torch.float32)
    check(student.expand(5, 70), teacher.expand(5, 70), labels.expand(5))


@pytest.mark.parametrize("where", [0, 1], ids=["student", "teacher"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("column", "label_smoothing"), [(0, 0.0), (70, 0.1)])
def test_non_finite_logits_act_as_in_the_definition(
    column: int, bad: float, where: int, label_smoothing: float, split: bool
) -> None:
    inputs = logits(3, 150, dtype=torch.float32)
    inputs[where][1, column] = bad
    inputs[2][1] = 5
    options = {"label_smoothing": label_smoothing}
    expected = terms_and_gradient(*inputs, backend="reference", **options)
    actual = terms_and_gradient(*inputs, backend="triton", **options)
    for a, e in zip(actual[:2], expected[:2], strict=True):
        assert a.isfinite() == e.isfinite()
        if e.isfinite():
            assert_close(a, e, torch.float32)
    # The other rows' gradients are untouched.
    assert_close(actual[2][[0, 2]], expected[2][[0, 2]], torch.float32)


@pytest.mark.parametrize("kind", ["tiles", "row"])
def test_impossible_classes_keep_the_cross_entropy_finite(kind: str, split: bool) -> None:
    student, teacher, labels = logits(3, 200, dtype=torch.float32)
    labels[:] = 199
    student[:, : 130 if kind == "tiles" else 200] = -math.inf
    leaf = student.requires_grad_()
    ce, _ = ce_kd_terms(leaf, teacher, labels, backend="triton")
    expected, _ = ce_kd_terms(student, teacher, labels, backend="reference")
    assert ce.isfinite() == expected.isfinite() == (kind == "tiles")
    if kind == "tiles":
        assert_close(ce, expected, torch.float32)


@pytest.mark.parametrize("label", [-100, -1, 70, 1 << 40])
def test_a_label_that_is_none_makes_its_row_nan(label: int, split: bool) -> None:
    student, teacher, labels = logits(4, 70, dtype=torch.float32)
    labels[1] = label
    ce, kd, stats = triton.soft_target_forward(student, teacher, labels, None, 4.0, 0.0)
    assert ce.isnan()
    assert kd.isfinite()
    one = torch.ones(())
    grad = triton.soft_target_backward(student, teacher, labels, None, stats, one, one, 4.0, 0.0)
    assert grad.isnan().any(dim=1).tolist() == [False, True, False, False]


def test_alignment_divides_the_classes_and_the_row_strides() -> None:
    def alignment(student: Tensor, teacher: Tensor | None) -> int:
        kind = soft_target._kind(soft_target._given(student, teacher), None, None)
        return soft_target._constants(*kind, "forward", 4.0, 0.0)[1]["ALIGN"]

    half = torch.empty(4, 1024, dtype=torch.bfloat16)
    assert alignment(half[:, :1000], None) == 8
    assert alignment(half[:, :1004], None) == 4
    assert alignment(half[:, :1001], half) == 1
    assert alignment(torch.empty(4, 1000), torch.empty(4, 1002)[:, :1000]) == 2


def test_bfloat16_and_every_tile_of_the_gpu_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    for kernel, classes in itertools.product(("forward", "backward"), (9, 60, 300)):
        config = launch.launch_config(f"soft_target_{kernel}", width=classes, hardware="sm_90")
        assert classes <= config.BLOCK_N
    monkeypatch.setattr(soft_target, "hardware_of", lambda device: "sm_90")
    for classes in (9, 60, 300):
        student, teacher, labels = logits(5, classes, dtype=torch.bfloat16)
        ce, kd, stats = triton.soft_target_forward(student, teacher, labels, None, 4.0, 0.1)
        one = torch.ones(())
        grad = triton.soft_target_backward(student, teacher, labels, None, stats, one, one, 4.0, 0.1)
        exact = terms_and_gradient(student.double(), teacher.double(), labels, label_smoothing=0.1)
        assert_close(ce / 5, exact[0], torch.float32)
        assert_close(kd / 5, exact[1], torch.float32)
        assert_close(grad / 5, exact[2], torch.bfloat16)


def test_the_tuner_times_the_launchers_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tune, "LOGITS", 64)
    monkeypatch.setattr(tune, "WIDEST_CLASSES", 32)
    work = [entry for entry, _ in tune.entries("interpreter", (*tune.DUAL, *tune.SOFT)) if entry.width < 128]
    assert {entry.kernel for entry in work} == {*tune.DUAL, *tune.SOFT}
    for entry in work:
        single = dataclasses.replace(entry, key=entry.key._replace(itemsize=4))  # the interpreter has no bfloat16
        result = tune.step_of(single, 20, torch.device("cpu"))()
        assert all(x.isfinite().all() for x in (result if isinstance(result, tuple) else (result,)))
