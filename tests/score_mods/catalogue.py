"""Every mask and score mod of the library with arguments for short sequences, and its law over plain integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class Case:
    """`law(t, j)` over positions in a document; `residual(t, j)` where a linear branch can read what is left."""

    name: str
    args: dict = field(default_factory=dict)
    law: Callable[[int, int], bool]
    residual: Callable[[int, int], bool] | None = None


def _square(t: int, j: int, *, height: int, width: int, radius: int) -> bool:
    (q_image, q_at), (k_image, k_at) = divmod(t, height * width), divmod(j, height * width)
    (q_row, q_column), (k_row, k_column) = divmod(q_at, width), divmod(k_at, width)
    return q_image == k_image and max(abs(q_row - k_row), abs(q_column - k_column)) <= radius


def _tile(t: int, j: int, *, height: int, width: int, size: int, shift: int) -> bool:
    def of(p: int) -> tuple[int, int, int]:
        image, at = divmod(p, height * width)
        row, column = divmod(at, width)
        return image, (row + shift) // size, (column + shift) // size

    return of(t) == of(j)


MASKS = {
    "causal": Case(name="causal", law=lambda t, j: j <= t),
    "sliding_window": Case(
        name="sliding_window",
        args={"window": 5},
        law=lambda t, j: t - 5 <= j <= t,
        residual=lambda t, j: j <= t - 6,
    ),
    "attention_sink": Case(
        name="attention_sink",
        args={"sinks": 3, "window": 5},
        law=lambda t, j: t - 5 <= j <= t or j <= min(t, 2),
        residual=lambda t, j: 3 <= j <= t - 6,
    ),
    "attention_sink, window 0": Case(
        name="attention_sink",
        args={"sinks": 1, "window": 0},
        law=lambda t, j: j == t or j == 0 <= t,
        residual=lambda t, j: 1 <= j <= t - 1,
    ),
    "attention_sink, more sinks than window": Case(
        name="attention_sink",
        args={"sinks": 9, "window": 2},
        law=lambda t, j: j <= t and (j < 9 or j >= t - 2),
        residual=lambda t, j: 9 <= j <= t - 3,
    ),
    "stochastic_window": Case(
        name="stochastic_window",
        args={"window": 4, "low": 0, "high": 9},
        law=lambda t, j: t - 4 <= j <= t,
        residual=lambda t, j: j <= t - 5,
    ),
    "dilated_window": Case(
        name="dilated_window",
        args={"window": 4, "dilation": 3},
        law=lambda t, j: j in [t - 3 * i for i in range(5)],
    ),
    "dilated_window, dilation 1": Case(
        name="dilated_window",
        args={"window": 4, "dilation": 1},
        law=lambda t, j: t - 4 <= j <= t,
        residual=lambda t, j: j <= t - 5,
    ),
    "chunked": Case(name="chunked", args={"chunk": 6}, law=lambda t, j: t - t % 6 <= j <= t),
    "prefix_lm": Case(name="prefix_lm", args={"prefix": 7}, law=lambda t, j: j <= max(t, 6)),
    "strided": Case(
        name="strided",
        args={"stride": 4},
        law=lambda t, j: t - 4 <= j <= t or j in range(t, -1, -4),
    ),
    "strided, window 1": Case(
        name="strided",
        args={"stride": 7, "window": 1},
        law=lambda t, j: t - 1 <= j <= t or j in range(t, -1, -7),
    ),
    "neighborhood_2d": Case(
        name="neighborhood_2d",
        args={"height": 4, "width": 6, "radius": 1},
        law=lambda t, j: _square(t, j, height=4, width=6, radius=1),
    ),
    "neighborhood_2d, causal": Case(
        name="neighborhood_2d",
        args={"height": 5, "width": 4, "radius": 2, "causal": True},
        law=lambda t, j: j <= t and _square(t, j, height=5, width=4, radius=2),
    ),
    "windows_2d": Case(
        name="windows_2d",
        args={"height": 4, "width": 6, "size": 2},
        law=lambda t, j: _tile(t, j, height=4, width=6, size=2, shift=0),
    ),
    "windows_2d, shifted, causal": Case(
        name="windows_2d",
        args={"height": 5, "width": 7, "size": 3, "shift": 2, "causal": True},
        law=lambda t, j: j <= t and _tile(t, j, height=5, width=7, size=3, shift=2),
    ),
}


def alibi_slopes(heads: int) -> list[float]:
    """The paper's recipe: powers of one start for a power of two, else those and every second of twice as many."""

    def powers(n: int) -> list[float]:
        start = 2 ** (-8 / n)
        return [start ** (i + 1) for i in range(n)]

    n = 2 ** math.floor(math.log2(heads))
    return powers(n) + powers(2 * n)[::2][: heads - n]


def bucket(distance: int, buckets: int, max_distance: int) -> int:
    exact = buckets // 2
    if distance < exact:
        return max(distance, 0)
    far = math.log(distance / exact) / math.log(max_distance / exact) * (buckets - exact)
    return min(exact + int(far), buckets - 1)


HEADS = 4
SCORE_MODS = {
    "soft_cap": {"cap": 2.0},
    "alibi": {"heads": HEADS},
    "relative_bias": {"heads": HEADS, "buckets": 8, "max_distance": 20},
}
