"""Numbers know how they were made, and do not compare where that differs."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from fewstep.eval import Number, Protocol, require_same
from fewstep.eval.protocol import FEATURES, replace

WHOLE = Protocol("inception", "6" * 64, "tensorflow", "nearest", 50000, "cifar10.npz@abc", "0-49999")


def test_every_field_alone_is_enough_to_refuse():
    other = Protocol("dinov2", "7" * 64, "clean", "truncate", 10000, "cifar10-train.npz@def", "50000-99999")
    mine = Number("fd", 2.0, WHOLE)
    for name, value in asdict(other).items():
        theirs = Number("fd", 1.0, replace(WHOLE, **{name: value}))
        for compare in (lambda a, b: a < b, lambda a, b: a > b, lambda a, b: a - b):
            with pytest.raises(ValueError, match=f"do not compare: {name} is .* in one and .* in the other"):
                compare(mine, theirs)
        require_same(mine, theirs, ignore=[name])
        # What is not known is not said to differ, and is known to be unknown.
        hidden = replace(WHOLE, **{name: None})
        assert hidden.unknown() == [name] and mine > Number("fd", 1.0, hidden)


def test_same_protocols_compare():
    assert Number("fd", 1.0, WHOLE) < Number("fd", 2.0, WHOLE)
    assert Number("fd", 3.0, WHOLE) - Number("fd", 2.0, WHOLE) == 1.0


def test_metric_and_settings_count():
    with pytest.raises(ValueError, match="one is fd and the other kid"):
        require_same(Number("fd", 1.0, WHOLE), Number("kid", 1.0, WHOLE))
    with pytest.raises(ValueError, match="settings are 'k 3' and 'k 5'"):
        require_same(
            Number("recall", 1.0, WHOLE, settings="k 3"), Number("recall", 1.0, WHOLE, settings="k 5")
        )
    with pytest.raises(ValueError, match="ignore has seed; expected some of features"):
        require_same(Number("fd", 1.0, WHOLE), Number("fd", 1.0, WHOLE), ignore=["seed"])


def test_it_is_printed_and_stored_whole():
    assert Protocol.read(WHOLE.text()) == WHOLE
    number = Number("fd", 2.25, WHOLE, 0.5, "jackknife of 10 groups")
    assert all(f"{name}=" in number.line() for name in asdict(WHOLE))
    assert "fd = 2.25 +- 0.5 (jackknife of 10 groups)" in number.line()
    record = json.loads(json.dumps(number.record()))
    assert record == {
        "metric": "fd",
        "value": 2.25,
        "stderr": 0.5,
        "settings": "jackknife of 10 groups",
        **asdict(WHOLE),
    }
    with pytest.raises(ValueError, match="protocol has crop; expected features, weights"):
        Protocol.read('{"crop": 256}')


def test_features_are_compared_by_what_makes_them():
    assert WHOLE.differences(replace(WHOLE, num=7, reference="x", seeds="y"), FEATURES) == []
    assert len(WHOLE.differences(replace(WHOLE, resize="clean", weights="8" * 64), FEATURES)) == 2
