"""The page of a suite: every picture within it, nothing from outside, every number of the CSV in its table."""

from __future__ import annotations

import base64
import csv
import io
from html.parser import HTMLParser

import pytest
from PIL import Image

from fewstep.eval import extractor, reference_of, suite
from fewstep.eval.contestants import contestant
from fewstep.eval.report import report
from fewstep.models import load

EXPECTED = [{"sampler": "deis:order=2", "budget": 3, "value": 12.5, "source": "a paper, <table> 1"}]


class Page(HTMLParser):
    """Pictures, cells, and all that is loaded from elsewhere."""

    def __init__(self, text: str):
        super().__init__()
        self.pictures, self.cells, self.outside, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag == "img":
            self.pictures.append((found["alt"], found["src"]))
        self.outside += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        self.text.append(data)
        if self.cells:
            self.cells[-1] += data


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    d, judge = load("digits-flow"), extractor("digits")

    def conditions(ids):
        return {"label": ids % 10}, ids % 10

    samplers = [contestant("deis:order=2"), contestant("heun")]
    results = suite.run(
        d, samplers, [3, 4], reference_of("digits:held_out", judge, keep=True), judge, folder, num=24, batch=12,
        metrics=["fd", "kid", "prdc"], conditions=conditions, told={"model": "digits-flow"}, expected=EXPECTED,
    )  # fmt: skip
    page = report(results, suite.pictures(folder, results, 5), folder, "Title & <more>", "about")
    return folder, results, page


def test_every_picture_is_there_and_nothing_comes_from_outside(made):
    page = Page(made[2].read_text())
    assert len(page.pictures) == 2 and not page.outside
    for alt, source in page.pictures:
        head, _, content = source.partition(",")
        picture = Image.open(io.BytesIO(base64.b64decode(content)))
        assert alt and head == "data:image/png;base64" and min(picture.size) > 100
    assert "http" not in made[2].read_text().replace("data:", "")


def test_every_number_of_the_csv_is_in_the_table(made):
    folder, results, page = made
    rows = list(csv.DictReader((folder / "table.csv").open()))
    assert len(rows) == len(results["rows"]) == 2 * 2 * 6
    cells = Page(page.read_text()).cells
    for row, full in zip(rows, results["rows"], strict=True):
        assert all(value in cells for value in row.values() if value)
        assert float(row["value"]) == pytest.approx(full["value"], rel=1e-5)
        assert len(row["weights"]) == 64 and row["num"] == "24" and row["seeds"] == "0: 0-23"


def test_calls_are_those_taken_and_papers_stand_beside(made):
    held = {(r["sampler"], r["budget"]): r for r in made[1]["rows"] if r["metric"] == "fd"}
    assert held["heun", 4]["calls"] == 3 and held["deis:order=2", 4]["calls"] == 4
    assert held["deis:order=2", 3]["expected"] == 12.5 and held["heun", 3]["expected"] is None
    text = made[2].read_text()
    assert "paper 12.5" in text and "(3 calls)" in text and "a paper, &lt;table&gt; 1" in text
    assert "features=digits" in text and "model digits-flow" in text and "torch 2" in text


def test_the_same_noise_begins_all_cells(made):
    shown = suite.pictures(made[0], made[1], 5)
    assert set(shown) == {(s, b) for s in ("deis:order=2", "heun") for b in (3, 4)}
    near = (shown["deis:order=2", 4].double() - shown["heun", 4].double()).flatten(1).norm(dim=1)
    far = (shown["deis:order=2", 4].double() - shown["heun", 4].double().roll(1, 0)).flatten(1).norm(dim=1)
    assert (near < far).all()


def test_a_suite_goes_on_from_what_is_there(made):
    folder, results, _ = made
    shards = sorted(folder.glob("samples/*/*.npz"))
    before = [f.stat().st_mtime_ns for f in shards]
    judge = extractor("digits")
    again = suite.run(
        load("digits-flow"), [contestant("deis:order=2")], [3], reference_of("digits:held_out", judge), judge, folder,
        num=24, batch=12, told={"model": "digits-flow"},
    )  # fmt: skip
    assert again["rows"][0]["value"] == results["rows"][0]["value"]
    assert [f.stat().st_mtime_ns for f in shards] == before


def test_what_cannot_be_is_said_before_anything_is_made(tmp_path):
    d, judge = load("digits-flow"), extractor("digits")
    reference = reference_of("digits:held_out", judge)

    def run(samplers, budgets):
        suite.run(d, [contestant(s) for s in samplers], budgets, reference, judge, tmp_path / "none")

    with pytest.raises(ValueError, match="one sampler and one budget"):
        run([], [3])
    with pytest.raises(ValueError, match="samplers must differ"):
        run(["abm", "abm"], [3])
    with pytest.raises(ValueError, match="no table nothing-3.json"):
        run(["abm", "nothing-{nfe}.json"], [3])
    assert not (tmp_path / "none").exists()
    with pytest.raises(ValueError, match="no rows"):
        report({"rows": []}, {}, tmp_path)
