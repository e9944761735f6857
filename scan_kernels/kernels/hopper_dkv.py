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
    NEWER,
    add_carry,
    barrier,
    bf16_of,
    copy_rows,
    copy_state,
    feature_map_and_logs,
    feature_map_bwd,
    feature_map_bwd_of_both,
    feature_map_of_logs,
    key_document,
    load_logs,
    load_pairs,
    made_here,
    none_reads,
    pair_layout,
    rename,
    shared_layout,
    store_tile,
    stride_here,
    tile_layout,
    to_memory,
    words_of,
    zero_of,
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
def _two_tiles(C: gl.constexpr, D: gl.constexpr, APART: gl.constexpr):
    """Two tiles, and both as one, or APART: the compiler then sees that who writes one is in no one's way in the other,
    which saves barriers, and takes addresses of its own for each."""
    if APART:
        first = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], shared_layout(D)).index(0)
        both = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], shared_layout(D))
        second = both.index(0)
    else:
        both = gl.allocate_shared_memory(gl.bfloat16, [2, C, D], shared_layout(D))
        first, second = both.index(0), both.index(1)
    return first, second, both


@gluon.jit
def _places(s_q, s_do, s_phi1, s_phi2, r):
    """Queries, do and both halves of phi(q) of heads r and r + 1."""
    i, j = r % 2, (r + 1) % 2
    now = (s_q[2].index(i), s_do[2].index(i), s_phi1[2].index(i), s_phi2[2].index(i))
    then = (s_q[2].index(j), s_do[2].index(j), s_phi1[2].index(j), s_phi2[2].index(j))
    return now, then


@gluon.jit
def _map_queries(s_q, s_phi, logs, SIGN: gl.constexpr, C: gl.constexpr, D: gl.constexpr, MAP: gl.constexpr):
    """phi(SIGN q) from q, both in shared memory."""
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    query = words_of(s_q, C, D).load(pair_layout(TILE))
    s_phi.store(rename(feature_map_of_logs(query, logs, SIGN, MAP, D, TILE).to(gl.bfloat16), C, D))


@gluon.jit
def _add_state(
    s_k, s_v, s_1, s_2, d_value, dphi1, dphi2, T, D: gl.constexpr, HAS_SUMS: gl.constexpr, PAIRED: gl.constexpr
):  # fmt: skip
    """What the queries that a state was gathered from give to the chunk's keys; without sums, the first there is."""
    # The compiler would keep the tiles' addresses for the heads, beside all that these need.
    place = zero_of(T) if D > 64 else 0
    s_v = s_v.index(place)
    d_value = warpgroup_mma(s_k.index(place), s_1, d_value, use_acc=HAS_SUMS, is_async=True)
    dphi1 = warpgroup_mma(s_v, s_1.permute([1, 0]), dphi1, use_acc=HAS_SUMS, is_async=True)
    if PAIRED:
        d_value = warpgroup_mma(s_k.index(place + 1), s_2, d_value, is_async=True)
        dphi2 = warpgroup_mma(s_v, s_2.permute([1, 0]), dphi2, use_acc=HAS_SUMS, is_async=True)
    return d_value, dphi1, dphi2


@gluon.jit
def _add_head(
    s_k, s_v, now, then, s_p, s_ds, s_part, part, d_value, dphi1, dphi2, d_out, pairs,
    r, q, q_st, q_sh, do, do_st, do_sh, n, T, logs, first_log,
    HAS_NEXT: gl.constexpr, PART: gl.constexpr, R: gl.constexpr, C: gl.constexpr, D: gl.constexpr,
    MAP: gl.constexpr, MEAN: gl.constexpr, PAIRED: gl.constexpr,
):  # fmt: skip
    """What the chunk's queries of head r give to its keys; the next head's features while these are multiplied.

    now, then: queries, do and both halves of phi(q) of this and of the next head. d_out: do of the next head, on its
    way. PART: half 1 or 2 of a state, which is copied and added on the way, or 0.
    """
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    SCORES: gl.constexpr = _wide_product_layout(C)
    s_q, s_do, s_phi1, s_phi2 = now
    s_q_then, s_do_then, s_phi1_then, s_phi2_then = then
    # The last head's addresses are made anew: kept since the first, through the loop, they would not fit.
    place = 0 if HAS_NEXT or D <= 64 else zero_of(q_st)
    s_v = s_v.index(place)
    logs1, logs2 = 0.0, 0.0
    if HAS_NEXT:
        t_row = n * C + gl.arange(0, C, gl.SliceLayout(1, TILE))
        heads = gl.num_programs(1).to(gl.int64) * R
        head = first_log + gl.minimum(r + 1, R - 1)
        logs1, logs2 = load_logs(logs, head, made_here(t_row) if D > 64 else t_row, T, heads, MAP, PAIRED)
    # All of this head is in shared memory, and no product under way.
    async_copy.wait_group(0)
    if PART > 0:
        copy_rows(s_part, part, D, 0, 0, D, D, D, WARPS)
        async_copy.commit_group()
    if HAS_NEXT:
        s_do_then.store(rename(bf16_of(d_out, TILE), C, D))
        # The last rounds read nothing: their bounds are empty.
        upper = gl.where(r + 2 < R, T, 0)
        copy_rows(s_q, q + (r + 2) * q_sh, q_st, n * C, 0, upper, C, D, WARPS)
        async_copy.commit_group()
        row = stride_here(do_st) if D > 64 else do_st
        d_out = load_pairs(do + (r + 2) * do_sh, row, n * C, 0, upper, C, D, TILE, D > 64)
    fence_async_shared()
    zeros = gl.zeros([C, C], gl.float32, SCORES)
    scores = warpgroup_mma(s_k.index(place), s_phi1.permute([1, 0]), zeros, use_acc=False, is_async=True)
    if PAIRED:
        scores = warpgroup_mma(s_k.index(place + 1), s_phi2.permute([1, 0]), scores, is_async=True)
    d_scores = warpgroup_mma(s_v, s_do.permute([1, 0]), zeros, use_acc=False, is_async=True)
    if HAS_NEXT:
        _map_queries(s_q_then, s_phi1_then, logs1, 1.0, C, D, MAP)
    scores, d_scores = warpgroup_mma_wait(0, deps=[scores, d_scores])
    if MAP == _SOFTMAX:
        scores = scores + MEAN
    s_p.store(gl.where(pairs, scores, 0.0).to(gl.bfloat16))
    s_ds.store(gl.where(pairs, d_scores, 0.0).to(gl.bfloat16))
    if PART > 0:
        async_copy.wait_group(1 if HAS_NEXT else 0)
    fence_async_shared()
    d_value = warpgroup_mma(s_p, s_do, d_value, is_async=True)
    dphi1 = warpgroup_mma(s_ds, s_phi1, dphi1, is_async=True)
    if PAIRED:
        dphi2 = warpgroup_mma(s_ds, s_phi2, dphi2, is_async=True)
    if PART == 1:
        d_value = warpgroup_mma(s_k.index(place), s_part, d_value, is_async=True)
        dphi1 = warpgroup_mma(s_v, s_part.permute([1, 0]), dphi1, is_async=True)
    if PART == 2:
        d_value = warpgroup_mma(s_k.index(place + 1), s_part, d_value, is_async=True)
        dphi2 = warpgroup_mma(s_v, s_part.permute([1, 0]), dphi2, is_async=True)
    if PAIRED:
        if HAS_NEXT:
            _map_queries(s_q_then, s_phi2_then, logs2, -1.0, C, D, MAP)
        d_value, dphi1, dphi2 = warpgroup_mma_wait(0, deps=[d_value, dphi1, dphi2])
    else:
        d_value, dphi1 = warpgroup_mma_wait(0, deps=[d_value, dphi1])
    return d_value, dphi1, dphi2, d_out


@gluon.jit
def _with_other(
    x, p_other, b, g, s_b, s_g, s_t, first, M, C: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr
):  # fmt: skip
    """x and what another reader of these keys gives to them."""
    if p_other is not None:
        other = load_pairs(p_other + b * s_b + g * s_g, s_t, first, 0, M, C, D, TILE, True)
        x = x + bf16_of(other, TILE).to(gl.float32)
    return x


@gluon.jit
def hopper_dkv_kernel(
    q, k, v, do, dk, dv, dk_other, dv_other, query_doc, key_doc, carried_doc,
    states, sums, factors, carry, carry_sums, logs,
    q_sb, q_st, q_sh, k_sb, k_st, k_sg, v_sb, v_st, v_sg, do_sb, do_st, do_sh,
    dko_sb, dko_st, dko_sg, dvo_sb, dvo_st, dvo_sg, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, M, lag, N, G, SEGMENT, empty,
    R: gl.constexpr, D: gl.constexpr, F: gl.constexpr, MAP: gl.constexpr, C: gl.constexpr,
    HAS_DOCS: gl.constexpr, HAS_CARRY: gl.constexpr,
):  # fmt: skip
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    WIDE: gl.constexpr = _wide_tile_layout(D)
    ACC: gl.constexpr = _wide_product_layout(D)
    SCORES: gl.constexpr = _wide_product_layout(C)
    PAIRED: gl.constexpr = F == 2 * D
    MEAN: gl.constexpr = F / D / D
    # Heads beside which the halves of the states, the own and from behind the segment, find place.
    FILLED: gl.constexpr = 4 if HAS_CARRY else 2
    STREAMED: gl.constexpr = PAIRED and not HAS_DOCS and R % 2 == 0 and R >= FILLED
    ALONE: gl.constexpr = R - FILLED if STREAMED else R - 1
    APART: gl.constexpr = STREAMED and ALONE == 0
    bg, n = gl.program_id(1).to(gl.int64), gl.program_id(0)
    b, g = bg // G, bg % G
    unread = (n >= N) | (n < empty)
    if HAS_DOCS:
        documents, key_documents = query_doc + b * qdoc_sb, key_doc + b * doc_sb
        unread |= none_reads(documents, key_documents, qdoc_st, doc_st, gl.minimum(n, N - 1), T, lag, C)
    if unread:
        # Keys that are younger than any query's residual keys or of older documents, or rows in front of all keys. (A
        # grid without these takes registers for where it begins.)
        zero = gl.zeros([C, D], gl.float32, WIDE)
        unread_dk = _with_other(zero, dk_other, b, g, dko_sb, dko_sg, dko_st, n * C - lag, M, C, D, WIDE)
        unread_dv = _with_other(zero, dv_other, b, g, dvo_sb, dvo_sg, dvo_st, n * C - lag, M, C, D, WIDE)
        store_tile(dk + (b * M * G + g) * D, G * D, n * C - lag, unread_dk, 0, M, C, D, WIDE)
        store_tile(dv + (b * M * G + g) * D, G * D, n * C - lag, unread_dv, 0, M, C, D, WIDE)
    else:
        # The state behind the chunk, what the queries there give to its keys: of the segment, and from behind it. If
        # there are heads for it, half a state is added beside each of the last ones; else all of them before the first.
        segment = (n - empty) // SEGMENT
        border = bg * ((N - empty + SEGMENT - 1) // SEGMENT + 1) + segment + 1
        s_q = _two_tiles(C, D, APART)
        if not STREAMED:
            s_e1 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
            s_e2, s_c1, s_c2 = s_e1, s_e1, s_e1
            if PAIRED:
                s_e2 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
            if HAS_CARRY:
                s_c1 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
                s_c2 = s_c1
                if PAIRED:
                    s_c2 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
                copy_state(s_c1, s_c2, carry + border * F * D, D, PAIRED, WARPS)
            copy_state(s_e1, s_e2, states + (bg * N + n) * F * D, D, PAIRED, WARPS)
        async_copy.commit_group()
        q += b * q_sb + g * R * q_sh
        do += b * do_sb + g * R * do_sh
        copy_rows(s_q[0], q, q_st, n * C, 0, T, C, D, WARPS)
        if R > 1:
            copy_rows(s_q[1], q + q_sh, q_st, n * C, 0, T, C, D, WARPS)
        async_copy.commit_group()

        key = load_pairs(k + b * k_sb + g * k_sg, k_st, n * C - lag, 0, T - lag, C, D, TILE)
        value = load_pairs(v + b * v_sb + g * v_sg, v_st, n * C - lag, 0, T - lag, C, D, TILE)
        d_out = load_pairs(do, do_st, n * C, 0, T, C, D, TILE)
        t_row = n * C + gl.arange(0, C, gl.SliceLayout(1, TILE))
        logs1, logs2 = load_logs(logs, bg * R, t_row, T, gl.num_programs(1).to(gl.int64) * R, MAP, PAIRED)
        factor = 1.0
        if HAS_CARRY and HAS_DOCS:
            factor = gl.load(factors + bg * N + n)
        if MAP == _SOFTMAX:
            o_m = gl.arange(0, D, gl.BlockedLayout([1], [32], [WARPS], [0]))
            mean = gl.load(sums + (bg * N + n) * D + o_m)
            if HAS_CARRY:
                mean = add_carry(mean, gl.load(carry_sums + border * D + o_m), factor, HAS_CARRY, HAS_DOCS)
            s_mean = gl.allocate_shared_memory(gl.float32, [D], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            s_mean.store(MEAN * mean)
        s_k = gl.allocate_shared_memory(gl.bfloat16, [F // D, C, D], shared_layout(D))
        s_logs1 = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        phi, key_logs = feature_map_and_logs(key, 1.0, MAP, D, TILE)
        s_k.index(0).store(rename(phi.to(gl.bfloat16), C, D))
        s_logs1.store(key_logs)
        s_logs2 = s_logs1
        if PAIRED:
            s_logs2 = gl.allocate_shared_memory(gl.float32, [C], gl.SwizzledSharedLayout(1, 1, 1, [0]))
            phi, key_logs = feature_map_and_logs(key, -1.0, MAP, D, TILE)
            s_k.index(1).store(rename(phi.to(gl.bfloat16), C, D))
            s_logs2.store(key_logs)
        s_v = gl.allocate_shared_memory(gl.bfloat16, [1, C, D], shared_layout(D))
        s_v.index(0).store(rename(bf16_of(value, TILE), C, D))
        pairs, runs_on = _masks(
            query_doc, key_doc, carried_doc, b, n, T, lag, qdoc_sb, qdoc_st, doc_sb, doc_st, C, SCORES, ACC, HAS_DOCS
        )
        d_value = gl.zeros([C, D], gl.float32, ACC)
        dphi1, dphi2 = d_value, d_value
        if not STREAMED:
            async_copy.wait_group(1)
            fence_async_shared()
            if HAS_CARRY:
                d_value, dphi1, dphi2 = _add_state(s_k, s_v, s_c1, s_c2, d_value, dphi1, dphi2, T, D, False, PAIRED)
                if HAS_DOCS:
                    d_value, dphi1, dphi2 = warpgroup_mma_wait(0, deps=[d_value, dphi1, dphi2])
                    d_value = gl.where(factor == 0, 0.0, factor * d_value)
                    dphi1 = gl.where(factor == 0, 0.0, factor * dphi1)
                    dphi2 = gl.where(factor == 0, 0.0, factor * dphi2)
            d_value, dphi1, dphi2 = _add_state(s_k, s_v, s_e1, s_e2, d_value, dphi1, dphi2, T, D, HAS_CARRY, PAIRED)
            d_value, dphi1, dphi2 = warpgroup_mma_wait(0, deps=[d_value, dphi1, dphi2])
            if HAS_DOCS:
                d_value = gl.where(runs_on[:, None], d_value, 0.0)
                dphi1 = gl.where(runs_on[:, None], dphi1, 0.0)
                dphi2 = gl.where(runs_on[:, None], dphi2, 0.0)
            # A warpgroup has waited for its own products; the other's read the same states, whose place others take.
            barrier()

        # The chunk's own queries, one head after the other.
        s_do, s_phi1 = _two_tiles(C, D, APART), _two_tiles(C, D, APART)
        s_phi2 = s_phi1
        if PAIRED:
            s_phi2 = _two_tiles(C, D, APART)
        s_p = gl.allocate_shared_memory(gl.bfloat16, [C, C], shared_layout(C))
        s_ds = gl.allocate_shared_memory(gl.bfloat16, [C, C], shared_layout(C))
        s_part = s_p
        if STREAMED:
            s_part = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
        one, two = (s_q[0], s_do[0], s_phi1[0], s_phi2[0]), (s_q[1], s_do[1], s_phi1[1], s_phi2[1])
        one[1].store(rename(bf16_of(d_out, TILE), C, D))
        d_out = load_pairs(do + do_sh, do_st, n * C, 0, T if R > 1 else 0, C, D, TILE)
        async_copy.wait_group(0)
        _map_queries(one[0], one[2], logs1, 1.0, C, D, MAP)
        if PAIRED:
            _map_queries(one[0], one[3], logs2, -1.0, C, D, MAP)
        if not APART:
            for r in range(0, ALONE):
                now, then = _places(s_q, s_do, s_phi1, s_phi2, r)
                d_value, dphi1, dphi2, d_out = _add_head(
                    s_k, s_v, now, then, s_p, s_ds, s_part, states, d_value, dphi1, dphi2, d_out, pairs,
                    r, q, q_st, q_sh, do, do_st, do_sh, n, T, logs, bg * R, True, 0, R, C, D, MAP, MEAN, PAIRED,
                )  # fmt: skip
        if STREAMED:
            # Half a state beside each head, from behind the segment first. Behind the last head nothing is read, and
            # mapped for no one: a branch would cost more.
            for pair in range(0, FILLED // 2):
                part = states + made_here((bg * N + n).to(gl.int32)).to(gl.int64) * F * D
                if HAS_CARRY:
                    behind = carry + made_here(border.to(gl.int32)).to(gl.int64) * F * D
                    part = gl.where(pair == 0, behind, part)
                d_value, dphi1, dphi2, d_out = _add_head(
                    s_k, s_v, one, two, s_p, s_ds, s_part, part, d_value, dphi1, dphi2, d_out, pairs,
                    ALONE + 2 * pair, q, q_st, q_sh, do, do_st, do_sh, n, T, logs, bg * R,
                    True, 1, R, C, D, MAP, MEAN, PAIRED,
                )  # fmt: skip
                # With Triton 3.8 their addresses would wait in registers from one round to the next.
                place = (zero_of(q_st) if NEWER else 0) + (0 if APART else 1)
                anew = (s_q[1], s_do[2].index(place), s_phi1[2].index(place), s_phi2[2].index(place))
                d_value, dphi1, dphi2, d_out = _add_head(
                    s_k, s_v, anew, one, s_p, s_ds, s_part, part + D * D, d_value, dphi1, dphi2, d_out, pairs,
                    ALONE + 2 * pair + 1, q, q_st, q_sh, do, do_st, do_sh, n, T, logs, bg * R,
                    True, 2, R, C, D, MAP, MEAN, PAIRED,
                )  # fmt: skip
        else:
            now, then = _places(s_q, s_do, s_phi1, s_phi2, R - 1)
            d_value, dphi1, dphi2, d_out = _add_head(
                s_k, s_v, now, then, s_p, s_ds, s_part, states, d_value, dphi1, dphi2, d_out, pairs,
                R - 1, q, q_st, q_sh, do, do_st, do_sh, n, T, logs, bg * R, False, 0, R, C, D, MAP, MEAN, PAIRED,
            )  # fmt: skip

        async_copy.wait_group(0)

        # Rows behind the last query hold keys that none of them reads.
        this, first = made_here(gl.program_id(1)), made_here(gl.program_id(0)) * C
        b, g = (this // G).to(gl.int64), (this % G).to(gl.int64)
        p_key = k + b * stride_here(k_sb) + g * stride_here(k_sg)
        key = load_pairs(p_key, stride_here(k_st), first - lag, 0, T - lag, C, D, WIDE)
        w_t = first + gl.arange(0, C, gl.SliceLayout(1, WIDE))
        reads = (w_t < T) & (w_t >= lag)
        d_value = to_memory(d_value, C, D, WIDE)
        if MAP == _SOFTMAX:
            mean = s_mean.load(gl.SliceLayout(0, WIDE))[None, :]
            if HAS_DOCS:
                mean = gl.where(gl.convert_layout(runs_on, gl.SliceLayout(1, WIDE))[:, None], mean, 0.0)
            d_value += mean
        d_value = gl.where(reads[:, None], d_value, 0.0)
        d_value = _with_other(d_value, dv_other, b, g, dvo_sb, dvo_sg, dvo_st, first - lag, M, C, D, WIDE)
        store_tile(dv + (b * M * G + g) * D, G * D, first - lag, d_value, 0, M, C, D, WIDE)
        logs1 = s_logs1.load(gl.SliceLayout(1, WIDE))
        dphi1 = to_memory(dphi1, C, D, WIDE)
        if PAIRED:
            logs2 = s_logs2.load(gl.SliceLayout(1, WIDE))
            d_key = feature_map_bwd_of_both(key, dphi1, to_memory(dphi2, C, D, WIDE), logs1, logs2, MAP, WIDE)
        else:
            d_key = feature_map_bwd(key, dphi1, logs1, 1.0, MAP, WIDE)
        d_key = gl.where(reads[:, None], d_key, 0.0)
        d_key = _with_other(d_key, dk_other, b, g, dko_sb, dko_sg, dko_st, first - lag, M, C, D, WIDE)
        store_tile(dk + (b * M * G + g) * D, G * D, first - lag, d_key, 0, M, C, D, WIDE)


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
