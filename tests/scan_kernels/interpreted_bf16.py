"""bf16 under Triton's interpreter, which keeps it as uint16: it truncates where a GPU rounds, and its products multiply
the bits as whole numbers. `correct` gives both what the GPU does: rounding to nearest, sums of products in fp32.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def rounded(x: np.ndarray) -> np.ndarray:
    """fp32 -> the bits of bf16."""
    bits = torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return bits.reshape(x.shape)


def widened(bits: np.ndarray) -> np.ndarray:
    """The bits of bf16 -> fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def correct(monkeypatch) -> None:
    cast, convert = InterpreterBuilder.cast_impl, InterpreterBuilder.create_fp_to_fp
    dot = InterpreterBuilder.create_dot

    def exact(self, src, dst_type):
        types = src.dtype.scalar, dst_type.scalar
        if types == (tl.float32, tl.bfloat16):
            return TensorHandle(rounded(src.data), tl.bfloat16)
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle(widened(src.data), tl.float32)
        return None

    def wide(x):
        return TensorHandle(widened(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    monkeypatch.setattr(
        InterpreterBuilder, "cast_impl", lambda self, src, dst: exact(self, src, dst) or cast(self, src, dst)
    )
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_fp_to_fp",
        lambda self, src, dst, mode: exact(self, src, dst) or convert(self, src, dst, mode),
    )
    monkeypatch.setattr(
        InterpreterBuilder, "create_dot", lambda self, a, b, *others: dot(self, wide(a), wide(b), *others)
    )
    assert interpreter.interpreter_builder.__class__ is InterpreterBuilder
