"""A small call of every classical loss: the module, and inputs of so many rows."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import losses

CLASSES, D_S, D_T, SAMPLES = 5, 6, 8, 20
Inputs = dict[str, Any]
SHAPES_S, SHAPES_T = [(4, 8, 8), (6, 4, 4)], [(6, 8, 8), (8, 4, 4)]


class Draw:
    """Random inputs. Those of the student require a gradient."""

    def __init__(self, rows: int, seed: int = 0) -> None:
        self.rows, self.generator = rows, torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(self.rows, *shape, generator=self.generator, dtype=torch.float64)

    def logits(self) -> Inputs:
        return {"student_logits": 2 * self(CLASSES), "teacher_logits": 2 * self(CLASSES)}

    def features(self) -> Inputs:
        return {"student_features": self(D_S), "teacher_features": self(D_T)}

    def map(self) -> Inputs:
        return {"student_map": self(*SHAPES_S[-1]), "teacher_map": self(*SHAPES_T[-1])}

    def maps(self, *, equal: bool = False) -> Inputs:
        teachers = SHAPES_S if equal else SHAPES_T
        return {"student_maps": [self(*s) for s in SHAPES_S], "teacher_maps": [self(*t) for t in teachers]}

    def labels(self) -> Inputs:
        return {"labels": torch.arange(self.rows) % CLASSES}


def both(*names: str) -> Callable[[Draw], Inputs]:
    return lambda draw: {key: value for name in names for key, value in getattr(draw, name)().items()}


def ipwd(draw: Draw) -> Inputs:
    return {**draw.logits(), "class_head_logits": draw(CLASSES), **draw.labels()}


def two_views(draw: Draw) -> Inputs:
    return {**draw.logits(), **{f"{name}_strong": x for name, x in draw.logits().items()}}


def srrl(draw: Draw) -> Inputs:
    weight, bias = draw(CLASSES, D_T)[0] if draw.rows else torch.zeros(CLASSES, D_T), torch.zeros(CLASSES)
    teacher_logits = draw(CLASSES)
    return {**draw.features(), "teacher_logits": teacher_logits, "teacher_classifier": (weight, bias.double())}


def crd(draw: Draw) -> Inputs:
    contrast = torch.randint(SAMPLES, (draw.rows, 5), generator=draw.generator)
    index = torch.randperm(SAMPLES, generator=draw.generator)[: draw.rows]
    contrast[:, 0] = index
    return {**draw.features(), "index": index, "contrast_index": contrast}


def review(draw: Draw) -> Inputs:
    maps = draw.maps()
    return {"student_maps": [*maps["student_maps"], draw(6, 1, 1)],
            "teacher_maps": [*maps["teacher_maps"], draw(8, 1, 1)]}  # fmt: skip


def channels(shapes: list[tuple[int, int, int]]) -> list[int]:
    return [shape[0] for shape in shapes]


# name -> a new module, its inputs
CALLS: dict[str, tuple[Callable[[], nn.Module], Callable[[Draw], Inputs]]] = {
    "ab": (lambda: losses.ABLoss(SHAPES_S, SHAPES_T), both("maps")),
    "at": (losses.ATLoss, both("maps")),
    "at paper": (lambda: losses.ATLoss(reading="paper"), both("maps")),
    "cc": (lambda: losses.CCLoss(D_S, D_T, 7), both("features")),
    "cc kernel": (lambda: losses.CCLoss(D_S, D_T, 7, "kernel"), both("features")),
    "cc raw": (lambda: losses.CCLoss(D_S, D_T, 7, "kernel-raw"), both("features")),
    "crd": (lambda: losses.CRDLoss(D_S, D_T, SAMPLES, negatives=4, embedding_dim=7), crd),
    "ctkd": (losses.CTKDLoss, lambda draw: {**draw.logits(), "epoch": 3}),
    "dist": (lambda: losses.DISTLoss(2.0), both("logits")),
    "dkd": (losses.DKDLoss, both("logits", "labels")),
    "fitnet": (lambda: losses.FitNetLoss(SHAPES_S[-1], SHAPES_T[-1]), both("map")),
    "fsp": (losses.FSPLoss, lambda draw: draw.maps(equal=True)),
    "ft": (lambda: losses.FTLoss(6, losses.Paraphraser(8)), both("map")),
    "ft factors": (lambda: losses.FTLoss(6, losses.Paraphraser(8), "factors"), both("map")),
    "ipwd": (losses.IPWDLoss, ipwd),
    "lskd": (losses.LSKDLoss, both("logits")),
    "lskd of dkd": (lambda: losses.LSKDLoss(losses.DKDLoss(2.0)), both("logits", "labels")),
    "mlkd": (losses.MLKDLoss, two_views),
    "mlkd paper": (lambda: losses.MLKDLoss(reading="paper"), two_views),
    "norm": (lambda: losses.NORMLoss(2), lambda draw: {"student_map": draw(8, 4, 4), "teacher_map": draw(4, 8, 8)}),
    "nst": (losses.NSTLoss, both("maps")),
    "ofd": (lambda: losses.OFDLoss(channels(SHAPES_S), [-torch.ones(s[0]) for s in SHAPES_T]), both("maps")),
    "pkt": (losses.PKTLoss, both("features")),
    "reviewkd": (lambda: losses.ReviewKDLoss([4, 6, 6], [6, 8, 8]), review),
    "rkd": (losses.RKDLoss, both("features")),
    "simkd": (lambda: losses.SimKDLoss(6, 8), both("map")),
    "sp": (losses.SPLoss, both("features")),
    "srrl": (lambda: losses.SRRLLoss(D_S, D_T), srrl),
    "vid": (lambda: losses.VIDLoss(channels(SHAPES_S), channels(SHAPES_T)), both("maps")),
    "wsld": (losses.WSLDLoss, both("logits", "labels")),
}
RELATIONAL = ("cc", "cc kernel", "cc raw", "crd", "dist", "mlkd", "mlkd paper", "pkt", "rkd", "sp")


def module(name: str) -> nn.Module:
    torch.manual_seed(1)
    return CALLS[name][0]().double()


def inputs(name: str, rows: int, change: Callable[[Tensor], Tensor] = lambda x: x, seed: int = 0) -> Inputs:
    """``change`` is what becomes of every float tensor."""

    def changed(value: Any) -> Any:
        if isinstance(value, list | tuple):
            return type(value)(changed(x) for x in value)
        return change(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    found = {key: changed(value) for key, value in CALLS[name][1](Draw(rows, seed)).items()}
    for x in students(found):
        x.requires_grad_()
    return found


def students(given: Inputs) -> list[Tensor]:
    """The tensors that get a gradient."""
    values = [value for key, value in given.items() if key.startswith("student")]
    return [x for value in values for x in (value if isinstance(value, list) else [value])]
