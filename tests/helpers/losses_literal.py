"""PCKD and MSDCRD written out as their formulas read, N x N, without the package: what the modules must equal."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def preview(ce: Tensor, threshold: float) -> Tensor:
    a = ce / ce.mean()
    return torch.stack([torch.ones_like(x) if x <= threshold else torch.exp(-x * x) for x in a])


def pckd(
    module: nn.Module,
    student_features: Tensor,
    teacher_features: Tensor,
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    student_classifier: tuple[Tensor, Tensor | None],
    teacher_classifier: tuple[Tensor, Tensor | None],
    epoch: float,
    temperature: float = 4.0,
    relation_scale: float = 0.25,
    preview_base: float = 1.005,
    first_epoch: int = 0,
    preview_gradient: bool = False,
    category_eps: float = 0.0,
) -> dict[str, Tensor]:
    """The terms before weights, of the module's own heads."""
    B = len(labels)
    (W_s, b_s), (W_t, b_t) = student_classifier, teacher_classifier
    threshold = preview_base ** (epoch + first_epoch)
    with_gradient = preview(F.cross_entropy(student_logits, labels, reduction="none"), threshold)
    w = with_gradient.detach()
    r1 = torch.stack([W_s @ F.normalize(module.student_head(f), dim=0) for f in student_features])
    r2 = torch.stack([W_t.detach() @ F.normalize(module.teacher_head(f), dim=0) for f in student_features])
    Z, y = torch.cat([r1, r2]), torch.cat([labels, labels])
    anchors = []
    for a in range(2 * B):
        x = relation_scale * Z @ Z[a]
        others = [b for b in range(2 * B) if b != a]
        positives = [p for p in others if y[p] == y[a]]
        peak = x.max().detach()
        anchors.append(peak + ((x[others] - peak).exp().sum() + category_eps).log() - x[positives].mean())
    terms = {"category": sum(w[i] * (anchors[i] + anchors[B + i]) for i in range(B)) / B}
    own = W_s if b_s is None else torch.cat([W_s, b_s[:, None]], dim=1)
    other = W_t if b_t is None else torch.cat([W_t, b_t[:, None]], dim=1)
    if own.shape == other.shape:
        terms["center"] = F.mse_loss(own, other.detach())
    first, second = module.mlp[0], module.mlp[2]
    hidden = (student_features @ first.weight.T + first.bias).clamp_min(0)
    projected = hidden @ second.weight.T + second.bias
    terms["feature"] = (2 - 2 * F.cosine_similarity(projected, teacher_features.detach(), dim=1)).mean()
    p = (teacher_logits.detach() / temperature).softmax(dim=1)
    log_ratio = p.log() - (student_logits / temperature).log_softmax(dim=1)
    w = with_gradient if preview_gradient else w
    terms["kd"] = temperature**2 * (w * (p * log_ratio).sum(dim=1)).mean()
    return terms


def local_samples(features: Tensor, windows: Sequence[int | tuple[int, int]], strides: Sequence[int]) -> Tensor:
    """[B * M, C], the samples of an image one after the other."""
    scales = [F.avg_pool2d(features, window, stride) for window, stride in zip(windows, strides, strict=True)]
    return torch.cat([scale.flatten(2) for scale in scales], dim=2).transpose(1, 2).reshape(-1, features.shape[1])


def msdcrd(
    student_map: Tensor,
    teacher_map: Tensor,
    classifier: tuple[Tensor, Tensor | None],
    windows: Sequence[int | tuple[int, int]],
    strides: Sequence[int],
    adapter: nn.Conv2d | None = None,
    temperature: float = 0.1,
    positives: str = "index",
    selection: str = "all",
    confidence: float = 0.5,
    image_labels: Sequence[int] = (),
) -> dict[str, Tensor]:
    """The terms before weights, of maps [B, C, H, W]."""
    teacher_map = teacher_map.detach()
    if adapter is not None:
        kernel = adapter.weight[:, :, 0, 0]
        student_map = torch.einsum("bchw,dc->bdhw", student_map, kernel) + adapter.bias[:, None, None]
    student_map = F.adaptive_avg_pool2d(student_map, teacher_map.shape[2:])
    s, t = (local_samples(x, windows, strides) for x in (student_map, teacher_map))
    labels = F.linear(t, *classifier).argmax(dim=1)
    if selection != "all":
        chosen, M = [], len(t) // len(teacher_map)
        probability = F.linear(t, *classifier).softmax(dim=1)
        whole = F.linear(teacher_map.mean(dim=(2, 3)), *classifier).argmax(dim=1)
        for r, c in enumerate(labels.tolist()):
            image, p = r // M, probability[r, c]
            rivals = [q for q in range(image * M, image * M + M) if labels[q] == c]
            takes_part = {
                "confident": p >= confidence,
                "teacher_class": whole[image] == c,
                "image_class": len(image_labels) and image_labels[image] == c,
                "one_per_class": r == max(rivals, key=lambda q: (probability[q, labels[q]].item(), -q)),
            }
            chosen += [r] if takes_part[selection] else []
        s, t, labels = s[chosen], t[chosen], labels[chosen]
    x = F.normalize(s, dim=1) @ F.normalize(t, dim=1).T / temperature
    rows = []
    for r in range(len(x)):
        if positives == "index":
            negatives = labels != labels[r]
            rows.append((x[r, r].exp() + x[r, negatives].exp().sum()).log() - x[r, r])
        else:
            rows.append(x[r].exp().sum().log() - x[r, labels == labels[r]].mean())
    channels = F.normalize(s.T, dim=1) @ F.normalize(t.T, dim=1).T / temperature
    feature = -channels.log_softmax(dim=1).diagonal().mean()
    return {"sample": torch.stack(rows).mean(), "feature": feature}
