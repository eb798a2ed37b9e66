"""How a case of each file of the classical losses is run by this package."""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from fastkd import losses
from fastkd.losses import KDLoss, total_loss

METHODS: dict[str, Callable[[Any], None]] = {}


def method(run: Callable[[Any], None]) -> Callable[[Any], None]:
    METHODS[run.__name__] = run
    return run


def logits(case: Any) -> tuple[Tensor, Tensor]:
    return case["student_logits"], case["teacher_logits"]


@method
def kd(case: Any) -> None:
    case.check(total_loss(KDLoss(case.option("temperature"))(*logits(case))))


@method
def dkd(case: Any) -> None:
    loss = losses.DKDLoss(*map(case.option, ("temperature", "alpha", "beta")))
    case.check(total_loss(loss(*logits(case), case["labels"])))


@method
def dist(case: Any) -> None:
    case.check(total_loss(losses.DISTLoss(*map(case.option, ("tau", "beta", "gamma")))(*logits(case))))


@method
def lskd_kd(case: Any) -> None:
    case.check(total_loss(losses.LSKDLoss(KDLoss(case.option("temperature")))(*logits(case))))


@method
def lskd_dkd(case: Any) -> None:
    loss = losses.LSKDLoss(losses.DKDLoss(*map(case.option, ("temperature", "alpha", "beta"))))
    case.check(total_loss(loss(*logits(case), case["labels"])))


@method
def wsld(case: Any) -> None:
    student, teacher = logits(case)
    terms = losses.WSLDLoss(case.option("temperature"))(student, teacher, case["labels"])
    case.check(F.cross_entropy(student, case["labels"]) + case.option("alpha") * terms["wsld"])


@method
def ctkd(case: Any) -> None:
    loss = losses.CTKDLoss(case.option("start"), case.option("range"), round(case.option("loops")))
    case.load(loss, "temperature.", ("global_T", "theta"))
    case.check(total_loss(loss(*logits(case), case.option("epoch"))))


@method
def mlkd(case: Any) -> None:
    T = case.option("temperature")
    weak, strong, labels = case["student_logits_weak"], case["student_logits_strong"], case["labels"]
    loss = losses.MLKDLoss([T, 3.0, 5.0, 2.0, 6.0])
    terms = loss(weak, case["teacher_logits_weak"], strong, case["teacher_logits_strong"])
    ce = F.cross_entropy(weak, labels) + F.cross_entropy(strong, labels)
    case.check(case.option("ce_weight") * ce + case.option("kd_weight") * total_loss(terms))


@method
def mlkd_parts(case: Any) -> None:
    case.check(total_loss(losses.MLKDLoss([case.option("temperature")], "paper")(*logits(case))))


@method
def ipwd(case: Any) -> None:
    inputs = case["student_logits"], case["class_head_logits"], case["teacher_logits"], case["labels"]
    if "loss_inverse" in case.values:
        case.check_value("loss_inverse", losses.IPWDLoss(case.option("temperature"), "class/kd")(*inputs)["ipwd"])
    case.check(losses.IPWDLoss(case.option("temperature"))(*inputs)["ipwd"])
