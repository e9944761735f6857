import torch
from torch import Tensor

from score_mods.arguments import check_positive_number
from score_mods.score_info import ScoreInfo, ScoreMod, describe_score


def soft_cap(cap: float) -> ScoreMod:
    """Score cap * tanh(score / cap): as it was near 0, and never beyond -cap ... cap.

    The score is q . k times the softmax scale. (Gemma 2, arXiv 2408.00118: cap 50)

    Raises ValueError for a cap that is no number above 0.
    """
    check_positive_number("cap", cap, meaning="bound of the scores")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return describe_score(score_mod, ScoreInfo(name="soft_cap", args=(("cap", cap),)))
