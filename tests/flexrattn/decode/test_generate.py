"""The command and its Python form, on a checkpoint that training wrote."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

from flexrattn import generate
from flexrattn.data.tokenizer import ByteTokenizer
from flexrattn.decode import DecodeCache
from flexrattn.decode.checkpoint import find_checkpoint, load_model, model_config
from flexrattn.decode.sampling import Sampling
from flexrattn.decode.text import TextStream
from flexrattn.generate import Generator
from flexrattn.registry import model_registry
from tests.flexrattn.decode.models import build, full_forward
from tests.flexrattn.runs import train, write_config


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A dump folder with steps 4 and 8."""
    folder = tmp_path_factory.mktemp("trained")
    train(write_config(folder))
    return folder / "out"


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("FLEXRATTN_DEVICE", "cpu")


def command(capsys, *arguments: str) -> tuple[int, str, str]:
    code = generate.main(list(arguments))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_the_readmes_command(trained, capsys):
    base = ["--checkpoint", str(trained), "--prompt", "def f", "--max-new-tokens", "20", "--seed", "3"]
    code, streamed, said = command(capsys, *base)
    assert code == 0
    assert streamed.startswith("def f")
    assert "tokens in" in said
    assert command(capsys, *base, "--no-stream")[1] == streamed
    assert command(capsys, *base, "--seed", "4")[1] != streamed
    assert command(capsys, *base, "--quiet")[1:] == (streamed.removeprefix("def f"), "")


def test_greedy_text_is_the_full_forwards(trained):
    generator = Generator.load(trained)
    (done,) = generator.generate(["def f"], max_new_tokens=24)
    row = torch.tensor([generator.encode("def f") + done.tokens])
    likeliest = full_forward(generator.model, row)[0, -len(done.tokens) - 1 : -1].argmax(-1)
    assert likeliest.tolist() == done.tokens
    assert len(done.tokens) == 24 or done.tokens[-1] == ByteTokenizer.eos_id


def test_many_prompts_as_one_by_one(trained):
    generator = Generator.load(trained)
    prompts = ["def f", "x", "return x * 31", "\N{SNOWMAN}"]
    sampling = Sampling(temperature=0.9, top_p=0.9, seed=5)
    together = generator.generate(prompts, max_new_tokens=15, sampling=sampling, slots=2)
    for i, prompt in enumerate(prompts):
        own = Sampling(temperature=0.9, top_p=0.9, seed=5 + i)
        assert generator.generate([prompt], max_new_tokens=15, sampling=own) == [together[i]]
        assert "".join(generator.stream(prompt, max_new_tokens=15, sampling=own)) == together[i].text


def test_stop_strings(trained):
    generator = Generator.load(trained)
    sampling = Sampling(temperature=1.0, seed=1)
    (whole,) = generator.generate(["def f"], max_new_tokens=40, sampling=sampling)
    stop = whole.text[7:9]
    (done,) = generator.generate(["def f"], max_new_tokens=40, sampling=sampling, stop=["never this", stop])
    assert (done.text, done.finish) == (whole.text[: whole.text.index(stop)], "stop")
    pieces = generator.stream("def f", max_new_tokens=40, sampling=sampling, stop=[stop])
    assert "".join(pieces) == done.text


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("def f", {}, "takes a list of prompts, got one text"),
        (["def f"], {"stop": "\n\n"}, "stop takes a list of texts"),
        (["def f"], {"stop": [""]}, "a stop string must not be empty"),
        (["def f"], {"max_new_tokens": 2.5}, "max_new_tokens must be a whole number"),
        (["def f"], {"slots": 0}, "slots must be a whole number"),
        (["def f", ""], {}, "the prompt is empty"),
    ],
)
def test_bad_input_in_python(prompts, options, message):
    generator = Generator(build(dtype=torch.float32, model={"vocab_size": 320}), ByteTokenizer())
    with pytest.raises(ValueError, match=message):
        generator.generate(prompts, **{"max_new_tokens": 4, **options})


def test_exported_is_the_same(trained, tmp_path, capsys):
    out = tmp_path / "exported"
    assert command(capsys, "--checkpoint", str(trained), "--export", str(out))[0] == 0
    assert sorted(path.name for path in out.iterdir()) == ["config.json", "model.safetensors"]
    a, b = (load_model(find_checkpoint(path), device="cpu", dtype=torch.float32) for path in (trained, out))
    assert all(torch.equal(x, b.state_dict()[name]) for name, x in a.state_dict().items())
    code, _, error = command(capsys, "--checkpoint", str(trained), "--export", str(out))
    assert (code, error.count("\n")) == (2, 1)
    assert "exists already" in error


def test_who_reads_may_stop_and_the_disk_may_be_full(trained):
    """No traceback: quietly when the reader has gone, one line when nothing can be written."""
    command = [sys.executable, "-m", "flexrattn.generate", "--checkpoint", str(trained), "--prompt", "def f"]
    reader, writer = os.pipe()
    os.close(reader)
    full = os.open("/dev/full", os.O_WRONLY)
    both = [subprocess.Popen(command, stdout=out, stderr=subprocess.PIPE, text=True) for out in (writer, full)]
    os.close(writer)
    os.close(full)
    (_, gone), (_, no_room) = [process.communicate(timeout=120) for process in both]
    assert [process.returncode for process in both] == [141, 2]
    assert gone == ""
    assert (no_room.count("\n"), "No space left" in no_room) == (1, True)


def test_newest_complete_step_and_a_step_by_name(trained):
    assert find_checkpoint(trained).weights.name == "step-8"
    assert find_checkpoint(trained / "checkpoint" / "step-4").weights.name == "step-4"
    assert find_checkpoint(trained / "checkpoint").weights.name == "step-8"


def test_bad_input_is_one_line(trained, tmp_path, capsys):
    config = json.loads((trained / "config.json").read_text())

    def with_config(change) -> str:
        other = tmp_path / f"other_{len(list(tmp_path.iterdir()))}"
        shutil.copytree(trained, other)
        changed = json.loads(json.dumps(config))
        change(changed)
        (other / "config.json").write_text(json.dumps(changed))
        return str(other)

    wide = model_registry("debug", window=8).model.to_dict()
    base = ["--prompt", "x", "--checkpoint"]
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([*base, str(tmp_path / "absent")], "does not exist"),
        ([*base, str(tmp_path / "empty")], "holds no complete checkpoint"),
        ([*base, with_config(lambda c: c["model_spec"].update(model=wide))], "checkpoint of another model"),
        ([*base, with_config(lambda c: c["model_spec"]["model"]["layers"][0].update(new=1))], "does not build: layers"),
        ([*base, with_config(lambda c: c["tokenizer"].clear())], "which tokenizer the run used: name it with"),
        (
            [*base, with_config(lambda c: c["tokenizer"].update({"class": "HuggingFaceTokenizer"}))],
            "tokenizer assets/tokenizer is missing: no tokenizer.json there",
        ),
        ([*base, str(trained), "--tokenizer", str(tmp_path)], "no tokenizer.json there"),
        (["--checkpoint", str(trained), "--prompt", ""], "the prompt is empty"),
        (["--checkpoint", str(trained)], "no prompt given"),
        (["--checkpoint", str(trained), "--export", str(trained / "config.json" / "x")], "cannot write an export to"),
        (["--checkpoint", str(trained), "--export", str(trained / "config.json")], "cannot write an export to"),
        (
            ["--checkpoint", str(trained), "--prompt", "a" * 131072],
            "the prompt has 131073 tokens, the model's limit is",
        ),
        ([*base, str(trained), "--max-new-tokens", "0"], "--max-new-tokens must be 1 or more"),
        ([*base, str(trained), "--temperature", "-1"], "temperature must be 0"),
        (["--checkpoint", str(trained), "--export", ""], "--export needs a folder"),
        ([*base, str(trained), "--stop", ""], "a stop string must not be empty"),
        ([*base, str(trained), "--impl", "triton"], "triton"),
        ([*base, str(trained), "--tempreature", "1"], "unrecognized arguments"),
    ):
        code, out, error = command(capsys, *arguments)
        assert code == 2, arguments
        assert out == "", arguments
        assert message in error
        assert error.count("\n") == 1, error


@pytest.mark.parametrize(
    "options",
    [
        {"window": 5, "learned_initial_state": True, "learned_qk_scale": True, "branch_norm": False},
        {"window": None, "feature_map": "relu", "pattern": ["local"]},
        {"layer_kind": "swa", "window": 7, "pattern": ["global", "local"]},
        {"layer_kind": "full"},
        {"layer_kind": "full", "local_mask": "sliding_window", "local_mask_args": {"window": 3}},
        {
            "layer_kind": "swa",
            "window": None,
            "local_mask": "tests.flexrattn.decode.models:position_parity",
            "global_mask": "sliding_window",
            "global_mask_args": {"window": 9},
        },
        {"window": 5, "global_mask": "sliding_window", "global_mask_args": {"window": 9}},
        {"window": 5, "layer_masks": {"0": {"attention_sink": {"sinks": 2}}, "1": {"sliding_window": {"window": 3}}}},
        {"window": 5, "local_mask": {"stochastic_window": {"values": [2, 9], "until": 30}}, "pattern": ["local"]},
        {"layer_kind": "swa", "layer_masks": {":2": {"chunked": {"chunk": 4}}, "2:": "causal"}},
        {"window": 5, "local_score_mod": {"soft_cap": {"cap": 5}}, "layer_score_mods": {"-1": "relative_bias"}},
        {"window": 5, "decay_gate": True, "global_rope": True, "rla_norm_init": 0.5},
        {"layer_kind": "hymba", "window": 5, "decay_gate": True},
        {"layer_kind": "swa", "window": 5, "global_rope": True},
        {"layer_kind": "full", "global_rope": True},
        {"layer_kind": "full", "global_rope": True, "global_mask": "sliding_window", "global_mask_args": {"window": 3}},
        {"window": 5, "model": {"activation": "gelu", "tied": False, "qk_norm": False, "n_layers": 5}},
    ],
)
def test_a_config_is_rebuilt_from_its_own_words(options):
    config = model_registry("debug", **options).model
    saved = json.loads(json.dumps(config.to_dict()))
    rebuilt = model_config(saved, source="config.json")

    def plain(x) -> dict:
        return json.loads(json.dumps({k: v for k, v in x.to_dict().items() if "init" not in k}))

    def without_functions(x):
        if isinstance(x, dict):
            return {k: without_functions(v) for k, v in x.items() if k != "param_init"}
        return [without_functions(v) for v in x] if isinstance(x, list) else x

    assert without_functions(plain(rebuilt)) == without_functions(plain(config))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"decay_gate": True}, "decay_gate true"),
        ({"layer_kind": "hymba"}, "layer_kind 'hymba'"),
        ({"layer_kind": "hymba", "decay_gate": True}, "decay_gate true and layer_kind 'hymba'"),
    ],
)
def test_layers_without_a_cache_are_refused(options, named):
    model = build(**options)
    said = f"a model with {named} trains and can be evaluated, but decoding has no cache for it yet"
    with pytest.raises(ValueError, match=said):
        Generator(model, ByteTokenizer())
    with pytest.raises(ValueError, match=said):
        DecodeCache(model.config, rows=1, max_length=8, device="cpu", dtype=torch.float64)


def test_text_comes_in_whole_characters_and_never_past_a_stop():
    tokenizer = ByteTokenizer()
    text = "a\N{EURO SIGN}b\N{GRINNING FACE}cSTOPd"
    stream = TextStream(tokenizer, ["STOP"])
    pieces = []
    for token in tokenizer.encode(text):
        if stream.add(token):
            break
        pieces.append(stream.take())
    pieces.append(stream.take(final=True))
    assert "".join(pieces) == text[: text.index("STOP")]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    held = TextStream(tokenizer, ["STOP"])
    for token in tokenizer.encode("xST"):
        held.add(token)
    assert held.take() == "x"
    assert held.take(final=True) == "ST"
    broken = TextStream(tokenizer)
    for token in (97, 0xE2, 0x82):
        broken.add(token)
    assert broken.take() == "a"
    assert broken.take(final=True) == "\N{REPLACEMENT CHARACTER}"
