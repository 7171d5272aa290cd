"""Distillation methods: each says how the student's loss and the critic's are made of the players and a batch.

A method is a dataclass of its options with two functions, ``student_loss(players, batch)`` and ``critic_loss(players,
batch)``; both answer (loss, numbers worth logging, detached). The trainer does the rest. One without ``critic_loss``
gets no critic.
"""

from .dmd2 import DMD2
from .ect import ECT
from .fdistill import FDistill
from .meanflow import MeanFlow
from .phased import PhasedDMD
from .scm import SCM
from .sim import SIM

METHODS = {
    "dmd2": DMD2,
    "fdistill": FDistill,
    "sim": SIM,
    "phased": PhasedDMD,
    "meanflow": MeanFlow,
    "scm": SCM,
    "ect": ECT,
}

__all__ = ["DMD2", "ECT", "METHODS", "SCM", "SIM", "FDistill", "MeanFlow", "PhasedDMD"]
