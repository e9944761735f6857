"""Bad input: one line on stderr that says what was given and what would do, exit code 2, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.flexrattn.runs import TINY, run, script, write_config

MISTAKES = {
    "unknown-recipe": ({"recipe": "ratention"}, "unknown recipe 'ratention', did you mean 'rattention'?"),
    "recipe-import": ({"recipe": "no_such_package:make"}, "ModuleNotFoundError: No module named 'no_such_package'"),
    "recipe-argument": (
        {"recipe_args": {"windw": 4}},
        "unknown recipe argument recipe_args.windw, did you mean 'window'?",
    ),
    "recipe-argument-type": ({"recipe_args": {"window": "wide"}}, "recipe_args.window must be int | None, got 'wide'"),
    "unknown-section": ({"trainig": {"steps": 3}}, "unknown key trainig, did you mean 'training'?"),
    "unknown-key": ({"training": {"step": 3}}, "unknown key training.step, did you mean 'steps'?"),
    "wrong-type": ({"training": {"steps": "many"}}, "training.steps must be int, got 'many' (str)"),
    "bool-is-no-int": ({"training": {"steps": True}}, "training.steps must be int, got True (bool)"),
    "wrong-choice": (
        {"training": {"dtype": "int8"}},
        "training.dtype must be one of 'bfloat16', 'float32', got 'int8'",
    ),
    "section-no-mapping": ({"training": 3}, "training must be a mapping"),
    "wrong-policy": ({"activation_checkpoint": "some"}, "unknown activation_checkpoint 'some'"),
    "negative-window": ({"recipe_args": {"window": -1}}, "window must be an integer >= 0"),
    "swa-without-window": ({"recipe_args": {"layer_kind": "swa", "window": None}}, "'swa' needs a window"),
    "heads": ({"recipe_args": {"model": {"n_kv_heads": 3}}}, "n_heads must be a multiple of n_kv_heads"),
    "softmax-backend": ({"recipe_args": {"softmax_backend": "flsh"}}, "did you mean 'flash'"),
    "softmax-backend-heads": (
        {"recipe_args": {"softmax_backend": "flash"}},
        "softmax_backend 'flash' takes heads of 32, 64, 96, 128, got 8: flash-attn-4's gradients of others can be",
    ),
    "softmax-backend-on-cpu": (
        {"recipe_args": {"softmax_backend": "flash", "model": {"dim": 32, "head_dim": 32}}},
        "softmax_backend 'flash' needs a Hopper or newer GPU, this is cpu: use 'triton'",
    ),
    "feature-map": ({"recipe_args": {"feature_map": "elu"}}, "unknown feature_map 'elu'"),
    "flavor": ({"recipe_args": {"flavor": "7b"}}, "unknown flavor '7b'"),
    "mask": ({"recipe_args": {"global_mask": "causl"}}, "did you mean 'causal'"),
    "mask-import": (
        {"recipe_args": {"global_mask": "no_such_package.masks:mine"}},
        "No module named 'no_such_package'",
    ),
    "mask-argument": (
        {"recipe_args": {"global_mask": "sliding_window", "global_mask_args": {"windw": 4}}},
        "windw",
    ),
    "mask-beside-linear-branch": (
        {"recipe_args": {"local_mask": {"chunked": {"chunk": 4}}}},
        "mask 'chunked_4' does not go with a linear branch: what it leaves out is not all keys before a window",
    ),
    "layer-masks": ({"recipe_args": {"layer_masks": {"9": "causal"}}}, "layer_masks[9] names no layer: the model has"),
    "score-mod": (
        {"recipe_args": {"local_score_mod": "my_package.mods:mine"}},
        "score mod 'my_package.mods:mine': cannot import 'my_package.mods': ModuleNotFoundError",
    ),
    "missing-data": ({"recipe_args": {"data_path": "/no/such/folder"}}, "/no/such/folder"),
    "no-data-path": ({"recipe_args": {"data_path": None}}, "needs recipe_args.data_path"),
    "vocabulary": ({"recipe_args": {"model": {"vocab_size": 100}}}, "100"),
    "missing-tokenizer": (
        {"recipe_args": {"tokenizer": "huggingface"}, "hf_assets_path": "/no/tokenizer"},
        "/no/tokenizer",
    ),
    "context-parallel": (
        {"parallelism": {"context_parallel_degree": 2}},
        "context_parallel_degree = 2 is not supported",
    ),
    "seq-len-of-model": (
        {"training": {"seq_len": 64}, "recipe_args": {"model": {"max_seq_len": 32}}},
        "training.seq_len 64 is more than the model's max_seq_len 32",
    ),
    "seq-len-of-loss": (
        {"training": {"seq_len": 60}, "recipe_args": {"loss": "chunked"}},
        "training.seq_len 60 must be a multiple of loss.num_chunks 8",
    ),
    "no-steps": ({"training": {"steps": 0}}, "must be positive"),
    "batch": ({"training": {"global_batch_size": 6}}, "global batch size must be multiple of local batch size"),
}

FLAGS = {
    "unknown-flag": (["--training.stps", "3"], "unknown flag --training.stps, did you mean 'steps'?"),
    "unknown-flag-section": (["--trainin.steps", "3"], "unknown flag --trainin, did you mean 'training'?"),
    "flag-type": (["--training.steps", "many"], "many"),
    "flag-without-value": (["--recipe_args.window"], "--recipe_args.window needs a value"),
    "recipe-flag": (["--recipe_args.window", "-3"], "window must be an integer >= 0"),
}


def refused(folder: Path, *args: str, python_path: str | None = None) -> str:
    """The one line that a run in a process of its own printed before it ended with exit code 2."""
    done = run(list(args), logs=folder, python_path=python_path)
    assert done.returncode == 2, done.output[-3000:]
    lines = [line for line in done.output.splitlines() if line.startswith("train.py: error:")]
    assert len(lines) == 1, done.output[-3000:]
    assert done.output.rstrip().endswith(lines[0])
    assert "Traceback" not in done.output
    return lines[0]


def merged(sections: dict) -> dict:
    """`sections` with the recipe arguments that a tiny run needs kept beside the wrong one."""
    sections = {k: dict(v) if isinstance(v, dict) else v for k, v in sections.items()}
    if isinstance(sections.get("recipe_args"), dict) and "model" in sections["recipe_args"]:
        sections["recipe_args"]["model"] = {**TINY["recipe_args"]["model"], **sections["recipe_args"]["model"]}
    return sections


@pytest.mark.parametrize(("sections", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_the_file(tmp_path, sections, said):
    config = write_config(tmp_path, **merged(sections))
    assert said in refused(tmp_path, str(config))
    assert not list((tmp_path / "out").rglob("step-*"))


@pytest.mark.parametrize(("flags", "said"), FLAGS.values(), ids=FLAGS)
def test_mistake_on_the_command_line(tmp_path, flags, said):
    assert said in refused(tmp_path, str(write_config(tmp_path)), *flags)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("recipe: [", "is not valid YAML"),
        ("- recipe", "must hold a mapping with a 'recipe', got list"),
        ("training: {steps: 3}", "no 'recipe'; known recipes: rattention"),
        ("base: a.yaml\narms: {a: {}}", "a study, not a configuration: run python -m flexrattn.ablate"),
        ("recipe: rattention\nrecipe_args: 3", "recipe_args must be a mapping"),
        ("", "must hold a mapping"),
    ],
    ids=["not-yaml", "list", "no-recipe", "study", "recipe-args", "empty"],
)
def test_mistake_in_the_yaml(tmp_path, text, said):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    assert said in refused(tmp_path, str(path))


def test_missing_file_suggests_one_that_exists(tmp_path):
    write_config(tmp_path)
    line = refused(tmp_path, str(tmp_path / "tny.yaml"))
    assert "does not exist, did you mean" in line
    assert "tiny.yaml" in line


def test_no_file_shows_the_usage(tmp_path):
    assert "usage: python train.py CONFIG.yaml" in refused(tmp_path)


def test_empty_data_folder(tmp_path):
    (tmp_path / "nothing").mkdir()
    config = write_config(tmp_path, recipe_args={"data_path": str(tmp_path / "nothing")})
    assert str(tmp_path / "nothing") in refused(tmp_path, str(config))


def test_a_users_mask_that_raises_while_imported(tmp_path):
    """The ImportError shown is the one inside the user's module."""
    (tmp_path / "my_masks.py").write_text("import a_package_i_forgot\n")
    config = write_config(tmp_path, recipe_args={"global_mask": "my_masks:mine"})
    line = refused(tmp_path, str(config), python_path=str(tmp_path))
    assert "No module named 'a_package_i_forgot'" in line


def test_exit_code_of_the_script(tmp_path):
    """The same through `python train.py`: exit code 2, one line, no traceback."""
    done = script(str(write_config(tmp_path)), "--training.stps", "3")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("train.py: error: unknown flag --training.stps")
    assert "Traceback" not in done.stderr
