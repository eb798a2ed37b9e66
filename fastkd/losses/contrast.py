"""InfoNCE and supervised contrast as modules (arXiv 1807.03748, 2004.11362)."""

from torch import Tensor

from fastkd import backends
from fastkd.distributed.group import Group, check_group
from fastkd.functional.contrast import info_nce_loss, sup_con_loss
from fastkd.losses.base import LossModule
from fastkd.validate import Backend, check_bool, check_temperature


class _ContrastLoss(LossModule):
    """What both have: a fixed temperature, cosines or dot products, the ranks and the backend."""

    def __init__(self, temperature: float, normalize: bool, group: Group, backend: Backend | None) -> None:
        super().__init__()
        check_temperature(temperature)
        check_bool("normalize", normalize)
        check_group(group)
        backends.check_name(backend)
        self.temperature, self.normalize, self.group, self.backend = temperature, normalize, group, backend


class InfoNCELoss(_ContrastLoss):
    r"""InfoNCE with in-batch negatives as a module: :func:`fastkd.info_nce_loss` at a fixed temperature.

    .. code-block:: text

        info_nce = mean_i -log softmax_j(cos(query_i, key_j) / temperature)_i

    For a learnable temperature, as CLIP has it, call the function with a tensor.

    Source: arXiv 1807.03748, eq. 4, with cosines as the scores.

    Args:
        temperature: divides the cosines; in [1e-4, 1e4]. The paper has none; 0.07 is usual (MoCo, CLIP's first value).
        normalize: ``False`` takes dot products in the place of cosines.
        group, backend: see :func:`fastkd.dcd_loss`.

    Raises:
        TypeError, ValueError: ``temperature`` is not a number in [1e-4, 1e4], ``normalize`` is no bool, or ``group`` or
            ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd import InfoNCELoss
        >>> query, key = torch.randn(6, 16, requires_grad=True), torch.randn(6, 16)
        >>> terms = InfoNCELoss(temperature=0.1)(query, key)
        >>> terms["info_nce"].backward()
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        normalize: bool = True,
        group: Group = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(temperature, normalize, group, backend)

    def forward(self, query: Tensor, key: Tensor, sample_weight: Tensor | None = None) -> dict[str, Tensor]:
        """Returns ``{"info_nce": loss}``, 0-dim. Key i is the positive of query i.

        query, key: [n, D], both in float64, float32, bf16 or fp16. sample_weight: [n], >= 0.
        """
        loss = info_nce_loss(
            query,
            key,
            temperature=self.temperature,
            normalize=self.normalize,
            sample_weight=sample_weight,
            group=self.group,
            backend=self.backend,
        )
        return {"info_nce": loss}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, normalize={self.normalize}"


class SupConLoss(_ContrastLoss):
    r"""Supervised contrast as a module: :func:`fastkd.sup_con_loss` at a fixed temperature.

    .. code-block:: text

        sup_con = mean_i [logsumexp_{a != i} x_ia - mean_{p != i of i's label} x_ip]
        x_ia    = cos(f_i, f_a) / temperature

    The mean is over the rows i that have a positive.

    Source: arXiv 2004.11362, eq. 2, without its outer factor of the temperature.

    Args:
        temperature: divides the cosines; in [1e-4, 1e4]. The paper uses 0.1.
        exclude_self: ``False`` counts row i among its own positives and candidates.
        normalize: ``False`` takes dot products in the place of cosines.
        group, backend: see :func:`fastkd.dcd_loss`.

    Raises:
        TypeError, ValueError: ``temperature`` is not a number in [1e-4, 1e4], an option is no bool, or ``group`` or
            ``backend`` is unknown.

    Example:
        >>> import torch
        >>> from fastkd import SupConLoss
        >>> features, labels = torch.randn(6, 16, requires_grad=True), torch.arange(6) % 2
        >>> terms = SupConLoss()(features, labels)
        >>> terms["sup_con"].backward()
    """

    def __init__(
        self,
        temperature: float = 0.1,
        *,
        exclude_self: bool = True,
        normalize: bool = True,
        group: Group = None,
        backend: Backend | None = None,
    ) -> None:
        super().__init__(temperature, normalize, group, backend)
        check_bool("exclude_self", exclude_self)
        self.exclude_self = exclude_self

    def forward(self, features: Tensor, labels: Tensor, sample_weight: Tensor | None = None) -> dict[str, Tensor]:
        """Returns ``{"sup_con": loss}``, 0-dim.

        features: [n, D] in float64, float32, bf16 or fp16. labels: [n], int64. sample_weight: [n], >= 0.
        """
        loss = sup_con_loss(
            features,
            labels,
            temperature=self.temperature,
            exclude_self=self.exclude_self,
            normalize=self.normalize,
            sample_weight=sample_weight,
            group=self.group,
            backend=self.backend,
        )
        return {"sup_con": loss}

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, exclude_self={self.exclude_self}, normalize={self.normalize}"
