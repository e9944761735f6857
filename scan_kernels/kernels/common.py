"""What the stages share: feature maps, document ids and states, as they are read inside a kernel.

Rows: row i of a chunk is query i and the youngest key that it reads, key i - lag (none where that is negative).
Letters: C rows of a chunk, D width of a query or key, DV width of a value, F features. `SIGN` picks the half of a
paired map.
"""

import triton
import triton.language as tl

SOFTMAX = tl.constexpr(0)
RELU = tl.constexpr(1)
IDENTITY = tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def feature_map(x, SIGN, MAP: tl.constexpr, D: tl.constexpr):
    """phi(SIGN x) over whole rows, fp32. Softmax features come less their mean 1/D: see docs/kernels.md, Precision."""
    y = x.to(tl.float32) * SIGN
    if MAP == SOFTMAX:
        e = tl.exp2((y - tl.max(y, 1)[:, None]) * LOG2E)
        y = e * (1.0 / tl.sum(e, 1))[:, None] - 1.0 / D
    elif MAP == RELU:
        y = tl.maximum(y, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return y


@triton.jit
def feature_map_bwd(x, dphi, SIGN, MAP: tl.constexpr, D: tl.constexpr):
    """dx of phi(SIGN x). Any constant added to a row of dphi leaves softmax's dx as it is."""
    if MAP == SOFTMAX:
        phi = feature_map(x, SIGN, MAP, D) + 1.0 / D
        dx = phi * (dphi - tl.sum(phi * dphi, 1)[:, None])
    elif MAP == RELU:
        dx = tl.where(x.to(tl.float32) * SIGN > 0, dphi, 0.0)
    else:
        dx = dphi
    return dx * SIGN


@triton.jit
def row_dot(x, dphi, SIGN, MAP: tl.constexpr, D: tl.constexpr):
    """phi(SIGN x) . dphi of every row, fp32."""
    return tl.sum(feature_map(x, SIGN, MAP, D) * dphi, 1)


@triton.jit
def is_bad(x):
    """Rows with a NaN or an infinity."""
    x = x.to(tl.float32)
    return tl.max((x - x != 0).to(tl.int32), 1) != 0


@triton.jit
def key_document(p_document, stride, carried_document, row, lag, T):
    """Document of the key of each row. Rows without a key: the carried document before, the last one behind."""
    key = tl.minimum(row, T - 1) - lag
    document = tl.load(p_document + key.to(tl.int64) * stride, mask=key >= 0, other=0)
    return tl.where(key >= 0, document, carried_document)


@triton.jit
def scaled(factor, state):
    """factor * state, and 0 where the factor is 0: another document's NaN must not pass."""
    return tl.where(factor == 0, 0.0, factor * state)


@triton.jit
def load_state(p_state, p_carry, factor, HAS_CARRY: tl.constexpr, HAS_FACTOR: tl.constexpr):
    """What the segment gathered up to the chunk, and the share of what came before the segment."""
    state = tl.load(p_state)
    if HAS_CARRY:
        carry = tl.load(p_carry).to(tl.float32)
        if HAS_FACTOR:
            carry = scaled(factor, carry)
        state = (state.to(tl.float32) + carry).to(p_state.dtype.element_ty)
    return state


@triton.jit
def long_product(a, b, sums, PARTS: tl.constexpr, PRECISION: tl.constexpr):
    """sums + a b. fp32 products are made of whole rows of a and columns of b in registers: here of PARTS of them, each
    by other threads."""
    if a.dtype == tl.float32 and PARTS > 1:
        PART: tl.constexpr = a.shape[1] // PARTS
        a = tl.permute(tl.reshape(a, (a.shape[0], PARTS, PART)), (1, 0, 2))
        b = tl.reshape(b, (PARTS, PART, b.shape[1]))
        return sums + tl.sum(tl.dot(a, b, input_precision=PRECISION), 0)
    else:
        return tl.dot(a, b, sums, input_precision=PRECISION)
