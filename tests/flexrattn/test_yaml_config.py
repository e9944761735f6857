"""What a YAML file and flags make of a config: the right things replaced, everything else as the recipe left it."""

from __future__ import annotations

import dataclasses
from typing import Literal

import pytest
import yaml
from torchtitan.distributed.activation_checkpoint import FullAC, SelectiveAC

from flexrattn.yaml_config import YamlConfigManager, coerce, override
from tests.flexrattn.runs import ROOT, write_config

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))


def parse(path, *flags):
    return YamlConfigManager().parse_args([str(path), *flags])


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_configs_parse(path):
    config = parse(path)
    assert config.dump_folder == f"outputs/{path.stem}"
    assert config.checkpoint.last_save_model_only is False


@pytest.mark.parametrize("size", ["3b", "12b"])
def test_arms_differ_in_the_layer_kind_alone(size):
    """rattn_, swa_ and full_ of a size are one file but for the layer kind, the window and the output folder."""
    arms = {arm: yaml.safe_load((ROOT / f"configs/{arm}_{size}.yaml").read_text()) for arm in ("rattn", "swa", "full")}
    kinds = {}
    for arm, document in arms.items():
        kinds[arm] = (document["recipe_args"].pop("layer_kind"), document["recipe_args"].pop("window"))
        assert document.pop("dump_folder") == f"outputs/{arm}_{size}"
    assert kinds == {"rattn": ("rattention", 512), "swa": ("swa", 2048), "full": ("full", None)}
    assert arms["rattn"] == arms["swa"] == arms["full"]


def test_flags_override_the_file_and_the_file_the_recipe(tmp_path):
    path = write_config(tmp_path, training={"steps": 5, "max_norm": 0.5})
    config = parse(path, "--training.steps", "7", "--recipe_args.window", "3", "--metrics.no-enable-tensorboard")
    assert config.training.steps == 7
    assert config.training.max_norm == 0.5
    assert config.metrics.enable_tensorboard is False
    assert config.model_spec.model.layers[0].attention.window == 3
    assert config.training.disable_cuda_graphs is True


def test_nested_recipe_flags(tmp_path):
    config = parse(write_config(tmp_path), "--recipe_args.model.dim=64", "--recipe_args.pattern", "[local, global]")
    assert config.model_spec.model.dim == 64
    assert [layer.attention.kind.value for layer in config.model_spec.model.layers[:2]] == ["rattention", "full"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("none", None),
        (None, None),
        ("full", FullAC.Config()),
        ({"full": {"preserve_rng_state": False}}, FullAC.Config(preserve_rng_state=False)),
        ("selective", SelectiveAC.Config()),
    ],
    ids=["none", "null", "full", "full-with-fields", "selective"],
)
def test_choice_by_name(tmp_path, value, expected):
    assert parse(write_config(tmp_path, activation_checkpoint=value)).activation_checkpoint == expected


def test_override_checks_the_dataclass_again():
    """`__post_init__` runs on what the override made: torchtitan's own checks hold for YAML too."""

    @dataclasses.dataclass
    class Half:
        x: int = 2

        def __post_init__(self):
            if self.x % 2:
                raise ValueError(f"x must be even, got {self.x}")

    assert override(Half(), {"x": 4}).x == 4
    with pytest.raises(ValueError, match="x must be even, got 3"):
        override(Half(), {"x": 3})


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        ("1e-3", float, 1e-3),
        (1, float, 1.0),
        ([1, "2e0"], list[float], [1.0, 2.0]),
        ([0.9, 0.95], tuple[float, float], (0.9, 0.95)),
        (None, int | None, None),
        ("x", str | int, "x"),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ("a", Literal["a", "b"], "a"),
        (False, bool, False),
    ],
    ids=str,
)
def test_coerced(value, hint, expected):
    result = coerce(value, hint, "key")
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        ("x", float),
        (True, float),
        (1.5, int),
        ("1", int),
        (1, bool),
        ("ab", list[str]),
        ([1], tuple[float, float]),
        (3, str),
        (None, int),
        ("c", Literal["a", "b"]),
        ([1], dict[str, int]),
    ],
    ids=str,
)
def test_refused_types(value, hint):
    with pytest.raises(ValueError, match=r"^section\.key must be"):
        coerce(value, hint, "section.key")


@pytest.mark.parametrize(
    ("flag", "value", "masks"),
    [
        ("layer_masks.-1.sliding_window.window", "5", {3: "sliding_window_5"}),
        ("layer-masks.0:-2.attention_sink.sinks", "2", dict.fromkeys([0, 1], "attention_sink_sinks2_window8")),
        ("local_mask.score_mods.masks.sliding_window:sliding_window.window", "5", {}),
    ],
    ids=["last", "slice", "own"],
)
def test_flags_name_layers_and_masks_of_ones_own(tmp_path, flag, value, masks):
    path = write_config(tmp_path, recipe_args={"flavor": "debug", "window": 8})
    layers = parse(path, f"--recipe_args.{flag}", value).model_spec.model.layers
    own = "score_mods.masks.sliding_window:sliding_window_window5"
    rest = [own] * 3 + ["causal"] if "score_mods" in flag else ["sliding_window_8"] * 3 + ["causal"]
    assert [layer.attention.mask for layer in layers] == [masks.get(i, rest[i]) for i in range(4)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--recipe_args.window", "[1"], r"--recipe_args\.window '\[1' is not valid YAML: while parsing"),
        (["--recipe_args.window", "3", "--recipe_args.window.x", "3"], "give window as a value and as a mapping"),
    ],
    ids=["yaml", "below-a-value"],
)
def test_values_of_flags_that_cannot_be_read(tmp_path, flags, said):
    with pytest.raises(ValueError, match=said) as error:
        parse(write_config(tmp_path), *flags)
    assert "\n" not in str(error.value)
