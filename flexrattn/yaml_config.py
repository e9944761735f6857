"""A YAML file becomes a torchtitan config: a recipe and its arguments, then overrides by torchtitan's own names.

    recipe: rattention               # a function of flexrattn.config_registry, or "package.module:function"
    recipe_args: {flavor: 30m, window: 512}
    training: {steps: 1000}          # any section of torchtitan's config
    activation_checkpoint: selective # a choice by its name, or {selective: {...}} with its fields

Command-line flags override the file: `--training.steps 20` is torchtitan's own (tyro), `--recipe_args.window 128`
goes to the recipe. Every mistake is a ValueError of one line that names the key, what was given and what would do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import io
import re
import types
import typing
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import tyro
import yaml
from torchtitan.config import ConfigManager
from torchtitan.config.manager import custom_registry

from flexrattn.quiet import quiet_log
from flexrattn.suggest import choose, did_you_mean

USAGE = "usage: python train.py CONFIG.yaml [--section.key value ...]   (configs/ holds the shipped ones)"
_RECIPE_FLAG = "--recipe_args."


class YamlConfigManager(ConfigManager):
    """torchtitan's manager, fed by a YAML file in place of --module and --config."""

    def _load_config(self, args: list[str]) -> tuple[Any, list[str]]:
        if not args or args[0].startswith("-"):
            raise ValueError(f"no configuration file given; {USAGE}")
        document = load_yaml(Path(args[0]))
        recipe_flags, flags = _split_recipe_flags(args[1:])
        config = build_config(document, recipe_flags=recipe_flags, source=args[0])
        _check_flag_names(config, flags)
        return config, flags

    def parse_args(self, args: list[str] | None = None) -> Any:
        assert args is not None
        loaded, flags = self._load_config(args)
        parse = partial(tyro.cli, type(loaded), args=flags, default=loaded, registry=custom_registry)
        if any(flag in ("-h", "--help") for flag in flags):
            return parse()
        printed = io.StringIO()
        try:
            # tyro builds the dataclasses again, and what they warn of has been said.
            with contextlib.redirect_stderr(printed), contextlib.redirect_stdout(printed), quiet_log():
                self.config = parse()
        except SystemExit as stop:
            raise ValueError(f"bad command line: {_one_line(printed.getvalue())}") from stop
        return self.config


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        known = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        raise ValueError(f"configuration file {path} does not exist{did_you_mean(str(path), known)}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"configuration file {path} cannot be read: {error}") from None
    try:
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {_one_line(str(error))}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} must hold a mapping with a 'recipe', got {type(document).__name__}")
    return document


def build_config(document: dict[str, Any], *, recipe_flags: dict[str, Any] | None = None, source: str) -> Any:
    """The config a document describes: its recipe, called with its arguments, overridden section by section."""
    document = dict(document)
    if "recipe" not in document and "arms" in document:
        raise ValueError(f"{source}: a study, not a configuration: run python -m flexrattn.ablate {source}")
    if "recipe" not in document:
        raise ValueError(f"{source}: no 'recipe'; known recipes: {', '.join(available_recipes())}")
    recipe = find_recipe(document.pop("recipe"))
    recipe_args = document.pop("recipe_args", None) or {}
    if not isinstance(recipe_args, dict):
        raise ValueError(f"{source}: recipe_args must be a mapping, got {recipe_args!r}")
    config = call_recipe(recipe, {**recipe_args, **(recipe_flags or {})})
    return override(config, document)


def available_recipes() -> list[str]:
    """Public functions of flexrattn.config_registry."""
    registry = importlib.import_module("flexrattn.config_registry")
    return sorted(registry.RECIPES)


def find_recipe(name: object) -> Any:
    """A recipe by name or by "package.module:function", with the real error where that cannot be imported."""
    if not isinstance(name, str):
        raise ValueError(f"recipe must be a name, got {name!r}")
    if ":" not in name:
        registry = importlib.import_module("flexrattn.config_registry")
        return registry.RECIPES[choose(name, available_recipes(), what="recipe")]
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"recipe {name!r} cannot be imported: {type(error).__name__}: {error}") from error


def call_recipe(recipe: Any, arguments: dict[str, Any]) -> Any:
    """Call a recipe after checking the names and types of its arguments against its signature."""
    parameters = inspect.signature(recipe).parameters
    hints = typing.get_type_hints(recipe)
    for key in arguments:
        if key not in parameters:
            raise ValueError(
                f"unknown recipe argument recipe_args.{key}{did_you_mean(key, parameters)}; "
                f"{recipe.__name__} takes: {', '.join(parameters)}"
            )
    typed = {key: coerce(value, hints.get(key, Any), f"recipe_args.{key}") for key, value in arguments.items()}
    return recipe(**typed)


def override(config: Any, values: dict[str, Any], path: str = "") -> Any:
    """`config` with nested `values` applied, innermost first, so that each dataclass checks itself again."""
    if not isinstance(values, dict):
        raise ValueError(f"{path} must be a mapping of {type(config).__qualname__} fields, got {values!r}")
    hints = typing.get_type_hints(type(config), include_extras=True)
    names = [f.name for f in dataclasses.fields(config) if not f.name.startswith("_") and f.name != "model_spec"]
    replaced = {}
    for key, value in values.items():
        where = f"{path}.{key}" if path else str(key)
        if key not in names:
            raise ValueError(f"unknown key {where}{did_you_mean(str(key), names)}; known: {', '.join(names)}")
        replaced[key] = _override_field(getattr(config, key), value, hints[key], where)
    return dataclasses.replace(config, **replaced) if replaced else config


def _override_field(current: Any, value: Any, hint: Any, where: str) -> Any:
    choices = _named_choices(hint)
    if choices:
        return _choose_union(current, value, choices, where)
    if dataclasses.is_dataclass(current) and not isinstance(current, type):
        return override(current, value, where)
    return coerce(value, hint, where)


def _named_choices(hint: Any) -> dict[str, Any]:
    """Members of a union that tyro offers as subcommands, by name: {"selective": SelectiveAC.Config, "none": None}."""
    named = {}
    for member in get_args(hint) if get_origin(hint) in (Union, types.UnionType) else ():
        for extra in getattr(member, "__metadata__", ()):
            if getattr(extra, "name", None):
                named[extra.name] = get_args(member)[0]
    return named


def _choose_union(current: Any, value: Any, choices: dict[str, Any], where: str) -> Any:
    if value is None:
        value = "none"
    if isinstance(value, dict) and len(value) == 1 and next(iter(value)) in choices:
        name, fields = next(iter(value.items()))
    elif isinstance(value, dict) and dataclasses.is_dataclass(current):
        return override(current, value, where)
    else:
        name, fields = choose(value, choices, what=where), None
    member = choices[name]
    if member in (None, type(None)):
        return None
    # An instance of the recipe's own subclass keeps what the recipe set beside the choice.
    base = current if isinstance(current, member) else member()
    return override(base, fields or {}, f"{where}.{name}")


def coerce(value: Any, hint: Any, where: str) -> Any:
    """`value` as the annotated type, or a ValueError. YAML reads 1e-3 as a string and 1 as an int: both are floats."""
    if get_origin(hint) is Annotated:
        hint = get_args(hint)[0]
    origin, members = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, typing.TypeVar):
        return value
    if origin in (Union, types.UnionType):
        for member in members:
            with contextlib.suppress(ValueError):
                return coerce(value, member, where)
        raise _wrong_type(value, hint, where)
    if origin is Literal:
        if value in members:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(repr, members))}, got {value!r}")
    if hint in (None, type(None)):
        if value is None:
            return None
        raise _wrong_type(value, hint, where)
    if hint is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
        raise _wrong_type(value, hint, where)
    if origin in (list, tuple) or hint in (list, tuple):
        return _coerce_sequence(value, hint, where)
    if origin is dict or hint is dict:
        if not isinstance(value, dict):
            raise _wrong_type(value, hint, where)
        inner = members[1] if members else Any
        return {k: coerce(v, inner, f"{where}.{k}") for k, v in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return _new_dataclass(hint, value, where)
    target = origin or hint
    if not isinstance(target, type) or not isinstance(value, target) or (target is int and isinstance(value, bool)):
        raise _wrong_type(value, hint, where)
    return value


def _coerce_sequence(value: Any, hint: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise _wrong_type(value, hint, where)
    origin, members = get_origin(hint) or hint, get_args(hint)
    if origin is tuple and members and Ellipsis not in members:
        if len(members) != len(value):
            raise _wrong_type(value, hint, where)
        return tuple(coerce(v, m, f"{where}[{i}]") for i, (v, m) in enumerate(zip(value, members, strict=True)))
    inner = members[0] if members else Any
    return origin(coerce(v, inner, f"{where}[{i}]") for i, v in enumerate(value))


def _new_dataclass(cls: Any, value: dict[str, Any], where: str) -> Any:
    hints = typing.get_type_hints(cls, include_extras=True)
    names = [f.name for f in dataclasses.fields(cls) if not f.name.startswith("_")]
    for key in value:
        if key not in names:
            raise ValueError(f"unknown key {where}.{key}{did_you_mean(str(key), names)}; known: {', '.join(names)}")
    try:
        return cls(**{k: coerce(v, hints[k], f"{where}.{k}") for k, v in value.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _wrong_type(value: Any, hint: Any, where: str) -> ValueError:
    wanted = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
    return ValueError(f"{where} must be {wanted}, got {value!r} ({type(value).__name__})")


def _split_recipe_flags(args: list[str]) -> tuple[dict[str, Any], list[str]]:
    """`--recipe_args.window 128` (values are read as YAML) apart from torchtitan's flags."""
    recipe: dict[str, Any] = {}
    rest = []
    i = 0
    while i < len(args):
        flag = args[i]
        name, equals, value = flag.partition("=")
        if name.replace("-", "_").startswith(_RECIPE_FLAG.replace("-", "_")):
            if not equals:
                i += 1
                if i == len(args):
                    raise ValueError(f"{flag} needs a value")
                value = args[i]
            # "-1" and "0:-1" are layers.
            keys = [k.replace("-", "_") if k[:1].isalpha() else k for k in key_path(name[len(_RECIPE_FLAG) :])]
            target = recipe
            for key in keys[:-1]:
                target = target.setdefault(key, {})
                if not isinstance(target, dict):
                    raise ValueError(f"{name} and a flag before it give {key} as a value and as a mapping")
            try:
                target[keys[-1]] = yaml.safe_load(value)
            except yaml.YAMLError as error:
                raise ValueError(f"{name} {value!r} is not valid YAML: {_one_line(str(error))}") from None
        else:
            rest.append(flag)
        i += 1
    return recipe, rest


# What holds {name: arguments}, and what holds a layer's choice of that.
NAMED = ("local_mask", "global_mask", "local_score_mod", "global_score_mod")
NAMED_BY_LAYER = ("layer_masks", "layer_score_mods")
_OWN_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def holds_name(path: Sequence[str]) -> bool:
    """Whether the keys below `path` are names of masks or score mods."""
    return (len(path) > 0 and path[-1] in NAMED) or (len(path) > 1 and path[-2] in NAMED_BY_LAYER)


def key_path(key: str, within: Sequence[str] = ()) -> list[str]:
    """A dotted key below the keys `within`, as single keys. The dots of a "package.module:factory" divide nothing."""
    path, rest = list(within), key
    while True:
        own = _OWN_FACTORY.match(rest) if holds_name(path) else None
        part = own.group() if own else rest.partition(".")[0]
        path.append(part)
        if len(part) == len(rest):
            return path[len(within) :]
        rest = rest[len(part) + 1 :]


def _check_flag_names(config: Any, flags: list[str]) -> None:
    """Refuse a flag of no section or key before tyro does, so that its name comes with a suggestion."""
    for flag in flags:
        if not flag.startswith("--") or flag == "--help":
            continue
        keys = flag[2:].partition("=")[0].replace("-", "_").split(".")
        node = config
        for depth, key in enumerate(keys):
            if not dataclasses.is_dataclass(node) or isinstance(node, type):
                break
            names = [f.name for f in dataclasses.fields(node) if not f.name.startswith("_") and f.name != "model_spec"]
            plain = key.removeprefix("no_") if key not in names else key
            if plain not in names:
                where = ".".join([*keys[:depth], key])
                prefix = ".".join(keys[:depth])
                raise ValueError(
                    f"unknown flag --{where}{did_you_mean(key, names)}; "
                    f"known under {prefix or 'the top level'}: {', '.join(names)}"
                )
            if _named_choices(typing.get_type_hints(type(node), include_extras=True)[plain]):
                break  # its fields depend on the member chosen on the command line: tyro knows
            node = getattr(node, plain)


def _one_line(text: str) -> str:
    """A tool's message without its frame: box characters, colours and line breaks folded away."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    text = re.sub(r"[│╭╮╰╯─━┃┏┓┗┛]+|-{5,}", " ", text)
    text = re.sub(r"For full helptext.*", "", text, flags=re.DOTALL)
    return " ".join(text.split())
