"""Stage 3 forward: o_i = c_i phi(q_i) S_n + sum over keys j of the chunk, j <= i, of w_ij (phi(q_i) . phi(k_j)) v_j.

One program per chunk and KV head: S_n, phi(k) and v stay in shared memory while the group's query heads pass, HEADS of
them side by side in one tile. With a start state S0 (per KV or query head) o_i gains its decayed phi(q_i) S0.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.common import SOFTMAX, feature_map, is_bad, key_document, load_state, long_product
from scan_kernels.kernels.launch import Config, Launch, Sizes, States, Tensors, precision, strides


@triton.jit
def _share_of_start(begun, p_start_sum, start_log, o_log, m_i):
    """What a start state gives to a tile of queries, from their products with it."""
    begun += tl.load(p_start_sum)[None, :]
    if start_log is not None:
        begun *= tl.exp(tl.load(start_log + o_log, mask=m_i, other=0.0))[:, None]
    return begun


@triton.jit
def chunk_output_fwd_kernel(
    q, k, v, o, cum_hi, cum_lo, query_doc, key_doc, carried_doc, start, start_sum, start_log,
    states, sums, factors, carry, carry_sums,
    q_sb, q_st, q_sh, q_sd, k_sb, k_st, k_sg, k_sd, v_sb, v_st, v_sg, v_sd, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, lag, N, G, X, SEGMENT, empty,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr,
    HAS_START: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, bg = tl.program_id(0) + empty, tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    PAIRED: tl.constexpr = F == 2 * D
    HAS_FACTOR: tl.constexpr = HAS_DECAY or HAS_DOCS
    MEAN: tl.constexpr = F / D / D  # phi(q) . mean of phi(k)
    # A start state with a decay or in fp32 takes all registers that there are: its products come first, when the least
    # is held beside them.
    START_FIRST: tl.constexpr = HAS_START and (HAS_DECAY or PRECISION == "ieee")
    PARTS: tl.constexpr = 4 if D > 64 else 1
    compute = states.dtype.element_ty
    o_c, o_d, o_v = tl.arange(0, C), tl.arange(0, D), tl.arange(0, DV)

    # The state before the chunk.
    segment = (n - empty) // SEGMENT
    segments = (N - empty + SEGMENT - 1) // SEGMENT
    o_tile = o_d[:, None] * DV + o_v[None, :]
    p_state = states + (bg * N + n) * F * DV + o_tile
    p_carry = carry + (bg * (segments + 1) + segment) * F * DV + o_tile if HAS_CARRY else p_state
    factor = tl.load(factors + bg * N + n) if HAS_FACTOR and HAS_CARRY else 1.0
    b_s1 = load_state(p_state, p_carry, factor, HAS_CARRY, HAS_FACTOR)
    if PAIRED:
        b_s2 = load_state(p_state + D * DV, p_carry + D * DV, factor, HAS_CARRY, HAS_FACTOR)
    p_sums = sums + (bg * N + n) * DV + o_v
    p_carry_sums = carry_sums + (bg * (segments + 1) + segment) * DV + o_v if HAS_CARRY else p_sums

    # The chunk's keys.
    o_j = n * C + o_c
    m_j = (o_j < T) & (o_j >= lag)
    first_key = (n * C - lag).to(tl.int64)
    k += b * k_sb + g * k_sg + first_key * k_st
    v += b * v_sb + g * v_sg + first_key * v_st
    key = tl.load(k + (o_c * k_st)[:, None] + o_d[None, :] * k_sd, mask=m_j[:, None], other=0.0)
    value = tl.load(v + (o_c * v_st)[:, None] + o_v[None, :] * v_sd, mask=m_j[:, None], other=0.0)
    # A masked score is 0, but 0 * NaN is NaN: keys and values that are not finite leave the products, and set those who
    # may read them to NaN below.
    bad = is_bad(key) | is_bad(value)
    any_bad = tl.max(bad.to(tl.int32), 0)
    key = tl.where(bad[:, None], 0.0, key)
    b_v = tl.where(bad[:, None], 0.0, value).to(compute)
    b_k1 = feature_map(key, 1.0, MAP, D).to(compute)
    if PAIRED:
        b_k2 = feature_map(key, -1.0, MAP, D).to(compute)

    # The queries, HEADS at a time: row r is query r % C of head r // C.
    o_r = tl.arange(0, HEADS * C)
    o_i = n * C + o_r % C
    m_i = o_i < T
    pairs = (o_r % C)[:, None] >= o_c[None, :]
    if HAS_DECAY:
        p_cum = bg * N * C + n * C
        i_hi, i_lo = tl.load(cum_hi + p_cum + o_r % C), tl.load(cum_lo + p_cum + o_r % C)
        j_hi, j_lo = tl.load(cum_hi + p_cum + o_c), tl.load(cum_lo + p_cum + o_c)
        between = tl.minimum((i_hi[:, None] - j_hi[None, :]) + (i_lo[:, None] - j_lo[None, :]), 0.0)
        weight = tl.exp(between)
        upto = tl.exp(i_hi + i_lo)
    if HAS_DOCS:
        carried = tl.load(carried_doc + b)
        doc_i = tl.load(query_doc + b * qdoc_sb + tl.minimum(o_i, T - 1).to(tl.int64) * qdoc_st)
        doc_j = key_document(key_doc + b * doc_sb, doc_st, carried, o_j, lag, T)
        pairs = pairs & (doc_i[:, None] == doc_j[None, :])
        reads = doc_i == key_document(key_doc + b * doc_sb, doc_st, carried, n * C - 1, lag, T)
    reads_bad = tl.max((pairs & bad[None, :]).to(tl.int32), 1) != 0
    q += b * q_sb + g * R * q_sh + (n * C).to(tl.int64) * q_st
    o_q = (o_r // C * q_sh + o_r % C * q_st)[:, None] + o_d[None, :] * q_sd
    o += ((b * T + n * C) * G * R + g * R) * DV
    o_o = ((o_r % C * G * R + o_r // C) * DV)[:, None] + o_v[None, :]
    for r in range(0, R, HEADS):
        query = tl.load(q + r * q_sh + o_q, mask=m_i[:, None], other=0.0)
        b_q = feature_map(query, 1.0, MAP, D).to(compute)
        if START_FIRST:
            # HEADS is 1: the start state may be another for every query head.
            x = b * X + (g * R + r) // (G * R // X)
            p_start = start + x * F * DV + o_tile
            begun = long_product(b_q, tl.load(p_start), tl.zeros((HEADS * C, DV), tl.float32), PARTS, PRECISION)
            out = long_product(b_q, b_s1, tl.zeros((HEADS * C, DV), tl.float32), PARTS, PRECISION)
        scores = tl.dot(b_q, tl.trans(b_k1), input_precision=PRECISION)
        if PAIRED:
            b_q2 = feature_map(query, -1.0, MAP, D).to(compute)
            if START_FIRST:
                begun = long_product(b_q2, tl.load(p_start + D * DV), begun, PARTS, PRECISION)
                out = long_product(b_q2, b_s2, out, PARTS, PRECISION)
            scores = tl.dot(b_q2, tl.trans(b_k2), scores, input_precision=PRECISION)
        if not START_FIRST:
            out = tl.dot(b_q, b_s1, input_precision=PRECISION)
            if PAIRED:
                out = tl.dot(b_q2, b_s2, out, input_precision=PRECISION)
        if MAP == SOFTMAX:
            scores += MEAN
            # Loaded for every tile: a row held through the loop would cost registers.
            out += MEAN * load_state(p_sums, p_carry_sums, factor, HAS_CARRY, HAS_FACTOR)[None, :]
        if HAS_DECAY:
            scores *= weight
            out *= upto[:, None]
        if HAS_DOCS:
            out = tl.where(reads[:, None], out, 0.0)
        scores = tl.where(pairs, scores, 0.0)
        if START_FIRST:
            out += _share_of_start(begun, start_sum + x * DV + o_v, start_log, bg * T + o_i, m_i)
        out = tl.fma(out, 1.0, tl.dot(scores.to(compute), b_v, input_precision=PRECISION))
        if any_bad != 0:
            out = tl.where(reads_bad[:, None], float("nan"), out)
        if HAS_START and not START_FIRST:
            x = b * X + (g * R + r) // (G * R // X)
            p_start = start + x * F * DV + o_tile
            begun = tl.dot(b_q, tl.load(p_start), input_precision=PRECISION)
            if PAIRED:
                begun = tl.dot(b_q2, tl.load(p_start + D * DV), begun, input_precision=PRECISION)
            out += _share_of_start(begun, start_sum + x * DV + o_v, start_log, bg * T + o_i, m_i)
        tl.store(o + r * DV + o_o, out.to(o.dtype.element_ty), mask=m_i[:, None])


def launch_chunk_output_fwd(
    sizes: Sizes, x: Tensors, states: States, o: Tensor, config: Config, compute: torch.dtype
) -> Launch:
    args = {
        "k": x.k,
        "v": x.v,
        "o": o,
        **query_args(sizes, x, states, config, compute),
        **strides(x.k, "k_sb k_st k_sg k_sd"),
        **strides(x.v, "v_sb v_st v_sg v_sd"),
    }
    return Launch(chunk_output_fwd_kernel, (sizes.N - sizes.empty, sizes.B * sizes.G), args, config.options)


def query_args(sizes: Sizes, x: Tensors, states: States, config: Config, compute: torch.dtype) -> dict:
    """Arguments that the stages over queries share."""
    heads = config.heads if sizes.R % config.heads == 0 and x.start is None else 1
    return {
        "q": x.q,
        "cum_hi": x.cum_hi,
        "cum_lo": x.cum_lo,
        "query_doc": x.query_doc,
        "key_doc": x.key_doc,
        "carried_doc": x.carried_doc,
        "start": x.start,
        "start_sum": x.start_sum,
        "start_log": x.start_log,
        "states": states.chunks,
        "sums": states.sums,
        "factors": states.factors,
        "carry": states.carry,
        "carry_sums": states.carry_sums,
        **strides(x.q, "q_sb q_st q_sh q_sd"),
        **strides(x.query_doc, "qdoc_sb qdoc_st"),
        **strides(x.key_doc, "doc_sb doc_st"),
        "T": sizes.T,
        "lag": sizes.lag,
        "N": sizes.N,
        "G": sizes.G,
        "X": x.start.shape[1] if x.start is not None else 1,
        "SEGMENT": sizes.segment,
        "empty": sizes.empty,
        "R": sizes.R,
        "D": sizes.D,
        "DV": sizes.DV,
        "F": sizes.F,
        "MAP": sizes.feature_map,
        "C": sizes.chunk,
        "HEADS": heads,
        "HAS_DECAY": x.cum_hi is not None,
        "HAS_DOCS": x.key_doc is not None,
        "HAS_CARRY": states.carry is not None,
        "HAS_START": x.start is not None,
        "PRECISION": precision(compute),
    }
