"""What a type checker must see of the losses. mypy reads this file with the package (see pyproject.toml); none runs it.

An ignored error that a checker does not find is itself an error (``warn_unused_ignores``).
"""

from typing import assert_type

from torch import Tensor

from fastkd import CKDLoss, DCDLoss, InfoNCELoss, KDLoss, MSDCRDLoss, SupConLoss, dcd_loss, total_loss


def uses(a: Tensor, b: Tensor) -> None:
    """Calls that must pass, and options that must not."""
    for loss in (CKDLoss(), DCDLoss(8, 16), InfoNCELoss(), KDLoss(), SupConLoss()):
        assert_type(loss(a, b), dict[str, Tensor])
    assert_type(total_loss(DCDLoss(8, 16, backend="blocked", group="local")(a, b)), Tensor)
    dcd_loss(a, b, 3.0, consistency="both")  # type: ignore[arg-type]
    DCDLoss(8, 16, backend="fast")  # type: ignore[arg-type]
    CKDLoss(group="mine")  # type: ignore[arg-type]
    MSDCRDLoss(8, 16, positives="all")  # type: ignore[arg-type]
