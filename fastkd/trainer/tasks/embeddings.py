"""Embeddings: a row is the embedding of any input, no labels are read, and recall@1 is what counts."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fastkd.trainer.config import TrainConfig
from fastkd.trainer.data.loader import GlobalBatches, collate, fetch
from fastkd.trainer.models.encoder import EncoderModel
from fastkd.trainer.models.features import FeatureModel, ModelOutput
from fastkd.trainer.objective.objective import Objective, needing
from fastkd.trainer.objective.terms.registry import TERMS
from fastkd.trainer.precision import autocast
from fastkd.trainer.ranks import Ranks
from fastkd.trainer.signals import StopRequest
from fastkd.trainer.tasks.base import Rows, Task
from fastkd.trainer.tasks.classification import check_chunks, check_rows
from fastkd.trainer.tasks.recall import nearest_of, recall, same_label
from fastkd.validate import NO_LABEL


class Embeddings(Task):
    """A student encoder learns the teacher's embeddings: see ``fastkd.trainer.models.encoder.EncoderModel``.

    The data are any map-style data sets. A sample is an input, or (input, label) with an integer as the label. An input
    is a tensor, a dict of tensors, or a tuple of tensors. Training reads no labels, and the terms are those of features
    or of intermediate maps.

    ``recall_1`` and ``recall_5`` are those of ``fastkd.trainer.tasks.recall.recall`` on the evaluation set. With labels
    there, a neighbour is right if it has the same label. Samples whose label no other one has are left out; where there
    are any, ``left_out`` counts them. Without labels, a neighbour is right if it is the teacher's nearest neighbour of
    the sample. A teacher's own recall is then 1.
    """

    metric = "recall_1"
    title = "recall@1"

    def __init__(self, config: TrainConfig) -> None:
        super().__init__(config)
        self._taught: Tensor | None = None  # the teacher's embeddings of the evaluation set, once they were needed
        if reading := needing("classes", config.objective):
            known = ", ".join(sorted(name for name, term in TERMS.items() if not getattr(term, "needs_classes", True)))
            raise ValueError(
                f"objective.terms: got {reading[0]!r} with the task 'embeddings', which has no logits and no labels; "
                f"expected terms among {known}"
            )
        for name in ("unlabelled", "mixup", "cutmix"):
            if value := getattr(config.data, name):
                raise ValueError(f"data.{name}: got {value} with the task 'embeddings', which reads no labels")

    def collate(self, samples: Any) -> tuple[Any, Tensor]:
        """The inputs and their labels, which are -1 where there are none."""
        batch = collate(samples)
        if isinstance(batch, tuple | list) and len(batch) == 2 and _are_labels(batch[1]):
            return batch[0], batch[1]
        given = tuple(batch) if isinstance(batch, list) else batch
        tensors = [part for part in tree_leaves(given) if isinstance(part, Tensor)]
        return given, torch.full((len(tensors[0]) if tensors else 0,), NO_LABEL)

    def rows(self, batch: Any) -> int:
        return len(batch[1])

    def sample(self, dataset: Any) -> Any:
        return self.collate(fetch(dataset, [0, 1 % len(dataset)]))[0]

    def outputs(self, train_set: Any, eval_set: Any) -> int:
        """None: the embedding is what a classifier would be given."""
        return 0

    def wrap(self, model: nn.Module, names: dict[str, Any], optional: bool) -> EncoderModel:
        if names.get("feature_map") is not None:
            raise ValueError(f"feature_map: got {names['feature_map']!r} with the task 'embeddings', expected None")
        return EncoderModel(model, names.get("classifier"), taps=names.get("taps"))

    def check_fit(
        self,
        student: FeatureModel,
        objective: Objective,
        sample: Any,
        batches: GlobalBatches,
        train_set: Any,
        eval_set: Any,
        *,
        resumed: bool,
    ) -> None:
        check_rows(objective, batches)
        if objective.additions:
            raise ValueError(f"objective.terms: got a term that reads {objective.additions} with the task 'embeddings'")
        if isinstance(sample, Tensor):
            check_chunks(self.config, student, sample, batches)
        elif self.config.chunks > 1:
            kind = type(sample).__name__
            raise ValueError(f"chunks: got {self.config.chunks} with inputs of type {kind}, expected 1, or tensors")
        if len(eval_set) < 2:
            raise ValueError(f"eval_data: got {len(eval_set)} samples, expected at least two, which can be neighbours")

    def forward(
        self,
        student: Callable[[Any], ModelOutput],
        teach: Callable[[Any], ModelOutput | None],
        batch: Any,
        wanted: Collection[str],
    ) -> Rows:
        given, labels = batch
        teacher = teach(given)
        return Rows(student(given), teacher, torch.full_like(labels, NO_LABEL))

    @torch.no_grad()
    def evaluate(
        self,
        model: nn.Module,
        loader: Any,
        device: torch.device,
        precision: str,
        ranks: Ranks,
        *,
        stop: StopRequest | None = None,
        per_class: dict[str, Any] | None = None,
    ) -> dict[str, float]:
        found = self._embed(model, loader, device, precision, ranks, stop)
        if found is None:
            return {"recall_1": 0.0, "recall_5": 0.0}
        embeddings, labels = found
        right = same_label(labels)
        if bool((labels == NO_LABEL).all()):
            right = nearest_of(self._of_teacher(loader, device, precision, ranks))
        values, left_out = recall(embeddings, right, ranks)
        if left_out == len(labels):
            raise ValueError("eval_data: got no label twice, expected samples of one class, or no labels at all")
        named = {f"recall_{k}": value for k, value in values.items()}
        return {**named, "left_out": float(left_out)} if left_out else named

    def _of_teacher(self, loader: Any, device: torch.device, precision: str, ranks: Ranks) -> Tensor:
        """The teacher's embeddings of the evaluation set, computed once."""
        if self._taught is None:
            if self.teacher is None:
                raise ValueError("eval_data: got samples without labels and no teacher, expected (input, label)")
            found = self._embed(self.teacher, loader, device, precision, ranks, None)
            assert found is not None
            self._taught = found[0]
        return self._taught

    def _embed(
        self,
        model: nn.Module,
        loader: Any,
        device: torch.device,
        precision: str,
        ranks: Ranks,
        stop: StopRequest | None,
    ) -> tuple[Tensor, Tensor] | None:
        """The embeddings [N, D] in float32 and the labels [N] of all ranks' samples, in their order.

        None once ``stop`` is requested on any rank.
        """
        ranks.broadcast_buffers(model)
        model.eval()
        found, labels, stopped = [torch.empty(0, 0)], [torch.empty(0, dtype=torch.long)], False
        for batch in loader:
            if stopped := stop is not None and bool(stop.signal):
                break
            given, label = self.to(batch, device)
            with autocast(device, precision):
                found.append(model(given).features.float().cpu())
            labels.append(label.cpu().long())
        own = torch.cat(found[1:] or found), torch.cat(labels)
        parts = ranks.gather((*own, stopped))
        if any(part[2] for part in parts):
            return None
        # Rank r has the samples r, r + W, r + 2 W and so on.
        count = sum(len(part[1]) for part in parts)
        width = max(part[0].shape[1] for part in parts)
        embeddings, every = torch.empty(count, width), torch.empty(count, dtype=torch.long)
        for rank, (rows, numbers, _) in enumerate(parts):
            embeddings[rank :: ranks.world_size], every[rank :: ranks.world_size] = rows, numbers
        return embeddings.to(device), every.to(device)


def _are_labels(part: Any) -> bool:
    """Whether the second part of a batch is a whole number for each sample."""
    return isinstance(part, Tensor) and part.ndim == 1 and not part.is_floating_point() and part.dtype != torch.bool
