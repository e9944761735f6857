"""The report as plain values (what report.json holds), put together from the other files here.

`SCHEMA` changes when a key changes its meaning. Times are in seconds, sizes in bytes, work in FLOPs (a multiply-add is
two). None: not measured, not known, or not there.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import inspect
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from flexrattn.inspect import binary, compiler, memory, scan
from flexrattn.inspect.compiler import Matmul
from flexrattn.inspect.gpus import GPU, occupancy
from flexrattn.inspect.problem import Layer, Problem
from flexrattn.model import RAttentionModel
from score_mods.show import Picture, look_at

SCHEMA = 1
OF_REPORT = ("config", "flags", "model", "problem", "gpu", "versions", "health", "memory", "warnings")
OF_LAYER = ("name", "index", "count", "what", "heads", "mask", "no_scan_kernels", "memory", "flex")
LINEAR, SOFTMAX, SUM = "linear branch", "softmax branch", "sum of the branches"
PRODUCTS, OTHERS = "matrix products", "norms and the rest"
GROUPS = (LINEAR, SOFTMAX, SUM, PRODUCTS, OTHERS)
# Whose kernels are compiled without a GPU.
OURS = (LINEAR, SUM)


def shortened(name: str, most: int = 52) -> str:
    """With its middle left out where it is long: generated names are told apart by their beginnings and ends."""
    return name if len(name) <= most else f"{name[: most * 2 // 3]}...{name[-(most - most * 2 // 3 - 3) :]}"


@dataclass(kw_only=True)
class Kernel:
    """A kernel of one layer in one step. Sizes and work are those of all its `launches` together."""

    name: str
    group: str
    phase: str  # forward or backward
    launches: int = 1
    grid: list[int] | None = None
    flops: int | None = None
    bytes: int | None = None
    dtype: str = "bf16"  # of its products
    roofline_s: float | None = None
    bound: str = ""
    measured_s: float | None = None
    share: float | None = None  # roofline_s / measured_s
    registers: int | None = None
    spilled: int | None = None
    stack: int | None = None
    shared: int | None = None
    warps: int | None = None
    stages: int | None = None
    programs_per_sm: int | None = None
    warps_share: float | None = None
    occupancy_limit: str = ""
    waves: float | None = None
    tensor_cores: dict[str, int] = field(default_factory=dict)
    dots: list[dict[str, Any]] = field(default_factory=list)
    loads: dict[str, int] = field(default_factory=dict)
    stores: dict[str, int] = field(default_factory=dict)
    bulk_loads: int = 0
    options: dict[str, Any] = field(default_factory=dict)
    dynamic: bool | None = None
    note: str = ""
    files: dict[str, str] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)  # not in report.json: the files hold them


def finish(kernel: Kernel, gpu: GPU) -> Kernel:
    """With its roofline, and its share of it where it was timed."""
    if kernel.flops is not None and kernel.bytes is not None:
        kernel.roofline_s = gpu.roofline_s(kernel.flops, kernel.bytes, kernel.dtype)
        kernel.bound = gpu.bound(kernel.flops, kernel.bytes, kernel.dtype)
        if kernel.measured_s:
            kernel.share = kernel.roofline_s / kernel.measured_s
    return kernel


def read_texts(kernel: Kernel, asm: dict[str, str]) -> None:
    """What a kernel's TTGIR and PTX say of it."""
    if "ttgir" in asm:
        kernel.dots = [dataclasses.asdict(dot) for dot in binary.dots(asm["ttgir"])]
    if "ptx" in asm:
        kernel.tensor_cores = binary.tensor_core_instructions(asm["ptx"])
        moved = binary.accesses(asm["ptx"])
        kernel.loads = {str(width): n for width, n in moved.loads.items()}
        kernel.stores = {str(width): n for width, n in moved.stores.items()}
        kernel.bulk_loads = moved.bulk
    kernel.sources |= asm


def set_occupancy(kernel: Kernel, problem: Problem) -> None:
    if kernel.registers is None or kernel.shared is None or not kernel.warps:
        return
    fits = occupancy(problem.arch, registers=kernel.registers, shared=kernel.shared, warps=kernel.warps)
    kernel.programs_per_sm, kernel.warps_share = fits.programs, fits.warps_share
    kernel.occupancy_limit = fits.limit
    if kernel.grid and fits.programs:
        programs = 1
        for size in kernel.grid:
            programs *= size
        kernel.waves = programs / (fits.programs * problem.gpu.sms)


def begin_scan_kernels(
    problem: Problem, layer: Layer, compile_jobs: scan.CompileJobs, *, with_sass: bool
) -> tuple[Callable[[], list[Kernel]], str]:
    """What waits for the linear branch's kernels of a layer, and why there are none."""
    attention = layer.attention
    if attention.residual is None:
        return list, "the layer has no linear branch"
    shape = memory.scan_shape_of(problem, layer)
    if reason := scan.why_no_kernels(attention.residual.impl, shape):
        return list, reason
    launches = scan.scan_launches(shape)
    same = scan.different(launches)
    numbers = sorted(set(same.values()))
    wait = compile_jobs([(shape, number, with_sass) for number in numbers])

    def finished() -> list[Kernel]:
        results = dict(zip(numbers, wait(), strict=True))
        return [_scan_kernel(problem, shape, each, results[same[i]]) for i, each in enumerate(launches)]

    return finished, ""


def _scan_kernel(problem: Problem, shape: scan.ScanShape, each: scan.ScanLaunch, compiled: scan.Compiled) -> Kernel:
    flops, nbytes = scan.work(each.launch)
    # Values that are taken in parts take the linear branch's kernels several times.
    launches = 1 if each.sums else shape.parts
    kernel = Kernel(
        name=each.name,
        group=SUM if each.sums else LINEAR,
        phase="backward" if each.backward else "forward",
        launches=launches,
        grid=list(each.launch.grid),
        flops=None if flops is None else flops * launches,
        bytes=nbytes * launches,
        dtype="fp32" if shape.dtype == torch.float32 else "bf16",
        warps=each.launch.options.get("num_warps"),
        stages=each.launch.options.get("num_stages"),
        note=compiled.error,
    )
    wanted = ("C", "D", "DV", "F", "R", "SEGMENT", "BLOCK_F", "BLOCK_V", "HEADS")
    kernel.options = {name: each.launch.args[name] for name in wanted if name in each.launch.args}
    kernel.sources["python"] = inspect.getsource(each.launch.kernel.fn)
    if not compiled.error:
        kernel.registers, kernel.spilled, kernel.stack = compiled.registers, compiled.spilled, compiled.stack
        kernel.shared, kernel.warps = compiled.shared, compiled.warps
        read_texts(kernel, compiled.asm)
        set_occupancy(kernel, problem)
    return kernel


def softmax_kernels_of(problem: Problem, layer: Layer, pairs: int) -> list[Kernel]:
    """FlexAttention forward and backward: the work of the pairs that the mask keeps.

    Forward two products (q k^T, p v), backward five (those of dq, dk, dv, and both of the forward's inputs again).
    """
    attention = layer.attention
    if not attention.has_softmax:
        return []
    B, T, D = problem.batch, problem.seq_len, attention.head_dim
    halves = 2 if attention.splits_heads else 1
    H, G = attention.n_heads // halves, attention.n_kv_heads // halves
    size = problem.torch_dtype.itemsize
    queries, keys, rows = B * T * H * D * size, B * T * G * D * size, B * T * H * 4
    product = 2 * D * H * B * pairs
    common: dict[str, Any] = {"group": SOFTMAX, "dtype": "fp32" if problem.dtype == "fp32" else "bf16"}
    return [
        Kernel(
            name="flex_attention",
            phase="forward",
            flops=2 * product,
            bytes=2 * queries + 2 * keys + rows,
            **common,
        ),
        Kernel(
            name="flex_attention backward",
            phase="backward",
            flops=5 * product,
            bytes=3 * queries + 4 * keys + 2 * rows,
            **common,
        ),
    ]


def product_kernels_of(problem: Problem, traced: memory.Traced) -> list[Kernel]:
    """The layer's matrix products with weights; equal shapes are one row."""
    kernels = []
    for phase, found in (("forward", traced.forward), ("backward", traced.backward)):
        counted: dict[Matmul, int] = {}
        for product in found:
            counted[product] = counted.get(product, 0) + 1
        for product, n in counted.items():
            name = f"{product.M} x {product.K} by {product.K} x {product.N}"
            kernels.append(
                Kernel(
                    name=name if product.batch == 1 else f"{product.batch} of {name}",
                    group=PRODUCTS,
                    phase=phase,
                    launches=n,
                    flops=n * product.flops,
                    bytes=n * product.nbytes,
                    dtype="fp32" if product.dtype == torch.float32 else "bf16",
                )
            )
    return kernels


def mask_of(problem: Problem, layer: Layer) -> tuple[dict[str, Any] | None, int]:
    """The layer's mask as blocks and counts, and the pairs that it keeps in one row."""
    if not layer.attention.has_softmax:
        return None, 0
    block_size = 128
    picture = look_at(problem.mask(layer, whole=True), seq_len=problem.seq_len, block_size=block_size)
    computed = (picture.count(1) + picture.count(2)) * block_size**2
    return {
        "name": picture.name,
        "seq_len": picture.seq_len,
        "block_size": block_size,
        "blocks": _rows(picture),
        "skipped": picture.count(0),
        "partial": picture.count(1),
        "full": picture.count(2),
        "kept_pairs": picture.kept_pairs,
        "keys_per_query": picture.kept_pairs / picture.seq_len,
        "of_all_pairs": picture.kept_pairs / picture.seq_len**2,
        "of_causal_pairs": picture.kept_pairs / (picture.seq_len * (picture.seq_len + 1) / 2),
        "of_computed_pairs": picture.kept_pairs / computed if computed else None,
    }, picture.kept_pairs


_WIDEST = 64


def _rows(picture: Picture) -> list[str]:
    """The blocks as strings of 0 (skipped), 1 (partial) and 2 (full), at most 64 cells each way."""
    blocks = picture.blocks
    merged = -(-max(blocks.shape) // _WIDEST)
    rows = []
    for top in range(0, blocks.shape[0], merged):
        cells = []
        for left in range(0, blocks.shape[1], merged):
            cell = blocks[top : top + merged, left : left + merged]
            kinds = set(cell.flatten().tolist())
            cells.append(str(kinds.pop()) if len(kinds) == 1 else "1")
        rows.append("".join(cells))
    return rows


def layer_report(problem: Problem, layer: Layer, compile_jobs: scan.CompileJobs, *, with_sass: bool) -> dict[str, Any]:
    """All that is known of a layer without running it."""
    scan_kernels, no_scan = begin_scan_kernels(problem, layer, compile_jobs, with_sass=with_sass)
    mask, pairs = mask_of(problem, layer)
    traced = memory.trace(problem, layer)
    policy = problem.config.activation_checkpoint
    checkpointed = memory.trace(problem, layer, checkpointing=True) if policy is not None else traced
    kernels = [*scan_kernels(), *softmax_kernels_of(problem, layer, pairs), *product_kernels_of(problem, traced)]
    attention = layer.attention
    return {
        "name": layer.name,
        "index": layer.index,
        "count": layer.count,
        "what": layer.describe(),
        "heads": {"H": attention.n_heads, "G": attention.n_kv_heads, "D": attention.head_dim},
        "mask": mask,
        "no_scan_kernels": no_scan,
        "kernels": [finish(kernel, problem.gpu) for kernel in kernels],
        "memory": {
            "traced": traced.kept_bytes,
            "traced_checkpointed": checkpointed.kept_bytes,
            "measured": None,
            "measured_checkpointed": None,
        },
        "flex": None,
    }


def head_of(problem: Problem) -> dict[str, Any]:
    """What the report is about, and what it was made with. No date: equal runs give equal files."""
    config, gpu = problem.config, problem.gpu
    policy = config.activation_checkpoint
    model: RAttentionModel.Config = problem.model
    return {
        "schema": SCHEMA,
        "config": problem.source,
        "flags": list(problem.flags),
        "model": {
            "layers": len(model.layers),
            "dim": model.dim,
            "vocab_size": model.vocab_size,
            "checkpointing": "none" if policy is None else type(policy).__qualname__.partition(".")[0],
            "compile": bool(config.compile.enable and "model" in config.compile.components),
        },
        "problem": {
            "batch": problem.batch,
            "seq_len": problem.seq_len,
            "dtype": problem.dtype,
            "documents": list(problem.documents),
            "arch": problem.arch,
        },
        "gpu": {**dataclasses.asdict(gpu), "device": torch.cuda.get_device_name() if problem.on_device else None},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "ptxas": compiler.ptxas_version(),
            "torchtitan": _version("torchtitan"),
        },
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def model_memory(layers: Sequence[dict[str, Any]], n_layers: int) -> dict[str, Any]:
    """Kept by all layers of the model together, where the layers looked at are all that it has."""
    if sum(layer["count"] for layer in layers) != n_layers:
        return dict.fromkeys(("traced", "traced_checkpointed", "measured", "measured_checkpointed"))
    found: dict[str, Any] = {}
    for key in ("traced", "traced_checkpointed", "measured", "measured_checkpointed"):
        each = [(layer["memory"][key], layer["count"]) for layer in layers]
        found[key] = None if any(kept is None for kept, _ in each) else sum(kept * n for kept, n in each)
    return found


def warnings_of(report: dict[str, Any]) -> list[str]:
    """What a reader should look at first."""
    found = []
    for layer in report["layers"]:
        if layer["no_scan_kernels"] and "no linear branch" not in layer["no_scan_kernels"]:
            found.append(f"{layer['name']}: no kernels of the linear branch, {layer['no_scan_kernels']}")
        for kernel in layer["kernels"]:
            name = f"{layer['name']}, {kernel.phase}, {shortened(kernel.name)}"
            found += [f"{name}: {text}" for text in _kernel_warnings(kernel)]
    return list(dict.fromkeys(found))


def _kernel_warnings(kernel: Kernel) -> list[str]:
    found = []
    if kernel.group in OURS and kernel.note:
        found.append(f"does not compile: {kernel.note}")
    if kernel.spilled:
        found.append(f"{kernel.spilled} bytes of registers spilled a thread")
    if kernel.programs_per_sm == 0:
        found.append(f"{kernel.shared} bytes of shared memory are more than a program may have")
    slow = [dot["where"] for dot in kernel.dots if not dot["tensor_cores"]]
    if slow:
        found.append(f"products without tensor cores: {', '.join(dict.fromkeys(slow))}")
    if kernel.dynamic:
        found.append("compiled for dynamic shapes, which makes FlexAttention 26-38 % slower (docs/kernels.md)")
    return found


def to_json(report: dict[str, Any]) -> dict[str, Any]:
    """Plain values, the kernels' sources left to their files."""

    def plain(value: Any) -> Any:
        if isinstance(value, Kernel):
            fields = dataclasses.asdict(value)
            del fields["sources"]
            return fields
        if isinstance(value, dict):
            return {key: plain(x) for key, x in value.items()}
        if isinstance(value, list):
            return [plain(x) for x in value]
        return value

    return plain(report)


def from_json(plain: dict[str, Any], source: str) -> dict[str, Any]:
    """A report as `to_json` wrote it; ValueError for anything else."""
    if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
        given = plain.get("schema") if isinstance(plain, dict) else None
        raise ValueError(f"{source} is no report of this version (schema {SCHEMA}, got {given}): make it again")
    try:
        layers = [{**layer, "kernels": [Kernel(**kernel) for kernel in layer["kernels"]]} for layer in plain["layers"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{source} is no report: {error}") from error
    for found, wanted in ((plain, OF_REPORT), *((layer, OF_LAYER) for layer in layers)):
        if absent := [key for key in wanted if key not in found]:
            raise ValueError(f"{source} is no whole report, it lacks {', '.join(absent)}: make it again")
    return {**plain, "layers": layers}
