"""Distillation in a loop of your own, with PyTorch alone: cross-entropy + KD + DCD."""

import torch
from torch.nn.functional import cross_entropy
from toy import Net, accuracy, batches, trained_teacher

from fastkd import DCDLoss, KDLoss

torch.manual_seed(0)
teacher, student = trained_teacher(), Net(width=16)
kd = KDLoss(temperature=4.0)
dcd = DCDLoss(student_dim=16, teacher_dim=128)  # two linear heads and a learnable temperature, tau

# The loss has parameters, and they belong in the optimiser. tau, like every bias, gets no weight decay.
parameters = [*student.parameters(), *dcd.parameters()]
optimizer = torch.optim.AdamW(
    [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 1e-2},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ],
    lr=3e-3,
)

for _ in range(10):
    for images, labels in batches():
        features, logits = student(images)
        with torch.no_grad():
            teacher_features, teacher_logits = teacher(images)
        terms = {"ce": cross_entropy(logits, labels)}
        terms |= kd(logits, teacher_logits)
        terms |= dcd(features, teacher_features)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        optimizer.step()
    print({name: round(value.item(), 3) for name, value in terms.items()}, f"scale {dcd.logit_scale().item():.2f}")

print(f"teacher accuracy {accuracy(teacher):.3f}")
print(f"student accuracy {accuracy(student):.3f}")
