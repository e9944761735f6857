"""The README's picture is drawn from the masks, and the committed file is what the script draws."""

import importlib.util
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "docs" / "pictures.py"


@pytest.fixture(scope="module")
def pictures():
    spec = importlib.util.spec_from_file_location("docs_pictures", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_committed_pictures_are_what_the_script_draws(pictures):
    assert pictures.main(["--check"]) == 0


def test_a_stale_picture_is_seen(pictures, monkeypatch, capsys):
    monkeypatch.setattr(pictures, "WINDOW", 5)
    assert pictures.main(["--check"]) == 1
    assert "branches.svg" in capsys.readouterr().err


def test_the_branches_follow_the_paper(pictures):
    read = pictures.branches()
    length = sum(pictures.DOCUMENTS)
    for t in range(length):
        for j in range(length):
            together = j <= t and (t < pictures.DOCUMENTS[0]) == (j < pictures.DOCUMENTS[0])
            branch = "neither" if not together else "softmax" if j >= t - pictures.WINDOW else "linear"
            assert [name for name, pairs in read.items() if pairs[t, j]] == [branch]
    assert torch.stack(list(read.values())).sum() == length**2


def test_the_picture_is_small_and_well_formed(pictures):
    path = pictures.IMAGES / "branches.svg"
    assert path.stat().st_size < 60_000
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    assert "http" not in path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
