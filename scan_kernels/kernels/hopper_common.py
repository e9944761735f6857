"""What the Hopper stages share: tiles that move between global memory, registers and tensor cores without a shuffle.

A warpgroup's matrix product (wgmma) reads its left operand from registers in which a thread holds columns 2t, 2t+1,
8+2t, 8+2t+1, ... (t: lane % 4), and leaves its result in the same places. Loads of 16 bytes want columns 8t ... 8t+7.
Both are true at once if the columns are renamed: column c of memory is column p of the product, with the bits of the
index moved as `column_of` says. A sum over columns does not see their order, so q, k, v, do are all renamed alike on
the way in, o, dq, dk, dv back on the way out, and no tile passes through shared memory but the right operands.
"""

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from scan_kernels.kernels.common import RELU, SOFTMAX

_SOFTMAX = gl.constexpr(SOFTMAX.value)
_RELU = gl.constexpr(RELU.value)
_LOG2E = gl.constexpr(1.4426950408889634)


# Triton 3.8 keeps more in registers than 3.6, whose kernels are those that were timed: see docs/kernels.md, Registers.
NEWER = gl.constexpr(tuple(int(number) for number in triton.__version__.split(".")[:2]) >= (3, 8))

# Triton 3.6 calls it thread_barrier.
barrier = getattr(gl, "barrier", None) or gl.thread_barrier


@gluon.constexpr_function
def tile_layout(ROWS, COLUMNS, WARPS):
    """Of a (ROWS, COLUMNS) tile as it is loaded and stored: 16 bytes a thread, rows where wgmma wants them."""
    registers = [[0, 1], [0, 2], [0, 4]] + [[0, 32 << i] for i in range((COLUMNS // 32).bit_length() - 1)]
    lanes = [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]]
    first = 8
    if ROWS >= 16 * WARPS:
        registers.append([8, 0])
        first = 16
    warps = [[first << i, 0] for i in range(WARPS.bit_length() - 1)]
    rows = first * WARPS
    while rows < ROWS:
        registers.append([rows, 0])
        rows *= 2
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [ROWS, COLUMNS])


@gluon.constexpr_function
def pair_layout(TILE):
    """Of a tile's words, two columns each."""

    def words(bases):
        return [[row, column // 2] for row, column in bases if column != 1]

    rows, columns = TILE.shape
    return gl.DistributedLinearLayout(
        words(TILE.reg_bases), words(TILE.lane_bases), words(TILE.warp_bases), [], [rows, columns // 2]
    )


@gluon.constexpr_function
def columns_of_a_thread(PAIRS):
    """How far apart lie the columns that a thread has, the farthest first."""
    return tuple(sorted((column for _, column in PAIRS.reg_bases if column), reverse=True))


@gluon.constexpr_function
def product_layout(COLUMNS, WARPS):
    """Of the result of a product with COLUMNS columns, WARPS warps below each other."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, COLUMNS, 16])


@gluon.constexpr_function
def operand_layout(COLUMNS, WARPS):
    """Of a left operand in registers."""
    return gl.DotOperandLayout(operand_index=0, parent=product_layout(COLUMNS, WARPS), k_width=2)


@gluon.constexpr_function
def shared_layout(COLUMNS):
    return gl.NVMMASharedLayout(swizzle_byte_width=min(128, 2 * COLUMNS), element_bitwidth=16, rank=2)


@gluon.jit
def column_of(p):
    """The column of memory that the product knows as p."""
    return (p & 1) | (((p >> 3) & 3) << 1) | (((p >> 1) & 3) << 3) | (p - p % 32)


@gluon.jit
def rename(x, ROWS: gl.constexpr, D: gl.constexpr):
    """Columns of memory -> columns of the product."""
    x = gl.reshape(x, [ROWS, D // 32, 4, 2, 2, 2])
    return gl.reshape(gl.permute(x, [0, 1, 3, 4, 2, 5]), [ROWS, D])


@gluon.jit
def to_memory(x, ROWS: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr):
    """The inverse of `rename`, in the layout of stores."""
    x = gl.reshape(x, [ROWS, D // 32, 2, 2, 4, 2])
    return gl.convert_layout(gl.reshape(gl.permute(x, [0, 1, 4, 2, 3, 5]), [ROWS, D]), TILE)


@gluon.constexpr_function
def copy_layout(COLUMNS, WARPS):
    """Of pointers that are copied to shared memory, 16 bytes a thread, whole rows side by side."""
    return gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [WARPS, 1], [1, 0])


@gluon.jit
def row_pointer(p, first, stride):
    """Where row `first` begins. Offsets inside a chunk are 32 bits wide: `fused._rows_of_16_bytes` sees to it."""
    return p + gl.to_tensor(first).to(gl.int64) * stride


@gluon.jit
def copy_rows(
    s_x, p, stride, first, lower, upper, C: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr,
    HERE: gl.constexpr = False,
):  # fmt: skip
    """Start the copy of rows first ... first + C of a tensor to shared memory, 0 outside lower <= row < upper. HERE:
    see `load_pairs`."""
    COPY: gl.constexpr = copy_layout(D, WARPS)
    if HERE:
        stride = stride_here(stride)
    o_c = gl.arange(0, C, gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    mask = (first + o_c >= lower) & (first + o_c < upper)
    source = row_pointer(p, first, stride) + ((o_c * stride)[:, None] + o_d[None, :])
    async_copy.async_copy_global_to_shared(s_x, source, mask=mask[:, None])


@gluon.jit
def copy_state(s_1, s_2, state, D: gl.constexpr, PAIRED: gl.constexpr, WARPS: gl.constexpr):
    """Start the copy of a state to shared memory, a tile for each half of the features."""
    copy_rows(s_1, state, D, 0, 0, D, D, D, WARPS)
    if PAIRED:
        copy_rows(s_2, state + D * D, D, 0, 0, D, D, D, WARPS)


@gluon.jit
def load_pairs(
    p, stride, first, lower, upper, C: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr, HERE: gl.constexpr = False
):  # fmt: skip
    """Rows first ... first + C of a bf16 tensor, two columns a word, 0 outside lower <= row < upper. HERE:
    addresses are made in place, not kept."""
    PAIRS: gl.constexpr = pair_layout(TILE)
    o_c = gl.arange(0, C, gl.SliceLayout(1, PAIRS))
    if HERE:
        o_c = made_here(o_c)
    o_d = gl.arange(0, D // 2, gl.SliceLayout(0, PAIRS))
    mask = (first + o_c >= lower) & (first + o_c < upper)
    row = row_pointer(p, first, stride).to(gl.pointer_type(gl.int32), bitcast=True) + o_c * (stride // 2)
    return gl.load(row[:, None] + o_d[None, :], mask=mask[:, None], other=0)


@gluon.jit
def store_tile(
    p, stride, first, x, lower, upper, C: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr,
    HERE: gl.constexpr = False,
):  # fmt: skip
    """Write rows first ... first + C, none outside lower <= row < upper. HERE: see `load_pairs`."""
    o_c = gl.arange(0, C, gl.SliceLayout(1, TILE))
    if HERE:
        o_c = made_here(o_c)
    o_d = gl.arange(0, D, gl.SliceLayout(0, TILE))
    mask = (first + o_c >= lower) & (first + o_c < upper)
    target = (row_pointer(p, first, stride) + o_c * stride)[:, None] + o_d[None, :]
    gl.store(target, x.to(p.dtype.element_ty), mask=mask[:, None])


@gluon.jit
def words_of(tile, C: gl.constexpr, D: gl.constexpr):
    """A tile of shared memory, two columns a word."""
    WIDTH: gl.constexpr = min(128, 2 * D)
    WORDS: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=WIDTH, element_bitwidth=32, rank=2)
    return tile._reinterpret(gl.int32, [C, D // 2], WORDS)


@gluon.jit
def halves_of(x):
    """The even and the odd columns, fp32, of pairs of bf16."""
    return (x << 16).to(gl.float32, bitcast=True), (x & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _halves_of_negative(x):
    """`halves_of` -x, in a way that the compiler takes for another computation: it would keep both columns of every
    pair in registers from phi(x) to phi(-x), twice as many as the pairs are."""
    return halves_of(
        gl.inline_asm_elementwise("xor.b32 $0, $1, 0x80008000;", "=r,r", [x], gl.int32, is_pure=True, pack=1)
    )


@gluon.jit
def join_halves(even, odd, TILE: gl.constexpr):
    """The inverse of `halves_of`, for any type: columns side by side."""
    ROWS: gl.constexpr = even.shape[0]
    D: gl.constexpr = 2 * even.shape[1]
    return gl.convert_layout(gl.reshape(gl.join(even, odd), [ROWS, D]), TILE)


@gluon.jit
def bf16_of(x, TILE: gl.constexpr):
    """Pairs as a bf16 tile."""
    even = x.to(gl.int16).to(gl.bfloat16, bitcast=True)
    return join_halves(even, (x >> 16).to(gl.int16).to(gl.bfloat16, bitcast=True), TILE)


@gluon.jit
def pairs_of(x):
    """A fp32 tile, rounded to bf16, as pairs."""
    even, odd = _neighbors(x)
    return gl.inline_asm_elementwise(
        "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [even, odd], gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def _neighbors(x):
    """A tile as two of half as many columns, that lie side by side in it."""
    ROWS: gl.constexpr = x.shape[0]
    HALF: gl.constexpr = x.shape[1] // 2
    return gl.split(gl.reshape(x, [ROWS, HALF, 2]))


@gluon.jit
def _apart(x, DISTANCE: gl.constexpr):
    """A tile as two of half as many columns, those that lie DISTANCE apart."""
    ROWS: gl.constexpr = x.shape[0]
    HALF: gl.constexpr = x.shape[1] // 2
    x = gl.reshape(x, [ROWS, HALF // DISTANCE, 2, DISTANCE])
    a, b = gl.split(gl.permute(x, [0, 1, 3, 2]))
    return gl.reshape(a, [ROWS, HALF]), gl.reshape(b, [ROWS, HALF])


@gluon.jit
def _wider(a, b, LARGEST: gl.constexpr):
    """Maxima or minima of pairs of bf16."""
    NAME: gl.constexpr = "max.bf16x2 $0, $1, $2;" if LARGEST else "min.bf16x2 $0, $1, $2;"
    return gl.inline_asm_elementwise(NAME, "=r,r,r", [a, b], gl.int32, is_pure=True, pack=1)


@gluon.jit
def _extreme(x, LARGEST: gl.constexpr):
    """fp32 maximum or minimum of every row of pairs: what a thread holds two at a time, as a tree."""
    ROWS: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    APART: gl.constexpr = columns_of_a_thread(x.type.layout)
    for i in gl.static_range(len(APART)):
        a, b = _apart(x, APART[i])
        x = _wider(a, b, LARGEST)
    even, odd = halves_of(x)
    x = gl.max(gl.maximum(even, odd), 1) if LARGEST else gl.min(gl.minimum(even, odd), 1)
    return gl.convert_layout(x, ROWS)


@gluon.jit
def _row_sum(x):
    """Sums of rows, those of a thread as a tree."""
    ROWS: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    APART: gl.constexpr = columns_of_a_thread(x.type.layout)
    for i in gl.static_range(len(APART)):
        a, b = _apart(x, APART[i])
        x = a + b
    return gl.convert_layout(gl.sum(x, 1), ROWS)


@gluon.jit
def _approximate(NAME: gl.constexpr, x):
    """A function that branches for what is denormal, without: a branch holds up products under way."""
    return gl.inline_asm_elementwise(NAME, "=f,f", [x], gl.float32, is_pure=True, pack=1)


@gluon.jit
def _softmax(x, SIGN: gl.constexpr):
    """exp(SIGN x) of even and odd columns of whole rows, scaled to a largest element of 1; one over its sum; log2 of
    the sum of exp(SIGN x)."""
    even, odd = halves_of(x)
    top = (_extreme(x, True) if SIGN > 0 else -_extreme(x, False)) * _LOG2E
    even = gl.exp2(even * (SIGN * _LOG2E) - top[:, None])
    odd = gl.exp2(odd * (SIGN * _LOG2E) - top[:, None])
    total = _row_sum(even + odd)  # from 1 to D
    return (
        even,
        odd,
        _approximate("rcp.approx.ftz.f32 $0, $1;", total),
        top + _approximate("lg2.approx.ftz.f32 $0, $1;", total),
    )


@gluon.jit
def feature_map_and_logs(x, SIGN: gl.constexpr, MAP: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr):
    """phi(SIGN x) of whole rows of pairs, fp32, and for softmax, else 0, log2 of a row's sum of exp(SIGN x).

    Softmax features come less their mean 1/D: see docs/kernels.md, Precision.
    """
    if MAP == _SOFTMAX:
        even, odd, share, logs = _softmax(x, SIGN)
        even = even * share[:, None] - 1.0 / D
        odd = odd * share[:, None] - 1.0 / D
    else:
        even, odd = halves_of(x)
        even, odd = _linear(even, SIGN, MAP), _linear(odd, SIGN, MAP)
        logs = gl.sum(even, 1) * 0.0
    return join_halves(even, odd, TILE), gl.convert_layout(logs, gl.SliceLayout(1, TILE))


@gluon.jit
def _linear(y, SIGN: gl.constexpr, MAP: gl.constexpr):
    y = y * SIGN
    if MAP == _RELU:
        y = gl.where(y != y, y, gl.maximum(y, 0.0))
    return y


@gluon.jit
def feature_map(x, SIGN: gl.constexpr, MAP: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr):
    """phi(SIGN x) as `feature_map_and_logs` has it."""
    phi, _ = feature_map_and_logs(x, SIGN, MAP, D, TILE)
    return phi


@gluon.jit
def _row_dot(x, y):
    """Sums of the rows of x * y: those of a thread as four chains, whose every link is one instruction."""
    APART: gl.constexpr = columns_of_a_thread(x.type.layout)
    x1, x2 = _apart(x, APART[0])
    y1, y2 = _apart(y, APART[0])
    x1, x3 = _apart(x1, APART[1])
    y1, y3 = _apart(y1, APART[1])
    x2, x4 = _apart(x2, APART[1])
    y2, y4 = _apart(y2, APART[1])
    total = gl.fma(x4, y4, gl.fma(x3, y3, gl.fma(x2, y2, x1 * y1)))
    return gl.convert_layout(_row_sum(total), gl.SliceLayout(1, x.type.layout))


@gluon.jit
def _softmax_of_logs(x, logs, SIGN: gl.constexpr, TILE: gl.constexpr):
    """exp(SIGN x - logs)."""
    logs = gl.convert_layout(logs, gl.SliceLayout(1, x.type.layout))
    even, odd = halves_of(x) if SIGN > 0 else _halves_of_negative(x)
    even = gl.exp2(even * _LOG2E - logs[:, None])
    odd = gl.exp2(odd * _LOG2E - logs[:, None])
    return join_halves(even, odd, TILE)


@gluon.jit
def feature_map_of_logs(x, logs, SIGN: gl.constexpr, MAP: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr):
    """phi(SIGN x) by the logs of `feature_map_and_logs`: no row is searched or summed again."""
    if MAP != _SOFTMAX:
        return feature_map(x, SIGN, MAP, D, TILE)
    return _softmax_of_logs(x, logs, SIGN, TILE) - 1.0 / D


@gluon.jit
def feature_map_bwd(x, dphi, logs, SIGN: gl.constexpr, MAP: gl.constexpr, TILE: gl.constexpr):
    """dx of phi(SIGN x), x in pairs, by the logs of `feature_map_and_logs`.

    Any constant added to a row of dphi leaves softmax's dx as it is.
    """
    if MAP == _SOFTMAX:
        phi = _softmax_of_logs(x, logs, SIGN, TILE)
        dx = phi * (dphi - _row_dot(phi, dphi)[:, None])
    elif MAP == _RELU:
        even, odd = halves_of(x)
        dx = gl.where(join_halves(even, odd, TILE) * SIGN > 0, dphi, 0.0)
    else:
        dx = dphi
    return dx * SIGN


@gluon.jit
def _add_both(a1, a2, b1, b2):
    return a1 + b1, a2 + b2


@gluon.jit
def feature_map_bwd_of_both(x, dphi1, dphi2, logs1, logs2, MAP: gl.constexpr, TILE: gl.constexpr):
    """dx of phi(x) and phi(-x) together, for rows that several warps share: they meet once, not for each."""
    if MAP == _SOFTMAX:
        phi1, phi2 = _softmax_of_logs(x, logs1, 1.0, TILE), _softmax_of_logs(x, logs2, -1.0, TILE)
        d1, d2 = phi1 * dphi1, phi2 * dphi2
        sum1, sum2 = gl.reduce((d1, d2), 1, _add_both)
        dx = (d1 - phi1 * sum1[:, None]) - (d2 - phi2 * sum2[:, None])
    else:
        dx = feature_map_bwd(x, dphi1, logs1, 1.0, MAP, TILE) + feature_map_bwd(x, dphi2, logs2, -1.0, MAP, TILE)
    return dx


@gluon.jit
def load_logs(logs, head, rows, T, heads, MAP: gl.constexpr, PAIRED: gl.constexpr):
    """The logs of the rows of head `head` of heads, for both halves of the features; zeros where the map has none."""
    logs1 = (rows * 0).to(gl.float32)
    logs2 = logs1
    if MAP == _SOFTMAX:
        logs1 = gl.load(logs + head * T + rows, mask=rows < T, other=0.0)
        if PAIRED:
            logs2 = gl.load(logs + (heads + head) * T + rows, mask=rows < T, other=0.0)
    return logs1, logs2


@gluon.jit
def made_here(x):
    """x, and what is computed from it is computed here: the compiler takes it out of no loop."""
    WIDE: gl.constexpr = x.dtype == gl.int64
    MOVE: gl.constexpr = "mov.b64 $0, $1;" if WIDE else "mov.b32 $0, $1;"
    x = x if WIDE else x.to(gl.int32)
    return gl.inline_asm_elementwise(MOVE, "=l,l" if WIDE else "=r,r", [x], x.dtype, is_pure=False, pack=1)


@gluon.jit
def uniform(x):
    """A scalar that ptxas, too, knows to be the same for all threads of a warp. Behind a branch on any other it takes
    the threads for parted, and moves no load over a shuffle."""
    return gl.inline_asm_elementwise("shfl.sync.idx.b32 $0, $1, 0, 31, -1;", "=r,r", [x], x.dtype, is_pure=True, pack=1)


@gluon.jit
def loads_first():
    """Loads above begin above: ptxas lets what only a loop's next round reads sink to the end of this one."""
    gl.inline_asm_elementwise("bar.warp.sync -1; mov.b32 $0, $1;", "=r,r", [0], gl.int32, is_pure=False, pack=1)


@gluon.jit
def stride_here(x):
    """`made_here` of a row's or a head's stride: still known to be a multiple of 16, without which no load takes 16
    bytes."""
    return made_here(gl.to_tensor(x) // 16) * 16


@gluon.jit
def zero_of(x):
    """0, from any number that is not negative. Neither compiler knows that: an address that is computed from it is not
    taken for the one that is computed from 0, or from another number, and kept in registers from there to here."""
    return gl.minimum(x, 0)


@gluon.jit
def is_bad(x):
    """1 for rows of pairs with a NaN or an infinity: 0 times those is NaN."""
    ROWS: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    APART: gl.constexpr = columns_of_a_thread(x.type.layout)
    x = x & 0x7FFF7FFF
    for i in gl.static_range(len(APART)):
        a, b = _apart(x, APART[i])
        x = _larger_of_16_bits(a, b)
    largest = gl.max(gl.maximum(x & 0xFFFF, x >> 16), 1)
    return gl.convert_layout((largest >= 0x7F80).to(gl.int32), ROWS)


@gluon.jit
def _larger_of_16_bits(a, b):
    return gl.inline_asm_elementwise("max.u16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.int32, is_pure=True, pack=1)


@gluon.jit
def key_document(p_document, stride, carried_document, row, lag, T):
    """Document of the key of each row. Rows without a key: the carried document before, the last one behind."""
    key = gl.minimum(row, T - 1) - lag
    document = gl.load(p_document + key.to(gl.int64) * stride, mask=key >= 0, other=0)
    return gl.where(key >= 0, document, carried_document)


@gluon.jit
def document_of(p_document, stride, row, T, lag):
    """Document of the key of each row, of rows in front of all keys the first key's: along the rows it never falls."""
    key = gl.maximum(gl.minimum(row, T - 1) - lag, 0)
    return gl.load(p_document + key.to(gl.int64) * stride)


@gluon.jit
def none_reads(query_doc, key_doc, qdoc_st, doc_st, n, T, lag, C: gl.constexpr):
    """Whether chunk n's queries, and all behind them, are of later documents than its keys, and all before them."""
    youngest = document_of(key_doc, doc_st, n * C + C - 1, T, lag)
    return youngest < gl.load(query_doc + (n * C).to(gl.int64) * qdoc_st)


@gluon.jit
def add_carry(state, carry, factor, HAS_CARRY: gl.constexpr, HAS_FACTOR: gl.constexpr):
    """What the segment gathered up to the chunk, and the share of what came before the segment."""
    if HAS_CARRY:
        before = carry.to(gl.float32)
        if HAS_FACTOR:
            before = gl.where(factor == 0, 0.0, factor * before)
        state = (state.to(gl.float32) + before).to(state.dtype)
    return state
