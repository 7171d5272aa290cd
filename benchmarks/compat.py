"""diffusers' own scheduler tests, run on FewstepScheduler:  python benchmarks/compat.py CHECKOUT  (make compat).

CHECKOUT is a clone of diffusers, of whose tests/ folder `SchedulerCommonTest` is used as it stands; the library under
test is the installed one. Each family of networks, and each of some solvers, gets all of its tests.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import unittest
import warnings
from pathlib import Path

DDPM = {"num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = {"num_train_timesteps": 1000, "prediction_type": "flow_prediction", "shift": 3.0}
FAMILIES = {
    "eps": {**DDPM, "prediction_type": "epsilon"},
    "v": {**DDPM, "prediction_type": "v_prediction"},
    "sample": {**DDPM, "prediction_type": "sample"},
    "flow": FLOW,
}
SOLVERS = ("multistep", "deis", "dpmpp", "unipc", "ipndm", "ddim", "heun", "sa", "sde_dpmpp", "ddpm")


def cases(common: type, solvers: tuple[str, ...]) -> dict[str, type]:
    """One test class for every family and solver."""
    from fewstep.samplers import FewstepScheduler

    def case(family: str, solver: str) -> type:
        def get_scheduler_config(self, **changes):
            return {**FAMILIES[family], "solver": solver, **changes}

        def test_over_steps(self):
            for steps in (1, 5, 50):
                self.check_over_forward(num_inference_steps=steps)

        def test_over_configs(self):
            for spacing in ("trailing", "linspace", "leading"):
                self.check_over_configs(timestep_spacing=spacing)
            for steps in (50, 1000):
                self.check_over_configs(num_train_timesteps=steps)

        body = {
            "scheduler_classes": (FewstepScheduler,),
            "forward_default_kwargs": (("num_inference_steps", 25),),
            "get_scheduler_config": get_scheduler_config,
            "test_over_steps": test_over_steps,
            "test_over_configs": test_over_configs,
        }
        return type(f"{family}-{solver}", (common,), body)

    return {f"{family}-{solver}": case(family, solver) for family in FAMILIES for solver in solvers}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=Path, help="a clone of diffusers")
    parser.add_argument("--solvers", default=",".join(SOLVERS))
    arguments = parser.parse_args()
    if not (arguments.checkout / "tests/schedulers/test_schedulers.py").is_file():
        parser.error(
            f"checkout must be a clone of diffusers with tests/schedulers in it, got {arguments.checkout}"
        )
    sys.path.append(str(arguments.checkout.resolve()))
    warnings.simplefilter("ignore", FutureWarning)

    import diffusers

    common = importlib.import_module(
        "tests.schedulers.test_schedulers"
    ).SchedulerCommonTest  # by the path just added

    diffusers.utils.logging.set_verbosity_error()
    passed, failed = 0, []
    for name, case in cases(common, tuple(arguments.solvers.split(","))).items():
        logging.getLogger("diffusers.configuration_utils").setLevel(
            logging.ERROR
        )  # one of their tests lowers it
        result = unittest.TestResult()
        unittest.defaultTestLoader.loadTestsFromTestCase(case).run(result)
        bad = [*result.failures, *result.errors]
        passed += result.testsRun - len(bad) - len(result.skipped)
        failed += [(name, test.id().rsplit(".", 1)[-1], text) for test, text in bad]
        print(f"{name:18} {result.testsRun - len(bad):3} of {result.testsRun} pass", flush=True)
    for name, test, text in failed:
        print(f"\n--- {name}: {test}\n{text}")
    print(f"\ndiffusers {diffusers.__version__}: {passed} passed, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
