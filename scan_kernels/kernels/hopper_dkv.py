"""Stage 3 over keys on Hopper: `chunk_dkv.py`, with dv and dk by two programs side by side.

Both read the same queries and gradients, and the second finds them in the L2 cache; one program for both would need 192
registers a thread for its sums alone.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from scan_kernels.kernels.hopper_common import (
    _SOFTMAX,
    copy_rows,
    feature_map,
    feature_map_bwd,
    key_document,
    load_border,
    load_half_state,
    load_tile,
    operand_layout,
    product_layout,
    rename,
    shared_layout,
    store_tile,
    tile_layout,
    to_memory,
)
from scan_kernels.kernels.hopper_query import chunk_args, rows_of
from scan_kernels.kernels.launch import Config, Launch, Sizes, States, Tensors

WARPS = gl.constexpr(4)


@gluon.jit
def _masks(
    query_doc, key_doc, carried_doc, b, n, T, lag, qdoc_sb, qdoc_st, doc_sb, doc_st,
    C: gl.constexpr, SCORES: gl.constexpr, ACC: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    """Which query (column) reads which key (row) of the chunk, and which keys are read behind it."""
    j_row = gl.arange(0, C, gl.SliceLayout(1, SCORES))
    i_row = gl.arange(0, C, gl.SliceLayout(0, SCORES))
    o_row = gl.arange(0, C, gl.SliceLayout(1, ACC))
    pairs = j_row[:, None] <= i_row[None, :]
    runs_on = o_row >= 0
    if HAS_DOCS:
        carried = gl.load(carried_doc + b)
        key_doc += b * doc_sb
        query_doc += b * qdoc_sb
        behind = key_document(key_doc, doc_st, carried, n * C + C - 1, lag, T)
        doc_i = gl.load(query_doc + gl.minimum(n * C + i_row, T - 1).to(gl.int64) * qdoc_st)
        doc_j = key_document(key_doc, doc_st, carried, n * C + j_row, lag, T)
        pairs = pairs & (doc_i[None, :] == doc_j[:, None])
        runs_on = key_document(key_doc, doc_st, carried, n * C + o_row, lag, T) == behind
    return pairs, runs_on


@gluon.jit
def _map_queries(
    s_q, s_q1, s_q2, C: gl.constexpr, D: gl.constexpr, MAP: gl.constexpr, PAIRED: gl.constexpr
):  # fmt: skip
    """phi(q) from q, all in shared memory, 32 rows at a time: more would not fit into registers beside the sums."""
    TILE: gl.constexpr = tile_layout(32, D, WARPS)
    for i in gl.static_range(C // 32):
        query = s_q.slice(32 * i, 32, dim=0).load(TILE)
        s_q1.slice(32 * i, 32, dim=0).store(rename(feature_map(query, 1.0, MAP, D).to(gl.bfloat16), 32, D))
        if PAIRED:
            s_q2.slice(32 * i, 32, dim=0).store(rename(feature_map(query, -1.0, MAP, D).to(gl.bfloat16), 32, D))


@gluon.jit
def hopper_dkv_kernel(
    q, k, v, do, dk, dv, query_doc, key_doc, carried_doc, states, sums, factors, carry, carry_sums,
    q_sb, q_st, q_sh, k_sb, k_st, k_sg, v_sb, v_st, v_sg, do_sb, do_st, do_sh, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, M, lag, N, G, SEGMENT,
    R: gl.constexpr, D: gl.constexpr, F: gl.constexpr, MAP: gl.constexpr, C: gl.constexpr,
    HAS_DOCS: gl.constexpr, HAS_CARRY: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    ACC: gl.constexpr = product_layout(D, WARPS)
    SCORES: gl.constexpr = product_layout(C, WARPS)
    LEFT: gl.constexpr = operand_layout(D, WARPS)
    PAIRED: gl.constexpr = F == 2 * D
    MEAN: gl.constexpr = F / D / D
    bg, n, of_keys = gl.program_id(1).to(gl.int64), gl.program_id(0) // 2, gl.program_id(0) % 2
    b, g = bg // G, bg % G
    o_c = gl.arange(0, C, gl.SliceLayout(1, TILE))
    o_t = n * C + o_c
    key_row = (o_t - lag).to(gl.int64)
    m_key = (o_t >= lag) & (o_t < M + lag)
    dk += (b * M * G + g) * D
    dv += (b * M * G + g) * D
    if not HAS_CARRY:
        carry, carry_sums = states, sums
    if n >= N:
        # Keys that are younger than any query's residual keys.
        if of_keys == 1:
            store_tile(dk, G * D, key_row, gl.zeros([C, D], gl.float32, TILE), m_key, D, TILE)
        else:
            store_tile(dv, G * D, key_row, gl.zeros([C, D], gl.float32, TILE), m_key, D, TILE)
    else:
        s_q = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
        s_do = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], shared_layout(D))
        q += b * q_sb + g * R * q_sh
        do += b * do_sb + g * R * do_sh
        copy_rows(s_q, q, q_st, n * C, 0, T, C, D, WARPS)
        copy_rows(s_do.index(0), do, do_st, n * C, 0, T, C, D, WARPS)
        m_j = (o_t < T) & (o_t >= lag)
        pairs, runs_on = _masks(
            query_doc, key_doc, carried_doc, b, n, T, lag, qdoc_sb, qdoc_st, doc_sb, doc_st, C, SCORES, ACC, HAS_DOCS
        )
        segment = n // SEGMENT
        segments = (N + SEGMENT - 1) // SEGMENT
        states += (bg * N + n) * F * D
        p_sums = sums + (bg * N + n) * D
        p_carry_sums = p_sums
        factor = 1.0
        if HAS_CARRY:
            carry += (bg * (segments + 1) + segment + 1) * F * D
            p_carry_sums = carry_sums + (bg * (segments + 1) + segment + 1) * D
            if HAS_DOCS:
                factor = gl.load(factors + bg * N + n)
        if of_keys == 0:
            # Values: first what the queries behind the chunk give, through the state; then the chunk's own.
            async_copy.commit_group()
            s_e = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
            key = load_tile(k + b * k_sb + g * k_sg, k_st, 1, key_row, m_j, D, TILE)
            load_half_state(s_e, states, carry, factor, 0, D, WARPS, HAS_CARRY, HAS_DOCS)
            fence_async_shared()
            b_k1 = gl.convert_layout(rename(feature_map(key, 1.0, MAP, D).to(gl.bfloat16), C, D), LEFT)
            d_value = warpgroup_mma(b_k1, s_e, gl.zeros([C, D], gl.float32, ACC), use_acc=False)
            if PAIRED:
                load_half_state(s_e, states, carry, factor, 1, D, WARPS, HAS_CARRY, HAS_DOCS)
                fence_async_shared()
                b_k2 = gl.convert_layout(rename(feature_map(key, -1.0, MAP, D).to(gl.bfloat16), C, D), LEFT)
                d_value = warpgroup_mma(b_k2, s_e, d_value)
            if HAS_DOCS:
                d_value = gl.where(runs_on[:, None], d_value, 0.0)
            s_q1 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
            s_q2 = s_q1
            if PAIRED:
                s_q2 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
            for r in range(0, R):
                async_copy.wait_group(0)
                _map_queries(s_q, s_q1, s_q2, C, D, MAP, PAIRED)
                fence_async_shared()
                gl.thread_barrier()
                if r + 1 < R:
                    copy_rows(s_q, q + (r + 1) * q_sh, q_st, n * C, 0, T, C, D, WARPS)
                    copy_rows(s_do.index((r + 1) % 2), do + (r + 1) * do_sh, do_st, n * C, 0, T, C, D, WARPS)
                    async_copy.commit_group()
                scores = warpgroup_mma(
                    b_k1, s_q1.permute([1, 0]), gl.zeros([C, C], gl.float32, SCORES), use_acc=False, is_async=True
                )
                if PAIRED:
                    scores = warpgroup_mma(b_k2, s_q2.permute([1, 0]), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                if MAP == _SOFTMAX:
                    scores = scores + MEAN
                b_scores = gl.convert_layout(gl.where(pairs, scores, 0.0).to(gl.bfloat16), LEFT)
                d_value = warpgroup_mma(b_scores, s_do.index(r % 2), d_value)
            if MAP == _SOFTMAX:
                o_v = gl.arange(0, D, gl.SliceLayout(0, ACC))
                mean = MEAN * load_border(p_sums + o_v, p_carry_sums + o_v, factor, HAS_CARRY, HAS_DOCS)
                d_value += gl.where(runs_on[:, None], mean[None, :], 0.0)
            # Rows behind the last query hold keys that none of them reads.
            o_row = n * C + gl.arange(0, C, gl.SliceLayout(1, ACC))
            d_value = gl.where(((o_row < T) & (o_row >= lag))[:, None], d_value, 0.0)
            m_row = (o_row >= lag) & (o_row < M + lag)
            store_tile(dv, G * D, (o_row - lag).to(gl.int64), d_value, m_row, D, ACC)
        else:
            s_v = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
            copy_rows(s_v, v + b * v_sb + g * v_sg, v_st, n * C - lag, 0, T - lag, C, D, WARPS)
            async_copy.commit_group()
            s_e = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
            load_half_state(s_e, states, carry, factor, 0, D, WARPS, HAS_CARRY, HAS_DOCS)
            async_copy.wait_group(0)
            fence_async_shared()
            dphi = warpgroup_mma(s_v, s_e.permute([1, 0]), gl.zeros([C, D], gl.float32, ACC), use_acc=False)
            if HAS_DOCS:
                dphi = gl.where(runs_on[:, None], dphi, 0.0)
            if PAIRED:
                load_half_state(s_e, states, carry, factor, 1, D, WARPS, HAS_CARRY, HAS_DOCS)
                fence_async_shared()
                dphi2 = warpgroup_mma(s_v, s_e.permute([1, 0]), gl.zeros([C, D], gl.float32, ACC), use_acc=False)
                if HAS_DOCS:
                    dphi2 = gl.where(runs_on[:, None], dphi2, 0.0)
            s_q1 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
            s_q2 = s_q1
            if PAIRED:
                s_q2 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
            for r in range(0, R):
                async_copy.wait_group(0)
                _map_queries(s_q, s_q1, s_q2, C, D, MAP, PAIRED)
                fence_async_shared()
                gl.thread_barrier()
                if r + 1 < R:
                    copy_rows(s_q, q + (r + 1) * q_sh, q_st, n * C, 0, T, C, D, WARPS)
                    copy_rows(s_do.index((r + 1) % 2), do + (r + 1) * do_sh, do_st, n * C, 0, T, C, D, WARPS)
                    async_copy.commit_group()
                d_scores = warpgroup_mma(
                    s_v, s_do.index(r % 2).permute([1, 0]), gl.zeros([C, C], gl.float32, SCORES), use_acc=False
                )
                b_ds = gl.convert_layout(gl.where(pairs, d_scores, 0.0).to(gl.bfloat16), LEFT)
                dphi = warpgroup_mma(b_ds, s_q1, dphi, is_async=True)
                if PAIRED:
                    dphi2 = warpgroup_mma(b_ds, s_q2, dphi2, is_async=True)
                    dphi2 = warpgroup_mma_wait(0, deps=[dphi2])
                dphi = warpgroup_mma_wait(0, deps=[dphi])
            key = load_tile(k + b * k_sb + g * k_sg, k_st, 1, key_row, m_j, D, TILE)
            d_key = feature_map_bwd(key, to_memory(dphi, C, D, TILE), 1.0, MAP)
            if PAIRED:
                d_key += feature_map_bwd(key, to_memory(dphi2, C, D, TILE), -1.0, MAP)
            store_tile(dk, G * D, key_row, gl.where(m_j[:, None], d_key, 0.0), m_key, D, TILE)


def launch_hopper_dkv(
    sizes: Sizes, x: Tensors, states: States, do: Tensor, dk: Tensor, dv: Tensor, config: Config
) -> Launch:
    """Writes dk, dv of all M keys."""
    args = {
        "do": do,
        "dk": dk,
        "dv": dv,
        "states": states.chunks,
        "sums": states.sums,
        "factors": states.factors,
        "carry": states.carry,
        "carry_sums": states.carry_sums,
        **chunk_args(sizes, x),
        **rows_of(do, "do_sb do_st do_sh"),
        "M": sizes.M,
        "SEGMENT": sizes.segment,
        "HAS_CARRY": states.carry is not None,
    }
    chunks_with_keys = -(-(sizes.M + sizes.lag) // sizes.chunk)
    return Launch(hopper_dkv_kernel, (2 * chunks_with_keys, sizes.B * sizes.G), args, config.options)
