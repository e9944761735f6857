"""Masks by name: `make_mask("sliding_window", window=512)`, `make_mask("package.module:factory", ...)`.

A mask of the library is one file in `masks/` and one line here.
"""

import difflib
import importlib
import inspect
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from score_mods.dense import dense_mask
from score_mods.info import MaskMod, check_takes_four, documents_in, mask_info, tensors_in
from score_mods.masks.causal import causal
from score_mods.masks.document import document
from score_mods.masks.sliding_window import sliding_window

MaskFactory = Callable[..., MaskMod]

FACTORIES: MappingProxyType[str, MaskFactory] = MappingProxyType(
    {
        "causal": causal,
        "document": document,
        "sliding_window": sliding_window,
    }
)

# Queries and keys on which a new mask is tried out.
_TRIED = 8


def available_masks() -> tuple[str, ...]:
    """The names that `make_mask` knows, sorted."""
    return tuple(sorted(FACTORIES))


def make_mask(name: str, /, **args: object) -> MaskMod:
    """The mask that the factory called `name` returns for `args`, tried out on a few indices.

    name: one of `available_masks()`, or "package.module:factory" for a factory of your own.

    Raises ValueError for an unknown name (with the known ones), a factory that cannot be imported (with the import's
    own error), arguments that do not fit, and a factory that returns something else than a mask.
    """
    factory = _find(name)
    what = f"mask {name!r}"
    _check_arguments(what, factory, args)
    try:
        mask = factory(**args)
    except Exception as error:
        # The library's own ValueErrors speak for themselves; a user's factory may fail in any way.
        if name in FACTORIES and isinstance(error, ValueError):
            raise ValueError(f"{what}: {error}") from error
        raise ValueError(f"{what} failed for {_shown(args)}: {_shown_error(error)}") from error
    check_mask(mask, what=f"{what} returned the wrong thing")
    return mask


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


def _find(name: str) -> MaskFactory:
    if not isinstance(name, str):
        raise ValueError(f"a mask is named by a string, got {name!r} ({type(name).__name__})")
    if ":" in name:
        return _import_factory(name)
    if name in FACTORIES:
        return FACTORIES[name]
    raise ValueError(
        f"unknown mask {name!r}{_did_you_mean(name, FACTORIES)}: known are {', '.join(available_masks())}, "
        'and "package.module:factory" names your own'
    )


def _import_factory(name: str) -> MaskFactory:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ValueError(f'a mask of your own is named "package.module:factory", got {name!r}')
    try:
        # A module may fail on import in any way; all are the user's to see.
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ValueError(f"mask {name!r}: cannot import {module_name!r}: {_shown_error(error)}") from error
    try:
        factory = getattr(module, attribute)
    except AttributeError as error:
        hint = _did_you_mean(attribute, vars(module))
        raise ValueError(f"mask {name!r}: AttributeError: {error}{hint}") from error
    if not callable(factory):
        raise ValueError(f"mask {name!r}: the factory must be a function that returns a mask, got {factory!r}")
    return factory


def _check_arguments(what: str, factory: MaskFactory, args: dict[str, object]) -> None:
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{what}: the factory's arguments cannot be read: {error}") from error
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
