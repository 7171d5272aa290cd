"""A student of the 25 modes by the shipped recipe, cut short: it nears the teacher, and at rate 0 it does not."""

import pytest

from fewstep.distill.run import run
from fewstep.distill.saved import metrics

SHORT = ["train.iters=150", "student.warm_up=150", "report.validate=150", "report.exam=1000", "report.grid=1000",
         "report.checkpoint=150", "threads=1"]  # fmt: skip


@pytest.mark.slow
def test_it_learns_and_at_rate_0_it_does_not(tmp_path):
    last = {}
    for rate in (0.001, 0.0):
        options = [f"optim.lr={rate}", f"name=rate-{rate}", f"out={tmp_path}", *SHORT]
        options += ["train.iters=2"] if rate == 0 else []  # nothing moves however long it is trained
        last[rate] = metrics(run("dmd2-mixture", options))[-1]
    # MMD of 1000 samples against 1000: exact ones have 0 with a standard error of about 0.001
    assert last[0.001]["teacher_mmd"] < 0.05 < 0.08 < last[0.0]["teacher_mmd"]
    assert last[0.001]["teacher_sliced_w2"] < 0.5 * last[0.0]["teacher_sliced_w2"]
