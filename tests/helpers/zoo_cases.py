"""How a case of each file of the classical losses is run by this package."""

import re
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


def features(case: Any) -> tuple[Tensor, Tensor]:
    return case["student_features"], case["teacher_features"]


@method
def rkd(case: Any) -> None:
    loss = losses.RKDLoss(*map(case.option, ("distance_weight", "angle_weight")))
    case.check(total_loss(loss(*features(case))))


@method
def cc(case: Any) -> None:
    student, teacher = features(case)
    width = len(case.values["param.embed_student.linear.bias"])
    loss = losses.CCLoss(student.shape[1], teacher.shape[1], width)
    case.check(case.load(loss, "", (r"\.linear", ""))(student, teacher)["cc"])


def cc_kernel(case: Any, reading: Any) -> None:
    student, teacher = case["student_embedding"], case["teacher_embedding"]
    options = {name: case.option(name) for name in ("gamma", "order")}
    loss = losses.CCLoss(student.shape[1], teacher.shape[1], None, reading, **options)
    case.check(loss(student, teacher)["cc"])


@method
def cc_rbf(case: Any) -> None:
    cc_kernel(case, "kernel")


@method
def cc_torchdistill(case: Any) -> None:
    cc_kernel(case, "kernel-raw")


@method
def pkt(case: Any) -> None:
    case.check(losses.PKTLoss()(*features(case))["pkt"])


@method
def sp(case: Any) -> None:
    case.check(losses.SPLoss()(*case.maps("student_map"), *case.maps("teacher_map"))["sp"])


@method
def crd(case: Any) -> None:
    names = ("samples", "negatives", "temperature", "momentum")
    widths = [case[f"{side}_features_step0"].shape[1] for side in ("student", "teacher")]
    loss = losses.CRDLoss(*widths, embedding_dim=case.option("dim"), **{name: case.option(name) for name in names})
    loss.double()
    embed = {name: loss.get_submodule(name) for name in ("embed_student", "embed_teacher")}
    for name, layer in embed.items():
        case.load(layer, f"{name}.linear.")
    loss.memory_student.copy_(case["memory_student"])
    loss.memory_teacher.copy_(case["memory_teacher"])
    for step in range(sum(re.fullmatch(r"loss_step\d+", name) is not None for name in case.values)):
        names = ("student_features", "teacher_features", "index", "contrast_index")
        terms = loss(*(case[f"{name}_step{step}"] for name in names))
        case.check(total_loss(terms), f"loss_step{step}", f"grad_step{step}")
        case.check_value(f"out.memory_student_step{step}", loss.memory_student)
        case.check_value(f"out.memory_teacher_step{step}", loss.memory_teacher)
        for side, normalizer in zip(("student", "teacher"), loss.normalizers, strict=True):
            case.check_value(f"out.Z_{side}_step{step}", normalizer)
