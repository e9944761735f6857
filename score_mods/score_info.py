"""What a score mod says about itself. It is FlexAttention's: score_mod(score, b, h, q_idx, kv_idx) -> score."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

from score_mods.info import MaskInfo, mask_name

ScoreMod = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoreInfo:
    """The facts about a score mod that its function cannot tell, attached to it as `score_mod.info`.

    name, args: which score mod it is.
    heads: query heads of a layer that it is for, where it treats heads differently.
    table_shape, bind: of a score mod with a learned table, heads first: bind(table) is the same one with that table.
    """

    name: str
    args: tuple[tuple[str, Hashable], ...] = ()
    heads: int | None = None
    table_shape: tuple[int, ...] | None = None
    bind: Callable[[Tensor], ScoreMod] | None = None

    @property
    def label(self) -> str:
        return MaskInfo(name=self.name, args=self.args).label


def describe_score(score_mod: ScoreMod, info: ScoreInfo) -> ScoreMod:
    """Attach `info` to `score_mod` and name it after it; returns `score_mod`. ValueError for a table without bind."""
    if (info.table_shape is None) != (info.bind is None):
        raise ValueError(f"score mod {mask_name(score_mod)}: table_shape and bind go together")
    score_mod.__name__ = score_mod.__qualname__ = info.label
    score_mod.info = info  # type: ignore[attr-defined]
    return score_mod


def score_info(score_mod: ScoreMod) -> ScoreInfo | None:
    """The score mod's description, None where its factory gave none."""
    info = getattr(score_mod, "info", None)
    return info if isinstance(info, ScoreInfo) else None
