"""Stage 1: what each chunk adds to the state, summed within a segment of SEGMENT chunks.

    fwd  S_{n+1} = f_n S_n + sum_i w_i phi(k_i)^T v_i      chunks in order; writes S_n, the state before chunk n
    bwd  E_{n-1} = f_n E_n + sum_i w_i phi(q_i)^T do_i     chunks reversed; writes E_n, the gradient behind chunk n

Both start at zero in each segment and leave the segment's total to the scan (stage 2). With softmax features the states
are sums of phi - 1/D, and beside them runs the plain sum of the values, from which the missing part follows exactly.

With decays the backward also multiplies S_n with the E_n that it gathered: what passes from the keys before a chunk to
the queries behind it, inside the segment. E_n may take the place of S_n, which nobody reads after that.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from scan_kernels.kernels.common import SOFTMAX, feature_map, key_document, load_state, scaled
from scan_kernels.kernels.launch import Config, Launch, Sizes, States, Tensors, precision, strides


@triton.jit
def _load_features(p_x, stride_d, m_t, SIGN, f0, MAP: tl.constexpr, D: tl.constexpr, BLOCK_F: tl.constexpr):
    """Features f0 ... of the rows at p_x (C, 1), from the whole rows if their sum is needed."""
    x = tl.load(p_x + (f0 + tl.arange(0, BLOCK_F))[None, :] * stride_d, mask=m_t[:, None], other=0.0).to(tl.float32)
    if BLOCK_F == D or MAP != SOFTMAX:
        return feature_map(x, SIGN, MAP, D)
    else:
        row = tl.load(p_x + tl.arange(0, D)[None, :] * stride_d, mask=m_t[:, None], other=0.0).to(tl.float32) * SIGN
        top = tl.max(row, 1)
        total = tl.sum(tl.exp2((row - top[:, None]) * 1.4426950408889634), 1)
        return tl.exp2((x * SIGN - top[:, None]) * 1.4426950408889634) * (1.0 / total)[:, None] - 1.0 / D


@triton.jit
def chunk_state_fwd_kernel(
    k, v, cum_hi, cum_lo, key_doc, carried_doc,
    states, value_sums, factors, totals, total_factors,
    k_sb, k_st, k_sg, k_sd, v_sb, v_st, v_sg, v_sd, doc_sb, doc_st,
    T, lag, N, G, empty,
    D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr, SEGMENT,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    segment, block, bg = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(0)
    b, g = bg // G, bg % G
    row0, v0 = (block // (DV // BLOCK_V)) * BLOCK_F, (block % (DV // BLOCK_V)) * BLOCK_V
    SIGN = tl.where(row0 < D, 1.0, -1.0)
    f0 = row0 % D
    o_c, o_f, o_v = tl.arange(0, C), row0 + tl.arange(0, BLOCK_F), v0 + tl.arange(0, BLOCK_V)
    k += b * k_sb + g * k_sg
    v += b * v_sb + g * v_sg
    SUMS: tl.constexpr = MAP == SOFTMAX
    compute = states.dtype.element_ty
    if HAS_DOCS:
        key_doc += b * doc_sb
        carried = tl.load(carried_doc + b)

    state = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    value_sum = tl.zeros((BLOCK_V,), tl.float32)
    share = 1.0
    first = empty + segment * SEGMENT
    for n in range(first, tl.minimum(first + SEGMENT, N)):
        p_state = states + ((bg * N + n) * F + o_f[:, None]) * DV + o_v[None, :]
        tl.store(p_state, state.to(compute))
        if row0 == 0:
            if SUMS:
                tl.store(value_sums + (bg * N + n) * DV + o_v, value_sum)
            if HAS_DECAY or HAS_DOCS:
                tl.store(factors + bg * N + n, share, mask=v0 == 0)

        o_t = n * C + o_c
        m_t = (o_t < T) & (o_t >= lag)
        o_key = (o_t - lag).to(tl.int64)
        phi = _load_features(k + o_key[:, None] * k_st, k_sd, m_t, SIGN, f0, MAP, D, BLOCK_F)
        p_v = v + o_key[:, None] * v_st + o_v[None, :] * v_sd
        value = tl.load(p_v, mask=m_t[:, None], other=0.0).to(tl.float32)
        factor = 1.0
        if HAS_DECAY:
            p_cum = bg * N * C + o_t
            end = bg * N * C + n * C + C - 1
            end_hi, end_lo = tl.load(cum_hi + end), tl.load(cum_lo + end)
            weight = tl.exp((end_hi - tl.load(cum_hi + p_cum)) + (end_lo - tl.load(cum_lo + p_cum)))
            value = value * weight[:, None]
            factor = tl.exp(end_hi + end_lo)
        if HAS_DOCS:
            before = key_document(key_doc, doc_st, carried, n * C - 1, lag, T)
            behind = key_document(key_doc, doc_st, carried, n * C + C - 1, lag, T)
            runs_on = key_document(key_doc, doc_st, carried, o_t, lag, T) == behind
            phi = tl.where(runs_on[:, None], phi, 0.0)
            value = tl.where(runs_on[:, None], value, 0.0)
            factor = tl.where(before == behind, factor, 0.0)
        if HAS_DECAY or HAS_DOCS:
            state = scaled(factor, state)
            value_sum = scaled(factor, value_sum)
            share = share * factor
        if SUMS:
            value_sum += tl.sum(value, 0)
        state = tl.dot(tl.trans(phi.to(compute)), value.to(compute), state, input_precision=PRECISION)

    # Without totals no scan follows.
    if totals is not None:
        p_total = totals + (bg * segments + segment) * (F + 1) * DV
        tl.store(p_total + o_f[:, None] * DV + o_v[None, :], state)
        if row0 == 0:
            tl.store(p_total + F * DV + o_v, value_sum)
            if HAS_DECAY or HAS_DOCS:
                tl.store(total_factors + bg * segments + segment, share, mask=v0 == 0)


@triton.jit
def chunk_state_bwd_kernel(
    q, do, cum_hi, cum_lo, query_doc, key_doc, carried_doc,
    states, value_sums, factors, totals, total_factors,
    fwd_chunks, fwd_sums, fwd_factors, fwd_carry, fwd_carry_sums, d_across,
    q_sb, q_st, q_sh, q_sd, do_sb, do_st, do_sh, do_sd, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, lag, N, G, empty, FWD_SEGMENT,
    R: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, F: tl.constexpr, MAP: tl.constexpr, C: tl.constexpr, SEGMENT,
    BLOCK_F: tl.constexpr, BLOCK_V: tl.constexpr, HAS_DECAY: tl.constexpr, HAS_DOCS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    segment, block, bg = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    segments = tl.num_programs(0)
    b, g = bg // G, bg % G
    row0, v0 = (block // (DV // BLOCK_V)) * BLOCK_F, (block % (DV // BLOCK_V)) * BLOCK_V
    SIGN = tl.where(row0 < D, 1.0, -1.0)
    f0 = row0 % D
    o_c, o_f, o_v = tl.arange(0, C), row0 + tl.arange(0, BLOCK_F), v0 + tl.arange(0, BLOCK_V)
    q += b * q_sb + g * R * q_sh
    do += b * do_sb + g * R * do_sh
    SUMS: tl.constexpr = MAP == SOFTMAX
    compute = states.dtype.element_ty
    if HAS_DOCS:
        query_doc += b * qdoc_sb
        key_doc += b * doc_sb
        carried = tl.load(carried_doc + b)

    HAS_FWD_CARRY: tl.constexpr = fwd_carry is not None
    state = tl.zeros((BLOCK_F, BLOCK_V), tl.float32)
    value_sum = tl.zeros((BLOCK_V,), tl.float32)
    share = 1.0
    first = empty + segment * SEGMENT
    last = tl.minimum(first + SEGMENT, N) - 1
    # The chunks backwards and, in each, the group's heads: one loop, so that loads run ahead across chunks.
    for step in range(0, (last - first + 1) * R):
        n, r = last - step // R, step % R
        if r == 0:
            o_tile = o_f[:, None] * DV + o_v[None, :]
            if HAS_DECAY:
                p_fwd, p_fwd_sums = fwd_chunks + (bg * N + n) * F * DV + o_tile, fwd_sums + (bg * N + n) * DV + o_v
                p_carry, p_carry_sums, fwd_factor = p_fwd, p_fwd_sums, 1.0
                if HAS_FWD_CARRY:
                    border = bg * ((N + FWD_SEGMENT - 1) // FWD_SEGMENT + 1) + n // FWD_SEGMENT
                    p_carry = fwd_carry + border * F * DV + o_tile
                    p_carry_sums = fwd_carry_sums + border * DV + o_v
                    fwd_factor = tl.load(fwd_factors + bg * N + n)
                b_fwd = load_state(p_fwd, p_carry, fwd_factor, HAS_FWD_CARRY, True)
                # All at once: Triton 3.6 stops at sm_100 on one axis after the other.
                across = tl.sum(b_fwd.to(tl.float32) * state)
                if SUMS and row0 == 0:
                    fwd_sum = load_state(p_fwd_sums, p_carry_sums, fwd_factor, HAS_FWD_CARRY, True)
                    across += F / D / D * tl.sum(fwd_sum * value_sum, 0)
                end = bg * N * C + n * C + C - 1
                chunk_factor = tl.exp(tl.load(cum_hi + end) + tl.load(cum_lo + end))
                if HAS_DOCS:
                    before_doc = key_document(key_doc, doc_st, carried, n * C - 1, lag, T)
                    behind_doc = key_document(key_doc, doc_st, carried, n * C + C - 1, lag, T)
                    chunk_factor = tl.where(before_doc == behind_doc, chunk_factor, 0.0)
                tl.store(d_across + (bg * N + n) * tl.num_programs(1) + block, scaled(chunk_factor, across))
                # `states` may be `fwd_chunks`: no thread may write where another has yet to read.
                tl.debug_barrier()
            tl.store(states + (bg * N + n) * F * DV + o_tile, state.to(compute))
            # Triton 3.6 stops at sm_100 on a state that a branch reads and does not write.
            state += 0.0
            if row0 == 0:
                if SUMS:
                    tl.store(value_sums + (bg * N + n) * DV + o_v, value_sum)
                if HAS_DECAY or HAS_DOCS:
                    tl.store(factors + bg * N + n, share, mask=v0 == 0)

        o_t = n * C + o_c
        m_t = o_t < T
        phi = _load_features(q + o_t[:, None].to(tl.int64) * q_st + r * q_sh, q_sd, m_t, SIGN, f0, MAP, D, BLOCK_F)
        p_do = do + o_t[:, None].to(tl.int64) * do_st + r * do_sh + o_v[None, :] * do_sd
        value = tl.load(p_do, mask=m_t[:, None], other=0.0).to(tl.float32)
        factor = 1.0
        if HAS_DECAY:
            p_cum = bg * N * C + o_t
            end = bg * N * C + n * C + C - 1
            value = value * tl.exp(tl.load(cum_hi + p_cum) + tl.load(cum_lo + p_cum))[:, None]
            factor = tl.exp(tl.load(cum_hi + end) + tl.load(cum_lo + end))
        if HAS_DOCS:
            before = key_document(key_doc, doc_st, carried, n * C - 1, lag, T)
            behind = key_document(key_doc, doc_st, carried, n * C + C - 1, lag, T)
            reads = tl.load(query_doc + o_t.to(tl.int64) * qdoc_st, mask=m_t, other=0) == before
            phi = tl.where(reads[:, None], phi, 0.0)
            value = tl.where(reads[:, None], value, 0.0)
            factor = tl.where(before == behind, factor, 0.0)
        if (HAS_DECAY or HAS_DOCS) and r == 0:
            state = scaled(factor, state)
            value_sum = scaled(factor, value_sum)
            share = share * factor
        if SUMS:
            value_sum += tl.sum(value, 0)
        state = tl.dot(tl.trans(phi.to(compute)), value.to(compute), state, input_precision=PRECISION)

    p_total = totals + (bg * segments + segment) * (F + 1) * DV
    tl.store(p_total + o_f[:, None] * DV + o_v[None, :], state)
    if row0 == 0:
        tl.store(p_total + F * DV + o_v, value_sum)
        if HAS_DECAY or HAS_DOCS:
            tl.store(total_factors + bg * segments + segment, share, mask=v0 == 0)


def _outputs(sizes: Sizes, like, compute, has_factor: bool, with_totals: bool = True, states: Tensor | None = None):
    BG, N, segments, F, DV = sizes.B * sizes.G, sizes.N, sizes.segments, sizes.F, sizes.DV
    return {
        "states": like.new_empty(BG, N, F, DV, dtype=compute) if states is None else states,
        "value_sums": like.new_empty(BG, N, DV, dtype=torch.float32),
        "factors": like.new_empty(BG, N, dtype=torch.float32) if has_factor else None,
        "totals": like.new_empty(BG, segments, F + 1, DV, dtype=torch.float32) if with_totals else None,
        "total_factors": like.new_empty(BG, segments, dtype=torch.float32) if has_factor and with_totals else None,
    }


def launch_chunk_state_fwd(
    sizes: Sizes, x: Tensors, config: Config, compute: torch.dtype, *, with_totals: bool = True
) -> Launch:
    """Without totals where no scan follows."""
    outputs = _outputs(sizes, x.k, compute, x.cum_hi is not None or x.key_doc is not None, with_totals)
    args = {
        "k": x.k,
        "v": x.v,
        **_common(sizes, x, config, compute),
        **outputs,
        **strides(x.k, "k_sb k_st k_sg k_sd"),
        **strides(x.v, "v_sb v_st v_sg v_sd"),
    }
    return Launch(chunk_state_fwd_kernel, _grid(sizes, config), args, config.options)


def launch_chunk_state_bwd(
    sizes: Sizes,
    x: Tensors,
    do: Tensor,
    config: Config,
    compute: torch.dtype,
    forward: States | None = None,
    forward_segment: int = 1,
    *,
    overwrite: bool = False,
) -> Launch:
    """With decays `forward` holds the states S_n, in segments of `forward_segment` chunks; E_n may `overwrite` them.

    Then it also writes d_across (B * G, N, blocks of a state) fp32: f_n S_n . E_n, E_n as far as the segment goes.
    """
    has_decay, grid = x.cum_hi is not None, _grid(sizes, config)
    in_place = forward.chunks if forward is not None and overwrite else None
    outputs = _outputs(sizes, x.k, compute, has_decay or x.key_doc is not None, states=in_place)
    outputs["d_across"] = torch.empty(grid[2], sizes.N, grid[1], device=do.device) if has_decay else None
    args = {
        "q": x.q,
        "do": do,
        "query_doc": x.query_doc,
        **_common(sizes, x, config, compute),
        **{
            f"fwd_{name}": getattr(forward, name, None) for name in ("chunks", "sums", "factors", "carry", "carry_sums")
        },
        "FWD_SEGMENT": forward_segment,
        **outputs,
        **strides(x.q, "q_sb q_st q_sh q_sd"),
        **strides(do, "do_sb do_st do_sh do_sd"),
        **strides(x.query_doc, "qdoc_sb qdoc_st"),
        "R": sizes.R,
    }
    return Launch(chunk_state_bwd_kernel, grid, args, config.options)


def _common(sizes: Sizes, x: Tensors, config: Config, compute: torch.dtype) -> dict:
    return {
        "cum_hi": x.cum_hi,
        "cum_lo": x.cum_lo,
        "key_doc": x.key_doc,
        "carried_doc": x.carried_doc,
        **strides(x.key_doc, "doc_sb doc_st"),
        "T": sizes.T,
        "lag": sizes.lag,
        "N": sizes.N,
        "G": sizes.G,
        "empty": sizes.empty,
        "D": sizes.D,
        "DV": sizes.DV,
        "F": sizes.F,
        "MAP": sizes.feature_map,
        "C": sizes.chunk,
        "SEGMENT": sizes.segment,
        "BLOCK_F": min(config.block_f, sizes.D),
        "BLOCK_V": min(config.block_v, sizes.DV),
        "HAS_DECAY": x.cum_hi is not None,
        "HAS_DOCS": x.key_doc is not None,
        "PRECISION": precision(compute),
    }


def _grid(sizes: Sizes, config: Config) -> tuple[int, ...]:
    blocks = (sizes.F // min(config.block_f, sizes.D)) * (sizes.DV // min(config.block_v, sizes.DV))
    return (sizes.segments, blocks, sizes.B * sizes.G)
