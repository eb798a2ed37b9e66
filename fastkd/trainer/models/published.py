"""The published weights of torchvision by their names."""

from __future__ import annotations

from typing import Any


def torchvision_weights(name: str) -> Any:
    """The published weights of torchvision that ``NAME`` or ``NAME.WEIGHTS`` means. ValueError if there are none."""
    import torchvision

    model, _, tag = name.partition(".")
    published = torchvision.models.get_model_weights(model)
    if tag and tag not in published.__members__:
        raise ValueError(f"model.name: got 'torchvision:{name}', expected weights among {list(published.__members__)}")
    return published[tag] if tag else published.DEFAULT
