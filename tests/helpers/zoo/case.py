"""One case of a file: its tensors, and how far this package's losses and gradients are from them."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

NOISE = 1e-10  # of the largest gradient; smaller ones, of biases before a batch norm, are rounding errors


class Case:
    """One case: its tensors by name, and the errors that were found."""

    def __init__(self, values: dict[str, Tensor]) -> None:
        self.values = values
        self.leaves: dict[str, Tensor] = {}
        self.loss_error = self.grad_error = 0.0
        self.compared = 0

    def __getitem__(self, name: str) -> Tensor:
        """An input. It requires a gradient if the file has one."""
        if name not in self.leaves:
            has_gradient = any(re.fullmatch(rf"grad\w*\.{re.escape(name)}", other) for other in self.values)
            self.leaves[name] = self.values[name].clone().requires_grad_(has_gradient)
        return self.leaves[name]

    def maps(self, name: str) -> list[Tensor]:
        """``NAME_0``, ``NAME_1``, ... as far as there are any."""
        count = sum(re.fullmatch(rf"{name}_\d+", other) is not None for other in self.values)
        return [self[f"{name}_{level}"] for level in range(count)]

    def option(self, name: str) -> Any:
        return self.values[f"option.{name}"].item()

    def channels(self, name: str) -> list[int]:
        return [x.shape[1] for x in self.maps(name)]

    def load(self, module: nn.Module, prefix: str, *renamed: tuple[str, str]) -> Any:
        """Puts the file's parameters below ``param.PREFIX`` into ``module``, in float64.

        ``renamed``: patterns of the file's names and what stands for them in the module. Every parameter of the module
        has to be in the file, and the other way round.
        """
        module.double()
        own = {name: x for name, x in module.state_dict(keep_vars=True).items() if "num_batches_tracked" not in name}
        for name, value in self.values.items():
            if name.startswith(f"param.{prefix}"):
                key = name.removeprefix(f"param.{prefix}")
                for pattern, replacement in renamed:
                    key = re.sub(pattern, replacement, key)
                target = own.pop(key)
                with torch.no_grad():
                    assert target.numel() == value.numel(), f"{key}: {list(target.shape)}, file {list(value.shape)}"
                    target.copy_(value.view(target.shape))
                self.leaves[name] = target
        assert not own, f"not in the file: {sorted(own)}"
        return module

    def check(self, loss: Tensor, name: str = "loss", gradients: str = "grad") -> None:
        """Compares a loss and all its gradients with the file's."""
        self.check_value(name, loss)
        for leaf in self.leaves.values():
            leaf.grad = None
        expected = {key.removeprefix(f"{gradients}."): value for key, value in self.values.items()
                    if key.startswith(f"{gradients}.")}  # fmt: skip
        assert expected, "the file has no gradient"
        loss.backward()
        largest = max(value.norm().item() for value in expected.values())
        for key, value in expected.items():
            assert key in self.leaves, f"nothing reads {key}"
            grad = self.leaves[key].grad
            grad = torch.zeros_like(value) if grad is None else grad.view(value.shape)
            norm = value.norm().item()
            self.grad_error = _worse(self.grad_error, grad, value, norm if norm > NOISE * largest else largest)
        self.compared += 1

    def check_value(self, name: str, actual: Tensor) -> None:
        """Compares a number or a tensor with the file's."""
        expected = self.values[name]
        self.loss_error = _worse(
            self.loss_error, actual.detach().view(expected.shape), expected, expected.norm().item()
        )


def _worse(error: float, actual: Tensor, expected: Tensor, size: float) -> float:
    found = (actual - expected).norm().item() / (size or 1.0)
    return math.inf if math.isnan(found) else max(error, found)


def cases_of(path: Path) -> list[Case]:
    """The cases of a file, in order."""
    found: dict[str, dict[str, Tensor]] = {}
    with np.load(path) as arrays:
        for name in arrays.files:
            case, _, key = name.partition(".")
            if key:
                found.setdefault(case, {})[key] = torch.tensor(arrays[name])
    return [Case(found[name]) for name in sorted(found, key=lambda name: int(name.removeprefix("case")))]
