"""Paths, denoisers, exact teachers, small networks and loaders: what every sampler and distiller sees."""

from . import paths
from .denoiser import Denoiser

__all__ = ["Denoiser", "paths"]
