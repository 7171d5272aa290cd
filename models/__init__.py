"""Paths, denoisers, exact teachers, small networks and loaders: what every sampler and distiller sees."""

from . import paths
from .blocks import in_blocks
from .classifier import DigitClassifier, load_classifier
from .denoiser import Denoiser
from .digits import digits
from .dit import DiT
from .ideal import IdealDenoiser
from .load import load, save_checkpoint
from .mixture import GaussianMixture
from .unet import UNet

__all__ = [
    "Denoiser",
    "DiT",
    "DigitClassifier",
    "GaussianMixture",
    "IdealDenoiser",
    "UNet",
    "digits",
    "in_blocks",
    "load",
    "load_classifier",
    "paths",
    "save_checkpoint",
]
