"""Single layers by index or slice, as configurations name them: "0", "-1", "4:12", "::4"."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TypeVar

Spec = TypeVar("Spec")

_SELECTOR = re.compile(r"-?\d+|(-?\d+)?:(-?\d+)?(:(-?\d+)?)?")


def check_selectors(what: str, selectors: Sequence[str]) -> None:
    """ValueError for a selector that is neither an index nor a slice."""
    for selector in selectors:
        if not _SELECTOR.fullmatch(selector) or selector.endswith(":0"):
            raise ValueError(
                f'{what} names layers by an index or a slice, such as "0", "-1", "4:12" or "::4", got {selector!r}'
            )


def selected(what: str, selector: str, n_layers: int) -> range:
    """The layers that `selector` names, of 0 ... n_layers - 1. ValueError where it names none."""
    if ":" in selector:
        start, stop, step = (int(part) if part else None for part in (selector + "::").split(":")[:3])
        layers = range(n_layers)[start:stop:step]
    else:
        index = int(selector) + (n_layers if selector.startswith("-") else 0)
        layers = range(index, index + 1) if 0 <= index < n_layers else range(0)
    if not layers:
        raise ValueError(f"{what}[{selector}] names no layer: the model has layers 0 to {n_layers - 1}")
    return layers


def resolve_layers(what: str, entries: Sequence[tuple[str, Spec]], n_layers: int) -> dict[int, Spec]:
    """Layer index -> what the last entry that names it says."""
    return {layer: each for selector, each in entries for layer in selected(what, selector, n_layers)}
