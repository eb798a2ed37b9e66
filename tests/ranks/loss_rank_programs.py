"""What the multi-process tests of the loss modules run on every rank, and what one process computes instead."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.measuring.traffic import CountedBytes
from fastkd import CKDLoss, DCDLoss, MSDCRDLoss, PCKDLoss, preview_weight
from tests.ranks.rank_programs import part

CLASSES, D_S, D_T = 4, 5, 6


class Student(nn.Module):
    """A loss module with a student's classifier and an adapter of its inputs, as DistributedDataParallel holds them."""

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.name = name
        width = D_S if options.pop("same", False) else D_T
        self.classifier = nn.Linear(D_S, CLASSES)
        self.body = nn.Linear(D_S, D_S)
        self.loss: nn.Module
        if name == "ckd":
            self.loss = CKDLoss(0.5, **options)
        elif name == "dcd":
            self.loss = DCDLoss(D_S, width, **options)
        elif name == "pckd":
            self.loss = PCKDLoss(D_S, width, hidden_dim=7, **options)
        else:
            self.loss = MSDCRDLoss(D_S, width, **options)
        teacher = nn.Linear(width, CLASSES).double()
        self.teacher = (teacher.weight.detach(), teacher.bias.detach())  # in no state dict, without gradient
        self.double()

    def forward(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        x, t = inputs["student"], inputs["teacher"]
        teacher = tuple(None if y is None else y.to(t.device) for y in self.teacher)
        if self.name == "msdcrd":
            student_map = self.body(x).unflatten(1, (7, 7)).permute(0, 3, 1, 2)
            return self.loss(student_map, t, teacher)
        x, t = self.body(x.mean(dim=1)), t.mean(dim=(2, 3))
        if self.name == "dcd":
            return self.loss(x, t)
        logits, teacher_logits = 4 * self.classifier(x), nn.functional.linear(t, *teacher)
        if self.name == "ckd":
            return self.loss(logits, teacher_logits)
        return self.loss(x, t, logits, teacher_logits, inputs["labels"], self.classifier, teacher, 3)


def batch(total: int, same: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(total)
    student = torch.randn(total, 49, D_S, generator=generator, dtype=torch.float64)
    teacher = torch.randn(total, D_S if same else D_T, 7, 7, generator=generator, dtype=torch.float64)
    return {"student": student, "teacher": teacher, "labels": torch.arange(total) % 3}


def terms_and_gradients(model: nn.Module, inputs: dict[str, Tensor], weights: dict[str, float]) -> dict[str, Any]:
    """The terms, and the gradients of a weighted sum of them in the inputs and in every parameter that has one."""
    student = inputs["student"].requires_grad_()
    terms = model(inputs)
    sum(weights.get(name, 1.0) * term for name, term in terms.items()).backward()
    grads = {name.removeprefix("module."): parameter.grad for name, parameter in model.named_parameters()}
    return {
        "terms": {name: term.detach().cpu() for name, term in terms.items()},
        "rows": student.grad.cpu(),
        "gradients": {name: grad.cpu() for name, grad in grads.items() if grad is not None},
    }


def module_on_rank(
    rank: int,
    name: str,
    sizes: tuple[int, ...],
    options: dict[str, Any],
    how: str,
    weights: dict[str, float],
    device: str = "cpu",
) -> dict[str, Any]:
    """On this rank's part of the batch; ``how``: bare, under torch.compile, or under DistributedDataParallel."""
    model: nn.Module = Student(name, **options).to(device)
    if how == "ddp":
        model = DistributedDataParallel(model, find_unused_parameters=True)
    if how == "compile":
        model.compile(backend="eager")
    whole = batch(sum(sizes), options.get("same", False))
    inputs = {key: part(x, sizes, rank).to(device) for key, x in whole.items()}
    return terms_and_gradients(model, inputs, weights)


def feature_term_of_size(rank: int, size: float) -> Tensor:
    """MSDCRD's feature-wise term of float32 maps of this size, those of rank 1 a thousand times smaller."""
    x = batch(6, same=True)
    scale = size * (torch.arange(6) < 3).double().clamp_min(1e-3)
    student, teacher = (scale.view(-1, *[1] * (y.ndim - 1)) * y for y in (x["student"], x["teacher"]))
    maps = [y.float().split(3)[rank] for y in (student, teacher)]
    return MSDCRDLoss(D_S, D_S, sample_term_weight=0)(*maps, (torch.ones(CLASSES, D_S), None))["feature"]


def second_derivative(rank: int) -> str:
    """Of the feature-wise term, which is not there over several ranks."""
    x = {key: part(value, (3, 3), rank) for key, value in batch(6).items()}
    rows = x["student"].requires_grad_()
    term = Student("msdcrd", sample_term_weight=0, backend="reference")(x)["feature"]
    (grad,) = torch.autograd.grad(term, rows, create_graph=True)
    grad.square().sum().backward()
    return "done"


def local_bytes(rank: int, name: str) -> dict[str, int]:
    """What a module of ``group="local"`` puts on the wire, forward and backward."""
    inputs = {key: part(x, (3, 3), rank) for key, x in batch(6).items()}
    with CountedBytes() as counter:
        terms_and_gradients(Student(name, group="local"), inputs, {})
    return dict(counter.sent)


def preview_on_rank(rank: int, sizes: tuple[int, ...], ce: Tensor, threshold: float, group: str | None) -> Tensor:
    return preview_weight(ce.split(sizes)[rank], threshold, group=group)


def preview_of_two_dtypes(rank: int) -> Tensor:
    return preview_weight(torch.ones(2, dtype=torch.float64 if rank == 1 else torch.float32), 1.0)


def with_deviation(rank: int, name: str, deviation: dict[str, Any]) -> str:
    """A module whose options, inputs or teacher's classifier deviate on rank 1; ``done`` if it went well."""
    own = dict(deviation) if rank == 1 else {}
    if name == "pckd":
        own["same"] = True
    classifier = own.pop("classifier", None)
    inputs = {key: part(x, (3, 3), rank) for key, x in batch(6, own.get("same", False)).items()}
    inputs.update({key: own.pop(key) for key in list(own) if key in inputs})
    model = Student(name, **own)
    if classifier is not None:
        model.teacher = classifier
    model(inputs)
    return "done"
