import sys

import pytest
import torch

from score_mods import all_of, causal, dense_mask, document, sliding_window
from score_mods.show import FULL, PARTIAL, SKIPPED, look_at, main, to_text


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
    text = to_text(look_at(sliding_window(4), seq_len=12, block_size=3))
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


BAD = {
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


def test_drawing_without_matplotlib_is_told(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(SystemExit) as exit:
        main(["causal", "--seq-len", "8", "--out", str(tmp_path / "a.png")])
    assert exit.value.code == 2
    assert "--out needs matplotlib (pip install matplotlib)" in capsys.readouterr().err
