"""Paths, denoisers, exact teachers, small networks and loaders: what every sampler and distiller sees."""

from . import paths
from .blocks import in_blocks
from .classifier import DigitClassifier, load_classifier
from .codec import Codec, Condition, decode, encode
from .denoiser import Denoiser
from .digits import digits
from .dit import DiT, DiTConfig
from .gaussian_fit import gaussian
from .gaussian_stats import GaussianStats
from .ideal import IdealDenoiser
from .load import load, save_checkpoint
from .masked import MaskedModel, load_masked
from .mixture import GaussianMixture
from .patch import patch
from .rewards import class_probability, ink
from .tarflow import TarFlow, TarFlowConfig, load_flow
from .unet import UNet, UNetConfig

__all__ = [
    "Codec",
    "Condition",
    "Denoiser",
    "DiT",
    "DiTConfig",
    "DigitClassifier",
    "GaussianMixture",
    "GaussianStats",
    "IdealDenoiser",
    "MaskedModel",
    "TarFlow",
    "TarFlowConfig",
    "UNet",
    "UNetConfig",
    "class_probability",
    "decode",
    "digits",
    "encode",
    "gaussian",
    "in_blocks",
    "ink",
    "load",
    "load_classifier",
    "load_flow",
    "load_masked",
    "patch",
    "paths",
    "save_checkpoint",
]
