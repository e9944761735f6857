"""A study file becomes arms, and arms become runs: each the whole YAML document that train.py is given.

    base: configs/rattn_30m.yaml            # relative to the working directory
    set: {training.steps: 1000}             # over the base, in every arm; keys may be dotted
    seeds: [1, 2, 3]
    arms:
      full: {recipe_args.layer_kind: full, recipe_args.window: null}
      swa:
        recipe_args.layer_kind: swa
        grid: {recipe_args.window: [32, 128]}        # arms swa-32 and swa-128
    control: full
    tune: {values: {recipe_args.lr: [5.0e-4, 1.0e-3, 2.0e-3]}, seed: 0, set: {training.steps: 300}}

Everything is built before anything runs: a mistake is a ValueError that names the arm and the key.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from flexrattn.ablate.code import ROOT, digest_of
from flexrattn.evaluation import GROUPS
from flexrattn.launch import USER_ERRORS
from flexrattn.quiet import quiet_log
from flexrattn.suggest import choose, did_you_mean
from flexrattn.yaml_config import NAMED, build_config, holds_name, key_path, load_yaml

KEYS = (
    "base",
    "set",
    "arms",
    "seeds",
    "seed_keys",
    "control",
    "comparisons",
    "primary",
    "margin",
    "metrics",
    "tune",
    "note",
)
TUNE_KEYS = ("values", "seed", "set")
GRID = "grid"
DEFAULT_METRICS = (
    "loss",
    "groups.in_window.loss",
    "groups.beyond_window.loss",
    "groups.bigram_in_window.loss",
    "groups.bigram_beyond_window.loss",
)

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """`document` lacks seed and tuned values. `series` is the name of the entry that a grid made it from."""

    name: str
    series: str
    document: Document


@dataclass(frozen=True, kw_only=True)
class Run:
    """One training run. `choice`: tuned key -> value. `document` is what train.py gets, its dump_folder aside."""

    stage: str  # "tune" or "run"
    arm: str
    seed: int
    choice: dict[str, Any]
    document: Document

    @property
    def name(self) -> str:
        """A file name, unique in the study."""
        values = "".join(f"-{_shown(value)}" for value in self.choice.values()) if self.stage == "tune" else ""
        return f"{self.stage}-{self.arm}{values}-seed{self.seed}"

    @cached_property
    def config_hash(self) -> str:
        """Of the document: equal hashes are the same experiment, on the same `data`."""
        return digest_of(self.document)

    @cached_property
    def data(self) -> str | None:
        """Fingerprint of the prepared text that is read, where it is there: a path may hold another text later."""
        return tokens_fingerprint(self.document)


@dataclass(frozen=True, kw_only=True)
class Tune:
    values: dict[str, list[Any]]
    seed: int
    set: Document


@dataclass(frozen=True, kw_only=True)
class Study:
    """comparisons: (arm, control) pairs, corrected together (Holm). margin: of equality, in the metric's unit."""

    name: str
    path: Path
    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    seed_keys: tuple[str, ...]
    control: str
    comparisons: tuple[tuple[str, str], ...]
    primary: str
    margin: float
    metrics: tuple[str, ...]
    tune: Tune | None
    note: str = ""

    def arm(self, name: str) -> Arm:
        return next(arm for arm in self.arms if arm.name == name)

    def tuning_runs(self) -> list[Run]:
        """Every arm with every combination of the tuned values, on the tuning seed."""
        if self.tune is None:
            return []
        keys, lists = list(self.tune.values), list(self.tune.values.values())
        choices = [dict(zip(keys, values, strict=True)) for values in itertools.product(*lists)]
        return [
            self._run("tune", arm, self.tune.seed, choice, self.tune.set) for choice in choices for arm in self.arms
        ]

    def run(self, arm: str, seed: int, choice: dict[str, Any]) -> Run:
        return self._run("run", self.arm(arm), seed, choice, {})

    def _run(self, stage: str, arm: Arm, seed: int, choice: dict[str, Any], extra: Document) -> Run:
        document = merge(arm.document, unflatten(extra))
        for key in self.seed_keys:
            document = merge(document, unflatten({key: seed}))
        document = merge(document, unflatten(choice))
        return Run(stage=stage, arm=arm.name, seed=seed, choice=choice, document=document)


# ------------------------------------------------------------------------------------------------------- documents


def unflatten(values: Document, within: tuple[str, ...] = ()) -> Document:
    """{"training.steps": 3} -> {"training": {"steps": 3}}, at every level; later keys win."""
    result: Document = {}
    for key, value in values.items():
        first, *rest = key_path(str(key), within)
        path = (*within, first)
        if rest:
            value = {".".join(rest): value}
        _put(result, {first: unflatten(value, path) if isinstance(value, dict) else value})
    return result


def _put(result: Document, over: Document) -> None:
    """Keys of one mapping, put together whatever they are."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(result.get(key), dict):
            _put(result[key], value)
        else:
            result[key] = copy.deepcopy(value)


def merge(base: Document, over: Document, within: tuple[str, ...] = ()) -> Document:
    """`over` over `base`, mapping by mapping.

    A mask's arguments belong to one mask: `..._mask_args` are replaced as a whole, and so is {name: arguments} by
    another name. So are those of score mods.
    """
    result = copy.deepcopy(base)
    for key, value in over.items():
        path = (*within, str(key))
        whole = path[-1].removesuffix("_args") in NAMED and path[-1] not in NAMED
        before = result.get(key)
        if isinstance(value, dict) and isinstance(before, dict) and not whole:
            other = holds_name(path) and set(before) != set(value)
            result[key] = copy.deepcopy(value) if other else merge(before, value, path)
        else:
            result[key] = copy.deepcopy(value)
    return result


def tokens_fingerprint(document: Document) -> str | None:
    """Of the prepared folder that the document trains from; None for other data, and where the folder is not."""
    recipe_args = document.get("recipe_args") or {}
    if recipe_args.get("data") != "tokens" or not recipe_args.get("data_path"):
        return None
    try:
        return json.loads((Path(recipe_args["data_path"]) / "tokens.json").read_text())["fingerprint"]
    except (OSError, ValueError, KeyError):
        return None


def _shown(value: Any) -> str:
    """A value as part of a name."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return (
            "".join(str(v)[:1] for v in value) if all(isinstance(v, str) for v in value) else "_".join(map(str, value))
        )
    if isinstance(value, dict):
        return "_".join(_shown(v) for v in value.values())
    return str(value).replace("/", "_").replace(":", ".")


# --------------------------------------------------------------------------------------------------------- reading


def load_study(path: Path) -> Study:
    """The study in a file. ValueError, one line, with the key and the arm, for whatever does not fit."""
    document = load_yaml(path)
    for key in document:
        if key not in KEYS:
            raise ValueError(f"{path}: unknown key {key}{did_you_mean(str(key), KEYS)}; known: {', '.join(KEYS)}")
    for key in ("base", "arms"):
        if not document.get(key):
            raise ValueError(f"{path}: no {key!r}: {'a configuration to vary' if key == 'base' else 'name => changes'}")
    if not isinstance(document["base"], str):
        raise ValueError(f"{path}: base must be one configuration's file name, got {document['base']!r}")
    base = load_yaml(_find(Path(document["base"])))
    base = merge(unflatten(base), unflatten(_mapping(path, "set", document.get("set"))))
    arms = _arms(path, base, _mapping(path, "arms", document["arms"]))
    names = [arm.name for arm in arms]
    control = choose(document.get("control", names[0]), names, what=f"{path}: control")
    comparisons = document.get("comparisons") or [[name, control] for name in names if name != control]
    for pair in comparisons:
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{path}: comparisons must be a list of [arm, control], got {pair!r}")
        for name in pair:
            choose(name, names, what=f"{path}: arm of comparisons")
        if pair[0] == pair[1]:
            raise ValueError(f"{path}: comparisons must be of two arms, got {pair!r}")
    margin = document.get("margin", 0.01)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 < margin < math.inf:
        raise ValueError(f"{path}: margin must be a positive number, got {margin!r}")
    primary = str(document.get("primary", "loss"))
    metrics = _names(path, "metrics", document.get("metrics") or DEFAULT_METRICS)
    for name in (primary, *metrics):
        if name.startswith("groups."):
            choose(name.split(".")[1], GROUPS, what=f"{path}: group of {name}")
    study = Study(
        name=path.stem,
        path=path,
        arms=tuple(arms),
        seeds=_seeds(path, document.get("seeds", [1, 2, 3])),
        seed_keys=_names(path, "seed_keys", document.get("seed_keys", ("debug.seed", "dataloader.seed"))),
        control=control,
        comparisons=tuple((a, b) for a, b in comparisons),
        primary=primary,
        margin=float(margin),
        metrics=tuple(dict.fromkeys([primary, *metrics])),
        tune=_tune(path, document.get("tune")),
        note=str(document.get("note", "")).strip(),
    )
    tuning = [run.name for run in study.tuning_runs()]
    if twice := next((name for name in tuning if tuning.count(name) > 1), None):
        raise ValueError(f"{path}: two runs of tune are named {twice!r}: its values must differ in six digits")
    return study


def _find(base: Path) -> Path:
    """Relative to the working directory, or, from elsewhere, to this checkout."""
    return ROOT / base if not base.exists() and (ROOT / base).exists() else base


def _mapping(path: Path, key: str, value: Any) -> Document:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{path}: {key} must be a mapping, got {value!r}")
    return value


def _names(path: Path, key: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{path}: {key} must be a list of dotted names, got {value!r}")
    return tuple(value)


def _seeds(path: Path, seeds: Any) -> tuple[int, ...]:
    fits = isinstance(seeds, list) and seeds and all(isinstance(s, int) and not isinstance(s, bool) for s in seeds)
    if not fits or len(set(seeds)) != len(seeds):
        raise ValueError(f"{path}: seeds must be a list of different integers, got {seeds!r}")
    return tuple(seeds)


def _arms(path: Path, base: Document, entries: Document) -> list[Arm]:
    arms: list[Arm] = []
    for series, entry in entries.items():
        changes = dict(_mapping(path, f"arms.{series}", entry))
        grid = _mapping(path, f"arms.{series}.{GRID}", changes.pop(GRID, None))
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise ValueError(f"{path}: arms.{series}.{GRID}.{key} must be a list of values, got {values!r}")
        own = merge(base, unflatten(changes))
        for values in itertools.product(*grid.values()):
            name = "-".join([str(series), *map(_shown, values)])
            if not re.fullmatch(r"[\w.+=-]+", name):
                raise ValueError(f"{path}: arm {name!r} must be letters, digits, and . _ + = - : it names files")
            if name in [arm.name for arm in arms]:
                raise ValueError(f"{path}: two arms are named {name!r}: give one entry another name")
            document = merge(own, unflatten(dict(zip(grid, values, strict=True))))
            arms.append(Arm(name=name, series=str(series), document=document))
    return arms


def _tune(path: Path, entry: Any) -> Tune | None:
    if entry is None:
        return None
    tune = _mapping(path, "tune", entry)
    for key in tune:
        if key not in TUNE_KEYS:
            raise ValueError(f"{path}: unknown key tune.{key}{did_you_mean(str(key), TUNE_KEYS)}")
    values = _mapping(path, "tune.values", tune.get("values"))
    for key, tried in values.items():
        if not isinstance(tried, list) or not tried:
            raise ValueError(f"{path}: tune.values.{key} must be a list of values, got {tried!r}")
    if not values:
        raise ValueError(f"{path}: tune needs values: a key of the configuration and the values to try")
    seed = tune.get("seed", 0)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"{path}: tune.seed must be an integer, got {seed!r}")
    return Tune(values=values, seed=seed, set=_mapping(path, "tune.set", tune.get("set")))


# -------------------------------------------------------------------------------------------------------- building


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known of an arm before it runs. cache_bytes: per sequence of seq_len tokens in bf16, states in fp32;
    None where decoding has no cache for the layers (yet)."""

    parameters: int
    window: int | None
    kind: str
    seq_len: int
    tokens: int
    tuning_tokens: int
    flops_per_token: int
    cache_bytes: int | None
    layers: list[str] = field(default_factory=list)


def build_arms(study: Study, *, ranks: int = 1, check_files: bool = True) -> dict[str, Facts]:
    """Build every run's config and every arm's model, without memory. ValueError names the arm and the key.

    check_files: also what is on this machine (tokenizer, prepared text); off, a study can be looked at anywhere.
    """
    facts = {}
    for arm in study.arms:
        tuning = [run for run in study.tuning_runs() if run.arm == arm.name]
        choice = tuning[0].choice if tuning else {}
        runs = [study.run(arm.name, study.seeds[0], choice), *tuning]
        try:
            # torchtitan warns of its own defaults each time that a configuration is built.
            with quiet_log():
                configs = [build_config(run.document, source=str(study.path)) for run in runs]
            if not all(config.validator.enable for config in configs):
                raise ValueError("validator.enable is false: runs are compared by their validation loss")
            if check_files:
                from flexrattn.data.tokens import read_manifest
                from flexrattn.trainer import check_before_start

                for config in configs:
                    check_before_start(config)
                    if getattr(config.dataloader, "dataset", None) == "tokens":
                        read_manifest(config.dataloader.dataset_path)
            facts[arm.name] = _facts(configs[0], configs[1] if tuning else None, ranks)
        except USER_ERRORS as error:
            message = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{study.path}: arm {arm.name!r} cannot be built: {message}") from error
    for what in ("tokens", "tuning_tokens"):
        counts = {name: getattr(fact, what) for name, fact in facts.items()}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{name} {count:,}" for name, count in counts.items())
            raise ValueError(
                f"{study.path}: arms must train on equally many tokens ({what}: {listed}): set steps, seq_len and "
                "batch alike"
            )
    return facts


def _facts(config: Any, tuning: Any | None, ranks: int) -> Facts:
    import torch

    from flexrattn.model import describe_layer

    model = config.model_spec.model
    with torch.device("meta"):
        built = model.build()
    parameters, flops = model.get_nparams_and_flops(built, config.training.seq_len)
    local = [layer.attention for layer in model.layers if layer.attention.kind != "full"]
    described = [describe_layer(layer.attention) for layer in model.layers]
    return Facts(
        parameters=parameters,
        window=local[0].window if local else None,
        kind=local[0].kind.value if local else "full",
        seq_len=config.training.seq_len,
        tokens=_tokens(config, ranks),
        tuning_tokens=0 if tuning is None else _tokens(tuning, ranks),
        flops_per_token=flops,
        cache_bytes=_cache_bytes(model, config.training.seq_len),
        layers=[f"{described.count(text)} x {text}" for text in dict.fromkeys(described)],
    )


def _tokens(config: Any, ranks: int) -> int:
    training, parallelism = config.training, config.parallelism
    data_parallel = max(1, ranks // parallelism.tensor_parallel_degree)
    batch = training.global_batch_size if training.global_batch_size > 0 else training.local_batch_size * data_parallel
    return training.steps * batch * training.seq_len


def _cache_bytes(model: Any, context: int) -> int | None:
    import torch

    from flexrattn.decode.cache import DecodeCache

    try:
        cache = DecodeCache(model, rows=1, max_length=context, device="meta", dtype=torch.bfloat16)
    except (ValueError, NotImplementedError, AttributeError):
        return None
    return cache.bytes_per_sequence
