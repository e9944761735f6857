"""Everything here that torch calls private: Dynamo's tracing, AOTAutograd's split, Inductor's kernels and logs.

Tried with torch 2.11 and 2.14. A name that moves is to be looked for in this file alone:

    torch._dynamo.backends.common.aot_autograd         a backend that sees the split graphs
    torch._functorch.partitioners                      the split into forward and backward that Inductor takes
    torch._subclasses.fake_tensor.FakeTensorMode       tensors without memory
    torch._inductor.runtime.triton_heuristics          CachingAutotuner, by which generated kernels are launched
    torch._inductor.runtime.compile_tasks              the ptxas that comes with torch
    torch._logging                                     graph breaks and recompilations, as they are logged
    torch.nn.attention.flex_attention._validate_device, scan_kernels.api.refusal
                                                       looked past while a layer is traced without a GPU
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from flexrattn.inspect.paths import without_paths
from flexrattn.quiet import quiet_log


@dataclass(frozen=True, kw_only=True)
class SplitGraphs:
    """A layer's forward and backward as the compiler gets them. `kept`: tensors that the forward leaves for the
    backward, without parameters and inputs; `outputs`: the forward's results."""

    kept: list[Tensor]
    outputs: list[Tensor]
    forward: Any  # torch.fx.GraphModule
    backward: Any


def assembles_as_training() -> None:
    """Let Triton take the ptxas that comes with torch, if one does, as torch.compile does for all that follows it.

    Triton's own is of another CUDA version, and makes other registers and spills of the same kernel.
    """
    try:
        from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
    except ImportError:
        return
    _set_triton_ptxas_path()


def ptxas_version() -> str:
    """Of the assembler that `assembles_as_training` leaves in place; "" without Triton."""
    assembles_as_training()
    try:
        from triton import knobs
    except ImportError:
        return ""
    return str(knobs.nvidia.ptxas.version)


class NotOneGraph(ValueError):
    """A layer that torch.compile(fullgraph=True) does not take, with the place in the source."""


def trace_layer(make: Callable[[], torch.nn.Module], inputs: Callable[[], Sequence[Any]]) -> SplitGraphs:
    """The graphs of make()(*inputs()), traced on the meta device: no GPU and no memory.

    Split as Inductor splits them: what is cheap is computed again in the backward. Raises NotOneGraph.
    """
    from torch._dynamo.backends.common import aot_autograd
    from torch._dynamo.exc import TorchDynamoException
    from torch._functorch.partitioners import min_cut_rematerialization_partition

    found: list[SplitGraphs] = []

    def split(joint: Any, joint_inputs: Any, **options: Any) -> tuple[Any, Any]:
        forward, backward = min_cut_rematerialization_partition(joint, joint_inputs, compiler="inductor", **options)
        found.append(_split_graphs(forward, backward, options["num_fwd_outputs"]))
        return forward, backward

    backend = aot_autograd(
        fw_compiler=lambda graph, _: graph.forward, bw_compiler=lambda graph, _: graph.forward, partition_fn=split
    )
    torch.compiler.reset()
    try:
        with _as_on_a_gpu():
            module, arguments = make(), inputs()
            torch.compile(module, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    except TorchDynamoException as error:
        text = str(error)
        raise NotOneGraph(f"{_reason(text)} (at {_last_place(text) or 'no line that is known'})") from error
    finally:
        torch.compiler.reset()
    (graphs,) = found
    return graphs


# Dynamo goes into functions, and not into mocks.
def _nothing(*_: Any) -> None:
    return None


def _no_reason(*_: Any) -> str:
    return ""


@contextlib.contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """FlexAttention and the linear branch's kernels take fake tensors of the meta device."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with (
        mock.patch("torch.nn.attention.flex_attention._validate_device", _nothing),
        mock.patch("scan_kernels.api.refusal", _no_reason),
        FakeTensorMode(allow_non_fake_inputs=True),
        torch.device("meta"),
        warnings.catch_warnings(),
        quiet_log(),  # what tracing warns of is said again where the model is trained
    ):
        warnings.simplefilter("ignore")
        yield


def _split_graphs(forward: Any, backward: Any, number: int) -> SplitGraphs:
    results = next(node for node in forward.graph.nodes if node.op == "output").args[0]
    outputs = [node.meta["val"] for node in results[:number] if isinstance(node, torch.fx.Node)]
    kept = [
        node.meta["val"]
        for node in results[number:]
        if isinstance(node, torch.fx.Node) and node.op != "placeholder" and isinstance(node.meta.get("val"), Tensor)
    ]
    return SplitGraphs(kept=kept, outputs=outputs, forward=forward, backward=backward)


def storage_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes of the memory behind tensors, of which some may be views of others."""
    storages = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


@dataclass(frozen=True, kw_only=True)
class Matmul:
    """(M x K) by (K x N), `batch` times."""

    batch: int
    M: int
    N: int
    K: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.M * self.N * self.K

    @property
    def nbytes(self) -> int:
        elements = self.M * self.K + self.K * self.N + self.M * self.N
        return self.batch * elements * self.dtype.itemsize


def matmuls(graph: Any) -> list[Matmul]:
    """The matrix products of a traced graph."""
    aten = torch.ops.aten
    first = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}
    found = []
    for node in graph.graph.nodes:
        if node.target not in first:
            continue
        left, right = (arg.meta["val"] for arg in node.args[first[node.target] :][:2])
        batch = left.shape[0] if left.dim() == 3 else 1
        M, K, N = int(left.shape[-2]), int(left.shape[-1]), int(right.shape[-1])
        found.append(Matmul(batch=int(batch), M=M, N=N, K=K, dtype=left.dtype))
    return found


@dataclass(frozen=True, kw_only=True)
class InductorKernel:
    """A Triton kernel that Inductor generated, as it was launched. nbytes: the tensors of its arguments once, of one
    that is read by an index no more than is written."""

    name: str
    source: str
    constants: dict[str, Any]  # tl.constexpr values: block sizes, and FlexAttention's options
    warps: int | None
    stages: int | None
    registers: int | None
    spilled: int | None
    shared: int | None
    asm: dict[str, str]
    nbytes: int
    dynamic: bool  # a size is an argument of the kernel


@contextlib.contextmanager
def inductor_kernels() -> Iterator[list[InductorKernel]]:
    """Every Triton kernel of Inductor that is launched inside, once each, in order. Compiles anew, past the caches."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.runtime.triton_heuristics import CachingAutotuner, TritonCompileResult

    seen: dict[int, tuple[Any, int, bool]] = {}
    run = CachingAutotuner.run

    def recorded(self: Any, *args: Any, **options: Any) -> Any:
        result = run(self, *args, **options)
        if id(self) not in seen:
            seen[id(self)] = (self, argument_bytes(self.fn.arg_names, args, self.fn.src), bool(_size_arguments(self)))
        return result

    make_launcher = TritonCompileResult.make_launcher

    def with_texts(self: Any) -> Any:
        launcher = make_launcher(self)
        launcher.texts = self.kernel.asm
        return launcher

    found: list[InductorKernel] = []
    settings = {"fx_graph_cache": False}
    if hasattr(torch._inductor.config, "use_static_cuda_launcher"):
        settings["use_static_cuda_launcher"] = False  # it keeps no texts of the kernel
    with (
        torch._inductor.config.patch(settings),
        torch._functorch.config.patch(enable_autograd_cache=False),
        mock.patch.object(CachingAutotuner, "run", recorded),
        mock.patch.object(TritonCompileResult, "make_launcher", with_texts),
    ):
        yield found
    found.extend(_inductor_kernel(*each) for each in seen.values())


def argument_bytes(names: Sequence[str], args: Sequence[Any], source: str) -> int:
    """Bytes of a generated kernel's tensors, each once. A gather (the bounds of its index are checked) reads no more of
    a table than it writes."""
    sizes: dict[int, int] = {}
    written = 0
    for name, x in zip(names, args, strict=False):
        if isinstance(x, Tensor):
            sizes[x.data_ptr()] = x.numel() * x.element_size()
            written += sizes[x.data_ptr()] if "out_ptr" in name else 0
    if "index out of bounds" in source and written:
        sizes = {pointer: min(size, written) for pointer, size in sizes.items()}
    return sum(sizes.values())


def _size_arguments(kernel: Any) -> list[str]:
    """Names of the arguments that are sizes of tensors (ks0, ...): there are none where all shapes are static."""
    signature = (kernel.triton_meta or {}).get("signature", {})
    return [name for name in map(str, signature) if re.fullmatch(r"ks\d+", name)]


_CONSTANT = re.compile(r"^\s*(\w+)\s*:\s*tl\.constexpr\s*=\s*(.+?)\s*$", re.M)


def _inductor_kernel(kernel: Any, nbytes: int, dynamic: bool) -> InductorKernel:
    launcher = kernel.launchers[0] if kernel.launchers else None
    config = getattr(launcher, "config", None)
    texts = getattr(launcher, "texts", {})
    source = getattr(kernel.fn, "src", "") or ""
    constants: dict[str, Any] = {name: _plain(value) for name, value in _CONSTANT.findall(source)}
    constants |= dict(getattr(config, "kwargs", {}) or {})
    asm = {stage: texts[stage] for stage in ("ttir", "ttgir", "ptx") if stage in texts}
    return InductorKernel(
        name=str(kernel.inductor_meta.get("kernel_name") or kernel.fn.__name__),
        source=source,
        constants=constants,
        warps=getattr(config, "num_warps", None),
        stages=getattr(config, "num_stages", None),
        registers=getattr(launcher, "n_regs", None),
        spilled=getattr(launcher, "n_spills", None),
        shared=getattr(launcher, "shared", None),
        asm=asm,
        nbytes=nbytes,
        dynamic=dynamic,
    )


def _plain(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return {"True": True, "False": False, "None": None}.get(text, text.strip("'\""))


@dataclass(frozen=True, kw_only=True)
class Event:
    """A graph break, recompilation or host sync: where in the source, and why."""

    where: str  # file:line
    why: str


@dataclass
class Events:
    graph_breaks: list[Event] = field(default_factory=list)
    recompiles: list[Event] = field(default_factory=list)
    graphs: int = 0


@contextlib.contextmanager
def dynamo_events() -> Iterator[Events]:
    """What Dynamo logs inside: graph breaks and recompilations with file and line, and how many graphs it compiled."""
    import torch._dynamo.utils as utils
    import torch._logging

    events = Events()

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            if record.name.endswith("graph_breaks"):
                events.graph_breaks.append(Event(where=_last_place(text), why=_reason(text)))
            else:
                events.recompiles.append(Event(where=_first_place(text), why=_reason(text)))

    artifacts = ("graph_breaks", "recompiles")
    handler = Collect()
    endings = tuple(f"__{name}" for name in artifacts)
    loggers = [logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.endswith(endings)]
    before = utils.counters["stats"]["unique_graphs"]
    saved = [(logger.level, logger.propagate) for logger in loggers]
    torch._logging.set_logs(graph_breaks=True, recompiles=True)
    for logger in loggers:
        # In place of the handlers that print.
        logger.handlers = [handler]
        logger.propagate = False
    try:
        yield events
    finally:
        for logger in loggers:
            logger.handlers = []
        torch._logging.set_logs()
        for logger, (level, propagate) in zip(loggers, saved, strict=True):
            logger.setLevel(level)
            logger.propagate = propagate
        events.graphs = utils.counters["stats"]["unique_graphs"] - before


_PLACE = re.compile(r'(?:File "([^"]+)", line (\d+)|((?:/|\w:\\)[^\s:"]+\.py):(\d+))')


def _places(text: str) -> list[str]:
    return [without_paths(f"{a or c}:{b or d}") for a, b, c, d in _PLACE.findall(text)]


def _first_place(text: str) -> str:
    return next(iter(_places(text)), "")


def _last_place(text: str) -> str:
    """The innermost frame of the user's code."""
    places = _places(text)
    return places[-1] if places else ""


def _reason(text: str) -> str:
    text = re.split(r"User (?:code|stack) trace|\n *Developer debug|from user code:", without_paths(text))[0]
    lines = [line.strip(" -\t") for line in text.splitlines()]
    wanted = [line for line in lines if line and not line.startswith(("File ", "Set TORCH"))]
    return " ".join(wanted)[:600]
