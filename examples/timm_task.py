"""Distillation as a training task of timm (1.0.31 and later), with timm's networks and optimisers."""

import timm
import torch
from timm.optim import create_optimizer_v2
from timm.task import TrainingTask
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import CLASSES, batches

from fastkd import DCDLoss, KDLoss


class ContrastiveDistillation(TrainingTask):
    """``task(images, labels)`` returns a dict whose ``loss`` is to be minimised, as timm's own tasks do."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__(verbose=False)
        self.trainable_module = nn.ModuleDict(
            {"student": student, "kd": KDLoss(), "dcd": DCDLoss(student.num_features, teacher.num_features)}
        )
        self.teacher = teacher.eval().requires_grad_(False)
        self.eval_model = student

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        student, kd, dcd = (self.trainable_module[name] for name in ("student", "kd", "dcd"))
        features, logits = features_and_logits(student, input)
        with torch.no_grad():
            teacher_features, teacher_logits = features_and_logits(self.teacher, input)
        terms = {"task_loss": cross_entropy(logits, target)}
        terms |= kd(logits, teacher_logits)
        terms |= dcd(features, teacher_features)
        return {"loss": sum(terms.values()), "output": logits, **terms}


def features_and_logits(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    features = model.forward_head(model.forward_features(images), pre_logits=True)
    return features, model.get_classifier()(features)


torch.manual_seed(0)
teacher, student = (timm.create_model(name, num_classes=CLASSES, in_chans=1) for name in ("resnet14t", "resnet10t"))
task = ContrastiveDistillation(student, teacher)  # the teacher would be a trained one
optimizer = create_optimizer_v2(task.get_trainable_module(), opt="adamw", lr=1e-3)
for step, (images, labels) in zip(range(8), batches(size=32), strict=False):
    result = task(images, labels)
    optimizer.zero_grad()
    result["loss"].backward()
    optimizer.step()
    print(f"step {step}, loss {result['loss'].item():.3f}, contrast {result['contrast'].item():.3f}")
