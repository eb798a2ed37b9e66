"""The objective of every method, with the weights that are usual on CIFAR-100: for recipes, studies and ``--method``.

The weights are those of the methods' authors, or of RepDistiller's tables where these are what is quoted. Options that
are not given here have their defaults. Weights that differ by pair of networks have their most frequent value.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from fastkd.trainer.objective.config import ObjectiveConfig
from fastkd.trainer.objective.options.fused import PCKDConfig
from fastkd.trainer.objective.options.logits import DISTConfig, LSKDConfig, MLKDConfig
from fastkd.trainer.objective.options.relations import CCConfig

# method -> its loss. Those with pre-training begin with the loss that PRETRAINING has.
SUMS = {
    "ce": "ce",
    "kd": "0.1*ce + 0.9*kd",
    "dcd": "ce + dcd",
    "dcd+kd": "ce + dcd + kd",
    "ckd": "ce + 100*ckd",
    "pckd": "pckd",
    "msdcrd": "ce + msdcrd",
    "msdcrd+kd": "ce + msdcrd + kd",
    # of logits
    "dkd": "ce + dkd",
    "dist": "ce + 2*dist",
    "lskd": "0.1*ce + 9*lskd",
    "lskd-dkd": "ce + 9*lskd",
    "wsld": "ce + 2.25*wsld",
    "ctkd": "0.1*ce + 0.9*ctkd",
    "mlkd": "0.1*ce + 0.1*ce_strong + 0.9*mlkd",
    "mlkd-paper": "0.1*ce + 0.1*ce_strong + 0.9*mlkd",
    "ipwd": "ce + ipwd",
    # of pooled features, and of how samples relate
    "cc": "ce + 0.02*cc",
    "cc-kernel": "ce + 100*cc",
    "rkd": "ce + rkd",
    "pkt": "ce + 30000*pkt",
    "sp": "ce + 3000*sp",
    "crd": "ce + 0.8*crd",
    "crd+kd": "ce + kd + 0.8*crd",
    "srrl": "ce + kd + srrl",
    # of feature maps
    "fitnet": "ce + 100*fitnet",
    "at": "ce + 1000*at",
    "nst": "ce + 50*nst",
    "vid": "ce + vid",
    "ofd": "ce + ofd",
    "reviewkd": "ce + 5*reviewkd",
    "simkd": "0*ce + simkd",
    "ft": "ce + 200*ft",
    "ab": "ce",
    "fsp": "ce",
}
OPTIONS: dict[str, Callable[[], dict[str, Any]]] = {
    "pckd": lambda: {
        "pckd": PCKDConfig(
            category_weight=0.05 * 4 / 0.07,
            feature_weight=20.0,
            kd_weight=0.0,
            first_epoch=1,
            preview_gradient=True,
            category_eps=1e-7,
        )
    },
    "dist": lambda: {"dist": DISTConfig(temperature=4.0)},
    "lskd-dkd": lambda: {"lskd": LSKDConfig(loss="dkd")},
    "mlkd-paper": lambda: {"mlkd": MLKDConfig(reading="paper")},
    "cc-kernel": lambda: {"cc": CCConfig(reading="kernel")},
}
# The loss of a first run, whose student (AB, FSP) or paraphraser (FT) the run with the method's loss begins with.
PRETRAINING = {"ab": "0*ce + ab", "fsp": "0*ce + fsp", "ft": "0*ce + paraphraser"}


def objective_of(method: str) -> ObjectiveConfig:
    """The loss of a method, by its name in ``SUMS``.

    Raises:
        ValueError: there is no such method.

    Example:
        >>> objective_of("rkd").weights
        {'ce': 1.0, 'rkd': 1.0}
    """
    if method not in SUMS:
        near = difflib.get_close_matches(method, SUMS, 3)
        meant = f"did you mean {' or '.join(near)}?" if near else f"expected one of {', '.join(SUMS)}"
        raise ValueError(f"method: got {method!r}, {meant}")
    return ObjectiveConfig(terms=SUMS[method], **OPTIONS.get(method, dict)())


def pretraining_of(method: str) -> ObjectiveConfig | None:
    """The loss of the run that a method begins with. None for a method that is one run."""
    objective = objective_of(method)
    return replace(objective, terms=PRETRAINING[method]) if method in PRETRAINING else None
