"""The random cases of ``make fuzz``: what a case is made of, and how large the terms of its results are."""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastkd import (
    CKDLoss,
    DCDLoss,
    InfoNCELoss,
    KDLoss,
    MSDCRDLoss,
    PCKDLoss,
    SupConLoss,
    ckd_loss,
    dcd_loss,
    kd_loss,
    multiscale_pool,
)
from fastkd.functional.kd import ce_kd_terms, soft_target_rows
from fastkd.functional.preview import preview_weight
from fastkd.losses import CTKDLoss, DKDLoss, LSKDLoss, WSLDLoss
from fastkd.numerics import accumulation_dtype
from tests.helpers.checks import CONSISTENCIES, embeddings, logits, value_and_grads
from tests.helpers.contract import OPERATIONS, Case, Size
from tests.helpers.pool_cases import feature_map

ROWS = ("plain", "nearly equal", "zero rows", "long", "short", "student is teacher")


@dataclass(frozen=True)
class Plan:
    """Everything that a case is made of."""

    n: int
    N: int
    D: int
    seed: int
    dtype: torch.dtype
    backend: str
    scale: float
    rows: str
    is_weighted: bool
    layout: str
    threads: int
    limits: tuple[float | None, ...]
    option: int

    def size(self) -> Size:
        weight = torch.rand(self.n, generator=self.generator()).mul(2).sub(0.3).clamp_min(0)
        noise = 1e-4 if self.rows == "nearly equal" else 1.4
        return Size(
            n=self.n, N=self.N, D=self.D, dtype=self.dtype, scale=self.scale, seed=self.seed, noise=noise,
            weight=weight if self.is_weighted else None,
        )  # fmt: skip

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)


def similarity_case(name: str, plan: Plan) -> tuple[Case, list[float]]:
    """A case of the table of operations, or of ``dcd_loss`` with other options, and what its results are made of."""
    size = plan.size()
    if name.startswith(("raw", "self")) or not name.startswith("dcd"):
        case = OPERATIONS[name](size)
    else:
        options = {"alpha": (0.0, 0.5, 3.0)[plan.option % 3], "consistency": CONSISTENCIES[plan.option % 2]}

        def compute(backend: str, first: Tensor, second: Tensor, scale: Tensor) -> Tensor:
            return dcd_loss(first, second, scale, sample_weight=size.weight, backend=backend, **options)

        rows = embeddings(size.n, size.D, size.seed, size.dtype, size.noise)
        case = Case(compute, (*rows, size.logit_scale), largest=size.scale, is_unit=True)
    *rows, scale = case.inputs
    rows = [changed(x, plan, rows[-1], can_be_any_length=case.is_unit) for x in rows]
    lengths = [x.double().norm(dim=1) for x in rows]
    longest = [1.0 if case.is_unit else x.max().item() for x in lengths]
    if not case.is_unit:  # a scale at which the logits are as large as the plan says
        scale = (scale.double() / max(longest[0] * longest[-1], 1e-3)).to(scale.dtype)
    largest = scale.item() * longest[0] * longest[-1]
    weight = 1.0 if size.weight is None else max(1e-3, size.weight.max().item())
    alpha = 4.0 if name.startswith("dcd") else 1.0
    of_rows = [
        scale.item() * other / (x[x > 0].min().item() if case.is_unit and (x > 0).any() else 1.0)
        for x, other in zip(lengths, reversed(longest), strict=True)
    ]
    natural = [alpha * weight * (1 + largest) * x for x in (1.0, *of_rows, largest / scale.item())]
    return dataclasses.replace(case, inputs=(*rows, scale)), natural


def changed(x: Tensor, plan: Plan, teacher: Tensor, *, can_be_any_length: bool) -> Tensor:
    """Rows as hard as the plan says."""
    if plan.rows == "student is teacher":
        return teacher.clone() if teacher.shape == x.shape else x
    if plan.rows == "nearly equal":
        return (x[:1].double() + 1e-3 * x.double()).to(x.dtype)
    if plan.rows == "zero rows":
        return x * (torch.arange(len(x)) % 3 != 0)[:, None]
    exponent = 3 if x.dtype == torch.float16 or not can_be_any_length else 12
    return x * 10.0 ** {"long": min(exponent, 2 if x.dtype == torch.float16 else 12), "short": -exponent}.get(
        plan.rows, 0
    )


def logits_case(name: str, plan: Plan) -> tuple[Case, list[float]]:
    """KD, and cross-entropy with it, at a random temperature; CKD."""
    size = plan.size()
    student, teacher, labels = logits(size.n, size.D, size.seed, size.dtype)
    size_of_logits = {"long": 100.0, "short": 1e-3}.get(plan.rows, 1.0)
    student, teacher = (x * size_of_logits for x in (student, teacher))
    if plan.rows == "student is teacher":
        student = teacher.clone()
    weight, temperature = size.weight, (0.5, 1.0, 4.0, 20.0)[plan.option % 4]
    smoothing = (0.0, 0.1, 1.0)[plan.option % 3]

    def compute(backend: str, student: Tensor, teacher: Tensor) -> Tensor:
        options = {"sample_weight": weight, "backend": backend}
        if name == "kd":
            return kd_loss(student, teacher, temperature, **options)
        if name == "ckd":
            return ckd_loss(student, teacher, 1 / plan.scale, **options)
        ce, kd = ce_kd_terms(student, teacher, labels, temperature, label_smoothing=smoothing, **options)
        return 0.3 * ce - 2.0 * kd

    most = max(x.abs().max().item() for x in (student.double(), teacher.double()))
    heaviest = 1.0 if weight is None else max(1e-3, weight.max().item())
    if name == "ckd":
        scale, shortest = plan.scale, student.double().norm(dim=1).min().item()
        natural = [heaviest * (1 + scale), heaviest * (1 + scale) * scale / max(shortest, 1e-9), 0.0]
    else:
        error = heaviest * (1 + most / temperature)  # of a logarithm of a probability
        natural = [2 * temperature**2 * error + 0.3 * (1 + most), 2 * temperature * error + 0.3 * (1 + most), 0.0]
    return Case(compute, (student, teacher), (labels,), frozen=(1,), is_unit=name == "ckd"), natural


def rows_case(name: str, plan: Plan) -> tuple[Case, list[float]]:
    """All that ``soft_target_rows`` gives, with random options, and the gradients of logits and temperatures."""
    generator, standardize = plan.generator(), plan.option % 3 == 0
    student, teacher, labels = logits(plan.n, plan.D + 2, plan.seed, plan.dtype)
    size_of_logits = {"long": 30.0, "short": 1e-2}.get(plan.rows, 1.0)
    student, teacher = (x * size_of_logits for x in (student, teacher))
    temperature = 0.5 + 5 * torch.rand(() if plan.option % 2 else (plan.n,), generator=generator, dtype=torch.float64)
    weights = torch.rand(4, plan.n, generator=generator, dtype=torch.float64)
    fixed = [1.0, 3.0, 4.0][: 1 + plan.option % 3]

    def compute(backend: str, student: Tensor, teacher: Tensor, temperature: Tensor) -> Tensor:
        options = {"labels": labels, "exclude_label": plan.is_weighted, "standardize": standardize, "backend": backend}
        total = student.new_zeros((), dtype=accumulation_dtype(student.dtype))
        for given in (fixed, temperature.to(total.dtype)):
            parts = soft_target_rows(student, teacher, given, **options)
            total = total + sum((w.to(total.dtype) * part).sum() for w, part in zip(weights, parts, strict=True))
        return total / plan.n

    given = student, teacher, temperature.to(plan.dtype)
    return Case(compute, given), sensitivities(compute, given, generator)


def pool_case(name: str, plan: Plan) -> tuple[Case, list[float]]:
    generator = plan.generator()

    def draw(most: int) -> int:
        return int(torch.randint(1, most + 1, (1,), generator=generator))

    height, width = 1 + plan.n % 30, 1 + plan.N % 30
    windows = [(draw(height), draw(width)) for _ in range(1 + plan.option % 3)]
    strides = [(draw(6), draw(6)) for _ in windows]
    normalize = name == "pool of unit rows"
    x = feature_map(1 + plan.option % 4, 1 + plan.D % 40, height, width, dtype=plan.dtype, seed=plan.seed)
    x = x * {"long": 100.0, "short": 1e-3}.get(plan.rows, 1.0) + {"nearly equal": 3.0}.get(plan.rows, 0.0)

    def compute(backend: str, features: Tensor) -> Tensor:
        dtype = accumulation_dtype(features.dtype)
        out = multiscale_pool(features, windows, strides, normalize=normalize, dtype=dtype, backend=backend)
        return (out * torch.arange(out.numel()).view(out.shape).cos()).sum() / out[..., 0].numel()

    most = x.double().abs().max().item()
    rows = multiscale_pool(x.double(), windows, strides, backend="reference")
    lengths = rows.norm(dim=2)
    nearest = lengths.min().clamp_min(1e-9).item()
    error = 1 + most / nearest * x.shape[1] ** 0.5 if normalize else 1.0
    natural = [error * x.shape[1] * (1.0 if normalize else most), error * (1 / nearest if normalize else 1.0)]
    return Case(compute, (x,)), natural


def module_case(name: str, plan: Plan) -> tuple[Case, list[float]]:
    """The weighted sum of a module's terms, of its inputs and of its parameters."""
    B, width, classes = min(plan.n, 24), 1 + plan.D % 12, 2 + plan.N % 9
    generator = plan.generator()

    def rows(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(classes, (B,), generator=generator)
    temperature = (0.1, 0.5, 4.0)[plan.option % 3]
    makers: dict[str, Callable[[str], nn.Module]] = {
        "DCDLoss": lambda backend: DCDLoss(width, 5, 4, logit_bias=plan.option % 2 == 0, backend=backend),
        "CKDLoss": lambda backend: CKDLoss(temperature, backend=backend),
        "KDLoss": lambda backend: KDLoss(temperature, backend=backend),
        "DKDLoss": lambda backend: DKDLoss(temperature, backend=backend),
        "WSLDLoss": lambda backend: WSLDLoss(temperature, backend=backend),
        "CTKDLoss": lambda backend: CTKDLoss(backend=backend),
        "LSKDLoss": lambda backend: LSKDLoss(
            DKDLoss(temperature, backend=backend) if plan.option % 2 else KDLoss(temperature, backend=backend)
        ),
        "InfoNCELoss": lambda backend: InfoNCELoss(temperature, backend=backend),
        "SupConLoss": lambda backend: SupConLoss(temperature, exclude_self=plan.option % 2 == 0, backend=backend),
        "PCKDLoss": lambda backend: PCKDLoss(width, 5, temperature=temperature, hidden_dim=6, backend=backend),
        "MSDCRDLoss": lambda backend: MSDCRDLoss(
            width, 5, temperature=temperature, positives=("index", "label")[plan.option % 2], backend=backend
        ),
    }
    if name == "DCDLoss":
        inputs = [rows(B, width), rows(B, 5)]
    elif name == "PCKDLoss":
        inputs = [
            rows(B, width),
            rows(B, 5),
            rows(B, classes),
            rows(B, classes),
            rows(classes, width),
            rows(classes, 5),
        ]
    elif name == "MSDCRDLoss":
        side, B = 1 + plan.N % 5, min(B, 6)
        inputs = [rows(B, width, side, side), rows(B, 5, side + plan.option % 2, side)]
        chosen = rows(10_000, classes)
    else:
        inputs = [rows(B, classes), rows(B, classes)]
    made = makers[name]("reference")
    names = [key for key, _ in made.named_parameters()]
    with torch.no_grad():
        values = [(rows(*x.shape) / max(1, x.shape[-1]) ** 0.5) if x.ndim else x.double() for x in made.parameters()]

    def compute(backend: str, *given: Tensor) -> Tensor:
        module, data = makers[name](backend), given[: len(inputs)]
        parameters = dict(zip(names, given[len(inputs) :], strict=True))
        if name == "PCKDLoss":
            arguments = (*data[:4], labels, (data[4], None), (data[5], None), 3)
        elif name == "MSDCRDLoss":  # labels that no rounding changes
            arguments = (*data, lambda samples: chosen[: len(samples)].to(samples.dtype))
        else:
            more = {
                "SupConLoss": (labels,),
                "CTKDLoss": (plan.option % 12,),
                "DKDLoss": (labels,),
                "WSLDLoss": (labels,),
            }
            more["LSKDLoss"] = (labels,) if plan.option % 2 else ()
            arguments = (*data[: 1 if name == "SupConLoss" else 2], *more.get(name, ()))
        terms = torch.func.functional_call(module, parameters, arguments)
        return sum(weight * term for weight, term in zip((1.0, 0.7, 1.3, 0.4), terms.values(), strict=False))

    given = tuple(x.to(plan.dtype) for x in (*inputs, *values))
    # The teacher's side gets no gradient.
    return Case(compute, given), sensitivities(compute, given, generator)


def sensitivities(compute: Callable[..., Tensor], given: tuple[Tensor, ...], generator: torch.Generator) -> list[float]:
    """How much the loss and each gradient change for relative changes of the inputs, in float64.

    At least 1, the size of the terms: where they cancel exactly, no change shows it.
    """
    step = 1e-5
    exact = [x.double() for x in given]
    moved = [x * (1 + step * torch.randn(x.shape, generator=generator, dtype=torch.float64)) for x in exact]
    before, after = (value_and_grads(lambda *x: compute("reference", *x), *x) for x in (exact, moved))
    return [(a - b).norm().item() / step + b.norm().item() + 1 for a, b in zip(after, before, strict=True)]


def preview_case(name: str, plan: Plan) -> tuple[Case, list[float]]:
    ce = torch.rand(plan.n, generator=plan.generator(), dtype=torch.float64) * (plan.option % 7)
    weights = torch.arange(plan.n).double().cos()

    def compute(backend: str, ce: Tensor) -> Tensor:
        return (preview_weight(ce, 1.0 + plan.option / 30) * weights).sum() + 0 * ce.sum()

    return Case(compute, (ce.to(plan.dtype),)), [math.sqrt(plan.n), 1.0]


MODULES = (
    *("DCDLoss", "CKDLoss", "KDLoss", "InfoNCELoss", "SupConLoss", "PCKDLoss", "MSDCRDLoss"),
    *("DKDLoss", "WSLDLoss", "CTKDLoss", "LSKDLoss"),
)
CASES: dict[str, Callable[[str, Plan], tuple[Case, list[float]]]] = {
    **{
        name: rows_case
        if name == "rows"
        else logits_case
        if name in ("kd", "ce and kd", "ckd")
        else pool_case
        if name.startswith("pool")
        else similarity_case
        for name in OPERATIONS
    },
    "preview": preview_case,
    **dict.fromkeys(MODULES, module_case),
}
