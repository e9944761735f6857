"""What is read from TTGIR and PTX, on lines as Triton 3.6 and 3.8 write them, and on kernels compiled here."""

from __future__ import annotations

import pytest
import torch

from flexrattn.inspect import binary

TTGIR = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [2, 16], warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 3, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 64, 16]}>
#shared = #ttg.nvmma_shared<{swizzlingByteWidth = 128, transposed = false, elementBitWidth = 16}>
#loc = loc("/a/b/kernel.py":10:0)
#loc1 = loc(unknown)
      %x = ttng.warp_group_dot %a, %b, %c, %false {inputPrecision = 0 : i32, isAsync = true} : tensor<64x128xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>> * !ttg.memdesc<128x32xbf16, #shared, #smem, mutable> -> tensor<64x32xf32, #mma> loc(#loc7)
      %w = ttng.warp_group_dot_wait %x {pendings = 1 : i32} : tensor<64x32xf32, #mma> loc(#loc7)
      %y = tt.dot %a, %b, %c, inputPrecision = ieee : tensor<16x64xf32, #ttg.dot_op<{opIdx = 0, parent = #blocked}>> * tensor<64x32xf32, #ttg.dot_op<{opIdx = 1, parent = #blocked}>> -> tensor<16x32xf32, #blocked> loc(#loc8)
      %z = tt.dot %a, %b, %c : tensor<16x64xbf16, #ttg.dot_op<{opIdx = 0, parent = #mma, kWidth = 2}>> * tensor<64x32xbf16, #ttg.dot_op<{opIdx = 1, parent = #mma, kWidth = 2}>> -> tensor<16x32xf32, #mma> loc(#loc1)
      ttng.tc_gen5_mma %a, %b, %c[], %true, %true : !ttg.memdesc<128x64xbf16, #shared, #smem>, !ttg.memdesc<64x256xbf16, #shared, #smem>, !ttg.memdesc<128x256xf32, #tmem, #ttng.tensor_memory, mutable> loc(#loc6)
#loc5 = loc("/a/b/helpers.py":7:11)
#loc6 = loc("out"(#loc5))
#loc7 = loc(callsite(#loc6 at #loc))
#loc8 = loc("y"(#loc))
"""  # noqa: E501

PTX = """
	@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
	ld.global.L1::evict_last.b32 { %r1 }, [ %rd1 + 0 ];
	@!%p1 ld.global.v2.b64 { %rd1, %rd2 }, [ %rd1 + 0 ];
	ld.global.b16 %rs1, [ %rd2 ];
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r5];
	@%p4 st.global.v8.b32 [ %rd8 + 0 ], { %r1, %r2 };
	cp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
	@%p3 cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 4;
	@%p1 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
	wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, %p1, 1, 1, 0, 0;
	wgmma.fence.sync.aligned;
	@%p9 tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r3, %p1;
	mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f2 };
"""


def test_products():
    found = binary.dots(TTGIR)
    assert [(dot.M, dot.K, dot.N, dot.dtype, dot.tensor_cores) for dot in found] == [
        (64, 128, 32, "bf16", True),
        (16, 64, 32, "f32", False),
        (16, 64, 32, "bf16", True),
        (128, 64, 256, "bf16", True),
    ]
    assert [dot.where for dot in found] == ["helpers.py:7", "kernel.py:10", "", "helpers.py:7"]


def test_instructions():
    assert binary.tensor_core_instructions(PTX) == {"wgmma.mma_async": 1, "tcgen05.mma": 1, "mma.sync": 1}
    found = binary.accesses(PTX)
    assert found.loads == {2: 1, 4: 2, 16: 3}
    assert found.stores == {32: 1}
    assert found.bulk == 1
    assert (found.wide_loads, found.narrow_loads) == (4, 3)


@pytest.mark.parametrize(
    ("capability", "dtype", "instruction"),
    [(80, torch.bfloat16, "mma.sync"), (90, torch.bfloat16, "wgmma.mma_async"), (100, torch.bfloat16, "tcgen05.mma")],
)
def test_compiled_kernels(capability, dtype, instruction):
    pytest.importorskip("triton")
    from flexrattn.inspect import scan

    shape = _shape(capability, dtype)
    number = next(i for i, x in enumerate(scan.scan_launches(shape)) if "output" in x.name)
    compiled = scan.compile_one((shape, number, False))
    assert not compiled.error
    assert binary.tensor_core_instructions(compiled.asm["ptx"])[instruction] > 0
    products = binary.dots(compiled.asm["ttgir"])
    assert len(products) == 5  # both halves of scores and state, and the values
    assert all(dot.tensor_cores and dot.where.partition(":")[0].endswith(".py") for dot in products)
    assert binary.accesses(compiled.asm["ptx"]).wide_loads > 0


def test_products_of_fp32_are_not_on_tensor_cores():
    pytest.importorskip("triton")
    from flexrattn.inspect import scan

    compiled = scan.compile_one((_shape(90, torch.float32), 0, False))
    (product,) = binary.dots(compiled.asm["ttgir"])
    assert not product.tensor_cores
    assert product.where.startswith("chunk_state.py:")
    assert not binary.tensor_core_instructions(compiled.asm["ptx"])


def _shape(capability, dtype):
    from flexrattn.inspect.scan import ScanShape

    return ScanShape(
        B=2,
        T=512,
        H=4,
        G=2,
        D=64,
        dtype=dtype,
        window=100,
        feature_map="softmax",
        save_every=16,
        start=False,
        joined="",
        summed=False,
        decays=False,
        capability=capability,
    )
