"""What some terms need of a sample beside its image and its label."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd.losses.relations.crd_indices import CRDIndices, Mode
from fastkd.trainer.data.labels import labels_of, normalization_of
from fastkd.trainer.data.strong import strong_views
from fastkd.trainer.rng import mix_seed
from fastkd.validate import NO_LABEL, check_choice

# "strong_teacher" is made of "strong".
ADDITIONS = ("index", "contrast_index", "strong", "strong_teacher")


class Additions:
    """Makes what the terms of a run ask for, for the samples of a batch:

    ============== ================= ==================================================================================
    index          [B], int64        the number of each sample in the training set
    contrast_index [B, K + 1], int64 the numbers of the samples that CRD contrasts it with, drawn by ``CRDIndices``
    strong         [B, C, H, W]      the image read once more, with new random numbers, and then changed strongly
    ============== ================= ==================================================================================

    ``features``, a function of the epoch and the numbers of samples, gives a further one, ``teacher_features`` [B, D].

    A term that asks for ``strong`` gets the student's output for these images, and with ``strong_teacher`` it gets the
    teacher's.

    What is drawn here depends on the seed, the epoch and the sample. So it is the same for every number of ranks and of
    workers, and in a resumed run.

    A sample without a label (-1) is taken as the only one of its class: all others are contrasted with it.

    Raises:
        ValueError: a name is unknown, or all samples have one label.
        TypeError: ``contrast_index`` of a dataset that does not expose its labels.
    """

    def __init__(
        self,
        names: Sequence[str],
        dataset: Any,
        negatives: int = 16384,
        mode: Mode = "exact",
        features: Callable[[int, Sequence[int]], Tensor] | None = None,
    ) -> None:
        for name in names:
            check_choice("additions", name, ADDITIONS)
        self.names, self.normalization = tuple(names), normalization_of(dataset)
        self.features = features
        self.draw: CRDIndices | None = None
        if "contrast_index" in names:
            try:
                labels = labels_of(dataset).to("cpu", torch.int64)
            except TypeError:
                raise TypeError(
                    f"train_data: {type(dataset).__name__} has neither 'labels' nor 'targets', expected one of them: "
                    "the term 'crd' draws samples of other classes by their numbers"
                ) from None
            own_class = labels.max() + 1 + torch.arange(len(labels))
            self.draw = CRDIndices(torch.where(labels == NO_LABEL, own_class, labels), negatives, mode)

    def __call__(
        self, indices: Sequence[int], seed: int, epoch: int, read_again: Callable[[], Tensor]
    ) -> dict[str, Tensor]:
        """The tensors by their names; ``read_again`` gives the images of these samples once more."""
        found = {}
        if "index" in self.names:
            found["index"] = torch.as_tensor(indices)
        if self.draw is not None:
            generator = torch.Generator()
            drawn = [self.draw(i, generator.manual_seed(mix_seed(seed, epoch, i))) for i in indices]
            found["contrast_index"] = torch.stack(drawn)
        if "strong" in self.names:
            images = read_again()
            found["strong"] = strong_views(images, self.normalization, [mix_seed(seed, epoch, i, 1) for i in indices])
        if self.features is not None:
            found["teacher_features"] = self.features(epoch, indices)
        return found


def stand_ins(names: Sequence[str], images: Tensor, samples: int, negatives: int) -> dict[str, Tensor]:
    """Additions of the right shapes for these images, where a step is to be measured and nothing learnt."""
    rows, device = len(images), images.device
    made = {
        "index": torch.arange(rows, device=device) % samples,
        "contrast_index": torch.randint(samples, (rows, negatives + 1), device=device),
        "strong": images,
    }
    return {name: value for name, value in made.items() if name in names}
