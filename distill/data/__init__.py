"""Data for teachers and students: one seam, ``open_data``, and one file for each kind of source behind it."""

from .batches import Data, DataRecipe, as_float, open_data, open_source
from .mixture import SIDE, SPACING, STD, grid_means, grid_mixture, mixture_samples
from .source import Source

__all__ = [
    "SIDE",
    "SPACING",
    "STD",
    "Data",
    "DataRecipe",
    "Source",
    "as_float",
    "grid_means",
    "grid_mixture",
    "mixture_samples",
    "open_data",
    "open_source",
]
