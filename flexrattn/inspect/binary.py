"""What a compiled Triton kernel's texts say: products and where they run, widths of memory accesses.

TTGIR names every product with the layout of its result and the source line it comes from; PTX names the instructions.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

# TTGIR operations that multiply tiles. `tt.dot` runs on tensor cores if its result has an mma layout, else by FMA.
_DOT = re.compile(r"(?:^|=)\s*(ttng\.warp_group_dot|ttng\.tc_gen5_mma(?:_scaled)?|tt\.dot(?:_scaled)?)\s(.*)$")
_SHAPED = re.compile(r"(?:tensor|!ttg\.memdesc)<((?:\d+x)+)(\w+),\s*(#?[\w.]+)")
_LOC_AT_END = re.compile(r"loc\((#loc\d*)\)\s*$")
_LOC = re.compile(r"^(#loc\d*) = loc\((.*)\)\s*$")
_FILE_LOC = re.compile(r'"([^"]+\.py)":(\d+):\d+')
_LAYOUT = re.compile(r"^(#\w+) = #(\w+)\.(\w+)<", re.MULTILINE)

_TENSOR_CORE = re.compile(r"^\s*(?:@!?%?\w+\s+)?((?:wgmma\.mma_async|tcgen05\.mma|mma\.sync|wmma\.mma)[\w.:]*)", re.M)
_GLOBAL = re.compile(r"^\s*(?:@!?%\w+\s+)?((ld|st)\.global[\w.:]*)\s", re.M)
_ASYNC_COPY = re.compile(
    r"^\s*(?:@!?%\w+\s+)?cp\.async\.c[ag]\.shared\.global[\w.:]*\s*"
    r"\[[^\]]+\]\s*,\s*\[[^\]]+\]\s*,\s*(0x[0-9a-fA-F]+|\d+)",
    re.M,
)
_BULK_COPY = re.compile(r"^\s*(?:@!?%\w+\s+)?cp\.async\.bulk\.tensor[\w.:]*", re.M)
_BITS = re.compile(r"\.[bfsu](8|16|32|64|128)\b")
_VECTOR = re.compile(r"\.v(2|4|8)\b")


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A product of tiles in the compiled program: (M x K) by (K x N)."""

    op: str
    M: int
    N: int
    K: int
    dtype: str
    tensor_cores: bool
    where: str  # file:line


@dataclass(frozen=True, kw_only=True)
class Accesses:
    """Instructions that move data between global memory and the SM, by bytes a thread moves; bulk copies apart."""

    loads: dict[int, int]
    stores: dict[int, int]
    bulk: int

    @property
    def wide_loads(self) -> int:
        return self.bulk + sum(n for width, n in self.loads.items() if width >= 16)

    @property
    def narrow_loads(self) -> int:
        return sum(n for width, n in self.loads.items() if width < 16)


def tensor_core_instructions(ptx: str) -> dict[str, int]:
    """{"wgmma.mma_async": 36}: how often each kind stands in the code."""
    return dict(Counter(".".join(found.split(".")[:2]) for found in _TENSOR_CORE.findall(ptx)))


def accesses(ptx: str) -> Accesses:
    """Loads and stores of global memory in the code, and asynchronous copies to shared memory as loads."""
    widths: dict[str, Counter[int]] = {"ld": Counter(), "st": Counter()}
    for instruction, kind in _GLOBAL.findall(ptx):
        bits = _BITS.search(instruction)
        if bits is not None:
            vector = _VECTOR.search(instruction)
            widths[kind][int(bits[1]) // 8 * (int(vector[1]) if vector else 1)] += 1
    for size in _ASYNC_COPY.findall(ptx):
        widths["ld"][int(size, 0)] += 1
    return Accesses(
        loads=dict(sorted(widths["ld"].items())),
        stores=dict(sorted(widths["st"].items())),
        bulk=len(_BULK_COPY.findall(ptx)),
    )


def dots(ttgir: str) -> list[Dot]:
    """Every product of tiles, in the order of the code; loops count once."""
    layouts = {name: kind for name, _, kind in _LAYOUT.findall(ttgir)}
    locations = _locations(ttgir)
    found = []
    for line in ttgir.splitlines():
        match = _DOT.search(line)
        if match is None:
            continue
        op, rest = match.groups()
        shaped = _SHAPED.findall(rest)
        if len(shaped) < 2:
            continue
        (left, dtype, _), (right, _, _) = shaped[:2]
        M, K = _last_two(left)
        N = _last_two(right)[1]
        # The result's layout: the last type of the line. tcgen05 leaves its result in tensor memory.
        on_tensor_cores = not op.startswith("tt.dot") or "mma" in layouts.get(shaped[-1][2], "").lower()
        location = _LOC_AT_END.search(rest)
        where = locations.get(location[1], "") if location else ""
        found.append(Dot(op=op, M=M, N=N, K=K, dtype=dtype, tensor_cores=on_tensor_cores, where=where))
    return found


def _last_two(shape: str) -> tuple[int, int]:
    sizes = [int(size) for size in shape.rstrip("x").split("x")]
    return sizes[-2], sizes[-1]


def _locations(ttgir: str) -> dict[str, str]:
    """{"#loc12": "hopper_query.py:125"}: where inlined calls end, in the innermost source line."""
    found = filter(None, map(_LOC.match, ttgir.splitlines()))
    texts = {match[1]: match[2] for match in found}

    def resolve(text: str, depth: int = 0) -> str:
        direct = _FILE_LOC.search(text)
        if direct is not None:
            return f"{Path(direct[1]).name}:{direct[2]}"
        # "name"(#loc3) and callsite(#loc3 at #loc4): the first names the callee's line.
        inner = re.search(r"#loc\d*", text)
        if inner is None or depth > 20:
            return ""
        return resolve(texts.get(inner[0], ""), depth + 1)

    return {name: resolve(text) for name, text in texts.items()}
