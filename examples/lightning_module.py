"""Distillation with Lightning. Needs: pip install lightning.

The losses are submodules, so that ``self.parameters()`` has theirs, and DistributedDataParallel averages their
gradients. With several devices the negatives are the rows of all of them: Lightning calls ``training_step`` inside the
wrapped module, which is where such a loss belongs.
"""

import lightning
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from toy import Net, accuracy, batches, trained_teacher

from fastkd import DCDLoss, KDLoss


class Distillation(lightning.LightningModule):
    def __init__(self, student: Net, teacher: Net) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher
        self.kd = KDLoss(temperature=4.0)
        self.dcd = DCDLoss(student_dim=16, teacher_dim=128)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        images, labels = batch
        features, logits = self.student(images)
        with torch.no_grad():
            teacher_features, teacher_logits = self.teacher(images)
        terms = {"ce": cross_entropy(logits, labels)}
        terms |= self.kd(logits, teacher_logits)
        terms |= self.dcd(features, teacher_features)
        self.log_dict(terms)
        return sum(terms.values())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=3e-3, weight_decay=0.0)


lightning.seed_everything(0, verbose=False)
module = Distillation(student=Net(width=16), teacher=trained_teacher())
trainer = lightning.Trainer(
    max_epochs=10, accelerator="cpu", logger=False,
    enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(module, batches())
print(f"student accuracy {accuracy(module.student):.3f}")
