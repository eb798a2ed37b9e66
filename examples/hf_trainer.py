"""Distillation with the Trainer of Hugging Face transformers. Needs: pip install transformers accelerate.

The Trainer takes any module whose ``forward`` returns a dict with ``loss``. The teacher is kept out of the module's
children, so that it is neither trained nor saved with every checkpoint.
"""

from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import Net, accuracy, generated_images, trained_teacher
from transformers import Trainer, TrainingArguments, set_seed

from fastkd import DCDLoss, KDLoss


class Distillation(nn.Module):
    def __init__(self, student: Net, teacher: Net) -> None:
        super().__init__()
        self.student = student
        self.kd = KDLoss(temperature=4.0)
        self.dcd = DCDLoss(student_dim=16, teacher_dim=128)
        self.teacher = [teacher]  # in a list: no child of this module

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        (teacher,) = self.teacher
        features, logits = self.student(images)
        with torch.no_grad():
            teacher_features, teacher_logits = teacher.to(images.device)(images)
        terms = {"ce": cross_entropy(logits, labels)}
        terms |= self.kd(logits, teacher_logits)
        terms |= self.dcd(features, teacher_features)
        return {"loss": sum(terms.values()), "logits": logits}


def collate(samples: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*samples, strict=True)
    return {"images": torch.stack(images), "labels": torch.stack(labels)}


set_seed(0)
module = Distillation(student=Net(width=16), teacher=trained_teacher())
with TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, num_train_epochs=10, per_device_train_batch_size=128, learning_rate=1e-2, weight_decay=0.0,
        use_cpu=True, save_strategy="no", report_to="none", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    Trainer(module, arguments, data_collator=collate, train_dataset=generated_images()).train()
print(f"student accuracy {accuracy(module.student):.3f}")
