"""How good samples are, and how fast: distances between samples, memorising, timing, pictures."""

from . import bench, images
from .bench import compare, environment
from .frechet import frechet_distance
from .images import grid, save_folder, save_npz, save_png, tile, to_uint8
from .kid import kernel_distance
from .mmd import Estimate, kernel_mmd, rbf_mmd
from .moments import Gaussian, Stats, gaussian_stats, stream_stats
from .neighbours import Memorisation, memorisation, nearest
from .sliced import sliced_wasserstein

__all__ = [
    "Estimate",
    "Gaussian",
    "Memorisation",
    "Stats",
    "bench",
    "compare",
    "environment",
    "frechet_distance",
    "gaussian_stats",
    "grid",
    "images",
    "kernel_distance",
    "kernel_mmd",
    "memorisation",
    "nearest",
    "rbf_mmd",
    "save_folder",
    "save_npz",
    "save_png",
    "sliced_wasserstein",
    "stream_stats",
    "tile",
    "to_uint8",
]
