"""Masks and score mods by name: `make_mask("sliding_window", window=512)`, `make_score_mod("soft_cap", cap=50)`.

"package.module:factory" names one of your own. A mask of the library is one file in `masks/` and one line here, a score
mod one file in `mods/` and one line here.
"""

import difflib
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from score_mods.dense import apply_score_mod, dense_mask
from score_mods.info import MaskMod, check_takes_five, check_takes_four, documents_in, mask_info, tensors_in
from score_mods.masks.attention_sink import attention_sink
from score_mods.masks.causal import causal
from score_mods.masks.chunked import chunked
from score_mods.masks.dilated_window import dilated_window
from score_mods.masks.document import document
from score_mods.masks.neighborhood_2d import neighborhood_2d
from score_mods.masks.prefix_lm import prefix_lm
from score_mods.masks.sliding_window import sliding_window
from score_mods.masks.stochastic_window import stochastic_window
from score_mods.masks.strided import strided
from score_mods.masks.windows_2d import windows_2d
from score_mods.mods.alibi import alibi
from score_mods.mods.relative_bias import relative_bias
from score_mods.mods.soft_cap import soft_cap
from score_mods.residual import residual_mask
from score_mods.score_info import ScoreMod, score_info

MaskFactory = Callable[..., MaskMod]
ScoreModFactory = Callable[..., ScoreMod]

FACTORIES: MappingProxyType[str, MaskFactory] = MappingProxyType(
    {
        "attention_sink": attention_sink,
        "causal": causal,
        "chunked": chunked,
        "dilated_window": dilated_window,
        "document": document,
        "neighborhood_2d": neighborhood_2d,
        "prefix_lm": prefix_lm,
        "sliding_window": sliding_window,
        "stochastic_window": stochastic_window,
        "strided": strided,
        "windows_2d": windows_2d,
    }
)
SCORE_FACTORIES: MappingProxyType[str, ScoreModFactory] = MappingProxyType(
    {
        "alibi": alibi,
        "relative_bias": relative_bias,
        "soft_cap": soft_cap,
    }
)


@dataclass(frozen=True, kw_only=True)
class _Kind:
    """What is looked up by name: masks or score mods."""

    noun: str
    factories: MappingProxyType[str, Callable[..., object]]


_MASKS = _Kind(noun="mask", factories=FACTORIES)
_SCORE_MODS = _Kind(noun="score mod", factories=SCORE_FACTORIES)

# Queries and keys on which a new mask is tried out.
_TRIED = 8


def available_masks() -> tuple[str, ...]:
    """The names that `make_mask` knows, sorted."""
    return tuple(sorted(FACTORIES))


def available_score_mods() -> tuple[str, ...]:
    """The names that `make_score_mod` knows, sorted."""
    return tuple(sorted(SCORE_FACTORIES))


def make_mask(name: str, /, **args: object) -> MaskMod:
    """The mask that the factory called `name` returns for `args`, tried out on a few indices.

    name: one of `available_masks()`, or "package.module:factory" for a factory of your own.

    Raises ValueError for an unknown name (with the known ones), a factory that cannot be imported (with the import's
    own error), arguments that do not fit, and a factory that returns something else than a mask.
    """
    mask = _make(_MASKS, name, args)
    check_mask(mask, what=f"mask {name!r} returned the wrong thing")  # type: ignore[arg-type]
    return mask  # type: ignore[return-value]


def make_score_mod(name: str, /, **args: object) -> ScoreMod:
    """The score mod that the factory called `name` returns for `args`, tried out on a few scores.

    name: one of `available_score_mods()`, or "package.module:factory". Raises ValueError as `make_mask` does.
    """
    score_mod = _make(_SCORE_MODS, name, args)
    check_score_mod(score_mod, what=f"score mod {name!r} returned the wrong thing")  # type: ignore[arg-type]
    return score_mod  # type: ignore[return-value]


def required_arguments(noun: str, name: str) -> tuple[str, ...]:
    """The arguments that the factory called `name` must be given. noun: "mask" or "score mod".

    Raises ValueError for an unknown name and a factory that cannot be imported or read.
    """
    kind = {each.noun: each for each in (_MASKS, _SCORE_MODS)}[noun]
    parameters = _signature(f"{noun} {name!r}", _find(kind, name)).parameters.values()
    named = (p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
    return tuple(p.name for p in named if p.default is p.empty)


def _make(kind: _Kind, name: str, args: dict[str, object]) -> object:
    factory = _find(kind, name)
    what = f"{kind.noun} {name!r}"
    _check_arguments(what, factory, args)
    try:
        return factory(**args)
    except Exception as error:
        # The library's own ValueErrors speak for themselves; a user's factory may fail in any way.
        if name in kind.factories and isinstance(error, ValueError):
            raise ValueError(f"{what}: {error}") from error
        raise ValueError(f"{what} failed for {_shown(args)}: {_shown_error(error)}") from error


def check_mask(mask: MaskMod, *, what: str = "mask") -> None:
    """Raise ValueError unless `mask` is a mask: four arguments, a bool for each index, and true to its `info`.

    It is evaluated for a few of the first queries and keys. `what` starts the message.
    """
    check_takes_four(mask, what)

    def tried(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        kept = mask(b, h, q_idx, kv_idx)
        if not isinstance(kept, Tensor):
            raise _WrongResult(f"{what}: a mask returns a boolean tensor, got {kept!r} ({type(kept).__name__})")
        if kept.dtype != torch.bool:
            raise _WrongResult(f"{what}: a mask returns a boolean tensor, got {kept.dtype}")
        if kept.ndim:
            raise _WrongResult(f"{what}: a mask returns one bool for one query and key, got shape {tuple(kept.shape)}")
        return kept

    documents = documents_in(mask)
    batch = documents[0].shape[0] if documents else None
    size = min([_TRIED, *(ids.shape[1] for ids in documents)])
    device = next((tensor.device for tensor in tensors_in(mask)), torch.device("cpu"))
    try:
        kept = dense_mask(tried, batch=batch, q_len=size, kv_len=size, device=device)
    except _WrongResult:
        raise
    except Exception as error:
        raise ValueError(f"{what}: it fails for the first {size} queries and keys: {_shown_error(error)}") from error
    _check_info(mask, kept, what)


def check_score_mod(score_mod: ScoreMod, *, what: str = "score mod") -> None:
    """Raise ValueError unless `score_mod` is one: five arguments, and a floating-point score for each score.

    It is evaluated for a few of the first queries and keys. `what` starts the message.
    """
    check_takes_five(score_mod, what)
    info = score_info(score_mod)
    heads = 2 if info is None or info.heads is None else info.heads
    device = next((tensor.device for tensor in tensors_in(score_mod)), torch.device("cpu"))

    def tried(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        changed = score_mod(score, b, h, q_idx, kv_idx)
        if not isinstance(changed, Tensor):
            raise _WrongResult(f"{what}: a score mod returns a tensor, got {changed!r} ({type(changed).__name__})")
        if not changed.is_floating_point():
            raise _WrongResult(f"{what}: a score mod returns a floating-point score, got {changed.dtype}")
        if changed.ndim:
            raise _WrongResult(f"{what}: a score mod returns one score for one score, got shape {tuple(changed.shape)}")
        return changed

    try:
        with torch.no_grad():
            apply_score_mod(tried, torch.zeros(1, heads, _TRIED, _TRIED, device=device))
    except _WrongResult:
        raise
    except Exception as error:
        raise ValueError(f"{what}: it fails for the first {_TRIED} queries and keys: {_shown_error(error)}") from error


class _WrongResult(ValueError):
    """Raised inside torch's evaluation, to be told from the mask's own errors."""


def _check_info(mask: MaskMod, kept: Tensor, what: str) -> None:
    """A false `info` gives wrong block masks without a word, so what can be seen of it is checked."""
    info = mask_info(mask)
    if info is None:
        return
    positions = torch.arange(kept.shape[-1], device=kept.device)
    gap = positions[:, None] - positions
    allowed = torch.ones_like(kept)
    if info.causal:
        allowed = allowed & (gap >= 0)
    if info.window is not None:
        allowed = allowed & (gap <= info.window)
    for ids_BT in info.documents:
        ids = ids_BT[:, None, : len(positions)]
        allowed = allowed & (ids[..., :, None] == ids[..., None, :])
    facts = f"causal={info.causal}, window={info.window}, {len(info.documents)} document_ids, exact={info.exact}"
    for wrong, verb in ((kept & ~allowed, "keeps"), (allowed & ~kept if info.exact else None, "leaves out")):
        if wrong is not None and wrong.any():
            _, _, t, j = wrong.nonzero()[0].tolist()
            raise ValueError(f"{what}: its info ({facts}) is false, it {verb} key {j} for query {t}")
    if info.residual is not None:
        size = {"q_len": len(positions), "kv_len": len(positions), "device": kept.device, "batch": kept.shape[0]}
        wrong = dense_mask(residual_mask(mask), **size) ^ dense_mask(info.residual.mask(), **size)  # type: ignore[arg-type]
        if wrong.any():
            _, _, t, j = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"{what}: its info ({info.residual}) is false, exactly one of mask and residual must read key {j} for "
                f"query {t}"
            )


def _find(kind: _Kind, name: str) -> Callable[..., object]:
    if not isinstance(name, str):
        raise ValueError(f"a {kind.noun} is named by a string, got {name!r} ({type(name).__name__})")
    if ":" in name:
        return _import_factory(kind.noun, name)
    if name in kind.factories:
        return kind.factories[name]
    raise ValueError(
        f"unknown {kind.noun} {name!r}{_did_you_mean(name, kind.factories)}: known are "
        f'{", ".join(sorted(kind.factories))}, and "package.module:factory" names your own'
    )


def _import_factory(noun: str, name: str) -> Callable[..., object]:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f'a {noun} of your own is named "package.module:factory", got {name!r}')
    try:
        # A module may fail on import in any way; all are the user's to see.
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"{noun} {name!r}: cannot import {module_name!r}: {_shown_error(error)}") from error
    try:
        factory = getattr(module, attribute)
    except AttributeError as error:
        hint = _did_you_mean(attribute, vars(module))
        raise ValueError(f"{noun} {name!r}: AttributeError: {error}{hint}") from error
    if not callable(factory):
        raise ValueError(f"{noun} {name!r}: the factory must be a function that returns a {noun}, got {factory!r}")
    return factory


def _signature(what: str, factory: Callable[..., object]) -> inspect.Signature:
    try:
        return inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: the factory's arguments cannot be read: {error}") from error


def _check_arguments(what: str, factory: Callable[..., object], args: dict[str, object]) -> None:
    signature = _signature(what, factory)
    try:
        signature.bind(**args)
    except TypeError as error:
        takes = ", ".join(str(parameter) for parameter in signature.parameters.values()) or "no arguments"
        unknown = [name for name in args if name not in signature.parameters]
        hint = _did_you_mean(unknown[0], signature.parameters) if unknown else ""
        raise ValueError(f"{what} takes {takes}, given {_shown(args)}: {error}{hint}") from error


def _did_you_mean(given: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _shown(args: dict[str, object]) -> str:
    """Arguments on one line, tensors by their shape."""
    shown = (
        f"{name}={f'tensor{tuple(value.shape)}' if isinstance(value, Tensor) else repr(value)}"
        for name, value in args.items()
    )
    return ", ".join(shown) or "no arguments"


# Frames of these tell nothing about a user's mistake.
_FOREIGN = ("<frozen", str(Path(importlib.__file__).parent), str(Path(torch.__file__).parent), __file__)


def _shown_error(error: Exception) -> str:
    """The error's type and text on one line, and the user's line that it came from."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_FOREIGN)]
    text = f"{type(error).__name__}: {error}"
    if frames:
        text += f" ({frames[-1].filename}, line {frames[-1].lineno})"
    return " ".join(text.split())
