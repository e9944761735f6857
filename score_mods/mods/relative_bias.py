import math

import torch
from torch import Tensor

from score_mods.arguments import check_whole_number
from score_mods.score_info import ScoreInfo, ScoreMod, describe_score

# Rows and columns of a block that have a bias of their own to add to; they are summed behind the kernel.
COPIES = 64


def relative_bias(heads: int, buckets: int = 32, max_distance: int = 128, table: Tensor | None = None) -> ScoreMod:
    """Score score + table[h, bucket(t - j)]: a bias for each query head and distance, learned as a table.

    bucket(d) = d for d < buckets / 2; from there to max_distance as many buckets again, growing in width like a
    logarithm; all farther keys share the last bucket. Later keys, t < j, have that of distance 0.
    table: (heads, buckets), floating point; zeros without one. Differentiable in it: FlexAttention's backward adds up
    its gradient with atomics, so that two runs on a GPU differ in its last bits. (arXiv 1910.10683, one-way buckets)

    Raises ValueError for heads < 1, an odd number of buckets or below 2, max_distance <= buckets / 2, another table.
    """
    check_whole_number("heads", heads, at_least=1, meaning="query heads of the layer")
    check_whole_number("buckets", buckets, at_least=2, meaning="biases of a head")
    if buckets % 2:
        raise ValueError(f"buckets must be even (half of them hold one distance each), got {buckets}")
    check_whole_number(
        "max_distance", max_distance, at_least=buckets // 2 + 1, meaning="first distance of the last bias"
    )
    widths = bucket_widths(buckets, max_distance)
    if table is None:
        table = torch.zeros(heads, buckets)
    if not isinstance(table, Tensor) or table.shape != (heads, buckets) or not table.is_floating_point():
        got = f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else type(table).__name__
        raise ValueError(f"table must be a floating-point tensor (heads, buckets) = {(heads, buckets)}, got {got}")
    # One bias a distance, spread out here, so that the kernel looks up once and no logarithm is rounded in it.
    # Copies of it for the rows of a block, and of the last bucket for its columns as well: a kernel's threads add up
    # the gradient with atomics, which wait for each other where they meet.
    last = max_distance
    widths[-1] += COPIES - 1
    bias_HX = torch.cat([table[:, i, None].expand(-1, width) for i, width in enumerate(widths)], dim=1)
    bias_HRX = bias_HX[:, None].expand(-1, COPIES, -1).contiguous()

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = (q_idx - kv_idx).clamp(0, last)
        column = torch.where(distance < last, distance, last + kv_idx % COPIES)
        return score + bias_HRX[h, q_idx % COPIES, column]

    def bind(table: Tensor) -> ScoreMod:
        return relative_bias(heads, buckets, max_distance, table)

    args = (("buckets", buckets), ("max_distance", max_distance))
    info = ScoreInfo(name="relative_bias", args=args, heads=heads, table_shape=(heads, buckets), bind=bind)
    return describe_score(score_mod, info)


def bucket_widths(buckets: int, max_distance: int) -> list[int]:
    """How many distances each bucket holds, from distance 0; the last one is the first of all farther distances."""
    exact = buckets // 2
    ratio = math.log(max_distance / exact)

    def bucket(distance: int) -> int:
        if distance < exact:
            return distance
        return min(exact + int(math.log(distance / exact) / ratio * (buckets - exact)), buckets - 1)

    found = [bucket(distance) for distance in range(max_distance + 1)]
    return [found.count(i) for i in range(buckets)]
