"""One wording for "no such name": what was given, the closest that exists, and the list."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def choose(given: object, known: Iterable[str], *, what: str) -> str:
    """`given` when it is one of `known`, else a ValueError that names the closest and lists the rest."""
    names = list(known)
    if isinstance(given, str) and given in names:
        return given
    raise ValueError(f"unknown {what} {given!r}{did_you_mean(str(given), names)}; known: {', '.join(names)}")


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """ ", did you mean 'window'?" or nothing."""
    close = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
