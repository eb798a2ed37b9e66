"""Distillation with Hugging Face accelerate. Needs: pip install accelerate.

``accelerate launch --num_processes 8 accelerate_loop.py`` contrasts the rows of all eight processes, exactly. For that,
student and losses are in one module: accelerate wraps it in DistributedDataParallel, and its ``forward`` returns the
loss.
"""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from toy import Net, accuracy, batches, trained_teacher

from fastkd import DCDLoss, KDLoss


class Distillation(nn.Module):
    def __init__(self, student: Net) -> None:
        super().__init__()
        self.student = student
        self.kd = KDLoss(temperature=4.0)
        self.dcd = DCDLoss(student_dim=16, teacher_dim=128)

    def forward(self, images: Tensor, labels: Tensor, teacher_features: Tensor, teacher_logits: Tensor) -> Tensor:
        features, logits = self.student(images)
        terms = {"ce": cross_entropy(logits, labels)}
        terms |= self.kd(logits, teacher_logits)
        terms |= self.dcd(features, teacher_features)
        return sum(terms.values())


torch.manual_seed(0)
accelerator = Accelerator(cpu=True)
teacher = trained_teacher().to(accelerator.device)
module = Distillation(Net(width=16))
optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, weight_decay=0.0)
module, optimizer, loader = accelerator.prepare(module, optimizer, batches())

for _ in range(10):
    for images, labels in loader:
        with torch.no_grad():
            teacher_features, teacher_logits = teacher(images)
        optimizer.zero_grad()
        accelerator.backward(module(images, labels, teacher_features, teacher_logits))
        optimizer.step()

accelerator.print(f"student accuracy {accuracy(accelerator.unwrap_model(module).student):.3f}")
