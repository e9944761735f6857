"""Study files: what they expand to, and mistakes that are named before anything runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flexrattn.ablate import code
from flexrattn.ablate.cli import main
from flexrattn.ablate.study import build_arms, load_study, merge, unflatten
from flexrattn.decode.checkpoint import CONFIG_FILE
from tests.flexrattn.ablate.studies import write_study

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "configs/ablations").glob("*.yaml"))


def test_dotted_keys_and_mappings_are_the_same():
    assert unflatten({"a.b.c": 1, "a": {"b.d": 2}}) == {"a": {"b": {"c": 1, "d": 2}}}
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}}) == {"a": {"b": 1, "c": 3}}


def test_a_masks_arguments_are_those_of_one_mask():
    base = {"recipe_args": {"local_mask": "x", "local_mask_args": {"window": 3}}}
    over = {"recipe_args": {"local_mask_args": {"size": 4}}}
    assert merge(base, over)["recipe_args"]["local_mask_args"] == {"size": 4}
    named = {
        "recipe_args": {"local_mask": {"x": {"window": 3}}, "layer_masks": {"0:2": {"x": {"window": 3}}, "5": "y"}}
    }
    other = unflatten({"recipe_args.local_mask": {"z": {"size": 4}}, "recipe_args.layer_masks.0:2.z.size": 4})
    assert merge(named, other)["recipe_args"] == {
        "local_mask": {"z": {"size": 4}},
        "layer_masks": {"0:2": {"z": {"size": 4}}, "5": "y"},
    }
    same = unflatten({"recipe_args.local_mask.x.size": 4})  # one argument more, by a grid say
    assert merge(named, same)["recipe_args"]["local_mask"] == {"x": {"window": 3, "size": 4}}


def test_dotted_arguments_of_one_mask_stand_together():
    for key in ("local_mask_args", "local_mask.x", "local_score_mod_args"):
        flat = {f"recipe_args.{key}.low": 1, f"recipe_args.{key}.high": 2}
        assert unflatten(flat) == unflatten({f"recipe_args.{key}": {"low": 1, "high": 2}})


@pytest.mark.parametrize("place", ["local_mask", "layer_masks.0:2", "layer_score_mods.-1"])
def test_the_dots_of_a_mask_of_ones_own_divide_nothing(place):
    nested = unflatten({f"recipe_args.{place}": {"my.masks:every": {"step": 2}}})
    assert nested == unflatten({f"recipe_args.{place}.my.masks:every.step": 2})
    first, _, layer = place.partition(".")
    held = nested["recipe_args"][first]
    assert (held[layer] if layer else held) == {"my.masks:every": {"step": 2}}


def test_arms_seeds_and_tuning_expand(tmp_path):
    path = write_study(
        tmp_path,
        arms={"full": {"recipe_args.layer_kind": "full"}, "r": {"grid": {"a.x": [1, None], "a.y": [["local"], 0.5]}}},
        tune={"values": {"recipe_args.lr": [0.1, 0.2]}, "seed": 9, "set": {"training.steps": 2}},
        set={"training": {"seq_len": 128}},
    )
    study = load_study(path)
    assert [arm.name for arm in study.arms] == ["full", "r-1-l", "r-1-0.5", "r-none-l", "r-none-0.5"]
    assert study.arm("r-none-0.5").document["a"] == {"x": None, "y": 0.5}
    assert study.control == "full"
    assert study.comparisons == tuple((arm.name, "full") for arm in study.arms[1:])
    run = study.run("r-1-l", 2, {"recipe_args.lr": 0.2})
    assert run.document["training"] == {"steps": 4, "seq_len": 128}
    assert run.document["debug"] == {"seed": 2}
    assert run.document["recipe_args"]["lr"] == 0.2
    tuning = study.tuning_runs()
    assert len(tuning) == 10
    assert {(r.document["debug"]["seed"], r.document["training"]["steps"]) for r in tuning} == {(9, 2)}
    assert len({r.name for r in tuning}) == 10


def test_same_seed_is_the_same_data_order_in_every_arm(tmp_path):
    path = write_study(tmp_path)
    document = yaml.safe_load(path.read_text())
    del document["seed_keys"]
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    study = load_study(path)
    for seed in study.seeds:
        seeds = {
            (d["debug"]["seed"], d["dataloader"]["seed"])
            for d in (study.run(arm.name, seed, {}).document for arm in study.arms)
        }
        assert seeds == {(seed, seed)}


MISTAKES = {
    "key": ({"sedes": [1]}, "unknown key sedes, did you mean 'seeds'?"),
    "no-arms": ({"arms": None}, "no 'arms'"),
    "no-base": ({"base": "nowhere.yaml"}, "configuration file nowhere.yaml does not exist"),
    "control": ({"control": "ful"}, "control 'ful', did you mean 'full'?"),
    "comparison": ({"comparisons": [["window-4", "window-5"]]}, "unknown .* arm of comparisons 'window-5'"),
    "comparison-form": ({"comparisons": [["full"]]}, r"list of \[arm, control\]"),
    "comparison-itself": ({"comparisons": [["full", "full"]]}, "comparisons must be of two arms"),
    "base-form": ({"base": ["a.yaml"]}, "base must be one configuration's file name"),
    "metrics": ({"metrics": "loss"}, "metrics must be a list of dotted names, got 'loss'"),
    "primary": ({"primary": "groups.beyond_windw.loss"}, "group of .* 'beyond_windw', did you mean 'beyond_window'"),
    "seed-keys": ({"seed_keys": "debug.seed"}, "seed_keys must be a list of dotted names, got 'debug.seed'"),
    "tune-twice": (
        {"tune": {"values": {"x": [0.1, 0.1000000001]}}},
        "two runs of tune are named 'tune-full-0.1-seed0'",
    ),
    "seeds": ({"seeds": [1, 1]}, "seeds must be a list of different integers"),
    "margin": ({"margin": 0}, "margin must be a positive number"),
    "margin-nan": ({"margin": float("nan")}, "margin must be a positive number"),
    "grid": ({"arms": {"a": {"grid": {"x": 3}}}}, r"arms\.a\.grid\.x must be a list of values"),
    "arm": ({"arms": {"a": 3}}, r"arms\.a must be a mapping"),
    "name": ({"arms": {"a b": {}}}, "arm 'a b' must be letters"),
    "twice": ({"arms": {"a": {"grid": {"x": [1, 1]}}}}, "two arms are named 'a-1'"),
    "tune-key": ({"tune": {"value": {}}}, r"unknown key tune\.value, did you mean 'values'"),
    "tune-values": ({"tune": {"seed": 1}}, "tune needs values"),
    "tune-list": ({"tune": {"values": {"x": 1}}}, r"tune\.values\.x must be a list"),
}


@pytest.mark.parametrize(("changes", "said"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes_in_the_file(tmp_path, changes, said):
    with pytest.raises(ValueError, match=said):
        load_study(write_study(tmp_path, **changes))


BAD_ARMS = {
    "recipe-argument": ({"recipe_args.windw": 3}, "recipe_args.windw, did you mean 'window'?"),
    "value": ({"recipe_args.feature_map": "elu"}, "unknown feature_map 'elu'"),
    "section": ({"training.step": 3}, "unknown key training.step, did you mean 'steps'?"),
    "swa-without-window": ({"recipe_args": {"layer_kind": "swa", "window": None}}, "'swa' needs a window"),
    "mask": ({"recipe_args": {"layer_kind": "swa", "local_mask": "slidng_window"}}, "did you mean 'sliding_window'"),
    "tokens": ({"training.steps": 5}, "arms must train on equally many tokens (tokens: full 1,024, bad 1,280)"),
    "seq-len": ({"recipe_args.model": {"max_seq_len": 32}}, "training.seq_len 64 is more than the model's max_seq_len"),
    "no-validation": ({"validator.enable": False}, "validator.enable is false"),
    "no-text": ({"recipe_args": {"data": "tokens", "data_path": "nowhere"}}, "nowhere holds no tokens.json"),
}


@pytest.mark.parametrize(("arm", "said"), BAD_ARMS.values(), ids=BAD_ARMS)
def test_an_arm_that_cannot_be_built_is_named_before_any_starts(tmp_path, capsys, arm, said):
    full = {"recipe_args": {"layer_kind": "full", "window": None}}
    path = write_study(tmp_path, arms={"full": full, "bad": arm}, set={"training.local_batch_size": 4})
    out = tmp_path / "out"
    assert main([str(path), "--out", str(out)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("ablate: error:")
    assert said in errors[0]
    if "tokens (" not in said:
        assert "arm 'bad' cannot be built" in errors[0]
    assert not out.exists()


def test_checkpoints_where_its_base_trained_are_in_no_arms_way(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "outputs/debug/checkpoint/step-1").mkdir(parents=True)
    (tmp_path / "outputs/debug/checkpoint/step-1/.metadata").touch()
    (tmp_path / "outputs/debug" / CONFIG_FILE).write_text('{"model_spec": {"model": {"of": "another"}}}')
    assert build_arms(load_study(write_study(tmp_path)))


def test_dry_run_lists_arms_parameters_tokens_and_time(tmp_path, capsys):
    path = write_study(tmp_path, tune={"values": {"recipe_args.lr": [0.1, 0.2]}, "set": {"training.steps": 2}})
    assert main([str(path), "--dry-run", "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "window-16" in printed
    assert "3 x swa(window 16" in printed
    # 4 steps of 8 rows of 64, and 2 steps of them.
    assert "6 runs of 1,024 tokens on seed 0 (recipe_args.lr: 0.1, 0.2)" in printed
    assert "3 arms x 2 seeds of 2,048 tokens, control full" in printed
    assert "2 at a time" in printed


def test_facts_of_an_arm(tmp_path):
    study = load_study(write_study(tmp_path))
    facts = build_arms(study, check_files=False)
    # debug: 4 layers, 2 KV heads of 32, bf16 keys and values; one global layer keeps all 64 tokens.
    one_key = 2 * 2 * 32 * 2
    assert facts["full"].cache_bytes == 4 * 64 * one_key
    assert facts["window-16"].cache_bytes == (3 * 17 + 64) * one_key
    assert facts["window-16"].window == 16
    assert facts["full"].window is None
    assert facts["full"].parameters == facts["window-4"].parameters > 500_000


@pytest.mark.parametrize("path", SHIPPED, ids=[path.stem for path in SHIPPED])
def test_shipped_studies_build(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    study = load_study(path)
    facts = build_arms(study, check_files=False)
    assert len(facts) >= 2
    assert len(study.seeds) >= 2
    assert study.path.read_text().startswith("# ")


def test_code_hash_follows_the_sources(tmp_path, monkeypatch):
    for name in (
        "flexrattn/model.py",
        "flexrattn/ablate/cli.py",
        "scan_kernels/ops.py",
        "score_mods/info.py",
        "train.py",
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("x = 1\n")
    monkeypatch.setattr(code, "ROOT", tmp_path)
    first = code.code_hash.__wrapped__()
    assert first == code.code_hash.__wrapped__()
    (tmp_path / "flexrattn/ablate/cli.py").write_text("x = 2\n")
    assert code.code_hash.__wrapped__() == first
    (tmp_path / "scan_kernels/ops.py").write_text("x = 2\n")
    second = code.code_hash.__wrapped__()
    assert second != first
    monkeypatch.setattr(code, "versions", lambda: {"torch": "0"})
    assert code.code_hash.__wrapped__() != second
