"""Distillation methods: each says how the student's loss and the critic's are made of the players and a batch.

A method is a dataclass of its options with two functions, ``student_loss(players, batch)`` and ``critic_loss(players,
batch)``; both answer (loss, numbers worth logging, detached). The trainer does the rest. One without ``critic_loss``
gets no critic.
"""

from .awm import AWM
from .dd2 import DD2
from .dmd2 import DMD2
from .dpo import DPO
from .ect import ECT
from .fdistill import FDistill
from .grpo import GRPO
from .inpo import InPO
from .mapo import MaPO
from .meanflow import MeanFlow
from .phased import PhasedDMD
from .raft import RAFT
from .scm import SCM
from .sim import SIM
from .smpo import SmPO

METHODS = {
    "dmd2": DMD2,
    "fdistill": FDistill,
    "sim": SIM,
    "phased": PhasedDMD,
    "meanflow": MeanFlow,
    "scm": SCM,
    "ect": ECT,
    "awm": AWM,
    "grpo": GRPO,
    "raft": RAFT,
    "dpo": DPO,
    "inpo": InPO,
    "smpo": SmPO,
    "mapo": MaPO,
    "dd2": DD2,
}

__all__ = [
    "AWM", "DD2", "DMD2", "DPO", "ECT", "GRPO", "METHODS", "RAFT", "SCM", "SIM", "FDistill", "InPO", "MaPO",
    "MeanFlow", "PhasedDMD", "SmPO",
]  # fmt: skip
