"""What a mask says about itself, so that others need not guess from its function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from score_mods.blocks import BlockLaw
    from score_mods.residual import Residual
    from score_mods.schedule import WindowSchedule

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class MaskInfo:
    """The facts about a mask that its function cannot tell, attached to it as `keep.info`.

    `causal`, `window` and `documents` are bounds: the mask keeps *no* pair outside them. With `exact` they are the
    whole law: the mask keeps *every* pair inside them too.

    name, args: together with the function's code they determine the mask, unless it also reads `documents` or
        `tensors`: two masks that agree in them share one cached block mask. A mask that reads anything else that can
        change (a random number, say) must not carry a MaskInfo, or must tell the states apart in `args`.
    causal: no key after its query, j <= t.
    window: no key older than t - window; None is no such bound, *not* "no softmax branch".
    documents: (B, T) integer ids; no pair whose ids differ in any of them.
    relative: the mask reads t - j alone, so that it is the same wherever a document begins in a packed row.
    tensors: other tensors that the mask reads; its block mask is built anew each time.
    parts: the masks that a combinator combines.
    blocks: which block pairs the mask keeps in part and whole, judged from their corners (score_mods/blocks.py).
    residual: what the mask leaves out, where a linear branch can read that; of a plain window it is known without.
    schedule: windows drawn by training step, of a mask whose law here is that of evaluation.
    """

    name: str
    args: tuple[tuple[str, Hashable], ...] = ()
    causal: bool = False
    window: int | None = None
    documents: tuple[Tensor, ...] = ()
    exact: bool = False
    relative: bool = False
    tensors: tuple[Tensor, ...] = ()
    parts: tuple[MaskMod, ...] = ()
    blocks: BlockLaw | None = None
    residual: Residual | None = None
    schedule: WindowSchedule | None = None

    @property
    def label(self) -> str:
        """Name and arguments in one word: `sliding_window_512`, `all_of(causal, document)`."""
        if self.parts:
            return f"{self.name}({', '.join(mask_name(part) for part in self.parts)})"
        words = (
            name if value is True else _word(value)
            for name, value in self.args
            if value is not None and value is not False
        )
        return "_".join([self.name, *words])

    @property
    def is_plain_window(self) -> bool:
        """Whether the mask is exactly t - window <= j <= t, within documents where it has any.

        Only then is what it leaves out the residual branch of `window`. A causal mask is not a plain window: it has no
        window, and leaves nothing out.
        """
        return self.exact and self.causal and self.window is not None


def _word(value: object) -> str:
    return "x".join(map(str, value)) if isinstance(value, tuple) else str(value)


def describe(keep: MaskMod, info: MaskInfo) -> MaskMod:
    """Attach `info` to `keep` and name it after it; returns `keep`."""
    hash(info.args)  # An unhashable argument fails here, where the factory's author sees it.
    keep.__name__ = keep.__qualname__ = info.label
    keep.info = info  # type: ignore[attr-defined]
    return keep


def mask_info(mask: MaskMod) -> MaskInfo | None:
    """The mask's description, None where its factory gave none."""
    info = getattr(mask, "info", None)
    return info if isinstance(info, MaskInfo) else None


def mask_name(mask: object) -> str:
    """The mask's name for messages."""
    return getattr(mask, "__name__", None) or type(mask).__name__


class _Same:
    """Equal to itself and to wrappers of the very same object (a tensor's own == compares elements)."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def fingerprint(mask: MaskMod) -> Hashable:
    """A dictionary key: equal fingerprints are the same mask, so one BlockMask serves both.

    Described masks are compared by name, arguments, code and the identity of their document ids; any other function
    only equals itself. A fingerprint keeps the tensors and functions in it alive.
    """
    info = mask_info(mask)
    if info is None:
        return _Same(mask)
    code = getattr(mask, "__code__", type(mask))
    return (
        info.name,
        info.args,
        code,
        tuple(_Same(tensor) for tensor in (*info.documents, *info.tensors)),
        tuple(fingerprint(part) for part in info.parts),
    )


def is_static(mask: MaskMod) -> bool:
    """Whether the mask depends on nothing but its fingerprint's name and arguments, so that it can be cached."""
    info = mask_info(mask)
    return info is not None and not info.documents and not info.tensors and all(is_static(part) for part in info.parts)


def check_takes_four(mask: object, what: str) -> None:
    """Raise ValueError unless `mask` is a function of (b, h, q_idx, kv_idx). `what` starts the message."""
    hint = " (five arguments make a score mod, which changes scores and masks nothing)"
    wanted = "a mask is a function of (b, h, q_idx, kv_idx) that returns a boolean tensor"
    _check_takes(4, mask, f"{what}: {wanted}", {5: hint})


def check_takes_five(score_mod: object, what: str) -> None:
    """Raise ValueError unless `score_mod` is a function of (score, b, h, q_idx, kv_idx). `what` starts the message."""
    hint = " (four arguments make a mask, which keeps or drops pairs)"
    wanted = "a score mod is a function of (score, b, h, q_idx, kv_idx) that returns a score"
    _check_takes(5, score_mod, f"{what}: {wanted}", {4: hint})


def _check_takes(number: int, function: object, said: str, hints: dict[int, str]) -> None:
    if not callable(function):
        raise ValueError(f"{said}, got {function!r}")
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError) as error:
        raise ValueError(f"{said}, the signature of {function!r} cannot be read: {error}") from error
    # FlexAttention itself tells masks from score mods by this count.
    needed = [p for p in parameters if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    if len(needed) == number:
        return
    got = f"{mask_name(function)}({', '.join(str(p) for p in parameters)})"
    called = " (is it a factory that should be called first?)" if len(needed) < 2 else ""
    raise ValueError(f"{said}, got {got}{hints.get(len(needed), called)}")


def check_sizes(mask: MaskMod, *, batch: int | None, q_len: int, kv_len: int, device: torch.device) -> None:
    """Raise ValueError where lengths, batch or device do not fit the mask's document ids, before torch indexes them."""
    for name, value in (("batch", 1 if batch is None else batch), ("q_len", q_len), ("kv_len", kv_len)):
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    for ids in documents_in(mask):
        rows, length = ids.shape
        if rows != (1 if batch is None else batch):
            raise ValueError(f"{mask_name(mask)}: document_ids has {rows} rows, so batch must be {rows}, got {batch}")
        if max(q_len, kv_len) > length:
            raise ValueError(
                f"{mask_name(mask)}: document_ids has {length} tokens, too few for {q_len} queries x {kv_len} keys"
            )
        if ids.device != device:
            raise ValueError(f"{mask_name(mask)}: document_ids is on {ids.device}, the mask is asked for on {device}")


def resolve_device(device: torch.device | str) -> torch.device:
    """`device` with its index: cuda and cuda:0 are one place."""
    resolved = torch.device(device)
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def documents_in(mask: MaskMod) -> list[Tensor]:
    """Every document_ids that the mask or one of its parts reads."""
    info = mask_info(mask)
    if info is None:
        return []
    return [*info.documents, *(ids for part in info.parts for ids in documents_in(part))]


def tensors_in(function: object) -> Iterator[Tensor]:
    """The tensors in a function's closure, and in the closures of the functions it calls."""
    if isinstance(function, Tensor):
        yield function
    elif isinstance(function, functools.partial):
        yield from tensors_in((function.func, *function.args, *function.keywords.values()))
    elif isinstance(function, list | tuple):
        for item in function:
            yield from tensors_in(item)
    else:
        yield from tensors_in([cell.cell_contents for cell in getattr(function, "__closure__", None) or ()])
