"""Stage 3 over keys on Hopper: `chunk_dkv.py`; two warpgroups share the columns of every product.

dv and dk of a chunk are 192 sums a thread for one warpgroup, and 96 for two.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from scan_kernels.kernels.hopper_common import (
    _SOFTMAX,
    add_carry,
    copy_rows,
    feature_map,
    feature_map_bwd,
    feature_map_of_logs,
    key_document,
    load_logs,
    load_tile,
    rename,
    shared_layout,
    store_tile,
    tile_layout,
    to_memory,
)
from scan_kernels.kernels.hopper_query import chunk_args, rows_of
from scan_kernels.kernels.launch import Config, Launch, Sizes, States, Tensors

WARPS = gl.constexpr(8)


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


@gluon.constexpr_function
def _wide_product_layout(COLUMNS):
    """Of a result whose columns two warpgroups share."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 2], instr_shape=[16, COLUMNS // 2, 16])


@gluon.constexpr_function
def _wide_tile_layout(D):
    """`tile_layout` for such a result of 64 rows."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[0, 32 << i] for i in range(D.bit_length() - 7)] + [[8, 0]]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0], [0, D // 2]], [], [64, D])


@gluon.jit
def _map_queries(s_q, s_phi, logs, SIGN, C: gl.constexpr, D: gl.constexpr, MAP: gl.constexpr):
    """phi(SIGN q) from q, both in shared memory."""
    query = s_q.load(tile_layout(C, D, WARPS))
    s_phi.store(rename(feature_map_of_logs(query, logs, SIGN, MAP, D).to(gl.bfloat16), C, D))


@gluon.jit
def _add_head(
    s_k1, s_k2, s_v, s_q, s_do, s_q1, s_q2, s_p, s_ds, d_value, dphi1, dphi2, pairs, r, logs1, logs2,
    HAS_NEXT: gl.constexpr, C: gl.constexpr, D: gl.constexpr, MAP: gl.constexpr, MEAN: gl.constexpr,
    PAIRED: gl.constexpr,
):  # fmt: skip
    """What the chunk's queries of head r give to its keys; the next head's features while these are multiplied."""
    SCORES: gl.constexpr = _wide_product_layout(C)
    now, then = r % 2, (r + 1) % 2
    fence_async_shared()
    zeros = gl.zeros([C, C], gl.float32, SCORES)
    scores = warpgroup_mma(s_k1, s_q1.index(now).permute([1, 0]), zeros, use_acc=False, is_async=True)
    if PAIRED:
        scores = warpgroup_mma(s_k2, s_q2.index(now).permute([1, 0]), scores, is_async=True)
    d_scores = warpgroup_mma(s_v, s_do.permute([1, 0]), zeros, use_acc=False, is_async=True)
    if HAS_NEXT:
        _map_queries(s_q.index(then), s_q1.index(then), logs1, 1.0, C, D, MAP)
    scores, d_scores = warpgroup_mma_wait(0, deps=[scores, d_scores])
    if MAP == _SOFTMAX:
        scores = scores + MEAN
    s_p.store(gl.where(pairs, scores, 0.0).to(gl.bfloat16))
    s_ds.store(gl.where(pairs, d_scores, 0.0).to(gl.bfloat16))
    fence_async_shared()
    d_value = warpgroup_mma(s_p, s_do, d_value, is_async=True)
    dphi1 = warpgroup_mma(s_ds, s_q1.index(now), dphi1, is_async=True)
    if PAIRED:
        dphi2 = warpgroup_mma(s_ds, s_q2.index(now), dphi2, is_async=True)
        if HAS_NEXT:
            _map_queries(s_q.index(then), s_q2.index(then), logs2, -1.0, C, D, MAP)
        d_value, dphi1, dphi2 = warpgroup_mma_wait(0, deps=[d_value, dphi1, dphi2])
    else:
        d_value, dphi1 = warpgroup_mma_wait(0, deps=[d_value, dphi1])
    return d_value, dphi1, dphi2


@gluon.jit
def _with_other(x, p_other, stride, first, M, C: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr):
    """x and what another reader of these keys gives to them."""
    if p_other is not None:
        x = x + load_tile(p_other, stride, first, 0, M, C, D, TILE).to(gl.float32)
    return x


@gluon.jit
def hopper_dkv_kernel(
    q, k, v, do, dk, dv, dk_other, dv_other, query_doc, key_doc, carried_doc,
    states, sums, factors, carry, carry_sums, logs,
    q_sb, q_st, q_sh, k_sb, k_st, k_sg, v_sb, v_st, v_sg, do_sb, do_st, do_sh,
    dko_sb, dko_st, dko_sg, dvo_sb, dvo_st, dvo_sg, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, M, lag, N, G, SEGMENT,
    R: gl.constexpr, D: gl.constexpr, F: gl.constexpr, MAP: gl.constexpr, C: gl.constexpr,
    HAS_DOCS: gl.constexpr, HAS_CARRY: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    WIDE: gl.constexpr = _wide_tile_layout(D)
    ACC: gl.constexpr = _wide_product_layout(D)
    SCORES: gl.constexpr = _wide_product_layout(C)
    PAIRED: gl.constexpr = F == 2 * D
    MEAN: gl.constexpr = F / D / D
    bg, n = gl.program_id(1).to(gl.int64), gl.program_id(0)
    b, g = bg // G, bg % G
    dk += (b * M * G + g) * D
    dv += (b * M * G + g) * D
    if dk_other is not None:
        dk_other += b * dko_sb + g * dko_sg
    if dv_other is not None:
        dv_other += b * dvo_sb + g * dvo_sg
    if n >= N:
        # Keys that are younger than any query's residual keys.
        zero = gl.zeros([C, D], gl.float32, WIDE)
        unread_dk = _with_other(zero, dk_other, dko_st, n * C - lag, M, C, D, WIDE)
        unread_dv = _with_other(zero, dv_other, dvo_st, n * C - lag, M, C, D, WIDE)
        store_tile(dk, G * D, n * C - lag, unread_dk, 0, M, C, D, WIDE)
        store_tile(dv, G * D, n * C - lag, unread_dv, 0, M, C, D, WIDE)
    else:
        s_q = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], shared_layout(D))
        s_do = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], shared_layout(D))
        s_v = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
        q += b * q_sb + g * R * q_sh
        do += b * do_sb + g * R * do_sh
        copy_rows(s_v, v + b * v_sb + g * v_sg, v_st, n * C - lag, 0, T - lag, C, D, WARPS)
        copy_rows(s_q.index(0), q, q_st, n * C, 0, T, C, D, WARPS)
        copy_rows(s_do.index(0), do, do_st, n * C, 0, T, C, D, WARPS)
        if R > 1:
            copy_rows(s_q.index(1), q + q_sh, q_st, n * C, 0, T, C, D, WARPS)
        async_copy.commit_group()

        # phi(k), and the state behind the chunk: what the queries there give to its keys. Loads come first.
        k += b * k_sb + g * k_sg
        key = load_tile(k, k_st, n * C - lag, 0, T - lag, C, D, TILE)
        segment = n // SEGMENT
        segments = (N + SEGMENT - 1) // SEGMENT
        o_m = gl.arange(0, D, gl.BlockedLayout([1], [32], [WARPS], [0]))
        p_sums = sums + (bg * N + n) * D + o_m
        STATE: gl.constexpr = tile_layout(D, D, WARPS)
        o_row, o_column = gl.arange(0, D, gl.SliceLayout(1, STATE)), gl.arange(0, D, gl.SliceLayout(0, STATE))
        p_state = states + (bg * N + n) * F * D + ((o_row * D)[:, None] + o_column[None, :])
        p_carry, p_carry_sums, factor = p_state, p_sums, 1.0
        if HAS_CARRY:
            border = bg * (segments + 1) + segment + 1
            p_carry = carry + border * F * D + ((o_row * D)[:, None] + o_column[None, :])
            p_carry_sums = carry_sums + border * D + o_m
            if HAS_DOCS:
                factor = gl.load(factors + bg * N + n)
        # All of them before anything waits for one.
        state1, before1 = gl.load(p_state), gl.load(p_carry)
        state2, before2 = state1, before1
        if PAIRED:
            state2, before2 = gl.load(p_state + D * D), gl.load(p_carry + D * D)
        t_row = n * C + gl.arange(0, C, gl.SliceLayout(1, TILE))
        heads = gl.num_programs(1).to(gl.int64) * R
        logs1, logs2 = load_logs(logs, bg * R, t_row, T, heads, MAP, PAIRED)
        if MAP == _SOFTMAX:
            mean = MEAN * add_carry(gl.load(p_sums), gl.load(p_carry_sums), factor, HAS_CARRY, HAS_DOCS)
            s_mean = gl.allocate_shared_memory(gl.float32, [D], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            s_mean.store(mean)
        s_k1 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
        s_k1.store(rename(feature_map(key, 1.0, MAP, D).to(gl.bfloat16), C, D))
        s_e1 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
        s_e1.store(rename(add_carry(state1, before1, factor, HAS_CARRY, HAS_DOCS), D, D))
        s_e2, s_k2 = s_e1, s_k1
        if PAIRED:
            s_k2 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
            s_k2.store(rename(feature_map(key, -1.0, MAP, D).to(gl.bfloat16), C, D))
            s_e2 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
            s_e2.store(rename(add_carry(state2, before2, factor, HAS_CARRY, HAS_DOCS), D, D))
        async_copy.wait_group(0)
        fence_async_shared()
        zeros = gl.zeros([C, D], gl.float32, ACC)
        d_value = warpgroup_mma(s_k1, s_e1, zeros, use_acc=False, is_async=True)
        dphi1 = warpgroup_mma(s_v, s_e1.permute([1, 0]), zeros, use_acc=False, is_async=True)
        dphi2 = dphi1
        if PAIRED:
            d_value = warpgroup_mma(s_k2, s_e2, d_value, is_async=True)
            dphi2 = warpgroup_mma(s_v, s_e2.permute([1, 0]), zeros, use_acc=False, is_async=True)
        pairs, runs_on = _masks(
            query_doc, key_doc, carried_doc, b, n, T, lag, qdoc_sb, qdoc_st, doc_sb, doc_st, C, SCORES, ACC, HAS_DOCS
        )
        d_value, dphi1, dphi2 = warpgroup_mma_wait(0, deps=[d_value, dphi1, dphi2])
        if HAS_DOCS:
            d_value = gl.where(runs_on[:, None], d_value, 0.0)
            dphi1 = gl.where(runs_on[:, None], dphi1, 0.0)
            dphi2 = gl.where(runs_on[:, None], dphi2, 0.0)

        # The chunk's own queries, one head after the other; the next head's features while this one's are multiplied.
        s_q1 = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], shared_layout(D))
        s_q2 = s_q1
        if PAIRED:
            s_q2 = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], shared_layout(D))
        s_p = gl.allocate_shared_memory(gl.bfloat16, [C, C], shared_layout(C))
        s_ds = gl.allocate_shared_memory(gl.bfloat16, [C, C], shared_layout(C))
        _map_queries(s_q.index(0), s_q1.index(0), logs1, 1.0, C, D, MAP)
        if PAIRED:
            _map_queries(s_q.index(0), s_q2.index(0), logs2, -1.0, C, D, MAP)
        for r in range(0, R - 1):
            logs1, logs2 = load_logs(logs, bg * R + r + 1, t_row, T, heads, MAP, PAIRED)
            async_copy.wait_group(0)
            copy_rows(s_do.index((r + 1) % 2), do + (r + 1) * do_sh, do_st, n * C, 0, T, C, D, WARPS)
            # The last round copies nothing: its bounds are empty.
            copy_rows(s_q.index(r % 2), q + (r + 2) * q_sh, q_st, n * C, 0, gl.where(r + 2 < R, T, 0), C, D, WARPS)
            async_copy.commit_group()
            d_value, dphi1, dphi2 = _add_head(
                s_k1, s_k2, s_v, s_q, s_do.index(r % 2), s_q1, s_q2, s_p, s_ds, d_value, dphi1, dphi2, pairs, r,
                logs1, logs2, True, C, D, MAP, MEAN, PAIRED,
            )  # fmt: skip
        async_copy.wait_group(0)
        d_value, dphi1, dphi2 = _add_head(
            s_k1, s_k2, s_v, s_q, s_do.index((R - 1) % 2), s_q1, s_q2, s_p, s_ds, d_value, dphi1, dphi2, pairs, R - 1,
            logs1, logs2, False, C, D, MAP, MEAN, PAIRED,
        )  # fmt: skip

        # Rows behind the last query hold keys that none of them reads.
        key = load_tile(k, k_st, n * C - lag, 0, T - lag, C, D, WIDE)
        if MAP == _SOFTMAX:
            mean = s_mean.load(gl.SliceLayout(0, ACC))
            d_value += gl.where(runs_on[:, None], mean[None, :], 0.0)
        a_t = n * C + gl.arange(0, C, gl.SliceLayout(1, ACC))
        d_value = gl.where(((a_t < T) & (a_t >= lag))[:, None], d_value, 0.0)
        d_value = _with_other(d_value, dv_other, dvo_st, n * C - lag, M, C, D, ACC)
        store_tile(dv, G * D, n * C - lag, d_value, 0, M, C, D, ACC)
        d_key = feature_map_bwd(key, to_memory(dphi1, C, D, WIDE), 1.0, MAP)
        if PAIRED:
            d_key += feature_map_bwd(key, to_memory(dphi2, C, D, WIDE), -1.0, MAP)
        w_t = n * C + gl.arange(0, C, gl.SliceLayout(1, WIDE))
        d_key = gl.where(((w_t < T) & (w_t >= lag))[:, None], d_key, 0.0)
        d_key = _with_other(d_key, dk_other, dko_st, n * C - lag, M, C, D, WIDE)
        store_tile(dk, G * D, n * C - lag, d_key, 0, M, C, D, WIDE)


def launch_hopper_dkv(
    sizes: Sizes,
    x: Tensors,
    states: States,
    do: Tensor,
    logs: Tensor | None,
    dk: Tensor,
    dv: Tensor,
    config: Config,
    dk_other: Tensor | None = None,
    dv_other: Tensor | None = None,
) -> Launch:
    """Writes dk, dv of all M keys, with `dk_other`, `dv_other` added before they are rounded."""
    args = {
        "do": do,
        "dk": dk,
        "dv": dv,
        "dk_other": dk_other,
        "dv_other": dv_other,
        "states": states.chunks,
        "sums": states.sums,
        "factors": states.factors,
        "carry": states.carry,
        "carry_sums": states.carry_sums,
        **chunk_args(sizes, x),
        **rows_of(do, "do_sb do_st do_sh"),
        **rows_of(dk_other, "dko_sb dko_st dko_sg"),
        **rows_of(dv_other, "dvo_sb dvo_st dvo_sg"),
        "M": sizes.M,
        "SEGMENT": sizes.segment,
        "HAS_CARRY": states.carry is not None,
        "logs": logs,
    }
    chunks_with_keys = -(-(sizes.M + sizes.lag) // sizes.chunk)
    return Launch(hopper_dkv_kernel, (chunks_with_keys, sizes.B * sizes.G), args, config.options)
