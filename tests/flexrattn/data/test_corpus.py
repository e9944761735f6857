"""Which texts a corpus holds, how they are split, and what a user is told about bad input."""

import json
import os
import re

import numpy as np
import pytest

from flexrattn.data.corpus import walk_files
from flexrattn.data.python_source import python_source_files
from flexrattn.data.sources import TextSource


def texts(corpus):
    return [corpus.read(d) for d in range(len(corpus))]


def local(path, **options):
    return TextSource(dataset="local", dataset_path=str(path), **options)


@pytest.fixture
def folder(tmp_path):
    """60 different files in two directories, two copies, one blank file, one that is not UTF-8, one of another type."""
    root = tmp_path / "texts"
    for i in range(60):
        path = root / ("ab"[i % 2]) / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text {i}\n" * (i + 1))
    for copy in ("a/copy.txt", "b/zcopy.txt"):
        (root / copy).write_text("text 7\n" * 8)
    (root / "blank.txt").write_text(" \n\n")
    (root / "latin.txt").write_bytes("naïve".encode("latin-1"))
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / ".hidden").mkdir()
    (root / ".hidden" / "x.txt").write_text("hidden")
    return root


def test_splits_hold_each_text_once(folder, caplog):
    caplog.set_level("INFO")
    source = local(folder, validation_fraction=0.2)
    train, validation = texts(source.corpus("train")), texts(source.corpus("validation"))
    assert sorted(train + validation) == sorted(f"text {i}\n" * (i + 1) for i in range(60))
    assert 3 <= len(validation) <= 25
    assert "skipped 1 files that cannot be read or are not UTF-8" in caplog.text
    assert "dropped 2 duplicates, 1 blank" in caplog.text


def test_split_of_a_file_does_not_depend_on_the_other_files(folder, tmp_path):
    before = set(texts(local(folder, validation_fraction=0.3).corpus("validation")))
    moved = tmp_path / "elsewhere"
    folder.rename(moved)
    for i in range(0, 60, 3):
        (moved / ("ab"[i % 2]) / f"{i}.txt").unlink()
    after = local(moved, validation_fraction=0.3)
    kept = set(texts(after.corpus("train")) + texts(after.corpus("validation")))
    assert set(texts(after.corpus("validation"))) == before & kept


def test_order_does_not_depend_on_the_file_system(folder, monkeypatch):
    here = local(folder).corpus("train")
    walk = os.walk

    def backwards(root):
        for directory, subdirectories, names in walk(root):
            subdirectories.sort(reverse=True)
            names.sort(reverse=True)
            yield directory, subdirectories, names

    monkeypatch.setattr(os, "walk", backwards)
    there = local(folder, max_document_bytes=65535).corpus("train")  # another key of the cache
    assert texts(there) == texts(here)
    assert there.fingerprint == here.fingerprint


def test_epochs_are_different_permutations(folder):
    corpus = local(folder).corpus("train")
    orders = [corpus.epoch_order(seed=seed, epoch=epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    for order in orders:
        assert sorted(order) == list(range(len(corpus)))
    assert not any(np.array_equal(a, b) for a, b in [orders[:2], orders[1:], orders[::2]])
    # Pinned: a change of order would break the resume of every run that exists.
    pinned = local(folder, validation_fraction=0.0).corpus("train")
    first = [pinned.read(d).split("\n")[0] for d in pinned.epoch_order(seed=0, epoch=0)[:4]]
    assert first == ["text 22", "text 0", "text 10", "text 8"]


def test_top_directories_stay_on_one_side(tmp_path):
    for package in range(12):
        for module in range(3):
            path = tmp_path / f"p{package}" / f"{module}.txt"
            path.parent.mkdir(exist_ok=True)
            path.write_text(f"p{package} {module}")
    source = local(tmp_path, split_by="top_directory", validation_fraction=0.3)
    train = {text.split()[0] for text in texts(source.corpus("train"))}
    validation = {text.split()[0] for text in texts(source.corpus("validation"))}
    assert train
    assert validation
    assert not train & validation


def test_one_long_file_is_cut_at_lines_and_split(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of the book, naïve\r\n" for i in range(500)), newline="")
    source = local(path, max_document_bytes=1000)
    train, validation = texts(source.corpus("train")), texts(source.corpus("validation"))
    assert validation
    assert all(len(text.encode()) <= 1000 and text.endswith("\r\n") for text in train + validation)
    assert sorted("".join(train + validation).splitlines()) == sorted(path.read_text().splitlines())


@pytest.mark.parametrize("limit", [64, 65, 66, 67])
def test_long_lines_are_cut_between_characters(tmp_path, limit):
    path = tmp_path / "line.txt"
    path.write_text("é数𝄞a" * 200)
    source = local(path, max_document_bytes=limit, validation_fraction=0.0)
    # Equal pieces are dropped as duplicates, so what is left is a subset of the cuts, each whole characters.
    assert set("".join(texts(source.corpus("train")))) == set("é数𝄞a")


def test_jsonl_records_are_documents(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [{"body": f"record {i} \n数学", "text": 1} for i in range(40)]
    path.write_text("\n\n".join(json.dumps(record) for record in records))
    source = local(path, text_field="body", validation_fraction=0.25)
    train, validation = texts(source.corpus("train")), texts(source.corpus("validation"))
    assert validation
    assert sorted(train + validation) == sorted(record["body"] for record in records)


def test_validation_path_wins_over_equal_training_text(folder, tmp_path):
    held_out = tmp_path / "held_out.txt"
    held_out.write_text("text 0\n")
    source = local(folder, validation_path=str(held_out))
    assert texts(source.corpus("validation")) == ["text 0\n"]
    assert len(source.corpus("train")) == 59


def test_text_that_changed_is_refused(folder):
    corpus = local(folder).corpus("train")
    path = corpus.paths[corpus.file_ids[0]]
    with open(path, "r+b") as handle:
        handle.write(b"T")
    with pytest.raises(ValueError, match=f"{re.escape(path)} changed"):
        corpus.read(0)
    os.unlink(path)
    with pytest.raises(ValueError, match=f"{re.escape(path)} changed"):
        corpus.read(0)


BAD_LINES = [
    pytest.param('{"text": "x"', "not valid JSON", id="json"),
    pytest.param('{"body": "x"}', "needs an object with the field 'text', it has 'body'", id="field"),
    pytest.param('["x"]', "needs an object with the field 'text'", id="list"),
    pytest.param('{"text": 3}', "must be a string, got 3", id="type"),
    pytest.param('{"text": "\\ud800"}', "is not Unicode text", id="surrogate"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_jsonl_names_file_and_line(tmp_path, line, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"text": "fine"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=f"{re.escape(str(path))}, line 3: .*{re.escape(message)}") as caught:
        local(path).corpus("train")
    assert "\n" not in str(caught.value)


BAD_OPTIONS = [
    pytest.param({"dataset": "c4"}, "dataset must be one of python_source, local, tokens, got 'c4'", id="dataset"),
    pytest.param({"dataset_path": None}, "needs dataset_path", id="no-path"),
    pytest.param({"dataset_path": "/no/such/place"}, "/no/such/place does not exist", id="missing"),
    pytest.param({"suffixes": (".md",)}, "holds no file that ends in .md", id="no-files"),
    pytest.param({"suffixes": ()}, "at least one ending", id="no-suffix"),
    pytest.param({"validation_fraction": 1.0}, "at least 0 and below 1, got 1.0", id="fraction"),
    pytest.param({"validation_path": "/no/such/place"}, "/no/such/place does not exist", id="no-validation-path"),
    pytest.param({"split_by": "moon"}, "split_by must be one of", id="split-by"),
    pytest.param({"max_document_bytes": 1}, "at least 64, got 1", id="max-bytes"),
    pytest.param({"dataset": "python_source"}, "takes no dataset_path", id="python-source-path"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_bad_options_get_one_line(folder, options, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        TextSource(**{"dataset": "local", "dataset_path": str(folder)} | options).corpus("train")
    assert "\n" not in str(caught.value)


def test_nothing_to_read_and_nothing_to_split(tmp_path):
    path = tmp_path / "one.txt"
    path.write_text("")
    with pytest.raises(ValueError, match=r"no text in .*one\.txt"):
        local(path).corpus("train")
    path.write_text("a single short document")
    with pytest.raises(ValueError, match="too small to split"):
        local(path, validation_fraction=0.06).corpus("train")
    with pytest.raises(ValueError, match="validation_fraction is 0"):
        local(path, validation_fraction=0.0).corpus("validation")
    with pytest.raises(ValueError, match="split must be one of train, validation, got 'test'"):
        local(path, validation_fraction=0.0).corpus("test")


def test_python_source_is_this_installation():
    source = TextSource()
    train, validation = source.corpus("train"), source.corpus("validation")
    assert train.nbytes > 1_000_000
    assert 0 < validation.nbytes < 0.3 * train.nbytes
    assert not set(train.digests) & set(validation.digests)
    names = {os.path.relpath(path, os.path.dirname(os.__file__)) for path in train.paths}
    assert {"abc.py", os.path.join("json", "decoder.py")} <= names
    assert not any("site-packages" in name for name in names)
    assert train.read(0)


def test_site_packages_on_request():
    with_packages = python_source_files(site_packages=True)
    names = {file.name for file in with_packages}
    assert {"stdlib/abc.py", "site-packages/torch/__init__.py"} <= names
    assert len(names) == len(with_packages)


def test_walk_enters_no_hidden_folder(folder):
    names = {file.name for file in walk_files(str(folder), [".txt", ".png"])}
    assert {name for name in names if "/" not in name} == {"blank.txt", "latin.txt", "picture.png"}
    assert not any(".hidden" in name for name in names)
