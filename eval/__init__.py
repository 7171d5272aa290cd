"""How good samples are, and how fast: distances between samples, memorising, timing, pictures.

Numbers for images are made in three steps, each of which stands alone:

    images = open_images("out/")                      sources.py    bytes, one size, broken ones named
    seen = see(images, extractor("inception"))        seen.py       features and moments, over all ranks
    (fd,) = measure(seen, reference_of("stats.npz", ...), ["fd"])   measure.py   a ``Number`` with its ``Protocol``

What is built on top joins at these seams:

- Samples that are made rather than found are an ``Images``: a name, a count, read(i) -> bytes (C, H, W), and `seeds`,
  `rounding` and `labels`, which go into the protocol of every number. Whatever writes shards gives one that reads them.
- ``ranks.start``, ``share`` and ``gather_rows`` are how work is divided; shares are runs of neighbours, so what is
  gathered stands in the order of one process.
- A metric is a line in ``measure.METRICS``; a way of resizing one in ``resize.METHODS``; an extractor is any
  ``Extractor`` (a function from floats in [0, 255] to features, with the hash of its weights).
- Reports take ``Number.record()`` (flat: metric, value, stderr, settings, protocol) and compare by ``require_same`` or
  ``<``, which refuse what was not measured alike.
- A verb of ``fewstep eval`` is a line in ``cli/eval.py``; ``cli/eval_arguments.py`` has the flags they share.

>>> judge = extractor("digits")
>>> fd, *_ = measure(see("digits:held_out", judge), reference_of("digits:train", judge), ["fd", "prdc"])
>>> fd.protocol.line().split()[:3]
['features=digits', 'weights=5bf3663b4408', 'resize=none']
"""

from . import bench, images
from .bench import compare, environment
from .by_class import by_class
from .cmmd import cmmd
from .fd_infinity import fd_infinity
from .features import Extractor, Features, extractor
from .frechet import frechet_distance
from .images import grid, save_folder, save_npz, save_png, tile, to_uint8
from .inception_score import inception_score
from .jackknife import frechet_jackknife, interval, jackknife
from .kid import kernel_distance
from .measure import measure
from .mmd import Estimate, kernel_mmd, rbf_mmd
from .moments import Gaussian, Stats, gaussian_stats, stream_stats
from .neighbours import Memorisation, memorisation, nearest
from .prdc import PRDC, prdc
from .protocol import Number, Protocol, require_same
from .seen import Seen, reference_of, see
from .sliced import sliced_wasserstein
from .sources import Images, open_images
from .statistics_files import Statistics, read_statistics, write_statistics

__all__ = [
    "PRDC",
    "Estimate",
    "Extractor",
    "Features",
    "Gaussian",
    "Images",
    "Memorisation",
    "Number",
    "Protocol",
    "Seen",
    "Statistics",
    "Stats",
    "bench",
    "by_class",
    "cmmd",
    "compare",
    "environment",
    "extractor",
    "fd_infinity",
    "frechet_distance",
    "frechet_jackknife",
    "gaussian_stats",
    "grid",
    "images",
    "inception_score",
    "interval",
    "jackknife",
    "kernel_distance",
    "kernel_mmd",
    "measure",
    "memorisation",
    "nearest",
    "open_images",
    "prdc",
    "rbf_mmd",
    "read_statistics",
    "reference_of",
    "require_same",
    "save_folder",
    "save_npz",
    "save_png",
    "see",
    "sliced_wasserstein",
    "stream_stats",
    "tile",
    "to_uint8",
    "write_statistics",
]
