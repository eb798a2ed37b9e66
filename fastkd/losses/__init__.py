"""One nn.Module per method: its heads, its learnable parameters, its formula in words.

Every module returns a dict of named terms whose sum is the method's loss; weights between methods belong to the caller.
"""

from fastkd.losses.ckd import CKDLoss
from fastkd.losses.dcd import DCDLoss
from fastkd.losses.kd import KDLoss
from fastkd.losses.msdcrd import MSDCRDLoss
from fastkd.losses.pckd import PCKDLoss

__all__ = ["CKDLoss", "DCDLoss", "KDLoss", "MSDCRDLoss", "PCKDLoss"]
