"""One nn.Module per method, with the method's heads and learnable parameters.

Every module returns a dict of named terms, each 0-dim in float32 (float64 for float64 inputs). Their sum is the loss of
the method (:func:`total_loss`). The weights between methods belong to the caller. The classical methods are
in ``logits``, ``relations`` and ``maps``, by what they read.
"""

from fastkd.losses.base import total_loss
from fastkd.losses.ckd import CKDLoss
from fastkd.losses.contrast import InfoNCELoss, SupConLoss
from fastkd.losses.dcd import DCDLoss
from fastkd.losses.kd import KDLoss
from fastkd.losses.logits.ctkd import CTKDLoss
from fastkd.losses.logits.dist import DISTLoss
from fastkd.losses.logits.dkd import DKDLoss
from fastkd.losses.logits.ipwd import IPWDLoss
from fastkd.losses.logits.lskd import LSKDLoss
from fastkd.losses.logits.mlkd import MLKDLoss
from fastkd.losses.logits.wsld import WSLDLoss
from fastkd.losses.maps.ab import ABLoss
from fastkd.losses.maps.at import ATLoss
from fastkd.losses.maps.fitnet import FitNetLoss
from fastkd.losses.maps.fsp import FSPLoss
from fastkd.losses.maps.ft import FTLoss, Paraphraser
from fastkd.losses.maps.norm import NORMLoss
from fastkd.losses.maps.nst import NSTLoss
from fastkd.losses.maps.ofd import OFDLoss, activation_margin
from fastkd.losses.maps.reviewkd import ReviewKDLoss
from fastkd.losses.maps.simkd import SimKDLoss
from fastkd.losses.maps.srrl import SRRLLoss
from fastkd.losses.maps.vid import VIDLoss
from fastkd.losses.msdcrd import MSDCRDLoss
from fastkd.losses.pckd import PCKDLoss
from fastkd.losses.relations.cc import CCLoss
from fastkd.losses.relations.crd import CRDLoss
from fastkd.losses.relations.crd_indices import CRDIndices
from fastkd.losses.relations.pkt import PKTLoss
from fastkd.losses.relations.rkd import RKDLoss
from fastkd.losses.relations.sp import SPLoss

__all__ = [
    "ABLoss",
    "ATLoss",
    "CCLoss",
    "CKDLoss",
    "CRDIndices",
    "CRDLoss",
    "CTKDLoss",
    "DCDLoss",
    "DISTLoss",
    "DKDLoss",
    "FSPLoss",
    "FTLoss",
    "FitNetLoss",
    "IPWDLoss",
    "InfoNCELoss",
    "KDLoss",
    "LSKDLoss",
    "MLKDLoss",
    "MSDCRDLoss",
    "NORMLoss",
    "NSTLoss",
    "OFDLoss",
    "PCKDLoss",
    "PKTLoss",
    "Paraphraser",
    "RKDLoss",
    "ReviewKDLoss",
    "SPLoss",
    "SRRLLoss",
    "SimKDLoss",
    "SupConLoss",
    "VIDLoss",
    "WSLDLoss",
    "activation_margin",
    "total_loss",
]
