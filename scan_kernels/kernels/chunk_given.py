"""Stage 3 backward, decays: what each key gave to the queries behind its chunk, c'_j phi(k_j) E_n v_j.

A decay feels it from the rows behind the key on. dk and dv are made of the same products, but a kernel that holds their
sums has no registers left for these.
"""

import torch
import triton
import triton.language as tl

from scan_kernels.kernels.chunk_output import query_args
from scan_kernels.kernels.common import SOFTMAX, feature_map, key_document, load_state, scaled
from scan_kernels.kernels.launch import Config, Launch, Sizes, States, Tensors, strides


@triton.jit
def _product(phi, p_state, p_carry, b_v, factor, HAS_CARRY: tl.constexpr, PRECISION: tl.constexpr):
    """phi S v of every row, fp32."""
    b_s = load_state(p_state, p_carry, factor, HAS_CARRY, True)
    return tl.sum(tl.dot(b_v, tl.trans(b_s), input_precision=PRECISION) * phi, 1)


@triton.jit
def chunk_given_kernel(
    k, v, given, beyond, cum_hi, cum_lo, key_doc, carried_doc,
    states, sums, factors, carry, carry_sums,
    k_sb, k_st, k_sg, k_sd, v_sb, v_st, v_sg, v_sd, doc_sb, doc_st,
    T, lag, N, G, SEGMENT,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr,
    HAS_DOCS: tl.constexpr, HAS_CARRY: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    n, bg = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b, g = bg // G, bg % G
    MEAN: tl.constexpr = F / D / D
    o_c, o_d, o_v = tl.arange(0, C), tl.arange(0, D), tl.arange(0, DV)
    o_j = n * C + o_c
    m_j = (o_j < T) & (o_j >= lag)
    first_key = (n * C - lag).to(tl.int64)
    k += b * k_sb + g * k_sg + first_key * k_st
    v += b * v_sb + g * v_sg + first_key * v_st
    key = tl.load(k + (o_c * k_st)[:, None] + o_d[None, :] * k_sd, mask=m_j[:, None], other=0.0)
    b_v = tl.load(v + (o_c * v_st)[:, None] + o_v[None, :] * v_sd, mask=m_j[:, None], other=0.0).to(
        states.dtype.element_ty
    )

    p_state = states + (bg * N + n) * F * DV + o_d[:, None] * DV + o_v[None, :]
    p_sums = sums + (bg * N + n) * DV + o_v
    p_carry, p_carry_sums, factor = p_state, p_sums, 1.0
    if HAS_CARRY:
        border = bg * ((N + SEGMENT - 1) // SEGMENT + 1) + n // SEGMENT + 1
        p_carry = carry + border * F * DV + o_d[:, None] * DV + o_v[None, :]
        p_carry_sums = carry_sums + border * DV + o_v
        factor = tl.load(factors + bg * N + n)

    # To all queries behind the chunk and, of these, to those behind the segment.
    to_all, to_beyond = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for half in tl.static_range(0, F // D):
        phi, o_half = feature_map(key, 1.0 - 2.0 * half, MAP, D), half * D * DV
        to_all += _product(phi, p_state + o_half, p_carry + o_half, b_v, factor, HAS_CARRY, PRECISION)
        if HAS_CARRY:
            to_beyond += _product(phi, p_carry + o_half, p_carry, b_v, factor, False, PRECISION)
    if MAP == SOFTMAX:
        value = b_v.to(tl.float32)
        b_sums = load_state(p_sums, p_carry_sums, factor, HAS_CARRY, True)
        to_all += MEAN * tl.sum(value * b_sums[None, :], 1)
        if HAS_CARRY:
            to_beyond += MEAN * tl.sum(value * tl.load(p_carry_sums)[None, :], 1)

    p_cum = bg * N * C + n * C
    j_hi, j_lo = tl.load(cum_hi + p_cum + o_c), tl.load(cum_lo + p_cum + o_c)
    end_hi, end_lo = tl.load(cum_hi + p_cum + C - 1), tl.load(cum_lo + p_cum + C - 1)
    rest = tl.exp((end_hi - j_hi) + (end_lo - j_lo))
    to_all, to_beyond = to_all * rest, to_beyond * rest
    if HAS_DOCS:
        carried, key_doc = tl.load(carried_doc + b), key_doc + b * doc_sb
        behind = key_document(key_doc, doc_st, carried, n * C + C - 1, lag, T)
        runs_on = key_document(key_doc, doc_st, carried, o_j, lag, T) == behind
        to_all, to_beyond = tl.where(runs_on, to_all, 0.0), tl.where(runs_on, to_beyond, 0.0)
    tl.store(given + p_cum + o_c, to_all)
    if HAS_CARRY:
        tl.store(beyond + bg * N + n, scaled(factor, tl.sum(to_beyond, 0)))


def launch_chunk_given(sizes: Sizes, x: Tensors, states: States, config: Config, compute: torch.dtype) -> Launch:
    """For a problem with decays, from the backward's states; in fp32:

    given (B, G, N * C): of every row, to the queries behind its chunk; beyond (B * G, N): of every chunk, to queries
    behind its segment, None where nothing is carried.
    """
    args = query_args(sizes, x, states, config, compute)
    for name in ("q", "q_sb", "q_st", "q_sh", "q_sd", "query_doc", "qdoc_sb", "qdoc_st", "R", "HEADS", "HAS_DECAY"):
        del args[name]
    for name in ("start", "start_sum", "start_log", "X", "HAS_START", "empty"):
        del args[name]
    B, G, N, device = sizes.B, sizes.G, sizes.N, x.k.device
    args |= {
        "k": x.k,
        "v": x.v,
        "given": torch.empty(B, G, N * sizes.chunk, device=device),
        "beyond": None if states.carry is None else torch.empty(B * G, N, device=device),
        **strides(x.k, "k_sb k_st k_sg k_sd"),
        **strides(x.v, "v_sb v_st v_sg v_sd"),
    }
    return Launch(chunk_given_kernel, (N, B * G), args, config.options)
