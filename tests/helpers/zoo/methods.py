"""How a case of each file of the classical losses is run by this package."""

import re
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fastkd import losses
from fastkd.losses import KDLoss, total_loss
from tests.helpers.zoo.case import Case

METHODS: dict[str, Callable[[Case], None]] = {}


def method(run: Callable[[Case], None]) -> Callable[[Case], None]:
    METHODS[run.__name__] = run
    return run


def logits(case: Case) -> tuple[Tensor, Tensor]:
    return case["student_logits"], case["teacher_logits"]


@method
def kd(case: Case) -> None:
    case.check(total_loss(KDLoss(case.option("temperature"))(*logits(case))))


@method
def dkd(case: Case) -> None:
    loss = losses.DKDLoss(*map(case.option, ("temperature", "alpha", "beta")))
    case.check(total_loss(loss(*logits(case), case["labels"])))


@method
def dist(case: Case) -> None:
    case.check(total_loss(losses.DISTLoss(*map(case.option, ("tau", "beta", "gamma")))(*logits(case))))


@method
def lskd_kd(case: Case) -> None:
    case.check(total_loss(losses.LSKDLoss(KDLoss(case.option("temperature")))(*logits(case))))


@method
def lskd_dkd(case: Case) -> None:
    loss = losses.LSKDLoss(losses.DKDLoss(*map(case.option, ("temperature", "alpha", "beta"))))
    case.check(total_loss(loss(*logits(case), case["labels"])))


@method
def wsld(case: Case) -> None:
    student, teacher = logits(case)
    terms = losses.WSLDLoss(case.option("temperature"))(student, teacher, case["labels"])
    case.check(F.cross_entropy(student, case["labels"]) + case.option("alpha") * terms["wsld"])


@method
def ctkd(case: Case) -> None:
    loss = losses.CTKDLoss(case.option("start"), case.option("range"), round(case.option("loops")))
    case.load(loss, "temperature.", ("global_T", "theta"))
    case.check(total_loss(loss(*logits(case), case.option("epoch"))))


@method
def mlkd(case: Case) -> None:
    T = case.option("temperature")
    weak, strong, labels = case["student_logits_weak"], case["student_logits_strong"], case["labels"]
    loss = losses.MLKDLoss([T, 3.0, 5.0, 2.0, 6.0])
    terms = loss(weak, case["teacher_logits_weak"], strong, case["teacher_logits_strong"])
    ce = F.cross_entropy(weak, labels) + F.cross_entropy(strong, labels)
    case.check(case.option("ce_weight") * ce + case.option("kd_weight") * total_loss(terms))


@method
def mlkd_parts(case: Case) -> None:
    case.check(total_loss(losses.MLKDLoss([case.option("temperature")], "paper")(*logits(case))))


@method
def ipwd(case: Case) -> None:
    inputs = case["student_logits"], case["class_head_logits"], case["teacher_logits"], case["labels"]
    if "loss_inverse" in case.values:
        case.check_value("loss_inverse", losses.IPWDLoss(case.option("temperature"), "class/kd")(*inputs)["ipwd"])
    case.check(losses.IPWDLoss(case.option("temperature"))(*inputs)["ipwd"])


def features(case: Case) -> tuple[Tensor, Tensor]:
    return case["student_features"], case["teacher_features"]


@method
def rkd(case: Case) -> None:
    loss = losses.RKDLoss(*map(case.option, ("distance_weight", "angle_weight")))
    case.check(total_loss(loss(*features(case))))


@method
def cc(case: Case) -> None:
    student, teacher = features(case)
    width = len(case.values["param.embed_student.linear.bias"])
    loss = losses.CCLoss(student.shape[1], teacher.shape[1], width)
    case.check(case.load(loss, "", (r"\.linear", ""))(student, teacher)["cc"])


def cc_kernel(case: Case, reading: Literal["kernel", "kernel-raw"]) -> None:
    student, teacher = case["student_embedding"], case["teacher_embedding"]
    options = {name: case.option(name) for name in ("gamma", "order")}
    loss = losses.CCLoss(student.shape[1], teacher.shape[1], None, reading, **options)
    case.check(loss(student, teacher)["cc"])


@method
def cc_rbf(case: Case) -> None:
    cc_kernel(case, "kernel")


@method
def cc_torchdistill(case: Case) -> None:
    cc_kernel(case, "kernel-raw")


@method
def pkt(case: Case) -> None:
    case.check(losses.PKTLoss()(*features(case))["pkt"])


@method
def sp(case: Case) -> None:
    case.check(losses.SPLoss()(*case.maps("student_map"), *case.maps("teacher_map"))["sp"])


@method
def crd(case: Case) -> None:
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


def pooled_classifier(case: Case) -> tuple[Tensor, Tensor]:
    return case.values["param.teacher_classifier.weight"], case.values["param.teacher_classifier.bias"]


@method
def srrl(case: Case) -> None:
    student, teacher = features(case)
    loss = case.load(losses.SRRLLoss(student.shape[1], teacher.shape[1]), "connector.transfer.", ("^", "connector."))
    case.check(total_loss(loss(student, teacher, case["teacher_logits"], pooled_classifier(case))))


@method
def srrl_official(case: Case) -> None:
    student, teacher = case["student_map_0"], case["teacher_map_0"]
    loss = losses.SRRLLoss(student.shape[1], teacher.shape[1], "maps")
    case.load(loss, "connector.Connectors.", ("^", "connector."))
    case.check(total_loss(loss(student, teacher, case["teacher_logits"], pooled_classifier(case))))


def maps(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    return case.maps("student_map"), case.maps("teacher_map")


def channels(case: Case) -> tuple[list[int], list[int]]:
    return [x.shape[1] for x in case.maps("student_map")], [x.shape[1] for x in case.maps("teacher_map")]


@method
def fitnet(case: Case) -> None:
    student, teacher = case["student_map"], case["teacher_map"]
    loss = case.load(losses.FitNetLoss(tuple(student.shape[1:]), tuple(teacher.shape[1:])), "")
    case.check(loss(student, teacher)["fitnet"])


@method
def at(case: Case) -> None:
    case.check(losses.ATLoss(case.option("power"))(*maps(case))["at"])


@method
def at_paper(case: Case) -> None:
    case.check(losses.ATLoss(reading="paper")(*maps(case))["at"])


@method
def nst(case: Case) -> None:
    case.check(losses.NSTLoss()(*maps(case))["nst"])


@method
def fsp(case: Case) -> None:
    case.check(losses.FSPLoss()(*maps(case))["fsp"])


@method
def vid(case: Case) -> None:
    options = {name: case.option(name) for name in ("initial_variance", "eps")}
    loss = losses.VIDLoss(*channels(case), **options)
    case.load(loss, "vid.", ("log_scale", "rho.0"), ("regressor", "regressors.0"))
    case.check(loss(*maps(case))["vid"])


@method
def ab(case: Case) -> None:
    shapes = [[tuple(x.shape[1:]) for x in side] for side in maps(case)]
    loss = case.load(losses.ABLoss(*shapes, case.option("margin")), "connector.")
    case.check(loss(*maps(case))["ab"])


@method
def ft(case: Case) -> None:
    (student,), (teacher,) = channels(case)
    loss = case.load(losses.FTLoss(student, losses.Paraphraser(teacher)), "", ("translator.encoder", "translator"))
    case.check(loss(*(side[0] for side in maps(case)))["ft"])


@method
def ft_official(case: Case) -> None:
    (student,), (teacher,) = channels(case)
    loss = losses.FTLoss(student, losses.Paraphraser(teacher), "factors")
    places = [(rf"\.{conv}{k}", f".{stack}{3 * k}") for k in range(3)
              for conv, stack in (("deconv", "decoder."), ("conv", "encoder."))]  # fmt: skip
    case.load(loss, "", *places, (r"translator\.encoder", "translator"))
    case.check(loss(*(side[0] for side in maps(case)))["ft"])


@method
def ofd(case: Case) -> None:
    count = len(case.maps("student_map"))
    for level in range(count):  # the file's margins have the accuracy of float32
        bn = case[f"teacher_bn_weight_{level}"], case[f"teacher_bn_bias_{level}"]
        torch.testing.assert_close(losses.activation_margin(*bn), case[f"margin_{level}"], rtol=1e-4, atol=1e-5)
    loss = losses.OFDLoss(channels(case)[0], [case[f"margin_{level}"] for level in range(count)]).double()
    for level in range(count):
        loss.get_buffer(f"margin_{level}").copy_(case[f"margin_{level}"])
    case.load(loss.connectors, "connector.")
    case.check(loss(*maps(case))["ofd"])


@method
def reviewkd(case: Case) -> None:
    loss = losses.ReviewKDLoss(*channels(case))
    count = len(loss.fusions)
    deepest_first = [(rf"^abfs\.{level}\.", f"fusions.{count - 1 - level}.") for level in range(count)]
    case.load(loss, "", *deepest_first, (r"att_conv\.0", "gates"))
    case.check(loss(*maps(case))["review"])


@method
def simkd(case: Case) -> None:
    (student,), (teacher,) = maps(case)
    loss = losses.SimKDLoss(student.shape[1], teacher.shape[1], case.option("factor"))
    case.load(loss, "projector.transfer.", ("^", "projector."))
    if "out.student_logits" in case.values:
        state = {name: x.clone() for name, x in loss.state_dict().items()}
        logits = loss.logits(student, pooled_classifier(case), teacher.shape[2])
        case.check_value("out.student_logits", logits)
        loss.load_state_dict(state)
    case.check(loss(student, teacher)["simkd"])


@method
def norm(case: Case) -> None:
    case.check(losses.NORMLoss(case.option("repeats"))(case["student_map"], case["teacher_map"])["norm"])
