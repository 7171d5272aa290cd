"""The documentation's pages: what they show is there, what they quote is made by a command, no page is lost."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


def figures():
    spec = importlib.util.spec_from_file_location("figures", ROOT / "benchmarks" / "figures.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_what_a_page_shows_and_links_to_is_there(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).is_file(), target
    for module in re.findall(r"^::: ([\w.]+)", text, re.M):
        try:
            importlib.import_module(module)
        except ModuleNotFoundError:
            parent, _, name = module.rpartition(".")
            assert hasattr(importlib.import_module(parent), name), module


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_every_page_can_be_reached(page):
    assert str(page.relative_to(ROOT / "docs")) in (ROOT / "mkdocs.yml").read_text()


def test_figures_belong_to_pages_and_each_names_its_command():
    for name in figures().FIGURES:
        text = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
        assert f"({name}.png)" in text and f"python benchmarks/figures.py {name}`" in text


@pytest.mark.parametrize("name", ["search", "rlg"])
def test_a_figure_is_drawn(name, tmp_path):
    assert figures().draw(name, tmp_path).stat().st_size > 5000


def test_a_name_that_is_no_figure_is_refused(capsys):
    with pytest.raises(SystemExit):
        figures().main(["nothing"])
    assert "there is no figure 'nothing'" in capsys.readouterr().err
