import torch
from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.score_info import ScoreInfo, ScoreMod, describe_score


def alibi(heads: int) -> ScoreMod:
    """Score score - slope_h |t - j|: a penalty linear in the distance, with a fixed slope for each query head.

    slope_h = 2^(-8 (h + 1) / n) for the first n heads, n the largest power of two that is not above `heads`; the others
    take every second slope of 2n heads: 2^(-4 (2 (h - n) + 1) / n). (arXiv 2108.12409)

    Raises ValueError for heads < 1 or no int.
    """
    check_whole_number("heads", heads, at_least=1, meaning="query heads of the layer")
    n = 1 << (heads.bit_length() - 1)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        exponent = torch.where(h < n, -8.0 / n * (h + 1), -4.0 / n * (2 * (h - n) + 1))
        return score - torch.exp2(exponent) * (q_idx - kv_idx).abs()

    return describe_score(score_mod, ScoreInfo(name="alibi", args=(("heads", heads),), heads=heads))
