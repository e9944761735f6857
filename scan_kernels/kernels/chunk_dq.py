"""Stage 3 backward, queries: dphi(q_i) = c_i do_i S_n^T + sum over j <= i of w_ij (do_i . v_j) phi(k_j), then dq_i.

The layout is that of the forward. The states hold phi - 1/D, and need no correction here: it would add a constant to a
row of dphi, which the softmax does not see.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.chunk_output import query_args
from scan_kernels.kernels.common import (
    SOFTMAX,
    feature_map,
    feature_map_bwd,
    is_bad,
    key_document,
    load_state,
    long_product,
    row_dot,
)
from scan_kernels.kernels.launch import Config, Launch, Sizes, States, Tensors, strides


@triton.jit
def _read_by_mean(b_do, older, upto, reads):
    """do . o of every query by the mean that the states are less: `older`, in front of the chunk."""
    read = tl.sum(b_do.to(tl.float32) * older[None, :], 1) * upto
    if reads is not None:
        read = tl.where(reads, read, 0.0)
    return read


@triton.jit
def _reads_bad(pairs, bad_keys, C: tl.constexpr):
    """The rows that read one of the keys in `bad_keys`, a bit a key."""
    bad = (bad_keys >> tl.arange(0, C)) & 1
    return tl.max(tl.where(pairs, bad[None, :].to(tl.int32), 0), 1) != 0


@triton.jit
def _half_with_start(
    query, b_do, b_s, b_ds, b_k, p_start, begun, upto, reads,
    SIGN: tl.constexpr, MAP: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx by a half of the features where there are decays and a start state, and do . o of every query by the carried
    and by the start state. p_start: columns of values first.

    Together they take all registers that there are: the start state's product comes first, when the least is held
    beside it, and phi is made once, less its mean, for both of the sums and for dx.
    """
    PARTS: tl.constexpr = 2 if b_do.shape[1] >= 32 else 1
    phi = feature_map(query, SIGN, MAP, D)
    nothing = tl.zeros((b_do.shape[0], D), tl.float32)
    dphi = begun[:, None] * long_product(b_do, tl.load(p_start), nothing, PARTS, PRECISION)
    by_start = tl.sum(phi * dphi, 1)
    carried = upto[:, None] * long_product(b_do, tl.trans(b_s), nothing, PARTS, PRECISION)
    if reads is not None:
        carried = tl.where(reads[:, None], carried, 0.0)
    by_carried = tl.sum(phi * carried, 1)
    dphi += tl.fma(carried, 1.0, tl.dot(b_ds, b_k, input_precision=PRECISION))
    if MAP == SOFTMAX:
        dphi -= tl.sum(tl.fma(phi, dphi, dphi / D), 1)[:, None]
        dx = tl.fma(phi, dphi, dphi / D) * SIGN
    else:
        dx = feature_map_bwd(query, dphi, SIGN, MAP, D)
    return dx, by_carried, by_start


@triton.jit
def chunk_dq_kernel(
    q, k, v, do, dq, dq_other, d_read, d_paired, d_start,
    cum_hi, cum_lo, query_doc, key_doc, carried_doc, start, start_sum, start_log,
    states, sums, factors, carry, carry_sums,
    q_sb, q_st, q_sh, q_sd, k_sb, k_st, k_sg, k_sd, v_sb, v_st, v_sg, v_sd, do_sb, do_st, do_sh, do_sd,
    dqo_sb, dqo_st, dqo_sh, dqo_sd, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, lag, N, G, X, SEGMENT, empty,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr,
    HAS_START: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, bg = tl.program_id(0) + empty, tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    PAIRED: tl.constexpr = F == 2 * D
    HAS_FACTOR: tl.constexpr = HAS_DECAY or HAS_DOCS
    MEAN: tl.constexpr = F / D / D
    DECAY_AND_START: tl.constexpr = HAS_DECAY and HAS_START
    compute = states.dtype.element_ty
    PARTS: tl.constexpr = 2 if DV >= 32 and not HAS_START else 1
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

    # The chunk's keys. A masked product may still be 0 * NaN, so keys that are not finite leave them.
    o_j = n * C + o_c
    m_j = (o_j < T) & (o_j >= lag)
    first_key = (n * C - lag).to(tl.int64)
    k += b * k_sb + g * k_sg + first_key * k_st
    v += b * v_sb + g * v_sg + first_key * v_st
    key = tl.load(k + (o_c * k_st)[:, None] + o_d[None, :] * k_sd, mask=m_j[:, None], other=0.0)
    b_v = tl.load(v + (o_c * v_st)[:, None] + o_v[None, :] * v_sd, mask=m_j[:, None], other=0.0).to(compute)
    bad = is_bad(key)
    key = tl.where(bad[:, None], 0.0, key)
    tl.static_assert(C <= 64, "keys that are not finite are bits of one number")
    # A bit a key: as booleans they, or who reads them, would wait in registers through the loop.
    bad_keys = tl.sum(bad.to(tl.int32 if C <= 32 else tl.int64) << o_c, 0)
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
        paired = tl.zeros((C,), tl.float32)
    if HAS_DOCS:
        carried = tl.load(carried_doc + b)
        doc_i = tl.load(query_doc + b * qdoc_sb + tl.minimum(o_i, T - 1).to(tl.int64) * qdoc_st)
        doc_j = key_document(key_doc + b * doc_sb, doc_st, carried, o_j, lag, T)
        pairs = pairs & (doc_i[:, None] == doc_j[None, :])
        reads = doc_i == key_document(key_doc + b * doc_sb, doc_st, carried, n * C - 1, lag, T)
    else:
        reads = None
    q += b * q_sb + g * R * q_sh + (n * C).to(tl.int64) * q_st
    do += b * do_sb + g * R * do_sh + (n * C).to(tl.int64) * do_st
    o_q = (o_r // C * q_sh + o_r % C * q_st)[:, None] + o_d[None, :] * q_sd
    o_do = (o_r // C * do_sh + o_r % C * do_st)[:, None] + o_v[None, :] * do_sd
    if dq_other is not None:
        dq_other += b * dqo_sb + (n * C).to(tl.int64) * dqo_st
        if D <= 64:
            dq_other += g * R * dqo_sh
    row = (b * T + n * C) * G * R + g * R
    o_row = o_r % C * G * R + o_r // C
    for r in range(0, R, HEADS):
        query = tl.load(q + (o_q + r * q_sh), mask=m_i[:, None], other=0.0)
        b_do = tl.load(do + (o_do + r * do_sh), mask=m_i[:, None], other=0.0).to(compute)
        d_scores = tl.dot(b_do, tl.trans(b_v), input_precision=PRECISION)
        if HAS_DECAY:
            d_scores *= weight
        d_scores = tl.where(pairs, d_scores, 0.0)
        b_ds = d_scores.to(compute)
        if HAS_DECAY:
            # do_i . o_i by pairs of the chunk, summed for their queries and for their keys. One product for both: where
            # the two sums cancel, their rounding does, too. A query and the key of its own row feel no decay between.
            scores = tl.dot(feature_map(query, 1.0, MAP, D).to(compute), tl.trans(b_k1), input_precision=PRECISION)
            if PAIRED:
                b_q2 = feature_map(query, -1.0, MAP, D).to(compute)
                scores = tl.dot(b_q2, tl.trans(b_k2), scores, input_precision=PRECISION)
            if MAP == SOFTMAX:
                scores += MEAN
            scores = tl.where(pairs & ((o_r % C)[:, None] > o_c[None, :]), scores * d_scores, 0.0)
            read = tl.sum(scores, 1)
            paired += tl.sum(scores, 0)
        if HAS_START:
            x = b * X + (g * R + r) // (G * R // X)
            p_start = start + x * F * DV + o_tile
            begun = tl.full((HEADS * C,), 1.0, tl.float32)
            if start_log is not None:
                begun = tl.exp(tl.load(start_log + bg * T + o_i, mask=m_i, other=0.0))

        if DECAY_AND_START:
            if MAP == SOFTMAX:
                older = MEAN * load_state(p_sums, p_carry_sums, factor, HAS_CARRY, HAS_FACTOR)
                read += _read_by_mean(b_do, older, upto, reads)
            read_start = begun * tl.sum(b_do.to(tl.float32) * tl.load(start_sum + x * DV + o_v)[None, :], 1)
            p_start = start + x * F * DV + o_d[None, :] * DV + o_v[:, None]
            p_dq = dq + (row + r) * D + (o_row * D)[:, None] + o_d[None, :]
            d_query, by_carried, by_start = _half_with_start(
                query, b_do, b_s1, b_ds, b_k1, p_start, begun, upto, reads, 1.0, MAP, D, PRECISION
            )
            read += by_carried
            read_start += by_start
            d_query = d_query.to(compute)
            if PAIRED:
                if D > 64 or compute == tl.float32:
                    # In registers it would wait as what it is made of, since compilers round it when it is needed;
                    # the queries are read again.
                    tl.store(p_dq, d_query.to(dq.dtype.element_ty), mask=m_i[:, None])
                    tl.debug_barrier()
                    query = tl.load(q + (o_q + r * q_sh), mask=m_i[:, None], other=0.0)
                d_query2, by_carried, by_start = _half_with_start(
                    query, b_do, b_s2, b_ds, b_k2, p_start + D * DV, begun, upto, reads, -1.0, MAP, D, PRECISION
                )
                read += by_carried
                read_start += by_start
                if D > 64 or compute == tl.float32:
                    d_query = tl.load(p_dq, mask=m_i[:, None], other=0.0)
                d_query = d_query.to(tl.float32) + d_query2
        else:
            dphi = tl.dot(b_do, tl.trans(b_s1), input_precision=PRECISION)
            if HAS_DECAY:
                dphi *= upto[:, None]
            if HAS_DOCS:
                dphi = tl.where(reads[:, None], dphi, 0.0)
            if HAS_DECAY:
                read += row_dot(query, dphi, 1.0, MAP, D)
            dphi = tl.fma(dphi, 1.0, tl.dot(b_ds, b_k1, input_precision=PRECISION))
            if HAS_START:
                d_begun = begun[:, None] * tl.dot(b_do, tl.trans(tl.load(p_start)), input_precision=PRECISION)
                if start_log is not None:
                    read_start = row_dot(query, d_begun, 1.0, MAP, D)
                dphi += d_begun
            d_query = feature_map_bwd(query, dphi, 1.0, MAP, D).to(compute)
            if PAIRED:
                if D > 128:
                    # The queries again, which would wait beside the first half's gradient.
                    tl.debug_barrier()
                    query = tl.load(q + (o_q + r * q_sh), mask=m_i[:, None], other=0.0)
                dphi2 = long_product(b_do, tl.trans(b_s2), tl.zeros((HEADS * C, D), tl.float32), PARTS, PRECISION)
                if HAS_DECAY:
                    dphi2 *= upto[:, None]
                if HAS_DOCS:
                    dphi2 = tl.where(reads[:, None], dphi2, 0.0)
                if HAS_DECAY:
                    read += row_dot(query, dphi2, -1.0, MAP, D)
                dphi2 = tl.fma(dphi2, 1.0, tl.dot(b_ds, b_k2, input_precision=PRECISION))
                if HAS_START:
                    d_begun = tl.trans(tl.load(p_start + D * DV))
                    d_begun = begun[:, None] * tl.dot(b_do, d_begun, input_precision=PRECISION)
                    if start_log is not None:
                        read_start += row_dot(query, d_begun, -1.0, MAP, D)
                    dphi2 += d_begun
                d_query = d_query.to(tl.float32) + feature_map_bwd(query, dphi2, -1.0, MAP, D)
        if bad_keys != 0:
            d_query = tl.where(_reads_bad(pairs, bad_keys, C)[:, None], float("nan"), d_query)
        if dq_other is not None:
            if D > 64:
                # Computed from r for every row, so that it is computed here and not kept through the loop.
                p_other, head = dq_other, g * R + r + o_r // C
            else:
                p_other, head = dq_other + r * dqo_sh, o_r // C
            o_other = (head * dqo_sh + o_r % C * dqo_st)[:, None] + o_d[None, :] * dqo_sd
            other = tl.load(p_other + o_other, mask=m_i[:, None], other=0.0)
            d_query = d_query.to(tl.float32) + other.to(tl.float32)
        tl.store(
            dq + (row + r) * D + (o_row * D)[:, None] + o_d[None, :], d_query.to(dq.dtype.element_ty), mask=m_i[:, None]
        )
        # do . o, by which a decay between key and query is felt: what the keys gave, and what the start state gave.
        if HAS_DECAY:
            if MAP == SOFTMAX and not HAS_START:
                older = MEAN * load_state(p_sums, p_carry_sums, factor, HAS_CARRY, HAS_FACTOR)
                read += _read_by_mean(b_do, older, upto, reads)
            if bad_keys != 0:
                read = tl.where(_reads_bad(pairs, bad_keys, C), float("nan"), read)
            tl.store(d_read + row + r + o_row, read, mask=m_i)
        if HAS_START and start_log is not None:
            if not HAS_DECAY:
                read_start += begun * tl.sum(b_do.to(tl.float32) * tl.load(start_sum + x * DV + o_v)[None, :], 1)
            tl.store(d_start + row + r + o_row, read_start, mask=m_i)
    if HAS_DECAY:
        tl.store(d_paired + (bg * N + n) * C + o_c, paired)


def launch_chunk_dq(
    sizes: Sizes,
    x: Tensors,
    states: States,
    do: Tensor,
    dq: Tensor,
    d_read: Tensor | None,
    d_paired: Tensor | None,
    d_start: Tensor | None,
    config: Config,
    compute: torch.dtype,
    other: Tensor | None = None,
) -> Launch:
    """Writes dq, with `other` added before it is rounded, and, for the gradient of decays, in fp32:

    d_read (B, T, H): do . o of every query, but for the key of its own row and the start state; d_paired (B, G, N * C):
    the part of it that each key gave to queries of its chunk; d_start (B, T, H): do . o by the start state.
    """
    args = {
        "k": x.k,
        "v": x.v,
        "do": do,
        "dq": dq,
        "dq_other": other,
        "d_read": d_read,
        "d_paired": d_paired,
        "d_start": d_start,
        **query_args(sizes, x, states, config, compute),
        **strides(x.k, "k_sb k_st k_sg k_sd"),
        **strides(x.v, "v_sb v_st v_sg v_sd"),
        **strides(do, "do_sb do_st do_sh do_sd"),
        **strides(other, "dqo_sb dqo_st dqo_sh dqo_sd"),
    }
    return Launch(chunk_dq_kernel, (sizes.N - sizes.empty, sizes.B * sizes.G), args, config.options)
