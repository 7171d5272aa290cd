"""Paths, denoisers, exact teachers, small networks and loaders: what every sampler and distiller sees."""

from . import paths
from .denoiser import Denoiser
from .ideal import IdealDenoiser
from .mixture import GaussianMixture

__all__ = ["Denoiser", "GaussianMixture", "IdealDenoiser", "paths"]
