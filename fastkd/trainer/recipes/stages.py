"""Methods that train for a while by a loss of their own, and then by another: as stages."""

from __future__ import annotations

from dataclasses import replace

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.objective.objective import needs
from fastkd.trainer.recipes.methods import PRETRAINING, objective_of, pretraining_of


def pretrained(config: TrainConfig, method: str) -> dict[str, TrainConfig]:
    """The stages ``pretrain`` and ``train`` of a method in ``PRETRAINING``, with all else as in ``config``.

    The pre-training is RepDistiller's: 30 epochs at a constant learning rate, with an optimiser of its own. It is that
    of the recipe for AB and FSP, which train the student's layers before its classifier, and 0.01 for FT, which trains
    the paraphraser. ``train`` begins with what ``pretrain`` has trained, and has a teacher only if its loss needs one.

    Example:
        >>> from fastkd.trainer import RECIPES
        >>> list(pretrained(RECIPES["digits"](), "fsp"))
        ['pretrain', 'train']
    """
    objective = pretraining_of(method)
    if objective is None:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(PRETRAINING)}")
    constant = replace(config.optim, schedule="constant", milestones=(), warmup_epochs=0.0, min_lr=0.0)
    if method == "ft":
        constant = replace(constant, lr=0.01)
    first = replace(config, objective=objective, optim=constant, epochs=30)
    config = replace(config, objective=objective_of(method))
    config = config if needs("teacher", config.objective) else replace(config, teacher=None)
    values = config.to_dict()
    if method == "ft":
        values["objective"]["ft"]["paraphraser"] = "stage:pretrain"
    else:
        values["student"]["weights"] = "stage:pretrain"
    return {"pretrain": first, "train": TrainConfig.from_dict(values)}
