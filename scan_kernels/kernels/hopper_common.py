"""What the Hopper stages share: tiles that move between global memory, registers and tensor cores without a shuffle.

A warpgroup's matrix product (wgmma) reads its left operand from registers in which a thread holds columns 2t, 2t+1,
8+2t, 8+2t+1, ... (t: lane % 4), and leaves its result in the same places. Loads of 16 bytes want columns 8t ... 8t+7.
Both are true at once if the columns are renamed: column c of memory is column p of the product, with the bits of the
index moved as `column_of` says. A sum over columns does not see their order, so q, k, v, do are all renamed alike on
the way in, o, dq, dk, dv back on the way out, and no tile passes through shared memory but the right operands.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from scan_kernels.kernels.common import RELU, SOFTMAX

_SOFTMAX = gl.constexpr(SOFTMAX.value)
_RELU = gl.constexpr(RELU.value)
_LOG2E = gl.constexpr(1.4426950408889634)


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
    s_x, p, stride, first, lower, upper, C: gl.constexpr, D: gl.constexpr, WARPS: gl.constexpr
):  # fmt: skip
    """Start the copy of rows first ... first + C of a tensor to shared memory, 0 outside lower <= row < upper."""
    COPY: gl.constexpr = copy_layout(D, WARPS)
    o_c = gl.arange(0, C, gl.SliceLayout(1, COPY))
    o_d = gl.arange(0, D, gl.SliceLayout(0, COPY))
    mask = (first + o_c >= lower) & (first + o_c < upper)
    source = row_pointer(p, first, stride) + ((o_c * stride)[:, None] + o_d[None, :])
    async_copy.async_copy_global_to_shared(s_x, source, mask=mask[:, None])


@gluon.jit
def load_tile(
    p, stride, first, lower, upper, C: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr,
    INDEX: gl.constexpr = gl.int32,
):  # fmt: skip
    """Rows first ... first + C of a tensor, 0 outside lower <= row < upper. INDEX: what costs fewer registers."""
    o_c = gl.arange(0, C, gl.SliceLayout(1, TILE)).to(INDEX)
    o_d = gl.arange(0, D, gl.SliceLayout(0, TILE))
    mask = (first + o_c >= lower) & (first + o_c < upper)
    source = row_pointer(p, first, stride) + ((o_c * stride)[:, None] + o_d[None, :])
    return gl.load(source, mask=mask[:, None], other=0.0)


@gluon.jit
def store_tile(
    p, stride, first, x, lower, upper, C: gl.constexpr, D: gl.constexpr, TILE: gl.constexpr,
    INDEX: gl.constexpr = gl.int32,
):  # fmt: skip
    """Write rows first ... first + C, none outside lower <= row < upper. INDEX: see `load_tile`."""
    o_c = gl.arange(0, C, gl.SliceLayout(1, TILE)).to(INDEX)
    o_d = gl.arange(0, D, gl.SliceLayout(0, TILE))
    mask = (first + o_c >= lower) & (first + o_c < upper)
    target = row_pointer(p, first, stride) + ((o_c * stride)[:, None] + o_d[None, :])
    gl.store(target, x.to(p.dtype.element_ty), mask=mask[:, None])


@gluon.jit
def _softmax(x, SIGN):
    """exp(SIGN x) of whole rows, scaled to a largest element of 1; one over its sum; log2 of the sum of exp(SIGN x)."""
    y = x.to(gl.float32) * SIGN
    top = gl.max(y, 1) * _LOG2E
    e = gl.exp2(y * _LOG2E - top[:, None])
    total = gl.sum(e, 1)
    # gl.log2 branches for what is denormal, and a branch holds up products under way; a total is from 1 to D.
    log = gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [total], gl.float32, is_pure=True, pack=1)
    return e, 1.0 / total, top + log


@gluon.jit
def feature_map_and_logs(x, SIGN, MAP: gl.constexpr, D: gl.constexpr):
    """phi(SIGN x) of whole rows, fp32, and for softmax, else 0, log2 of a row's sum of exp(SIGN x).

    Softmax features come less their mean 1/D: see docs/kernels.md, Precision.
    """
    if MAP == _SOFTMAX:
        e, share, logs = _softmax(x, SIGN)
        y = e * share[:, None] - 1.0 / D
    else:
        y = x.to(gl.float32) * SIGN
        if MAP == _RELU:
            y = gl.where(y != y, y, gl.maximum(y, 0.0))
        logs = gl.zeros_like(gl.sum(y, 1))
    return y, logs


@gluon.jit
def feature_map(x, SIGN, MAP: gl.constexpr, D: gl.constexpr):
    """phi(SIGN x) as `feature_map_and_logs` has it."""
    phi, _ = feature_map_and_logs(x, SIGN, MAP, D)
    return phi


@gluon.jit
def feature_map_of_logs(x, logs, SIGN, MAP: gl.constexpr, D: gl.constexpr):
    """phi(SIGN x) by the logs of `feature_map_and_logs`: no row is searched or summed again."""
    if MAP == _SOFTMAX:
        y = gl.exp2(x.to(gl.float32) * (SIGN * _LOG2E) - logs[:, None]) - 1.0 / D
    else:
        y = feature_map(x, SIGN, MAP, D)
    return y


@gluon.jit
def feature_map_bwd(x, dphi, SIGN, MAP: gl.constexpr, logs=None):
    """dx of phi(SIGN x). Any constant added to a row of dphi leaves softmax's dx as it is."""
    if MAP == _SOFTMAX:
        if logs is None:
            e, share, _ = _softmax(x, SIGN)
            phi = e * share[:, None]
        else:
            phi = gl.exp2(x.to(gl.float32) * (SIGN * _LOG2E) - logs[:, None])
        dx = phi * (dphi - gl.sum(phi * dphi, 1)[:, None])
    elif MAP == _RELU:
        dx = gl.where(x.to(gl.float32) * SIGN > 0, dphi, 0.0)
    else:
        dx = dphi
    return dx * SIGN


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
def is_bad(x):
    """1 for rows with a NaN or an infinity: 0 times those is NaN."""
    return (gl.sum(x.to(gl.float32) * 0.0, 1) != 0).to(gl.int32)


@gluon.jit
def key_document(p_document, stride, carried_document, row, lag, T):
    """Document of the key of each row. Rows without a key: the carried document before, the last one behind."""
    key = gl.minimum(row, T - 1) - lag
    document = gl.load(p_document + key.to(gl.int64) * stride, mask=key >= 0, other=0)
    return gl.where(key >= 0, document, carried_document)


@gluon.jit
def add_carry(state, carry, factor, HAS_CARRY: gl.constexpr, HAS_FACTOR: gl.constexpr):
    """What the segment gathered up to the chunk, and the share of what came before the segment."""
    if HAS_CARRY:
        before = carry.to(gl.float32)
        if HAS_FACTOR:
            before = gl.where(factor == 0, 0.0, factor * before)
        state = (state.to(gl.float32) + before).to(state.dtype)
    return state
