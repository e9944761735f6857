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
    monkeypatch.undo()
    monkeypatch.setattr(pictures, "DRAWN", 3)
    assert pictures.main(["--check"]) == 1
    assert "masks.svg" in capsys.readouterr().err


def test_the_branches_follow_the_paper(pictures):
    read = pictures.branches()
    length = sum(pictures.DOCUMENTS)
    for t in range(length):
        for j in range(length):
            together = j <= t and (t < pictures.DOCUMENTS[0]) == (j < pictures.DOCUMENTS[0])
            branch = "neither" if not together else "softmax" if j >= t - pictures.WINDOW else "linear"
            assert [name for name, pairs in read.items() if pairs[t, j]] == [branch]
    assert torch.stack(list(read.values())).sum() == length**2


def test_the_gallery_shares_out_the_causal_pairs(pictures):
    causal = torch.ones(pictures.GALLERY_TOKENS, pictures.GALLERY_TOKENS).tril().bool()
    with_linear = set()
    for name, read in pictures.gallery().items():
        assert not (read["softmax"] & read["linear"]).any()
        if read["linear"].any():
            with_linear.add(name)
            assert torch.equal(read["softmax"] | read["linear"], causal)
    assert with_linear == {"sliding_window", "attention_sink", "stochastic_window"}


@pytest.mark.parametrize("name", ["branches.svg", "masks.svg"])
def test_the_picture_is_small_and_well_formed(pictures, name):
    path = pictures.IMAGES / name
    assert path.stat().st_size < 60_000
    root = ET.fromstring(path.read_text(encoding="utf-8"))
    assert root.tag.endswith("svg")
    assert "http" not in path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
