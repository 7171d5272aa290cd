"""Any solver of ours in any diffusers pipeline, unchanged: ``FewstepScheduler``.

    from fewstep.samplers import FewstepScheduler
    pipe.scheduler = FewstepScheduler.from_config(
        pipe.scheduler.config, solver="deis", solver_order=3, timestep_spacing="logsnr")
    image = pipe("a photo of a fox", num_inference_steps=8).images[0]

A pipeline that was saved with it names this module, and diffusers imports no module because a folder names it:

    from fewstep.samplers import FewstepScheduler                     # this line first, and all is well
    pipe = DiffusionPipeline.from_pretrained(folder)

    pipe = DiffusionPipeline.from_pretrained(folder, scheduler=...)   # or any other scheduler in its place

>>> scheduler = FewstepScheduler(prediction_type="flow_prediction", shift=3.0, solver="dpmpp", solver_order=2)
>>> scheduler.set_timesteps(4)
>>> scheduler.timesteps.tolist()
[1000.0, 900.0, 750.0, 500.0]
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping, Sequence
from types import EllipsisType
from typing import Any

import numpy as np
import torch

# Whoever loads a pipeline looks the two mixins up in this module: their names must stay in it.
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput

from ..models.denoiser import convert
from ..models.paths import coefficient
from ..models.scheduler_meaning import alphas_cumprod, betas, family, is_edm, network
from . import grids
from . import scheduler_config as meaning
from .catalogue import find, solvers
from .noise import check_ids
from .stepper import Noise, Stepper
from .table import Table

TABLE_FILE = "table.json"


class FewstepScheduler(SchedulerMixin, ConfigMixin):
    """Runs the table of any solver inside a diffusers pipeline. Keys are named as diffusers names them:

    Args:
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, rescale_betas_zero_snr: the network's
            noise levels, for all but flows.
        prediction_type: ``epsilon``, ``v_prediction``, ``sample`` or ``flow_prediction``. ``from_config`` recognises
            the config of a flow scheduler, which has no such key.
        solver, solver_order, solver_options: a solver of ``fewstep.samplers`` by name, its order (or nodes) if it has
            one, and any other options of it.
        timestep_spacing: ``trailing``, ``linspace``, ``leading`` as diffusers has them, or a grid of ours
            (``logsnr``, ``karras``, ``vp``, ...), which the config holds under ``grid``, so that diffusers' schedulers
            can read what they are handed back. ``use_karras_sigmas`` and its like are understood.
        final_sigmas_type: ``zero``, or ``sigma_min`` to stop at index 0.
        shift, use_dynamic_shifting, time_shift_type, shift_terminal, shift_custom: of a flow's times. Times made here
            and the ``sigmas`` that a pipeline passes are shifted (those only if ``shift_custom``), ``timesteps`` never.
        sigma_data, sigma_min, sigma_max: of a network in EDM's preconditioning, on EDM's path; None is another one.
        clip_sample, clip_sample_range: whether every estimate of x0 is clipped. ``thresholding`` is understood too.
        table: a ``Table``, its file or its content, in place of solver and grid. Saved beside the config.
        seed: of the noise of stochastic solvers; see ``set_noise``.

    The network is called at ``timesteps[i]``: for solvers that call it more than once a step that is every call. The
    pipeline's ``sample`` is where the network was called; if the pipeline changes it (inpainting does), so be it.
    """

    _compatibles = [
        "DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LMSDiscreteScheduler", "EulerDiscreteScheduler",
        "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
        "DEISMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler", "LCMScheduler", "TCDScheduler",
        "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "EDMEulerScheduler",
        "EDMDPMSolverMultistepScheduler",
    ]  # fmt: skip

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Sequence[float] | None = None,
        rescale_betas_zero_snr: bool = False,
        prediction_type: str = "epsilon",
        solver: str = "abm",
        solver_order: int = 3,
        solver_options: Mapping[str, Any] | None = None,
        timestep_spacing: str = "trailing",
        grid: str | None = None,
        final_sigmas_type: str = "zero",
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        time_shift_type: str = "exponential",
        shift_terminal: float | None = None,
        shift_custom: bool = True,
        sigma_data: float | None = None,
        sigma_min: float = 0.002,
        sigma_max: float = 80.0,
        clip_sample: bool = False,
        clip_sample_range: float = 1.0,
        table: Table | str | Mapping[str, Any] | None = None,
        seed: int | None = None,
    ):
        if timestep_spacing not in meaning.SPACINGS:
            self.register_to_config(timestep_spacing="trailing", grid=grid or timestep_spacing)
        if final_sigmas_type not in ("zero", "sigma_min"):
            raise ValueError(f"final_sigmas_type must be 'zero' or 'sigma_min', got {final_sigmas_type!r}")
        find(solver)
        meaning.grid_name(self.config)
        family(self.config)
        self._path, self._predicts = network(self.config)
        self._noise: Noise | None = seed
        self._ids: torch.Tensor | None = None
        self._given = None if table is None else _as_table(table)
        if self._given is not None:
            self._stepper_of(self._given)  # of this network's path, or ValueError
            self.register_to_config(table=json.loads(self._given.to_json()))
        self.betas = torch.as_tensor(betas(self.config), dtype=torch.float32)
        self.alphas_cumprod = torch.as_tensor(alphas_cumprod(self.config), dtype=torch.float32)
        # theirs counts the data's variance as 1
        self.init_noise_sigma = (sigma_max**2 + 1) ** 0.5 if is_edm(self.config) else 1.0
        self.num_inference_steps: int | None = None
        self._order: int | None = None
        self._table: Table | None = None
        self._forget()
        levels = self._training_times()
        self.timesteps = self._counted(levels)
        self.sigmas = self._levels(levels)

    # --- what pipelines read ------------------------------------------------------------------------------------

    @property
    def order(self) -> int:
        """Calls a step once the solver has started; progress bars and image-to-image starts count with it."""
        if self._order is None:
            given = self._given
            self._order = (
                meaning.calls_a_step(self.config, self._path)
                if given is None
                else max(1, round(given.calls / (given.times.shape[-1] - 1)))
            )
        return self._order

    @property
    def step_index(self) -> int | None:
        """How many entries of ``timesteps`` are done, None before the first step."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Where in ``timesteps`` the pipeline said that it begins."""
        return self._begin_index

    @property
    def noise(self) -> Noise | None:
        """What ``set_noise`` was told last, or the config's ``seed``."""
        return self._noise

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    # --- before the loop ----------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
        original_inference_steps: int | None | EllipsisType = ...,
    ) -> None:
        """Make the table and forget the last run; the grid follows ``scheduler_config.times``.

        ``timesteps`` are used as they are, ``sigmas`` are shifted on a flow (Flux passes them so), by ``mu`` where the
        config says so. A table that was given knows its times: then only the number of steps is checked.
        ``original_inference_steps`` is what pipelines of LCMs pass, be it None: their times are chosen from so many,
        and ``step`` returns its estimate of x0 beside the sample.
        """
        pairs, original = original_inference_steps is not ..., original_inference_steps
        original = None if isinstance(original, EllipsisType) else original
        table = self.table_for(num_inference_steps, sigmas, timesteps, mu, original)
        self._forget()
        self._pairs = pairs
        self._table, self._stepper = table, self._stepper_of(table).to(device)
        self.num_inference_steps = table.times.shape[-1] - 1
        at = table.t[:, 0]
        self.timesteps = self._counted(at).to(device)
        self.sigmas = self._levels(np.append(at, table.times.reshape(-1)[-1]))
        self.set_noise(self._noise, self._ids)

    def table_for(
        self,
        num_inference_steps: int | None = None,
        sigmas: Sequence[float] | None = None,
        timesteps: Sequence[float] | None = None,
        mu: float | None = None,
        original_inference_steps: int | None = None,
    ) -> Table:
        """The table that ``set_timesteps`` would run."""
        if self._given is not None:
            if timesteps is not None:
                raise ValueError("timesteps cannot be given beside a table, which has its own")
            n = meaning.steps_of(num_inference_steps, sigmas)
            steps = self._given.times.shape[-1] - 1
            if n not in (steps, self._given.calls):
                raise ValueError(
                    f"num_inference_steps must be {steps}, the table's own number of steps, got {n}"
                )
            return self._given
        grid = meaning.times(
            self.config, self._path, num_inference_steps, sigmas, timesteps, mu, original_inference_steps
        )
        return meaning.build(self.config, self._path, grid)

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at ``timesteps[begin_index]``: the solver starts there anew, its order rising from one."""
        if self._table is None:
            raise ValueError("set_timesteps must be called before set_begin_index")
        whole = isinstance(begin_index, (int, np.integer)) and not isinstance(begin_index, bool)
        if not whole or not 0 <= begin_index < self._table.calls:
            raise ValueError(
                f"begin_index must be an integer in 0 .. {self._table.calls - 1}, got {begin_index!r}"
            )
        if begin_index or self._stepper.done:
            self._stepper = self._stepper_of(self._from(int(begin_index))).to(self.timesteps.device)
        self._begin_index, self._step_index = int(begin_index), None

    def set_noise(self, noise: Noise | None, ids: torch.Tensor | None = None) -> None:
        """What stochastic solvers draw from where the pipeline passes no generator (SD3, Flux and DiT never do).

        A seed: noise that depends on the seed, a sample's id (0 .. batch - 1 unless given) and the step alone. A
        generator, or a list with one an image. None: a seed from torch's global generator in every ``set_timesteps``.
        """
        generators = noise if isinstance(noise, (list, tuple)) else [noise]
        kinds = {type(g) for g in generators}
        seed = isinstance(noise, int) and not isinstance(noise, bool)
        if not (noise is None or seed or kinds == {torch.Generator}):
            raise TypeError(f"noise must be a seed, a torch.Generator, a list of them or None, got {noise!r}")
        self._ids = None if ids is None else check_ids(ids)
        self._noise = self._seed = noise
        if noise is None and self._table is not None and self._table.stochastic:
            self._seed = int(torch.randint(2**62, (1,))[0])
        if self._stepper is not None:
            self._stepper.ids = self._ids

    # --- the loop -----------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """What the network gets: the sample as it is, and in EDM's preconditioning c_in of it."""
        if not is_edm(self.config):
            return sample
        t, data = float(self._table.t[self._settled(timestep), 0]), self.config.sigma_data
        return sample / (t * t + data * data) ** 0.5

    def step(
        self,
        model_output: torch.Tensor,
        timestep: float | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[torch.Tensor]:
        """From the network's answer at ``sample`` to where it is to be called next; at the end, the result.

        Steps are counted: ``timestep`` is looked at only in a first step, to see which entry of ``timesteps`` it is,
        where the pipeline has cut them short without ``set_begin_index``.
        """
        row = self._step_index = self._settled(timestep)
        if self._stepper.done == self._stepper.calls:
            raise ValueError(f"all {self._stepper.calls} steps are done: set_timesteps begins anew")
        channels = sample.shape[1]
        if model_output.shape[1] == 2 * channels and self._learned_variance:
            model_output = model_output[:, :channels]
        noise = self._seed if generator is None else generator
        following = self._stepper.step(model_output, sample, noise)
        self._step_index += 1
        if return_dict:
            return SchedulerOutput(prev_sample=following)
        return (following, self._estimate(row, model_output, sample)) if self._pairs else (following,)

    def _settled(self, timestep: Any) -> int:
        """The entry of ``timesteps`` that is next; a pipeline may have cut them short without a word."""
        if self._stepper is None:
            raise ValueError("set_timesteps must be called before step")
        if self._step_index is not None:
            return self._step_index
        if self._begin_index is None and not torch.compiler.is_compiling():
            begin = _place(timestep, self.timesteps)
            if begin:
                self.set_begin_index(begin)
        return self._begin_index or 0

    def _estimate(self, row: int, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        p, q = convert(self._path, float(self._table.t[row, 0]), self._predicts, "x0")
        return p * sample + q * model_output

    # --- noising ------------------------------------------------------------------------------------------------

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """alpha(t) x0 + sigma(t) noise, t in the network's units, one for all or one a sample."""
        alpha, sigma = self._alpha_sigma(timesteps, original_samples)
        return alpha * original_samples + sigma * noise.to(original_samples.dtype)

    def scale_noise(
        self, sample: torch.Tensor, timestep: float | torch.Tensor, noise: torch.Tensor | None = None
    ) -> torch.Tensor:
        """``add_noise``, as flow schedulers call it."""
        if noise is None:
            raise ValueError("noise must be a tensor of standard normals like sample, got None")
        return self.add_noise(sample, noise, torch.as_tensor(timestep))

    def get_velocity(
        self, sample: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """What a v-network is trained to answer: alpha noise - sigma x0; on a flow, noise - x0."""
        if self._path.name == "flow":
            return noise - sample
        alpha, sigma = self._alpha_sigma(timesteps, sample)
        return alpha * noise - sigma * sample

    def _alpha_sigma(self, timesteps: torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        t = meaning.time_of(self.config, self._path, torch.as_tensor(timesteps).to(like.device).double())
        return coefficient(self._path.alpha(t), like), coefficient(self._path.sigma(t), like)

    # --- the table ----------------------------------------------------------------------------------------------

    def _counted(self, t: np.ndarray) -> torch.Tensor:
        """Times as the network counts them."""
        return torch.as_tensor(meaning.network_time(self.config, self._path, t), dtype=torch.float32)

    def _forget(self) -> None:
        self._stepper: Stepper | None = None
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._seed: Noise | None = None
        self._pairs = False

    def _stepper_of(self, table: Table) -> Stepper:
        how = {"precond": "edm", "sigma_data": self.config.sigma_data} if is_edm(self.config) else {}
        return Stepper(table, self._path, self._predicts, meaning.transform(self.config), self._ids, **how)

    @property
    def _learned_variance(self) -> bool:
        """Whether the network answers with a variance beside its prediction."""
        return str(self.config.get("variance_type", "")).startswith("learned")

    def _from(self, begin: int) -> Table:
        """The table that begins at call ``begin``, with a start of its own."""
        table = self._table
        if begin == 0:
            return table
        at = int(np.abs(table.times[:-1] - table.t[begin, 0]).argmin())
        if self._given is None:
            later = meaning.build(self.config, self._path, table.times[at:])
        elif table.solver in solvers():
            later = find(table.solver)(self._path, table.times[at:], **table.options)
        else:
            raise ValueError(
                f"begin_index must be 0: how {table.solver!r} would begin midway is not in its table"
            )
        if later.calls != table.calls - begin or not np.allclose(later.t, table.t[begin:]):
            raise ValueError(
                f"begin_index must be a call at which a step of {table.solver} begins, and the steps that follow must "
                f"be those that it makes when it begins there; call {begin} of {table.calls} is none"
            )
        return later

    def _training_times(self) -> np.ndarray:
        if self._path.name == "edm":
            return grids.karras(self._path, self.config.num_train_timesteps)[:-1]
        if self._path.name != "flow":
            return np.arange(self._path.t_max, -1.0, -1.0)
        t = np.linspace(1.0, 1.0 / self.config.num_train_timesteps, self.config.num_train_timesteps)
        return t if self.config.use_dynamic_shifting else meaning.shifted(self.config, t)

    def _levels(self, t: np.ndarray) -> torch.Tensor:
        """Noise levels as diffusers counts them: sigma / alpha, on a flow sigma."""
        return torch.as_tensor(t if self._path.name == "flow" else self._path.rho(t), dtype=torch.float32)

    # --- configs ------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """From the config of any scheduler with betas or of flow matching; keyword arguments replace its keys.

        What this class does not know stays in the config, for the class that knows it.
        """
        known = set(inspect.signature(cls.__init__).parameters)
        config, kwargs = meaning.handed_over(config, kwargs, known, strict=not return_unused_kwargs)
        return super().from_config(config, return_unused_kwargs=return_unused_kwargs, **kwargs)

    @classmethod
    def load_config(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """As diffusers does, and the table from the file beside the config."""
        loaded = super().load_config(pretrained_model_name_or_path, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded
        if isinstance(config.get("table"), str):
            folder = os.path.join(os.fspath(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
            config["table"] = json.loads(Table.load(os.path.join(folder, config["table"])).to_json())
        return loaded

    def save_config(
        self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        """``scheduler_config.json``, and ``table.json`` beside it if a table was given."""
        if self._given is not None:
            self._given.save(os.path.join(save_directory, TABLE_FILE))
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    def to_json_string(self) -> str:
        """The config as JSON; a table is named by its file."""
        content = json.loads(super().to_json_string())
        if content.get("table") is not None:
            content["table"] = TABLE_FILE
        return json.dumps(content, indent=2, sort_keys=True) + "\n"


def _as_table(given: Table | str | os.PathLike | Mapping[str, Any]) -> Table:
    if isinstance(given, Table):
        return given
    return Table.from_json(json.dumps(given)) if isinstance(given, Mapping) else Table.load(given)


def _place(timestep: Any, timesteps: torch.Tensor) -> int:
    """Which entry of ``timesteps`` this is a view of, 0 if of none: no value is read, so nothing is waited for."""
    if not isinstance(timestep, torch.Tensor) or timestep.device != timesteps.device or timestep.numel() != 1:
        return 0
    if timestep.untyped_storage().data_ptr() != timesteps.untyped_storage().data_ptr():
        return 0
    return timestep.storage_offset() - timesteps.storage_offset()
