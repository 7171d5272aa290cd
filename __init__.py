"""fewstep: good samples from diffusion and flow models in few steps.

Nothing heavy is imported here; take what you need from ``fewstep.models``, ``fewstep.samplers``,
``fewstep.eval`` and ``fewstep.distill``.
"""

from .version import __version__

__all__ = ["__version__"]
