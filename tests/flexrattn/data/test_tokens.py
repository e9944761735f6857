"""Text tokenised once: the stream is that of the text itself, near-duplicates go, another tokenizer is refused."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
import torch
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from flexrattn.data import prepare
from flexrattn.data.corpus import Index, SourceFile, hash64, split_index
from flexrattn.data.prepare import NearDuplicates
from flexrattn.data.text import TextDataLoader
from flexrattn.data.tokenizer import ByteTokenizer
from flexrattn.data.tokens import open_tokens, read_manifest


def lines(i: int) -> list[str]:
    return [f"def function_{i}_{j}(argument): return argument * {i * 31 + j}" for j in range(3 + i % 7)]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """40 files; 40 and 41 repeat all lines, and two of three lines, of others."""
    root = tmp_path_factory.mktemp("text")
    for i in range(40):
        (root / f"{i:02}.txt").write_text("\n".join(lines(i)))
    (root / "40.txt").write_text("\n".join(reversed(lines(6))))
    (root / "41.txt").write_text("\n".join([*lines(0)[:2], "something else entirely, once"]))
    return root


@pytest.fixture(scope="module")
def prepared(text, tmp_path_factory):
    out = tmp_path_factory.mktemp("prepared") / "tokens"
    assert prepare.main(["--source", str(text), "--out", str(out), "--vocab-size", "400"]) == 0
    return out


def loader(dataset, path, tokenizer, **options):
    return TextDataLoader.Config(dataset=dataset, dataset_path=str(path), **options).build(
        dp_world_size=1, dp_rank=0, tokenizer=tokenizer, seq_len=48, local_batch_size=2
    )


@pytest.mark.parametrize("split", ["train", "validation"])
def test_stream_is_that_of_the_text(text, prepared, tmp_path, split):
    """The same batches to the bit, over two epochs; the text without what was dropped, for the comparison."""
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(prepared))
    kept = tmp_path / "kept"
    kept.mkdir()
    digests = {int(d) for part in ("train", "validation") for d in open_tokens(prepared, part).digests}
    for path in text.iterdir():
        if hash64(path.read_bytes()) in digests:
            (kept / path.name).write_text(path.read_text())
    options = {"split": split, "seed": 3}
    expected = list(itertools.islice(loader("local", kept, tokenizer, **options), 40))
    actual = list(itertools.islice(loader("tokens", prepared, tokenizer, **options), 40))
    for (x, y), (x0, y0) in zip(actual, expected, strict=True):
        assert torch.equal(y, y0)
        assert all(torch.equal(x[key], x0[key]) for key in ("input", "positions"))


def test_near_duplicates_are_dropped(prepared):
    manifest = read_manifest(prepared)
    assert manifest["near_duplicates"] == 2
    assert manifest["train"]["documents"] + manifest["validation"]["documents"] == 40
    for split in ("train", "validation"):
        corpus = open_tokens(prepared, split)
        assert corpus.n_tokens == manifest[split]["tokens"]
        assert len(corpus) == manifest[split]["documents"]


def test_what_counts_as_a_near_duplicate():
    seen = NearDuplicates(0.5)
    old = [f"a line of some length, number {i}" for i in range(4)]
    assert not seen.drops("\n".join(old))
    assert not seen.drops("\n".join([*old[:2], "a new line, long enough", "another one of these"]))
    assert seen.drops("\n".join(["    " + old[0], old[1], old[2], "quite another line of text"]))
    # Short lines say nothing.
    assert not seen.drops("x = 1\ny = 2")
    assert not seen.drops("x = 1\ny = 2")
    assert (seen.dropped, seen.dropped_bytes) == (1, sum(len(x) for x in old[:3]) + 4 + 3 + 26)


def test_another_tokenizer_is_refused(prepared):
    with pytest.raises(ValueError, match="tokenised with another tokenizer"):
        loader("tokens", prepared, ByteTokenizer())


def test_a_resumed_stream_goes_on(prepared):
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(prepared))
    whole = list(itertools.islice(loader("tokens", prepared, tokenizer), 9))
    first = loader("tokens", prepared, tokenizer)
    iterator = iter(first)
    for _ in range(4):
        next(iterator)
    second = loader("tokens", prepared, tokenizer)
    second.load_state_dict(first.state_dict())
    for (x, y), (x0, y0) in zip(itertools.islice(second, 5), whole[4:], strict=True):
        assert torch.equal(x["input"], x0["input"])
        assert torch.equal(y, y0)


def test_same_text_gives_the_same_fingerprint(text, prepared, tmp_path):
    again = tmp_path / "again"
    arguments = ["--source", str(text), "--out", str(again), "--vocab-size", "400"]
    assert prepare.main(arguments) == 0
    assert read_manifest(again) == read_manifest(prepared)
    assert prepare.main([*arguments, "--tokenizer", str(prepared), "--similar", "1", "--overwrite"]) == 0
    assert read_manifest(again)["fingerprint"] != read_manifest(prepared)["fingerprint"]


def test_bad_folders(prepared, tmp_path, capsys):
    with pytest.raises(ValueError, match=r"holds no tokens\.json"):
        read_manifest(tmp_path)
    (tmp_path / "tokens.json").write_text(json.dumps({"format": "x"}))
    with pytest.raises(ValueError, match="prepare it again"):
        read_manifest(tmp_path)
    for path in prepared.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "train.bin").write_bytes((tmp_path / "train.bin").read_bytes()[:-2])
    with pytest.raises(ValueError, match="bytes, expected"):
        open_tokens(tmp_path, "train")
    assert prepare.main(["--out", str(prepared)]) == 2
    assert "is already prepared" in capsys.readouterr().err
    assert prepare.main(["--out", str(tmp_path / "new"), "--similar", "0"]) == 2
    with pytest.raises(ValueError, match="'tokens' needs dataset_path"):
        TextDataLoader.Config(dataset="tokens").source()


def test_split_by_package_takes_small_packages(tmp_path):
    """One package holds most of the bytes: it trains, and what is held out is whole packages below the fraction."""
    files = []
    sizes = {"site-packages/huge": 50_000, **{f"site-packages/small{i}": 500 for i in range(60)}, "stdlib/mid": 2_000}
    for package, size in sizes.items():
        for part in range(2):
            path = tmp_path / f"{package.replace('/', '_')}_{part}.py"
            path.write_text(f"# {package} {part}\n" + "x" * (size // 2))
            files.append(SourceFile(f"{package}/{part}.py", str(path)))
    index = Index(files, text_field="text", max_document_bytes=65536, split_by="package")
    splits = split_index(index, "packages", validation_fraction=0.1)
    held_out = {index.files[i].name.rsplit("/", 1)[0] for i in splits.validation.file_ids}
    training = {index.files[i].name.rsplit("/", 1)[0] for i in splits.train.file_ids}
    assert not held_out & training
    assert "site-packages/huge" in training
    total = splits.train.nbytes + splits.validation.nbytes
    assert 0.07 * total < splits.validation.nbytes <= 0.1 * total
    assert len(held_out) > 10
    assert np.array_equal(np.sort(index.digests), np.sort(np.r_[splits.train.digests, splits.validation.digests]))


def rows_of(dataset_loader, count):
    """(input, positions, labels) of single rows."""
    batches = itertools.islice(dataset_loader, count)
    return [(tuple(x["input"][i].tolist()), tuple(y[i].tolist())) for x, y in batches for i in range(len(y))]


def test_shuffled_rows_are_the_epochs_rows_in_another_order(prepared):
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(prepared))
    pairs = open_tokens(prepared, "train").n_tokens - len(open_tokens(prepared, "train"))
    n = pairs // 48
    plain = rows_of(loader("tokens", prepared, tokenizer), n // 2)
    mixed = rows_of(loader("tokens", prepared, tokenizer, shuffle_rows=True), n)
    first, second = mixed[:n], mixed[n : 2 * n]
    assert first[: len(plain)] != plain
    assert set(plain) <= set(first)
    assert len(set(first)) == n
    # Another epoch cuts other rows of other neighbours.
    assert set(first) != set(second)
    assert rows_of(loader("tokens", prepared, tokenizer, shuffle_rows=True, seed=1), 3) != mixed[:6]


def test_shuffled_rows_resume_and_are_dealt_once(prepared):
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(prepared))
    whole = rows_of(loader("tokens", prepared, tokenizer, shuffle_rows=True), 60)
    first = loader("tokens", prepared, tokenizer, shuffle_rows=True)
    iterator = iter(first)
    # Into the second epoch.
    for _ in range(50):
        next(iterator)
    second = loader("tokens", prepared, tokenizer, shuffle_rows=True)
    second.load_state_dict(first.state_dict())
    assert rows_of(second, 10) == whole[100:120]
    with pytest.raises(ValueError, match="shuffle_rows was True, is None"):
        loader("tokens", prepared, tokenizer).load_state_dict(first.state_dict())

    options = {"dataset": "tokens", "dataset_path": str(prepared), "shuffle_rows": True}
    ranks = [
        TextDataLoader.Config(**options).build(
            dp_world_size=2, dp_rank=rank, tokenizer=tokenizer, seq_len=48, local_batch_size=1
        )
        for rank in range(2)
    ]
    dealt = [rows_of(each, 15) for each in ranks]
    assert dealt[0] == whole[0:30:2]
    assert dealt[1] == whole[1:30:2]
    with pytest.raises(ValueError, match="shuffle_rows needs dataset 'tokens'"):
        TextDataLoader.Config(shuffle_rows=True)
