"""Decode: one query a row over a ring (or an array) of cached keys, split over the slots.

    o_t = softmax over the slots s with t - window <= p(s) <= t of (q_t . k_s * scale) v_s

Slot s holds the newest position p(s) <= t with p(s) mod S = s; the order of slots does not matter to a softmax.
The heads of a group share keys and are one tile. The splits are put together in decode_combine.py.
Letters: decode_attention.py, whose kernel calls this.
"""

import triton
import triton.language as tl


@triton.jit
def softmax_split(
    q,
    k,
    v,
    length,
    active,
    partial,
    partial_max,
    partial_sum,
    split,
    bg,
    S,
    window,
    splits,
    scale_log2,
    G: tl.constexpr,
    R: tl.constexpr,
    D: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One split of one KV head: sums of exp2(score - max) v and of exp2(score - max), and the max."""
    b = bg // G
    t = tl.load(length + b)
    o_r, o_d, o_t = tl.arange(0, BLOCK_R), tl.arange(0, D), tl.arange(0, BLOCK_S)
    m_r = o_r < R
    # A row that rests reads nothing.
    used = tl.where(tl.load(active + b) != 0, tl.minimum(t + 1, S), 0).to(tl.int32)
    tiles_a_split = tl.cdiv(tl.cdiv(used, BLOCK_S), splits)
    begin = split * tiles_a_split * BLOCK_S
    end = tl.minimum(begin + tiles_a_split * BLOCK_S, used)
    b_q = tl.load(q + (bg * R + o_r[:, None]) * D + o_d[None, :], mask=m_r[:, None], other=0.0)
    p_k, p_v = k + bg * S * D, v + bg * S * D
    b_max = tl.full((BLOCK_R,), -float("inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_R,), tl.float32)
    b_o = tl.zeros((BLOCK_R, D), tl.float32)
    for first in range(begin, end, BLOCK_S):
        o_s = first + o_t
        m_s = o_s < end
        # Slots are counted in int32, elements of a long cache are not.
        o_row = o_s.to(tl.int64) * D
        b_k = tl.load(p_k + o_row[None, :] + o_d[:, None], mask=m_s[None, :], other=0.0)
        b_v = tl.load(p_v + o_row[:, None] + o_d[None, :], mask=m_s[:, None], other=0.0)
        visible = m_s
        if WINDOWED:
            # The same in every round; said here, it takes fewer registers.
            slot = t.to(tl.int32) % S
            age = slot - o_s
            age = tl.where(age < 0, age + S, age)
            visible = visible & (age <= window)
        score = tl.dot(b_q, b_k, input_precision=PRECISION) * scale_log2
        score = tl.where(visible[None, :], score, -float("inf"))
        new_max = tl.maximum(b_max, tl.max(score, 1))
        # A tile may show nothing: its exponents would be inf - inf.
        safe = tl.where(new_max == -float("inf"), 0.0, new_max)
        weight = tl.exp2(score - safe[:, None])
        shrink = tl.exp2(b_max - safe)
        b_sum = b_sum * shrink + tl.sum(weight, 1)
        b_o = b_o * shrink[:, None] + tl.dot(weight.to(b_v.dtype), b_v, input_precision=PRECISION)
        b_max = new_max
    o_part = (bg * splits + split) * R + o_r
    tl.store(partial + o_part[:, None] * D + o_d[None, :], b_o, mask=m_r[:, None])
    tl.store(partial_max + o_part, b_max, mask=m_r)
    tl.store(partial_sum + o_part, b_sum, mask=m_r)


def choose_splits(programs: int, S: int, *, multiprocessors: int, block_s: int = 64, resident: int = 3) -> int:
    """Splits of the slots, at most one a tile, that leave few multiprocessors idle at the end.

    A multiprocessor runs `resident` programs at a time. The fewest splits are taken of those whose last round of
    programs is about as full as can be.
    """
    capacity = resident * multiprocessors
    most = max(1, min(-(-S // block_s), -(-4 * capacity // programs)))

    def used(splits: int) -> float:
        return programs * splits / (-(-programs * splits // capacity) * capacity)

    enough = 0.97 * max(used(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if used(splits) >= enough)
