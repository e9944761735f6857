"""Stage 1 on Hopper: `chunk_state.py`, one half of the features a program, wgmma from shared memory.

Neither decay nor a start state: those take the stages of `chunk_state.py`. The rows and columns of a state are stored
in the order of `column_of`, so that the readers may copy them into shared memory as they are: `reorder_state` undoes
it.

A forward runs this twice: for the totals of the segments, which the scan turns into the states at their borders, and
from those for the state in front of every chunk. A backward runs it once, for both: queries and their gradients are
four times as many bytes as keys and values, and its one reader adds what came before the segment.

With documents a program visits the chunks of its segment that a query reads (`none_reads`), and writes no others.
"""

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from scan_kernels.kernels.hopper_common import (
    _SOFTMAX,
    NEWER,
    barrier,
    column_of,
    copy_rows,
    document_of,
    feature_map_and_logs,
    none_reads,
    pair_layout,
    product_layout,
    rename,
    shared_layout,
    tile_layout,
    to_memory,
    uniform,
    words_of,
)
from scan_kernels.kernels.launch import Config, Launch, Sizes, Tensors, strides

# At most, of a segment in which those that no query reads are left out: each is a bit.
MOST_CHUNKS = gl.constexpr(32)


@gluon.constexpr_function
def _read_layout(C, D, WARPS):
    """Of a chunk read from shared memory: 16 bytes a thread, 128 bytes of a row by 8 threads."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[0, 64 << i] for i in range(D.bit_length() - 7)]
    lanes = [[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]]
    warps = [[4 << i, 0] for i in range(WARPS.bit_length() - 1)]
    rows = 4 * WARPS
    while rows < C:
        registers.append([rows, 0])
        rows *= 2
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [C, D])


@gluon.constexpr_function
def _column_layout(C, COLUMNS, WARPS):
    """Of a tile whose columns are summed: a warp has all rows of its columns, so that no sum leaves it."""
    columns = COLUMNS // WARPS
    registers = [[0, 1]] + [[0, 8 << i] for i in range(columns.bit_length() - 4)]
    registers += [[8 << i, 0] for i in range(C.bit_length() - 4)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    warps = [[0, columns << i] for i in range(WARPS.bit_length() - 1)]
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [C, COLUMNS])


@gluon.jit
def _column_sums(tile, C: gl.constexpr, COLUMNS: gl.constexpr, WARPS: gl.constexpr):
    """(8, COLUMNS) fp32: sums over every eighth row, those that a thread holds, of a tile in shared memory."""
    x = tile.load(_column_layout(C, COLUMNS, WARPS)).to(gl.float32)
    return gl.sum(gl.reshape(x, [C // 8, 8, COLUMNS]), 0)


@gluon.jit
def _chunks_to_visit(query_doc, key_doc, qdoc_st, doc_st, first, last, T, lag, C: gl.constexpr, WARPS: gl.constexpr):
    """A bit for each chunk of first ... last but those that `none_reads`, the lowest for the first. There is one at
    least, so that there is a step."""
    o_n = gl.arange(0, MOST_CHUNKS, gl.BlockedLayout([1], [32], [WARPS], [0]))
    n = gl.minimum(first + o_n, last)
    visited = (first + o_n <= last) & (none_reads(query_doc, key_doc, qdoc_st, doc_st, n, T, lag, C) == 0)
    return uniform(gl.maximum(gl.sum(gl.where(visited, 1 << o_n, 0), 0), 1))


@gluon.jit
def _chunk_and_head(step, begin, step_n, R: gl.constexpr):
    """Where all chunks are visited, each with all heads."""
    return begin + step_n * (step // R), step % R


@gluon.jit
def _take(bits, BACKWARD: gl.constexpr):
    """The number of the lowest bit, BACKWARD of the highest, -1 if there is none, and the other bits."""
    bit = bits if BACKWARD else bits & -bits
    number = gl.inline_asm_elementwise("bfind.u32 $0, $1;", "=r,r", [bit], gl.int32, is_pure=True, pack=1)
    return number, bits & ((1 << gl.maximum(number, 0)) ^ -1)


@gluon.jit
def hopper_state_kernel(
    x, y, query_doc, key_doc, states, value_sums, factors, totals, total_factors, carry, carry_sums, logs,
    x_sb, x_st, x_sh, y_sb, y_st, y_sh, qdoc_sb, qdoc_st, doc_sb, doc_st,
    T, lag, N, G, SEGMENT, empty,
    R: gl.constexpr, D: gl.constexpr, F: gl.constexpr, MAP: gl.constexpr, C: gl.constexpr, BACKWARD: gl.constexpr,
    HAS_DOCS: gl.constexpr, SOME: gl.constexpr, HAS_CARRY: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """x, y: keys and values (R = 1), or, BACKWARD, the group's queries and their gradients. SOME: of chunks of which no
    query reads a key, nothing is read and nothing written."""
    READ: gl.constexpr = _read_layout(C // 2, D, WARPS)
    WORDS: gl.constexpr = pair_layout(READ)
    OUT: gl.constexpr = tile_layout(D, D, WARPS)
    HALVES: gl.constexpr = F // D
    SUMS: gl.constexpr = MAP == _SOFTMAX
    HERE: gl.constexpr = NEWER and D > 64
    # Tiles of x and y: the one of this step, and those on their way. A third pays where it takes little room.
    TILES: gl.constexpr = 3 if D == 64 and not HAS_DOCS else 2
    # Every program sums its share of the values' columns, where that is a tile of its own.
    COLUMNS: gl.constexpr = D // HALVES if D // HALVES >= 64 else D
    segment, half, bg = gl.program_id(0) // HALVES, gl.program_id(0) % HALVES, gl.program_id(1).to(gl.int64)
    segments = gl.num_programs(0) // HALVES
    b, g = bg // G, bg % G
    signs = gl.where(half == 0, 0, -0x7FFF8000)  # phi(-x): the sign bits of a pair
    x += b * x_sb + g * R * x_sh
    y += b * y_sb + g * R * y_sh
    if logs is not None:
        logs += (half * gl.num_programs(1).to(gl.int64) + bg) * R * T
    if HAS_DOCS:
        query_doc += b * qdoc_sb
        key_doc += b * doc_sb
    s_x = gl.allocate_shared_memory(gl.bfloat16, [TILES, C, D], shared_layout(D))
    s_y = gl.allocate_shared_memory(gl.bfloat16, [TILES, C, D], shared_layout(D))
    s_phi = gl.allocate_shared_memory(gl.bfloat16, [C, D], shared_layout(D))
    # 64 columns of a tile lie behind the 64 before them.
    s_columns = s_y
    if COLUMNS != D:
        s_columns = s_y._reinterpret(gl.bfloat16, [TILES * HALVES, C, COLUMNS], shared_layout(COLUMNS))
    share_of_columns = half if COLUMNS != D else 0
    writes_sums = (half == 0) | (COLUMNS != D)

    state_rows = half * D + column_of(gl.arange(0, D, gl.SliceLayout(1, OUT)))
    o_columns = gl.arange(0, D, gl.SliceLayout(0, OUT))
    o_state = (state_rows * D)[:, None] + o_columns[None, :]
    state = gl.zeros([D, D], gl.float32, product_layout(D, WARPS))
    sums = gl.zeros_like(_column_sums(s_columns.index(0), C, COLUMNS, WARPS))
    first_sum = gl.sum(sums, 0)
    o_sum = share_of_columns * COLUMNS + gl.arange(0, COLUMNS, first_sum.type.layout)
    first = empty + segment * SEGMENT
    last = gl.minimum(first + SEGMENT, N) - 1
    # The chunks in order, or backwards and in each the group's heads; `following`: the next chunk that is visited.
    begin, end = (last, first - 1) if BACKWARD else (first, last + 1)
    step_n = -1 if BACKWARD else 1
    n, following, rest, chunks = begin, begin + step_n, 0, last - first + 1
    if SOME:
        rest = _chunks_to_visit(query_doc, key_doc, qdoc_st, doc_st, first, last, T, lag, C, WARPS)
        chunks = gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [rest], gl.int32, is_pure=True, pack=1)
        number, rest = _take(rest, BACKWARD)
        n = first + number
        number, rest = _take(rest, BACKWARD)
        following = gl.where(number < 0, end, first + number)
    # The state before a chunk is that of the document of the row in front of it, BACKWARD of the chunk's last row.
    row_of_state = C - 1 if BACKWARD else -1
    if HAS_DOCS:
        first_doc = document_of(key_doc, doc_st, begin * C + row_of_state, T, lag)
        doc = document_of(key_doc, doc_st, n * C + row_of_state, T, lag)
    if HAS_CARRY:
        border = bg * (segments + 1) + segment
        state = gl.load(carry + border * F * D + o_state).to(gl.float32)
        state = gl.convert_layout(rename(state, D, D), product_layout(D, WARPS))
        if SUMS:
            first_sum = gl.load(carry_sums + border * D + o_sum)
        if SOME:
            state = gl.where(first_doc == doc, state, 0.0)
            first_sum = gl.where(first_doc == doc, first_sum, 0.0)

    # A segment has a chunk: a way around the loop would make the compiler wait for each product where it begins.
    steps = gl.maximum(chunks * R, 1)
    o_c = gl.arange(0, C // 2, gl.SliceLayout(1, READ))
    # Row i of a chunk is key i - lag, or query i.
    shift = 0 if BACKWARD else lag
    for i in gl.static_range(TILES - 1):
        n_then, r_then = n, 0
        if i > 0:
            n_then, r_then = _chunk_and_head(i, begin, step_n, R)
        upper = gl.where(i < steps, T - shift, 0)
        copy_rows(s_x.index(i), x + r_then * x_sh, x_st, n_then * C - shift, 0, upper, C, D, WARPS)
        copy_rows(s_y.index(i), y + r_then * y_sh, y_st, n_then * C - shift, 0, upper, C, D, WARPS)
        async_copy.commit_group()
    # A step's features are made while the tensor cores still multiply the step before.
    product = warpgroup_mma_init(state)
    for step in range(0, steps):
        # The chunk and head of this step, and of the one whose rows are asked for.
        if HAS_DOCS:
            r = step % R
            goes_on = r + 1 < R
            n_then, r_then = gl.where(goes_on, n, following), gl.where(goes_on, r + 1, 0)
        else:
            n, r = _chunk_and_head(step, begin, step_n, R)
            n_then, r_then = _chunk_and_head(step + TILES - 1, begin, step_n, R)
        tile, tile_then = step % TILES, (step + TILES - 1) % TILES
        # The last rounds copy nothing: their bounds are empty.
        upper = gl.where(step + TILES - 1 < steps, T - shift, 0)
        async_copy.wait_group(TILES - 2)
        copy_rows(s_x.index(tile_then), x + r_then * x_sh, x_st, n_then * C - shift, 0, upper, C, D, WARPS, HERE)
        if HAS_DOCS:
            # Behind this chunk the state is the next one's, and of its document. Ids never fall: all rows are of that
            # document if the first one (of queries the last one) is.
            next_doc = document_of(key_doc, doc_st, following * C + row_of_state, T, lag)
            p_last = query_doc + gl.minimum(n * C + C - 1, T - 1).to(gl.int64) * qdoc_st
            own_doc = gl.load(p_last) if BACKWARD else doc
        rows = words_of(s_x.index(tile), C, D)
        phi1, logs1 = feature_map_and_logs(rows.slice(0, C // 2, dim=0).load(WORDS) ^ signs, 1.0, MAP, D, READ)
        phi1 = phi1.to(gl.bfloat16)
        phi2, logs2 = feature_map_and_logs(rows.slice(C // 2, C // 2, dim=0).load(WORDS) ^ signs, 1.0, MAP, D, READ)
        phi2 = phi2.to(gl.bfloat16)
        state = warpgroup_mma_wait(0, deps=[product])
        # A warpgroup has waited for its own product; the other's reads the same rows.
        barrier()
        copy_rows(s_y.index(tile_then), y + r_then * y_sh, y_st, n_then * C - shift, 0, upper, C, D, WARPS, HERE)
        async_copy.commit_group()
        if logs is not None:
            t_row = n * C + o_c
            gl.store(logs + r * T + t_row, logs1, mask=t_row < T)
            gl.store(logs + r * T + t_row + C // 2, logs2, mask=t_row + C // 2 < T)
        if HAS_DOCS:  # noqa: SIM102  (one is known to the compiler)
            if uniform((own_doc != next_doc).to(gl.int32)) != 0:
                # Another document's NaN must not pass: its rows leave both factors of the product.
                for i in gl.static_range(2):
                    o_i = n * C + i * C // 2 + o_c
                    if BACKWARD:
                        own = gl.load(query_doc + gl.minimum(o_i, T - 1).to(gl.int64) * qdoc_st)
                    else:
                        own = document_of(key_doc, doc_st, o_i, T, lag)
                    counts = own == next_doc
                    if i == 0:
                        phi1 = gl.where(counts[:, None], phi1, 0.0).to(gl.bfloat16)
                    else:
                        phi2 = gl.where(counts[:, None], phi2, 0.0).to(gl.bfloat16)
                    part = s_y.index(tile).slice(i * C // 2, C // 2, dim=0)
                    part.store(gl.where(counts[:, None], part.load(READ), 0.0))
        s_phi.slice(0, C // 2, dim=0).store(phi1)
        s_phi.slice(C // 2, C // 2, dim=0).store(phi2)
        fence_async_shared()
        # A branch around the state would make the compiler wait for each product where it begins.
        begins = r == 0
        if states is not None:
            out = to_memory(state.to(gl.bfloat16), D, D, OUT)
            p_state = states + (bg * N + n) * F * D
            # A pointer for each row takes fewer registers, of which there are enough at D = 64.
            p_state = (p_state + state_rows * D)[:, None] + o_columns[None, :] if D > 64 else p_state + o_state
            gl.store(p_state, out, mask=(o_state >= 0) & begins)
            if SUMS:
                p_sums = value_sums + (bg * N + n) * D + o_sum
                gl.store(p_sums, first_sum + gl.sum(sums, 0), mask=(o_sum >= 0) & (begins & writes_sums))
            if factors is not None:
                share = gl.where(first_doc == doc, 1.0, 0.0)
                gl.store(factors + bg * N + n, share, mask=begins & (half == 0))
        if HAS_DOCS:
            keeps = (doc == next_doc) | (r != 0)
            state = gl.where(keeps, state, 0.0)
            sums = gl.where(keeps, sums, 0.0)
            first_sum = gl.where(keeps, first_sum, 0.0)
            doc = gl.where(goes_on, doc, next_doc)
        product = warpgroup_mma(s_phi.permute([1, 0]), s_y.index(tile), state, is_async=True)
        if SUMS:
            sums += _column_sums(s_columns.index(D // COLUMNS * tile + share_of_columns), C, COLUMNS, WARPS)
        if HAS_DOCS:
            n = n_then
            if SOME:
                number, others = _take(rest, BACKWARD)
                rest = gl.where(goes_on, rest, others)
                following = gl.where(goes_on, following, gl.where(number < 0, end, first + number))
            else:
                following = gl.where(goes_on, following, following + step_n)
    state = warpgroup_mma_wait(0, deps=[product])
    if totals is not None:
        p_total = totals + (bg * segments + segment) * (F + 1) * D
        gl.store(p_total + o_state, to_memory(state, D, D, OUT))
        gl.store(p_total + F * D + o_sum, first_sum + gl.sum(sums, 0), mask=(o_sum >= 0) & writes_sums)
        if HAS_DOCS and half == 0:
            gl.store(total_factors + bg * segments + segment, gl.where(first_doc == doc, 1.0, 0.0))


def reorder_state(state: Tensor, D: int) -> Tensor:
    """(..., F, D) from the order in which the stages here keep a state to the plain one, or back."""
    columns = torch.tensor([column_of.fn(p) for p in range(D)], device=state.device)
    return state.unflatten(-2, (-1, D))[..., columns, :][..., columns].flatten(-3, -2)


def launch_hopper_totals(sizes: Sizes, x: Tensors, config: Config) -> Launch:
    """The sums of the segments of keys and values."""
    args = _keys(sizes, x) | _arguments(sizes, x) | _totals(sizes, x)
    return Launch(hopper_state_kernel, _grid(sizes), args, _options(sizes, config))


def launch_hopper_state_fwd(
    sizes: Sizes, x: Tensors, carry: Tensor | None, carry_sums: Tensor | None, config: Config
) -> Launch:
    """The states in front of every chunk, from those at the borders of the segments (None: all zero)."""
    args = _keys(sizes, x) | _arguments(sizes, x) | _borders(sizes, x)
    args |= {"carry": carry, "carry_sums": carry_sums, "HAS_CARRY": carry is not None}
    return Launch(hopper_state_kernel, _grid(sizes), args, _options(sizes, config))


def launch_hopper_state_bwd(sizes: Sizes, x: Tensors, do: Tensor, config: Config) -> Launch:
    """Both for queries and do, chunks reversed; the states as far as their segment made them.

    For softmax features also args["logs"], (halves, B, H, T) fp32: log2 of the sums of the queries' exponentials, by
    which the later stages map them without going over their rows.
    """
    args = _arguments(sizes, x) | _borders(sizes, x) | _totals(sizes, x)
    args |= {"x": x.q, "y": do, "R": sizes.R, "BACKWARD": True}
    args |= {**_strides(x.q, "x"), **_strides(do, "y")}
    if sizes.feature_map == _SOFTMAX.value:
        args["logs"] = x.q.new_empty(sizes.halves, sizes.B, sizes.H, sizes.T, dtype=torch.float32)
    if x.key_doc is not None:
        args["factors"] = x.k.new_empty(sizes.B * sizes.G, sizes.N, dtype=torch.float32)
    return Launch(hopper_state_kernel, _grid(sizes), args, _options(sizes, config))


def _strides(x: Tensor, name: str) -> dict[str, int]:
    return {f"{name}_sb": x.stride(0), f"{name}_st": x.stride(1), f"{name}_sh": x.stride(2)}


def _keys(sizes: Sizes, x: Tensors) -> dict:
    return {"x": x.k, "y": x.v, "R": 1, "BACKWARD": False} | _strides(x.k, "x") | _strides(x.v, "y")


def _arguments(sizes: Sizes, x: Tensors) -> dict:
    names = ("states", "value_sums", "factors", "totals", "total_factors", "carry", "carry_sums", "logs")
    return {
        **dict.fromkeys(names),
        "query_doc": x.query_doc,
        "key_doc": x.key_doc,
        **strides(x.query_doc, "qdoc_sb qdoc_st"),
        **strides(x.key_doc, "doc_sb doc_st"),
        "T": sizes.T,
        "lag": sizes.lag,
        "N": sizes.N,
        "G": sizes.G,
        "SEGMENT": sizes.segment,
        "empty": sizes.empty,
        "D": sizes.D,
        "F": sizes.F,
        "MAP": sizes.feature_map,
        "C": sizes.chunk,
        "HAS_DOCS": x.key_doc is not None,
        "SOME": x.key_doc is not None and sizes.segment < MOST_CHUNKS.value,
        "HAS_CARRY": False,
        "WARPS": _warps(sizes),
    }


def _borders(sizes: Sizes, x: Tensors) -> dict:
    BG, N = sizes.B * sizes.G, sizes.N
    return {
        "states": x.k.new_empty(BG, N, sizes.F, sizes.D, dtype=torch.bfloat16),
        "value_sums": x.k.new_empty(BG, N, sizes.D, dtype=torch.float32),
    }


def _totals(sizes: Sizes, x: Tensors) -> dict:
    BG, segments = sizes.B * sizes.G, sizes.segments
    factors = x.k.new_empty(BG, segments, dtype=torch.float32) if x.key_doc is not None else None
    totals = x.k.new_empty(BG, segments, sizes.F + 1, sizes.D, dtype=torch.float32)
    return {"totals": totals, "total_factors": factors}


def _warps(sizes: Sizes) -> int:
    return sizes.D // 16  # one wgmma of 64 rows for each warpgroup


def _grid(sizes: Sizes) -> tuple[int, ...]:
    return (sizes.segments * sizes.halves, sizes.B * sizes.G)


def _options(sizes: Sizes, config: Config) -> dict[str, int]:
    return {**config.options, "num_warps": _warps(sizes)}
