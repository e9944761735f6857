"""Byte tokenizer, vocabulary check, and the BPE command with torchtitan's loader of its files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from flexrattn.data.tokenizer import ByteTokenizer, check_vocabulary, largest_token_id
from flexrattn.data.train_bpe import main

TEXTS = ["", "plain", "naïve 数学 𝄞 \x00\t\r\n", "a\ud800b", "<|bos|><|eos|>", "x = 12345  # \ufeff\n\n    y"]


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer.Config().build(tokenizer_path="no/such/folder")
    ids = tokenizer.encode(text, add_bos=True, add_eos=True)
    assert ids[0] == tokenizer.bos_id == 256
    assert ids[-1] == tokenizer.eos_id == 257
    assert ids[1:-1] == tokenizer.encode(text)
    assert all(i < 256 for i in ids[1:-1])
    assert tokenizer.decode(ids) == text


def test_bytes_decode_a_cut_character():
    assert ByteTokenizer().decode([*ByteTokenizer().encode("é")[:1], ByteTokenizer.pad_id]) == "\ufffd"


def test_vocabulary_check(caplog):
    tokenizer = ByteTokenizer()
    assert tokenizer.get_vocab_size() == tokenizer.vocab_size == 259
    assert largest_token_id(tokenizer) == 258
    check_vocabulary(tokenizer, 259)
    caplog.set_level("INFO")
    # Said once a process; no flavor has this size, so that no test before has said it.
    for _ in range(2):
        check_vocabulary(tokenizer, 321)
    assert caplog.text.count("uses 259 of the model's 321") == 1
    with pytest.raises(ValueError, match=r"ids up to 258, the model's vocabulary has 258: .* at least 259"):
        check_vocabulary(tokenizer, 258)


def test_vocabulary_check_sees_gaps():
    class Gaps(ByteTokenizer):
        def get_vocab(self):
            return {"a": 0, "b": 900}

    with pytest.raises(ValueError, match="ids up to 900"):
        check_vocabulary(Gaps(), 512)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("corpus")
    for i in range(30):
        (root / f"{i}.txt").write_text(f"def function_{i}(argument):\n    return argument * {i * 137}\n" * 5)
    return root


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("bpe") / "tokenizer"
    assert main(["--out", str(out), "--vocab-size", "280", "--source", str(corpus)]) == 0
    return out


def test_torchtitan_loads_the_trained_bpe(trained):
    tokenizer = HuggingFaceTokenizer.Config().build(tokenizer_path=str(trained))
    assert tokenizer.get_vocab_size() == 280
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)
    for text in TEXTS[:3] + TEXTS[5:]:
        ids = tokenizer.encode(text, add_bos=True, add_eos=True)
        assert (ids[0], ids[-1]) == (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.decode(ids[1:-1]) == text
    assert len(tokenizer.encode("12345", add_bos=False)) == 5  # a token a digit
    assert len(tokenizer.encode("return argument", add_bos=False)) < 8
    check_vocabulary(tokenizer, 280)
    with pytest.raises(ValueError, match="ids up to 279"):
        check_vocabulary(tokenizer, 259)


def test_training_is_repeatable(corpus, trained, tmp_path, capsys):
    assert main(["--out", str(tmp_path), "--vocab-size", "280", "--source", str(corpus)]) == 0
    assert re.search(r"\d\.\d{3} bytes/token on [\d,]+ held-out bytes", capsys.readouterr().out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()


BAD_ARGUMENTS = [
    pytest.param(["--vocab-size", "100"], "at least 259", id="vocabulary"),
    pytest.param(["--source", "/no/such/place"], "/no/such/place does not exist", id="source"),
    pytest.param(["--validation-fraction", "2"], "below 1, got 2.0", id="fraction"),
    pytest.param(["--validation-fraction", "0"], "validation_fraction is 0", id="nothing-held-out"),
    pytest.param(["--max-bytes", "0"], "must be positive", id="max-bytes"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_ARGUMENTS)
def test_bad_arguments_get_one_line(corpus, tmp_path, capsys, arguments, message):
    assert main(["--out", str(tmp_path / "out"), "--source", str(corpus), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_tokenizer_is_not_overwritten_unasked(trained, corpus, capsys):
    before = (trained / "tokenizer.json").read_bytes()
    assert main(["--out", str(trained), "--vocab-size", "280", "--source", str(corpus)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (trained / "tokenizer.json").read_bytes() == before


def test_the_command_runs():
    root = Path(__file__).parents[3]
    command = [sys.executable, "-m", "flexrattn.data.train_bpe", "--out", "x", "--vocab-size", "1"]
    done = subprocess.run(command, cwd=root, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "train_bpe: error: --vocab-size must be at least 259 (256 bytes, 3 special tokens), got 1\n"
