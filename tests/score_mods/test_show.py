import sys

import pytest
import torch

from score_mods import all_of, causal, dense_mask, document, in_documents, make_mask, sliding_window
from score_mods.show import FULL, PARTIAL, SKIPPED, Heads, look_at, main, read_shares, to_text
from tests.score_mods.catalogue import MASKS as LIBRARY


def packed(*lengths):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def holes(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (kv_idx % 30 < 11)


MASKS = {
    "causal": causal(),
    "window 0": sliding_window(0),
    "window 9": sliding_window(9),
    "window > T": sliding_window(500),
    "documents": all_of(sliding_window(20), document(packed(1, 40, 30, 32))),
    "undescribed": holes,
}


@pytest.mark.parametrize("block_size", [1, 8, 16, 128])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_pairs_are_counted_as_in_the_dense_mask(mask, block_size):
    picture = look_at(mask, seq_len=103, block_size=block_size)
    assert picture.kept_pairs == dense_mask(mask, batch=1, q_len=103, kv_len=103, device="cpu").sum()
    assert sum(picture.count(kind) for kind in (FULL, PARTIAL, SKIPPED)) == (-(-103 // block_size)) ** 2


def test_the_text_shows_blocks_and_numbers():
    text = to_text(look_at(sliding_window(4), seq_len=12, block_size=3), heads=Heads(heads=2, kv_heads=1, head_dim=4))
    assert text.splitlines() == [
        "sliding_window_4: 12 queries (down) × 12 keys (across), block = 3",
        "",
        "  ▒▒······",
        "  ▒▒▒▒····",
        "  ▒▒▒▒▒▒··",
        "  ··▒▒▒▒▒▒",
        "",
        "  ██ full 0   ▒▒ partial 9   ·· skipped 7   of 16 blocks: 43.8% skipped",
        "  pairs kept 50: 34.72% of all, 64.10% of the causal ones; 4.2 keys for a query on average",
        "  a linear branch reads the 28 pairs that are left, 35.90%: j <= t - 5",
        "  of one layer with 2 heads, 1 KV heads of width 4, bf16:",
        "    forward FLOPs 1.6 kFLOP, in the computed blocks 2.59 kFLOP; 35.9% saved (blocks: 10.0% saved) beside "
        "causal attention",
        "    keys and values read by the blocks 864 bytes, of 192 bytes that there are",
        "    cache for decoding 80 bytes a sequence: at most 5 keys are still needed",
    ]


def test_the_text_needs_no_unicode_and_merges_many_blocks():
    text = to_text(look_at(causal(), seq_len=100, block_size=1), encoding="ascii")
    assert text.isascii()
    assert "one cell = 4 x 4 blocks" in text
    rows = text.splitlines()[2:27]
    assert rows[0] == "  ::" + ".." * 24
    assert rows[24] == "  " + "##" * 24 + "::"


def test_the_command(capsys):
    assert main(["sliding_window", "window=512", "--seq-len", "4096"]) == 0
    out = capsys.readouterr().out
    assert "sliding_window_512: 4096 queries" in out
    assert "pairs kept 1,969,920" in out


def test_the_command_with_documents(capsys):
    assert main(["--documents", "5,7,1", "sliding_window", "--block-size", "4", "window=2"]) == 0
    out = capsys.readouterr().out
    assert "all_of(sliding_window_2, document): 13 queries" in out
    assert f"pairs kept {(1 + 2 + 3 * 3) + (1 + 2 + 5 * 3) + 1}:" in out
    assert main(["document", "--documents", "5,7,1"]) == 0
    assert f"pairs kept {25 + 49 + 1}:" in capsys.readouterr().out


@pytest.mark.parametrize("ending", ["png", "svg"])
def test_the_command_draws(tmp_path, capsys, ending):
    out = tmp_path / f"mask.{ending}"
    assert main(["sliding_window", "window=6", "--documents", "10,14", "--block-size", "4", "--out", str(out)]) == 0
    assert str(out) in capsys.readouterr().out
    assert out.read_bytes().startswith({"png": b"\x89PNG", "svg": b"<?xml"}[ending])


def most_keys_needed(kept):
    """By a loop: over all t, the keys up to t that query t or a later one reads."""
    length = len(kept)
    return max(sum(bool(kept[t:, j].any()) for j in range(t + 1)) for t in range(length))


@pytest.mark.parametrize("case", LIBRARY.values(), ids=LIBRARY)
def test_numbers_of_every_mask(case):
    """Kept pairs, what is left, and the keys that a decoder has to hold, against the dense mask; packed, too."""
    lengths = (30, 1, 72)
    ids = packed(*lengths)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    alone = make_mask(case.name, **case.args)
    for mask in (alone, in_documents(alone, document_ids=ids, positions=positions)):
        picture = look_at(mask, seq_len=103, block_size=16, told_by=alone)
        kept = dense_mask(mask, batch=1, q_len=103, kv_len=103, device="cpu")[0, 0]
        readable = torch.ones(103, 103).tril().bool()
        if mask is not alone:
            readable &= ids == ids.T
        assert picture.kept_pairs == kept.sum()
        assert picture.readable_pairs == readable.sum()
        if kept.triu(1).any():
            assert picture.cached_keys is None
        else:
            assert picture.cached_keys == most_keys_needed(kept)
        assert (picture.residual is None) == (case.residual is None)
        softmax, linear = read_shares(picture)
        assert torch.equal(softmax, kept.float())
        expected = (readable & ~kept).float() if case.residual is not None else torch.zeros(103, 103)
        assert torch.equal(linear, expected)


def test_long_sequences_are_drawn_by_shares():
    picture = look_at(sliding_window(200), seq_len=1100, block_size=128)
    softmax, linear = read_shares(picture)
    assert softmax.shape == (367, 367)
    # Each cell is 3 x 3 tokens, the last 2 x 2 (1100 = 366 * 3 + 2).
    size = torch.full((367,), 3.0)
    size[-1] = 2
    area = size[:, None] * size
    assert (softmax * area).sum().round() == picture.kept_pairs
    assert (linear * area).sum().round() == picture.readable_pairs - picture.kept_pairs


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["attention_sink", "sinks=4", "window=8"], "a linear branch reads the 3,486 pairs that are left"),
        (["attention_sink", "sinks=4", "window=8"], "4 <= j <= t - 9"),
        (["chunked", "chunk=8"], "no linear branch beside it: what it leaves out is not all keys before a window"),
        (["prefix_lm", "prefix=8"], "no cache for decoding: queries read later keys"),
        (["causal"], "keys and values read by the blocks 1.5 MiB, of 192 KiB that there are"),
        (["causal", "--heads", "2", "--kv-heads", "1", "--head-dim", "64"], "of one layer with 2 heads, 1 KV heads of"),
    ],
)
def test_the_command_tells_residual_and_cost(args, said, capsys):
    assert main([*args, "--seq-len", "96", "--block-size", "32"]) == 0
    assert said in capsys.readouterr().out


BAD = {
    "heads": (["causal", "--heads", "3"], "heads must be a multiple of kv_heads, got 3 and 4"),
    "width": (["causal", "--head-dim", "0"], "head_dim must be >= 1"),
    "unknown mask": (["slidng_window"], "unknown mask 'slidng_window' (did you mean 'sliding_window'?)"),
    "negative window": (["sliding_window", "window=-1"], "window must be >= 0"),
    "no window": (["sliding_window"], "missing a required argument: 'window'"),
    "no name": (["sliding_window", "512"], "mask arguments are given as name=value, got '512'"),
    "twice": (["sliding_window", "window=1", "window=2"], "mask argument 'window' is given twice"),
    "text": (["sliding_window", "window=many"], "got 'many' (str)"),
    "no mask": ([], "the following arguments are required: mask"),
    "option": (["causal", "--sequence", "3"], "unrecognized arguments: --sequence"),
    "length": (["causal", "--seq-len", "0"], "--seq-len must be >= 1, got 0"),
    "length text": (["causal", "--seq-len", "4k"], "argument --seq-len: invalid int value: '4k'"),
    "block": (["causal", "--block-size", "0"], "block_size must be >= 1"),
    "documents": (["causal", "--documents", "3,x"], "--documents takes lengths such as 1000,96,3000, got '3,x'"),
    "empty document": (["causal", "--documents", "3,0"], "--documents takes lengths >= 1, got '3,0'"),
    "sum": (["causal", "--documents", "3,4", "--seq-len", "8"], "--documents add up to 7 tokens, --seq-len is 8"),
    "no documents": (["document"], "document needs --documents"),
    "import": (["no_such_module:f"], "ModuleNotFoundError: No module named 'no_such_module'"),
    "folder": (["causal", "--seq-len", "8", "--out", "/no/such/folder/a.png"], "No such file or directory"),
    "no ending": (["causal", "--out", "mask"], "--out mask names no picture: end it in .png, .svg or .pdf"),
    "a folder": (["causal", "--out", "."], "--out . names no picture"),
    "ending": (["causal", "--seq-len", "8", "--out", "a.mask"], "Format 'mask' is not supported"),
}


@pytest.mark.parametrize(("args", "message"), BAD.values(), ids=BAD.keys())
def test_bad_input_gets_one_line_and_exit_code_2(args, message, capsys):
    with pytest.raises(SystemExit) as exit:
        main(args)
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("python -m score_mods.show: error: ")
    assert error.count("\n") == 1


def test_interrupted_without_a_traceback(monkeypatch):
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("score_mods.show.look_at", interrupt)
    assert main(["causal", "--seq-len", "8"]) == 130


def test_drawing_without_matplotlib_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as exit:
        main(["causal", "--seq-len", "8", "--out", str(tmp_path / "a.png")])
    assert exit.value.code == 2
    assert "--out needs matplotlib (pip install matplotlib)" in capsys.readouterr().err
