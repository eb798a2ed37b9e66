"""What the ranks run to compare the classical losses that relate samples with one process."""

from typing import Any

import torch
from torch import Tensor, nn

from fastkd.losses import SPLoss
from tests.losses.calls import RELATIONAL, inputs, module, students

STEPS = 2  # the second reads what the first left in a memory


def part_of(value: Any, rows: slice) -> Any:
    """This rank's rows of an input."""
    return value.detach()[rows] if isinstance(value, Tensor) else value


def results_of(loss: nn.Module, given: list[dict[str, Any]]) -> dict[str, Tensor]:
    """Terms and gradients of a few steps, with weights that differ by term, and the buffers after them."""
    found: dict[str, Tensor] = {}
    for step, inputs_ in enumerate(given):
        loss.zero_grad()
        for x in students(inputs_):
            x.requires_grad_()
        terms = loss(**inputs_)
        torch.stack([(1 + k) * term for k, term in enumerate(terms.values())]).sum().backward()
        found |= {f"{step} mean {name}": term.detach() for name, term in terms.items()}
        found |= {f"{step} mean {name}": x.grad for name, x in loss.named_parameters()}
        found |= {f"{step} rows {k}": x.grad for k, x in enumerate(students(inputs_))}
    return found | {f"equal {name}": x for name, x in loss.named_buffers()}


def one_process(name: str, total: int) -> dict[str, Tensor]:
    return results_of(module(name), [inputs(name, total, seed=step) for step in range(STEPS)])


def on_rank(rank: int, sizes: tuple[int, ...]) -> dict[str, dict[str, Tensor]]:
    first = sum(sizes[:rank])
    rows = slice(first, first + sizes[rank])
    found = {}
    for name in RELATIONAL:
        batches = [inputs(name, sum(sizes), seed=step) for step in range(STEPS)]
        given = [{key: part_of(value, rows) for key, value in batch.items()} for batch in batches]
        found[name] = results_of(module(name), given)
    return found


def with_own_rows(rank: int) -> list[bool]:
    """Whether ``group="local"`` gives the loss of this rank's rows, and the default does not."""
    student, teacher = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(rank)).double()
    own = SPLoss(group="local")(student, teacher)["sp"]
    gram_s, gram_t = (nn.functional.normalize(x @ x.T) for x in (student, teacher))
    of_all = SPLoss()(student, teacher)["sp"]
    return [torch.allclose(own, (gram_s - gram_t).square().mean()), torch.allclose(own, of_all)]


def with_different_options(rank: int) -> None:
    module("dist").forward(**{key: x[:2] for key, x in inputs("dist", 2 + rank).items()})
    loss = module("dist")
    loss.gamma = rank  # type: ignore[assignment]
    loss(**inputs("dist", 3))


def with_a_gradient_on_one_rank(rank: int) -> None:
    given = inputs("rkd", 3)
    given["student_features"].requires_grad_(rank == 0)
    module("rkd")(**given)
