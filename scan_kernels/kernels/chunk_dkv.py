"""Stage 3 backward, keys and values, summed over the group's query heads without atomics:

    dv_j      = c'_j phi(k_j) E_n + sum over i >= j of w_ij (phi(q_i) . phi(k_j)) do_i
    dphi(k_j) = c'_j v_j E_n^T    + sum over i >= j of w_ij (do_i . v_j) phi(q_i),                            then dk_j

The products are computed with keys as rows: no result of a product is transposed into the next one.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.chunk_output import query_args
from scan_kernels.kernels.common import SOFTMAX, feature_map, feature_map_bwd, key_document, load_state, long_product
from scan_kernels.kernels.launch import Config, Launch, Sizes, States, Tensors, strides


@triton.jit
def _with_other(x, p_other, stride, stride_d, m_key, C: tl.constexpr, WIDTH: tl.constexpr):
    """x and what another reader of these keys gives to them."""
    if p_other is not None:
        o_c, o_d = tl.arange(0, C), tl.arange(0, WIDTH)
        other = tl.load(p_other + (o_c * stride)[:, None] + o_d[None, :] * stride_d, mask=m_key[:, None], other=0.0)
        x = x.to(tl.float32) + other.to(tl.float32)
    return x


@triton.jit
def chunk_dkv_kernel(
    q, k, v, do, dk, dv, dk_other, dv_other, cum_hi, cum_lo, query_doc, key_doc, carried_doc,
    states, sums, factors, carry, carry_sums,
    q_sb, q_st, q_sh, q_sd, k_sb, k_st, k_sg, k_sd, v_sb, v_st, v_sg, v_sd, do_sb, do_st, do_sh, do_sd,
    dko_sb, dko_st, dko_sg, dko_sd, dvo_sb, dvo_st, dvo_sg, dvo_sd, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, M, lag, N, G, SEGMENT, empty,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr,
    HEADS: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    n, bg = tl.program_id(0) + empty, tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    PAIRED: tl.constexpr = F == 2 * D
    HAS_FACTOR: tl.constexpr = HAS_DECAY or HAS_DOCS
    MEAN: tl.constexpr = F / D / D
    compute = states.dtype.element_ty
    # Whether keys and values are other ones for every head, as far as the compiler knows: it would keep rows of them in
    # registers through the loops.
    ANEW: tl.constexpr = compute != tl.float32 and (D > 128 or (HAS_DECAY and D > 64))
    PARTS: tl.constexpr = 4 if D > 64 else 1
    o_c, o_d, o_v = tl.arange(0, C), tl.arange(0, D), tl.arange(0, DV)
    o_j = n * C + o_c
    first_key = (n * C - lag).to(tl.int64)
    dk += ((b * M + first_key) * G + g) * D
    dv += ((b * M + first_key) * G + g) * DV
    m_key = (o_j >= lag) & (o_j < M + lag)
    if dk_other is not None:
        dk_other += b * dko_sb + g * dko_sg + first_key * dko_st
    if dv_other is not None:
        dv_other += b * dvo_sb + g * dvo_sg + first_key * dvo_st
    if n >= N:
        # Keys that are younger than any query's residual keys.
        o_row = o_c[:, None].to(tl.int64) * G
        d_key = _with_other(tl.zeros((C, D), tl.float32), dk_other, dko_st, dko_sd, m_key, C, D)
        d_value = _with_other(tl.zeros((C, DV), tl.float32), dv_other, dvo_st, dvo_sd, m_key, C, DV)
        tl.store(dk + o_row * D + o_d[None, :], d_key.to(dk.dtype.element_ty), mask=m_key[:, None])
        tl.store(dv + o_row * DV + o_v[None, :], d_value.to(dv.dtype.element_ty), mask=m_key[:, None])
        return

    m_j = (o_j < T) & (o_j >= lag)
    k += b * k_sb + g * k_sg + first_key * k_st
    v += b * v_sb + g * v_sg + first_key * v_st
    o_k = (o_c * k_st)[:, None] + o_d[None, :] * k_sd
    key = tl.load(k + o_k, mask=m_j[:, None], other=0.0)
    b_k1 = feature_map(key, 1.0, MAP, D).to(compute)
    if PAIRED:
        b_k2 = feature_map(key, -1.0, MAP, D).to(compute)

    segment = (n - empty) // SEGMENT
    segments = (N - empty + SEGMENT - 1) // SEGMENT
    o_tile = o_d[:, None] * DV + o_v[None, :]
    states += (bg * N + n) * F * DV
    if HAS_CARRY:
        carry += (bg * (segments + 1) + segment + 1) * F * DV
    else:
        carry = states
    factor = tl.load(factors + bg * N + n) if HAS_FACTOR and HAS_CARRY else 1.0

    # Values. First what the queries behind the chunk give, through the state; then the chunk's own.
    b_e = load_state(states + o_tile, carry + o_tile, factor, HAS_CARRY, HAS_FACTOR)
    d_value = long_product(b_k1, b_e, tl.zeros((C, DV), tl.float32), PARTS, PRECISION)
    if PAIRED:
        o_tile2 = D * DV + o_tile
        b_e = load_state(states + o_tile2, carry + o_tile2, factor, HAS_CARRY, HAS_FACTOR)
        d_value = long_product(b_k2, b_e, d_value, PARTS, PRECISION)
    if MAP == SOFTMAX:
        p_sums = sums + (bg * N + n) * DV + o_v
        p_carry_sums = carry_sums + (bg * (segments + 1) + segment + 1) * DV + o_v if HAS_CARRY else p_sums
        d_value += MEAN * load_state(p_sums, p_carry_sums, factor, HAS_CARRY, HAS_FACTOR)[None, :]
    # The chunk's queries, HEADS at a time: column r is query r % C of head r // C.
    o_r = tl.arange(0, HEADS * C)
    o_i = n * C + o_r % C
    m_i = o_i < T
    pairs = o_c[:, None] <= (o_r % C)[None, :]
    if HAS_DECAY:
        p_cum = bg * N * C + n * C
        i_hi, i_lo = tl.load(cum_hi + p_cum + o_r % C), tl.load(cum_lo + p_cum + o_r % C)
        j_hi, j_lo = tl.load(cum_hi + p_cum + o_c), tl.load(cum_lo + p_cum + o_c)
        end_hi, end_lo = tl.load(cum_hi + p_cum + C - 1), tl.load(cum_lo + p_cum + C - 1)
        between = tl.minimum((i_hi[None, :] - j_hi[:, None]) + (i_lo[None, :] - j_lo[:, None]), 0.0)
        weight = tl.exp(between)
        rest = tl.exp((end_hi - j_hi) + (end_lo - j_lo))
    if HAS_DOCS:
        carried = tl.load(carried_doc + b)
        doc_i = tl.load(query_doc + b * qdoc_sb + tl.minimum(o_i, T - 1).to(tl.int64) * qdoc_st)
        doc_j = key_document(key_doc + b * doc_sb, doc_st, carried, o_j, lag, T)
        pairs = pairs & (doc_i[None, :] == doc_j[:, None])
        runs_on = doc_j == key_document(key_doc + b * doc_sb, doc_st, carried, n * C + C - 1, lag, T)
    q += b * q_sb + g * R * q_sh + (n * C).to(tl.int64) * q_st
    do += b * do_sb + g * R * do_sh + (n * C).to(tl.int64) * do_st
    o_q = (o_r // C * q_sh + o_r % C * q_st)[:, None] + o_d[None, :] * q_sd
    o_do = (o_r // C * do_sh + o_r % C * do_st)[:, None] + o_v[None, :] * do_sd
    if HAS_DECAY:
        d_value *= rest[:, None]
    if HAS_DOCS:
        d_value = tl.where(runs_on[:, None], d_value, 0.0)
    for r in range(0, R, HEADS):
        query = tl.load(q + r * q_sh + o_q, mask=m_i[:, None], other=0.0)
        b_do = tl.load(do + r * do_sh + o_do, mask=m_i[:, None], other=0.0).to(compute)
        b_q = feature_map(query, 1.0, MAP, D).to(compute)
        if ANEW:
            b_k1 = tl.where(r < R, b_k1, 0.0)
        scores = tl.dot(b_k1, tl.trans(b_q), input_precision=PRECISION)
        if PAIRED:
            b_q2 = feature_map(query, -1.0, MAP, D).to(compute)
            if ANEW:
                b_k2 = tl.where(r < R, b_k2, 0.0)
            scores = tl.dot(b_k2, tl.trans(b_q2), scores, input_precision=PRECISION)
        if MAP == SOFTMAX:
            scores += MEAN
        if HAS_DECAY:
            scores *= weight
        scores = tl.where(pairs, scores, 0.0)
        d_value = tl.dot(scores.to(compute), b_do, d_value, input_precision=PRECISION)
    # Rows behind the last query hold keys that none of them reads.
    d_value = tl.where(m_j[:, None], d_value, 0.0)
    d_value = _with_other(d_value, dv_other, dvo_st, dvo_sd, m_key, C, DV)
    tl.store(dv + (o_c * G * DV)[:, None] + o_v[None, :], d_value.to(dv.dtype.element_ty), mask=m_key[:, None])
    b_v = tl.load(v + (o_c * v_st)[:, None] + o_v[None, :] * v_sd, mask=m_j[:, None], other=0.0).to(compute)

    # Keys, likewise, one half of the features after the other: both sums at once would not fit into registers.
    key = tl.load(k + o_k, mask=m_j[:, None], other=0.0)
    if D > 128:
        # 0, which the compiler does not know: it would keep the addresses of the states' tiles up to here.
        o_tile += 16 * tl.minimum(M, 0)
    d_key = tl.zeros((C, D), compute)
    for half in tl.static_range(0, F // D):
        b_e = load_state(states + half * D * DV + o_tile, carry + half * D * DV + o_tile, factor, HAS_CARRY, HAS_FACTOR)
        dphi = tl.dot(b_v, tl.trans(b_e), input_precision=PRECISION)
        if HAS_DECAY:
            dphi *= rest[:, None]
        if HAS_DOCS:
            dphi = tl.where(runs_on[:, None], dphi, 0.0)
        for r in range(0, R, HEADS):
            b_do = tl.load(do + r * do_sh + o_do, mask=m_i[:, None], other=0.0).to(compute)
            if ANEW:
                b_v = tl.where(r < R, b_v, 0.0)
            d_scores = tl.dot(b_v, tl.trans(b_do), input_precision=PRECISION)
            if HAS_DECAY:
                d_scores *= weight
            d_scores = tl.where(pairs, d_scores, 0.0)
            query = tl.load(q + r * q_sh + o_q, mask=m_i[:, None], other=0.0)
            b_q = feature_map(query, 1.0 - 2.0 * half, MAP, D).to(compute)
            dphi = tl.dot(d_scores.to(compute), b_q, dphi, input_precision=PRECISION)
        d_key = (d_key.to(tl.float32) + feature_map_bwd(key, dphi, 1.0 - 2.0 * half, MAP, D)).to(compute)
    d_key = _with_other(tl.where(m_j[:, None], d_key, 0.0), dk_other, dko_st, dko_sd, m_key, C, D)
    tl.store(dk + (o_c * G * D)[:, None] + o_d[None, :], d_key.to(dk.dtype.element_ty), mask=m_key[:, None])


def launch_chunk_dkv(
    sizes: Sizes,
    x: Tensors,
    states: States,
    do: Tensor,
    dk: Tensor,
    dv: Tensor,
    config: Config,
    compute: torch.dtype,
    dk_other: Tensor | None = None,
    dv_other: Tensor | None = None,
) -> Launch:
    """Writes dk, dv of all M keys, with `dk_other`, `dv_other` added before they are rounded."""
    args = query_args(sizes, x, states, config, compute)
    for name in ("start", "start_sum", "start_log", "X", "HAS_START"):
        del args[name]
    args |= {
        "k": x.k,
        "v": x.v,
        "do": do,
        "dk": dk,
        "dv": dv,
        "dk_other": dk_other,
        "dv_other": dv_other,
        "M": sizes.M,
        **strides(x.k, "k_sb k_st k_sg k_sd"),
        **strides(x.v, "v_sb v_st v_sg v_sd"),
        **strides(do, "do_sb do_st do_sh do_sd"),
        **strides(dk_other, "dko_sb dko_st dko_sg dko_sd"),
        **strides(dv_other, "dvo_sb dvo_st dvo_sg dvo_sd"),
    }
    chunks_with_keys = -(-(sizes.M + sizes.lag) // sizes.chunk) - sizes.empty
    return Launch(chunk_dkv_kernel, (chunks_with_keys, sizes.B * sizes.G), args, config.options)
