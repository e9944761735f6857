"""Stage 3 over queries on Hopper: `chunk_output.py` and `chunk_dq.py` with one warpgroup a program, two programs an SM.

S_n, phi(k) and v lie in shared memory (112 KB at D = 128); queries go from global memory to registers, through the
feature map into the tensor cores, and their results from there to global memory. Neither decay nor a start state.
"""

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from scan_kernels.kernels.hopper_common import (
    _SOFTMAX,
    bf16_of,
    copy_state,
    feature_map,
    feature_map_bwd,
    halves_of,
    is_bad,
    join_halves,
    key_document,
    load_logs,
    load_pairs,
    loads_first,
    made_here,
    none_reads,
    operand_layout,
    pairs_of,
    product_layout,
    rename,
    shared_layout,
    store_tile,
    stride_here,
    tile_layout,
    to_memory,
    uniform,
)
from scan_kernels.kernels.launch import Config, Launch, Sizes, States, Tensors, strides

WARPS = gl.constexpr(4)


@gluon.jit
def _share_features(s_1, s_2, x, C: gl.constexpr, D: gl.constexpr, MAP: gl.constexpr, PAIRED: gl.constexpr):
    """phi(x) in shared memory, a tile for each half."""
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    s_1.store(rename(feature_map(x, 1.0, MAP, D, TILE).to(gl.bfloat16), C, D))
    if PAIRED:
        s_2.store(rename(feature_map(x, -1.0, MAP, D, TILE).to(gl.bfloat16), C, D))


@gluon.jit
def _masks(
    query_doc, key_doc, carried_doc, b, n, T, lag, qdoc_sb, qdoc_st, doc_sb, doc_st,
    C: gl.constexpr, SCORES: gl.constexpr, ACC: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    """Which query (row) reads which key (column) of the chunk, and which queries read the state before it."""
    i_row = gl.arange(0, C, gl.SliceLayout(1, SCORES))
    j_row = gl.arange(0, C, gl.SliceLayout(0, SCORES))
    o_row = gl.arange(0, C, gl.SliceLayout(1, ACC))
    pairs = i_row[:, None] >= j_row[None, :]
    reads = o_row >= 0
    if HAS_DOCS:
        carried = gl.load(carried_doc + b)
        key_doc += b * doc_sb
        query_doc += b * qdoc_sb
        before = key_document(key_doc, doc_st, carried, n * C - 1, lag, T)
        doc_i = gl.load(query_doc + gl.minimum(n * C + i_row, T - 1).to(gl.int64) * qdoc_st)
        doc_j = key_document(key_doc, doc_st, carried, n * C + j_row, lag, T)
        pairs = pairs & (doc_i[:, None] == doc_j[None, :])
        reads = gl.load(query_doc + gl.minimum(n * C + o_row, T - 1).to(gl.int64) * qdoc_st) == before
    return pairs, reads


@gluon.jit
def _pack(pairs, reads, C: gl.constexpr, SCORES: gl.constexpr):
    """Both masks as one number a row: the first key of the chunk that a query reads, -1 where it reads the state, too.

    Ids never fall, so that a query's own document are the last keys up to it. As they are, a loop over heads would hold
    a bit for every pair, or both rows of ids.
    """
    i_row = gl.arange(0, C, gl.SliceLayout(1, SCORES))
    j_row = gl.arange(0, C, gl.SliceLayout(0, SCORES))
    others = (i_row[:, None] >= j_row[None, :]) & (pairs == 0)
    first = gl.max(gl.where(others, j_row[None, :] + 1, 0), 1)
    reads = gl.convert_layout(reads, gl.SliceLayout(1, SCORES))
    return gl.where((first == 0) & reads, -1, first)


@gluon.jit
def _unpack(first, C: gl.constexpr, SCORES: gl.constexpr, ACC: gl.constexpr):
    """The masks that `_pack` packed."""
    i_row = gl.arange(0, C, gl.SliceLayout(1, SCORES))
    j_row = gl.arange(0, C, gl.SliceLayout(0, SCORES))
    first = made_here(first)
    pairs = (i_row[:, None] >= j_row[None, :]) & (j_row[None, :] >= first[:, None])
    return pairs, gl.convert_layout(first, gl.SliceLayout(1, ACC)) < 0


@gluon.jit
def _bit_of_pairs(PAIRS: gl.constexpr, C: gl.constexpr):
    """The bit of a thread's column in a word for its row; (C, C) scores are (C, C // 8, 4, 2), four threads a row."""
    group = gl.arange(0, C // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, PAIRS))))
    side = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, PAIRS))))
    return 1 << (2 * group[None, :, None, None] + side[None, None, None, :])


@gluon.jit
def _words_of(pairs, C: gl.constexpr):
    """A mask of scores as a word for what a thread has of each row."""
    pairs = gl.reshape(pairs.to(gl.int32), [C, C // 8, 4, 2])
    PAIRS: gl.constexpr = pairs.type.layout
    return gl.sum(gl.sum(pairs * _bit_of_pairs(PAIRS, C), 3), 1)


@gluon.jit
def _pairs_of(words, C: gl.constexpr, SCORES: gl.constexpr):
    """The mask of `_words_of`."""
    PAIRS: gl.constexpr = words.type.layout.parent.parent
    words = gl.expand_dims(gl.expand_dims(made_here(words), 1), 3)
    words, bit = gl.broadcast(words, _bit_of_pairs(PAIRS, C))
    # By hand: the compiler makes shifts of it, one more instruction for each pair.
    found = gl.inline_asm_elementwise("and.b32 $0, $1, $2;", "=r,r,r", [words, bit], gl.int32, is_pure=True, pack=1)
    return gl.convert_layout(gl.reshape(found != 0, [C, C]), SCORES)


@gluon.jit
def _write_unread(
    x, other, other_sb, other_st, other_sh, n, b, T, G, R: gl.constexpr, D: gl.constexpr, C: gl.constexpr
):  # fmt: skip
    """The rows of a chunk whose queries read no key: zeros, or what another reader of them gives."""
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    g = gl.program_id(1).to(gl.int64) % G
    for r in range(0, R):
        row = gl.zeros([C, D], gl.float32, TILE)
        if other is not None:
            row = load_pairs(other + b * other_sb + (g * R + r) * other_sh, other_st, n * C, 0, T, C, D, TILE)
            row = bf16_of(row, TILE).to(gl.float32)
        store_tile(x + ((b * T * G + g) * R + r) * D, G * R * D, n * C, row, 0, T, C, D, TILE)


@gluon.jit
def hopper_output_kernel(
    q, k, v, o, query_doc, key_doc, carried_doc, states, sums,
    q_sb, q_st, q_sh, k_sb, k_st, k_sg, v_sb, v_st, v_sg, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, lag, N, G, empty,
    R: gl.constexpr, D: gl.constexpr, F: gl.constexpr, MAP: gl.constexpr, C: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    if HAS_DOCS:
        n, b = gl.program_id(0) + empty, gl.program_id(1).to(gl.int64) // G
        unread = none_reads(query_doc + b * qdoc_sb, key_doc + b * doc_sb, qdoc_st, doc_st, n, T, lag, C)
        if uniform(unread.to(gl.int32)) != 0:
            _write_unread(o, None, 0, 0, 0, n, b, T, G, R, D, C)
            return
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    ACC: gl.constexpr = product_layout(D, WARPS)
    SCORES: gl.constexpr = product_layout(C, WARPS)
    LEFT: gl.constexpr = operand_layout(D, WARPS)
    LEFT_SCORES: gl.constexpr = operand_layout(C, WARPS)
    PAIRED: gl.constexpr = F == 2 * D
    MEAN: gl.constexpr = F / D / D
    HERE: gl.constexpr = D > 64 and HAS_DOCS  # addresses are made where they are used: registers are short
    bg, n = gl.program_id(1).to(gl.int64), gl.program_id(0) + empty
    b, g = bg // G, bg % G

    # The chunk's state, keys and values in shared memory.
    s_s1 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
    s_k1 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
    s_v = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
    s_s2, s_k2 = s_s1, s_k1
    if PAIRED:
        s_s2 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
        s_k2 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
    copy_state(s_s1, s_s2, states + (bg * N + n) * F * D, D, PAIRED, WARPS)
    async_copy.commit_group()

    # The chunk's keys. A masked score is 0, but 0 * NaN is NaN: keys and values that are not finite leave the products,
    # and set those who may read them to NaN below.
    key = load_pairs(k + b * k_sb + g * k_sg, k_st, n * C - lag, 0, T - lag, C, D, TILE)
    value = load_pairs(v + b * v_sb + g * v_sg, v_st, n * C - lag, 0, T - lag, C, D, TILE)
    q += b * q_sb + g * R * q_sh
    query = load_pairs(q, q_st, n * C, 0, T, C, D, TILE)
    if MAP == _SOFTMAX:
        o_m = gl.arange(0, D, gl.BlockedLayout([1], [32], [WARPS], [0]))
        mean = MEAN * gl.load(sums + (bg * N + n) * D + o_m)
        s_mean = gl.allocate_shared_memory(gl.float32, [D], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        s_mean.store(mean)
    bad = gl.maximum(is_bad(key), is_bad(value))
    s_v.store(rename(bf16_of(gl.where(bad[:, None] != 0, 0, value), TILE), C, D))
    any_bad = uniform(gl.max(bad, 0))
    _share_features(s_k1, s_k2, gl.where(bad[:, None] != 0, 0, key), C, D, MAP, PAIRED)
    pairs, reads = _masks(
        query_doc, key_doc, carried_doc, b, n, T, lag, qdoc_sb, qdoc_st, doc_sb, doc_st, C, SCORES, ACC, HAS_DOCS
    )
    packed = _words_of(pairs, C) if HAS_DOCS else pairs
    o += (b * T * G * R + g * R) * D
    async_copy.wait_group(0)
    fence_async_shared()
    for r in range(0, R):
        # The next head's queries are on their way from here on.
        row, upper = stride_here(q_st) if HERE else q_st, gl.where(r + 1 < R, T, 0)
        later = load_pairs(q + (r + 1) * q_sh, row, n * C, 0, upper, C, D, TILE)
        loads_first()
        b_q1 = gl.convert_layout(rename(feature_map(query, 1.0, MAP, D, TILE).to(gl.bfloat16), C, D), LEFT)
        scores = warpgroup_mma(
            b_q1, s_k1.permute([1, 0]), gl.zeros([C, C], gl.float32, SCORES), use_acc=False, is_async=True
        )
        if PAIRED:
            b_q2 = gl.convert_layout(rename(feature_map(query, -1.0, MAP, D, TILE).to(gl.bfloat16), C, D), LEFT)
        out = warpgroup_mma(b_q1, s_s1, gl.zeros([C, D], gl.float32, ACC), use_acc=False, is_async=True)
        if PAIRED:
            scores = warpgroup_mma(b_q2, s_k2.permute([1, 0]), scores, is_async=True)
            out = warpgroup_mma(b_q2, s_s2, out, is_async=True)
        query = later
        scores = warpgroup_mma_wait(1, deps=[scores])
        if MAP == _SOFTMAX:
            scores = scores + MEAN
        pairs = _pairs_of(packed, C, SCORES) if HAS_DOCS else packed
        b_scores = gl.convert_layout(gl.where(pairs, scores, 0.0).to(gl.bfloat16), LEFT_SCORES)
        if HAS_DOCS:
            out = warpgroup_mma_wait(0, deps=[out])
            out = gl.where(reads[:, None], out, 0.0)
        out = warpgroup_mma(b_scores, s_v, out, is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])
        out = to_memory(out, C, D, TILE)
        if MAP == _SOFTMAX:
            row_mean = s_mean.load(gl.SliceLayout(0, TILE))
            if HAS_DOCS:
                reads_row = gl.convert_layout(reads, gl.SliceLayout(1, TILE))
                out += gl.where(reads_row[:, None], row_mean[None, :], 0.0)
            else:
                out += row_mean[None, :]
        if any_bad != 0:
            bad_j = gl.convert_layout(bad, gl.SliceLayout(0, SCORES))
            reads_bad = gl.max((pairs & (bad_j != 0)[None, :]).to(gl.int32), 1)
            reads_bad = gl.convert_layout(reads_bad, gl.SliceLayout(1, TILE))
            out = gl.where((reads_bad != 0)[:, None], float("nan"), out)
        store_tile(o + r * D, G * R * D, made_here(n * C) if HERE else n * C, out, 0, T, C, D, TILE, HERE)


@gluon.jit
def _dq_of_chunk(
    q, k, v, do, dq, dq_other, query_doc, key_doc, carried_doc, states, logs,
    q_sb, q_st, q_sh, k_sb, k_st, k_sg, v_sb, v_st, v_sg, do_sb, do_st, do_sh, dqo_sb, dqo_st, dqo_sh,
    qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, lag, N, G, empty,
    R: gl.constexpr, D: gl.constexpr, F: gl.constexpr, MAP: gl.constexpr, C: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    """`hopper_dq_kernel` of a chunk that a query reads: there, behind a return, it spills 24 bytes."""
    TILE: gl.constexpr = tile_layout(C, D, WARPS)
    ACC: gl.constexpr = product_layout(D, WARPS)
    SCORES: gl.constexpr = product_layout(C, WARPS)
    LEFT: gl.constexpr = operand_layout(D, WARPS)
    LEFT_SCORES: gl.constexpr = operand_layout(D, WARPS)
    PAIRED: gl.constexpr = F == 2 * D
    # Registers are short: masks are packed, and the next head's queries are loaded behind the store of this one.
    PACKED: gl.constexpr = D > 64 and HAS_DOCS
    bg, n = gl.program_id(1).to(gl.int64), gl.program_id(0) + empty
    b, g = bg // G, bg % G

    # The chunk's state, keys and values in shared memory.
    s_s1 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
    s_k1 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
    s_v = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
    s_s2, s_k2 = s_s1, s_k1
    if PAIRED:
        s_s2 = gl.allocate_shared_memory(gl.bfloat16, [D, D], shared_layout(D))
        s_k2 = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
    copy_state(s_s1, s_s2, states + (bg * N + n) * F * D, D, PAIRED, WARPS)
    async_copy.commit_group()

    # The chunk's keys. A masked product may still be 0 * NaN, so keys that are not finite leave them.
    key = load_pairs(k + b * k_sb + g * k_sg, k_st, n * C - lag, 0, T - lag, C, D, TILE)
    value = load_pairs(v + b * v_sb + g * v_sg, v_st, n * C - lag, 0, T - lag, C, D, TILE)
    d_out = load_pairs(do + b * do_sb + g * R * do_sh, do_st, n * C, 0, T, C, D, TILE)
    bad = is_bad(key)
    s_v.store(rename(bf16_of(value, TILE), C, D))
    any_bad = uniform(gl.max(bad, 0))
    _share_features(s_k1, s_k2, gl.where(bad[:, None] != 0, 0, key), C, D, MAP, PAIRED)
    pairs, reads = _masks(
        query_doc, key_doc, carried_doc, b, n, T, lag, qdoc_sb, qdoc_st, doc_sb, doc_st, C, SCORES, ACC, HAS_DOCS
    )
    packed = _pack(pairs, reads, C, SCORES) if PACKED else reads
    o_c = gl.arange(0, C, gl.SliceLayout(1, TILE))
    query = load_pairs(q + b * q_sb + g * R * q_sh, q_st, n * C, 0, T, C, D, TILE)
    heads = gl.num_programs(1).to(gl.int64) * R
    async_copy.wait_group(0)
    fence_async_shared()
    # Addresses are made where they are used, from these: kept, they take a fifth of the registers that there are.
    this = made_here(gl.program_id(1))
    small_b, small_g = this // G, this % G
    for r in range(0, R):
        b, g = made_here(small_b).to(gl.int64), made_here(small_g).to(gl.int64)
        first = made_here(n * C)
        b_do = gl.convert_layout(rename(bf16_of(d_out, TILE), C, D), LEFT)
        rows = made_here(T) if PACKED else T
        logs1, logs2 = load_logs(logs, (b * G + g) * R + r, first + o_c, rows, heads, MAP, PAIRED)
        d_scores = warpgroup_mma(
            b_do, s_v.permute([1, 0]), gl.zeros([C, C], gl.float32, SCORES), use_acc=False, is_async=True
        )
        dphi = warpgroup_mma(
            b_do, s_s1.permute([1, 0]), gl.zeros([C, D], gl.float32, ACC), use_acc=False, is_async=True
        )
        d_scores = warpgroup_mma_wait(1, deps=[d_scores])
        pairs_now, reads_now = _unpack(packed, C, SCORES, ACC) if PACKED else (pairs, reads)
        b_ds = gl.convert_layout(gl.where(pairs_now, d_scores, 0.0).to(gl.bfloat16), LEFT_SCORES)
        if HAS_DOCS:
            dphi = warpgroup_mma_wait(0, deps=[dphi])
            dphi = gl.where(reads_now[:, None], dphi, 0.0)
        dphi = warpgroup_mma(b_ds, s_k1, dphi, is_async=True)
        dphi = warpgroup_mma_wait(0, deps=[dphi])
        # Three tiles in fp32 are as many registers as there are: the first half waits in bf16.
        d_query = feature_map_bwd(query, to_memory(dphi, C, D, TILE), logs1, 1.0, MAP, TILE)
        if PAIRED:
            waiting = pairs_of(d_query)
            dphi2 = warpgroup_mma(
                b_do, s_s2.permute([1, 0]), gl.zeros([C, D], gl.float32, ACC), use_acc=False, is_async=True
            )
            if HAS_DOCS:
                dphi2 = warpgroup_mma_wait(0, deps=[dphi2])
                dphi2 = gl.where(reads_now[:, None], dphi2, 0.0)
            dphi2 = warpgroup_mma(b_ds, s_k2, dphi2, is_async=True)
            dphi2 = warpgroup_mma_wait(0, deps=[dphi2])
            even, odd = halves_of(waiting)
            d_query = join_halves(even, odd, TILE) + feature_map_bwd(
                query, to_memory(dphi2, C, D, TILE), logs2, -1.0, MAP, TILE
            )
        upper = gl.where(r + 1 < R, T, 0)
        d_out = load_pairs(do + b * do_sb + (g * R + r + 1) * do_sh, do_st, first, 0, upper, C, D, TILE, True)
        if any_bad != 0:
            pairs_now, _ = _unpack(packed, C, SCORES, ACC) if PACKED else (pairs, reads)
            row, end = k_st, T - lag
            if PACKED:
                # Neither waits in a register.
                row, end = (made_here(k_st) >> 4) * 16, made_here(T) - lag
            key = load_pairs(k + b * k_sb + g * k_sg, row, first - lag, 0, end, C, D, TILE, True)
            bad_j = gl.convert_layout(is_bad(key), gl.SliceLayout(0, SCORES))
            reads_bad = gl.max((pairs_now & (bad_j != 0)[None, :]).to(gl.int32), 1)
            reads_bad = gl.convert_layout(reads_bad, gl.SliceLayout(1, TILE))
            d_query = gl.where((reads_bad != 0)[:, None], float("nan"), d_query)
        if dq_other is not None:
            # Last of all: ahead of the products it took registers from them.
            other = load_pairs(
                dq_other + b * dqo_sb + (g * R + r) * dqo_sh, stride_here(dqo_st), first, 0, T, C, D, TILE, True
            )
            d_query = d_query + bf16_of(other, TILE).to(gl.float32)
        store_tile(dq + (b * T * G * R + g * R + r) * D, G * R * D, first, d_query, 0, T, C, D, TILE, True)
        query = load_pairs(q + b * q_sb + (g * R + r + 1) * q_sh, stride_here(q_st), first, 0, upper, C, D, TILE, True)


@gluon.jit
def hopper_dq_kernel(
    q, k, v, do, dq, dq_other, query_doc, key_doc, carried_doc, states, logs,
    q_sb, q_st, q_sh, k_sb, k_st, k_sg, v_sb, v_st, v_sg, do_sb, do_st, do_sh, dqo_sb, dqo_st, dqo_sh,
    qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, lag, N, G, empty,
    R: gl.constexpr, D: gl.constexpr, F: gl.constexpr, MAP: gl.constexpr, C: gl.constexpr, HAS_DOCS: gl.constexpr,
):  # fmt: skip
    if HAS_DOCS:
        n, b = gl.program_id(0) + empty, gl.program_id(1).to(gl.int64) // G
        unread = none_reads(query_doc + b * qdoc_sb, key_doc + b * doc_sb, qdoc_st, doc_st, n, T, lag, C)
        if uniform(unread.to(gl.int32)) != 0:
            _write_unread(dq, dq_other, dqo_sb, dqo_st, dqo_sh, n, b, T, G, R, D, C)
        else:
            _dq_of_chunk(
                q, k, v, do, dq, dq_other, query_doc, key_doc, carried_doc, states, logs, q_sb, q_st, q_sh,
                k_sb, k_st, k_sg, v_sb, v_st, v_sg, do_sb, do_st, do_sh, dqo_sb, dqo_st, dqo_sh, qdoc_sb,
                qdoc_st, doc_sb, doc_st, T, lag, N, G, empty, R, D, F, MAP, C, HAS_DOCS,
            )  # fmt: skip
    else:
        _dq_of_chunk(
            q, k, v, do, dq, dq_other, query_doc, key_doc, carried_doc, states, logs, q_sb, q_st, q_sh,
            k_sb, k_st, k_sg, v_sb, v_st, v_sg, do_sb, do_st, do_sh, dqo_sb, dqo_st, dqo_sh, qdoc_sb,
            qdoc_st, doc_sb, doc_st, T, lag, N, G, empty, R, D, F, MAP, C, HAS_DOCS,
        )  # fmt: skip


def launch_hopper_output(sizes: Sizes, x: Tensors, states: States, o: Tensor, config: Config) -> Launch:
    args = {"o": o, "states": states.chunks, "sums": states.sums, **chunk_args(sizes, x)}
    return Launch(hopper_output_kernel, (sizes.N - sizes.empty, sizes.B * sizes.G), args, config.options)


def launch_hopper_dq(
    sizes: Sizes,
    x: Tensors,
    states: Tensor,
    do: Tensor,
    logs: Tensor | None,
    dq: Tensor,
    config: Config,
    other: Tensor | None = None,
) -> Launch:
    """Writes dq, with `other` added before it is rounded. logs: see `launch_hopper_state_bwd`."""
    args = {
        "do": do,
        "dq": dq,
        "dq_other": other,
        "logs": logs,
        "states": states,
        **rows_of(do, "do_sb do_st do_sh"),
        **rows_of(other, "dqo_sb dqo_st dqo_sh"),
        **chunk_args(sizes, x),
    }
    return Launch(hopper_dq_kernel, (sizes.N - sizes.empty, sizes.B * sizes.G), args, config.options)


def rows_of(x: Tensor | None, names: str) -> dict[str, int]:
    """Strides of all dimensions but the last, which is contiguous; without a tensor zeros."""
    return dict(zip(names.split(), (0,) * 9 if x is None else x.stride(), strict=False))


def chunk_args(sizes: Sizes, x: Tensors) -> dict:
    """Arguments that the stages over chunks share."""
    return {
        "q": x.q,
        "k": x.k,
        "v": x.v,
        "query_doc": x.query_doc,
        "key_doc": x.key_doc,
        "carried_doc": x.carried_doc,
        **rows_of(x.q, "q_sb q_st q_sh"),
        **rows_of(x.k, "k_sb k_st k_sg"),
        **rows_of(x.v, "v_sb v_st v_sg"),
        **strides(x.query_doc, "qdoc_sb qdoc_st"),
        **strides(x.key_doc, "doc_sb doc_st"),
        "T": sizes.T,
        "lag": sizes.lag,
        "N": sizes.N,
        "G": sizes.G,
        "empty": sizes.empty,
        "R": sizes.R,
        "D": sizes.D,
        "F": sizes.F,
        "MAP": sizes.feature_map,
        "C": sizes.chunk,
        "HAS_DOCS": x.key_doc is not None,
    }
