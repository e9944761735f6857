"""`python -m benchmarks.run decode`: a whole decode step beside full attention, and beside the paper's formula.

    T_step = B * S_kv / BW + max(2 * B * P / F, P_size / BW)                             (arXiv 2506.15545)

with this GPU's measured bandwidth BW and matrix rate F. Weights are random, and caches are filled with random content
to `context` tokens less those that are timed. What is timed is the graph that `Engine` replays, sampling included.
What each column means: docs/generate.md.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.decode_report import Row, set_ratios
from benchmarks.report import environment
from benchmarks.timing import first_line
from flexrattn import RAttentionModel, build_model_config, make_layers, resolve_flavor
from flexrattn.attention import RAttention
from flexrattn.decode.cache import DecodeCache, LayerCache
from flexrattn.decode.checkpoint import empty_model
from flexrattn.decode.fast import _FUSED, GraphStepper, TritonStep, Tuning
from flexrattn.decode.layer import Clock
from flexrattn.decode.sampling import Mode, SamplingRows
from flexrattn.decode.step import decode_step

logger = logging.getLogger("benchmarks")

# Random content, the paper's points and the two ends; largest: as many sequences as fit, at this context.
POINTS = ((1, 1024), (1, 8192), (16, 32768), (64, 8192), (256, 1024), (1, 131072), (8, 131072))
LARGEST_AT = (32768,)
# Steps of one sample: a multiple of every fold_every that is used, as a step that folds takes longer.
STEPS = 16
# One row, few and many are launched in different ways.
GATE_LAYERS, GATE_ROWS, GATE_SLOTS = 4, (1, 16, 39, 70), 700
# Four blocks, each of which rounds a dozen times: as train_step's gate, times the square root of the blocks.
TOLERANCE = {torch.bfloat16: 4e-2, torch.float16: 4e-2, torch.float32: 4e-5}
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A model that is timed. library: full attention by torch's kernels, the fastest at each point."""

    name: str
    layers: dict[str, Any]
    library: bool = False


def arms(window: int, swa_window: int) -> list[Arm]:
    return [
        Arm(name=f"RAttention-{window}", layers={"layer_kind": "rattention", "window": window}),
        Arm(name=f"SWA-{swa_window}", layers={"layer_kind": "swa", "window": swa_window}),
        Arm(name="full, ours", layers={"layer_kind": "full"}),
        Arm(name="full, library", layers={"layer_kind": "full"}, library=True),
    ]


def _packed(q_BHD: Tensor, k_BGSD: Tensor) -> Tensor:
    # The heads of a group as queries of one head: they read the same keys.
    return q_BHD.unflatten(1, (k_BGSD.shape[1], -1))


def _sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def attend(q_BHD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(backend):
            return nnf.scaled_dot_product_attention(_packed(q_BHD, k_BGSD), k_BGSD, v_BGSD, scale=scale).flatten(1, 2)

    return attend


_flex = torch.compile(flex_attention, dynamic=False)


def _flex_decode(q_BHD: Tensor, k_BGSD: Tensor, v_BGSD: Tensor, scale: float) -> Tensor:
    return _flex(q_BHD[:, :, None], k_BGSD, v_BGSD, scale=scale, enable_gqa=True)[:, :, 0]


# All slots, without a mask: the friendliest case for a library, and right once the cache is full.
LIBRARY: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "cuDNN": _sdpa(SDPBackend.CUDNN_ATTENTION),
    "FA2": _sdpa(SDPBackend.FLASH_ATTENTION),
    "Flex": _flex_decode,
}


class LibraryStep(TritonStep):
    """The same step with the softmax of full layers by a kernel of torch."""

    kernel: str = "cuDNN"

    def _attention(self, attention: RAttention, layer: LayerCache, weights: Any, qkv: Any, clock: Clock) -> Tensor:
        from flexrattn.decode.glue import launch_heads, row_norm_eps

        spec = layer.spec
        assert layer.k_BGSD is not None
        assert layer.v_BGSD is not None
        launches, heads = launch_heads(
            qkv,
            H=spec.H,
            G=spec.G,
            D=spec.D,
            norms=(attention.q_norm.weight, attention.k_norm.weight, row_norm_eps(attention.q_norm)),
            scales=None,
            table=None if attention.rope is None else attention.rope.cache,
            length_B=clock.position_B,
            active_B=clock.active_B,
            cache=(layer.k_BGSD, layer.v_BGSD),
            feature_map=None,
        )
        for launch in launches:
            launch.run()
        assert heads.q_softmax is not None
        return LIBRARY[self.kernel](heads.q_softmax, layer.k_BGSD, layer.v_BGSD, spec.D**-0.5)


def formula_cache_bytes(config: RAttentionModel.Config, context: int, itemsize: int) -> int:
    """S_kv of the formula: keys and values that a token reads, and the linear branches' states in fp32."""
    total = 0
    for layer in config.layers:
        attention = layer.attention
        G, D = attention.n_kv_heads or attention.n_heads, attention.head_dim
        assert D is not None
        if attention.has_softmax:
            keys = context if attention.window is None else min(attention.window + 1, context)
            total += 2 * keys * G * D * itemsize
        if attention.residual is not None:
            total += 4 * G * (2 if attention.residual.feature_map in ("softmax", "relu") else 1) * D * D
    return total


def formula_seconds(*, B: int, cache: int, parameters: int, itemsize: int, bandwidth: float, flops: float) -> float:
    """T_step of the paper."""
    return B * cache / bandwidth + max(2 * B * parameters / flops, parameters * itemsize / bandwidth)


def add_options(add: Callable[..., Any]) -> None:
    add("--flavor", default="3b", help="model size")
    add("--layers", type=int, help="of the model, for a quick look (default: all)")
    add("--points", nargs="+", metavar="BxCONTEXT", help="such as 64x8192 (default: " + _shown(POINTS) + ")")
    add("--batches", type=int, nargs="+", metavar="B", help="with --contexts: every pair, in place of --points")
    add("--contexts", type=int, nargs="+", metavar="T")
    add("--largest", type=int, nargs="*", default=list(LARGEST_AT), metavar="T", help="contexts for the largest batch")
    add("--window", type=int, default=512, help="of RAttention")
    add("--swa-window", type=int, default=4096)
    add("--only", nargs="+", metavar="NAME", help="arms by the beginnings of their names: RAttention SWA full")
    known = ", ".join(each.name for each in dataclasses.fields(Tuning))
    add("--tuning", nargs="+", default=[], metavar="KEY=VALUE", help=f"how the kernels are launched: {known}")
    add("--fold-every", type=int, default=GraphStepper.fold_every, help="keys that enter a state at a time")


def _shown(points: Sequence[tuple[int, int]]) -> str:
    return " ".join(f"{B}x{T}" for B, T in points)


def points_of(options: argparse.Namespace) -> list[tuple[int, int]]:
    """(B, context), smaller caches first. ValueError says what was given and what would do."""
    if (options.batches is None) != (options.contexts is None):
        raise ValueError("--batches and --contexts go together: every pair of them is a point")
    if options.batches is not None and options.points is not None:
        raise ValueError("--points or --batches with --contexts, not both")
    points = list(POINTS)
    if options.points is not None:
        points = []
        for text in options.points:
            batch, x, context = text.partition("x")
            if not (x and batch.isdigit() and context.isdigit()):
                raise ValueError(f"a point must be BATCHxCONTEXT, such as 64x8192, got {text!r}")
            points.append((int(batch), int(context)))
    elif options.batches is not None:
        points = [(B, T) for T in options.contexts for B in options.batches]
    limit = resolve_flavor(options.flavor).max_seq_len
    for B, T in [*points, *((1, T) for T in options.largest)]:
        if B < 1:
            raise ValueError(f"a batch must be 1 or more, got {B}")
        if not STEPS * 2 < T <= limit:
            raise ValueError(f"a context must be {STEPS * 2 + 1} to {limit}, got {T}")
    if options.layers is not None and options.layers < 4:
        raise ValueError(f"--layers must be 4 or more, so that every kind is there, got {options.layers}")
    if options.fold_every < 1 or STEPS % options.fold_every:
        raise ValueError(f"--fold-every must divide {STEPS}, got {options.fold_every}")
    return sorted(dict.fromkeys(points), key=lambda point: point[0] * point[1])


def tuning_of(options: argparse.Namespace, rows: int) -> Tuning:
    known = [each.name for each in dataclasses.fields(Tuning)]
    values: dict[str, int] = {}
    for given in options.tuning:
        name, _, value = given.partition("=")
        if name not in known or not value.isdigit():
            raise ValueError(f"--tuning takes KEY=NUMBER with a key of {', '.join(known)}; got {given!r}")
        values[name] = int(value)
    return dataclasses.replace(Tuning.measured(rows), **values)


def chosen_arms(options: argparse.Namespace) -> list[Arm]:
    known = arms(options.window, options.swa_window)
    if options.only is None:
        return known
    for name in options.only:
        if not any(arm.name.startswith(name) for arm in known):
            raise ValueError(f"--only must be among {', '.join(arm.name for arm in known)}, got {name!r}")
    return [arm for arm in known if arm.name.startswith(tuple(options.only))]


def make_config(arm: Arm, flavor: str, *, max_length: int, **changes: Any) -> RAttentionModel.Config:
    size = resolve_flavor(flavor, {"max_seq_len": max_length} | changes)
    return build_model_config(size, make_layers(**arm.layers))


def random_model(
    config: RAttentionModel.Config,
    device: torch.device,
    dtype: torch.dtype,
    seed: int,
    like: RAttentionModel | None = None,
) -> RAttentionModel:
    """Random weights; `like`: those of another model, wherever both have one. They are not copied."""
    shared = {} if like is None else dict(like.named_parameters())
    tables = {} if like is None else {repr(rope.config): rope.cache for rope in _ropes(like)}
    model = empty_model(config, device="meta", dtype=dtype)
    gen = torch.Generator(device).manual_seed(seed)
    for name, parameter in list(model.named_parameters()):
        value = shared.get(name)
        if value is None:
            value = torch.nn.Parameter(torch.empty(parameter.shape, dtype=dtype, device=device), requires_grad=False)
            if value.ndim == 1 or "norm" in name:
                value.data.uniform_(0.5, 1.5, generator=gen)
            else:
                value.data.normal_(std=0.02, generator=gen)
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, value)
    if config.enable_weight_tying:
        model.lm_head.weight = model.tok_embeddings.weight  # it was listed under the first of its names
    for rope in _ropes(model):
        key = repr(rope.config)
        if key not in tables:
            with torch.device(device):
                tables[key] = rope._precompute_cache()
        rope.cache = tables[key]
    for name, block in model.layers.items():
        if like is not None and hasattr(like.layers[name], _FUSED):
            object.__setattr__(block, _FUSED, getattr(like.layers[name], _FUSED))
    return model


def _ropes(model: RAttentionModel) -> list[Any]:
    return [b.attention.rope for b in model.layers.values() if b.attention.rope is not None]


def fill(cache: DecodeCache, length: int, seed: int) -> None:
    """Random keys, values and states, as if every row had seen `length` tokens."""
    gen = torch.Generator(cache.device).manual_seed(seed)
    for layer in cache.layers:
        for name, x in layer.tensors().items():
            for part in x:  # below 2^31 elements each
                part.normal_(generator=gen)
                if name == "state":
                    part.mul_(0.1)
    set_length(cache, length)


def set_length(cache: DecodeCache, length: int) -> None:
    cache.lengths_B.fill_(length)
    for window, absorbed_B in cache.absorbed.items():
        absorbed_B.fill_(max(length - window, 0))


def gate(arm: Arm, options: argparse.Namespace, device: torch.device, dtype: torch.dtype, kernel: str) -> float:
    """Largest relative error of the logits over a few steps of a short model, beside the torch step in float64."""
    slots = GATE_SLOTS if arm.library else 2 * GATE_SLOTS
    # Of the flavor's heads and widths, but few layers and words.
    layers = dict(arm.layers)
    if "window" in layers:
        layers["window"] = min(layers["window"], 500)
    short = Arm(name=arm.name, layers=layers, library=arm.library)
    config = make_config(short, options.flavor, max_length=slots, n_layers=GATE_LAYERS, vocab_size=512)
    model = random_model(config, device, dtype, options.seed)
    exact = empty_model(config, device=device, dtype=torch.float64)
    for name, x in model.state_dict().items():
        exact.state_dict()[name].copy_(x)
    return max(_gate(arm, model, exact, rows, slots, options, kernel) for rows in GATE_ROWS)


def _gate(
    arm: Arm,
    model: RAttentionModel,
    exact: RAttentionModel,
    rows: int,
    slots: int,
    options: argparse.Namespace,
    kernel: str,
) -> float:
    config, device, dtype = model.config, model.norm.weight.device, model.norm.weight.dtype
    cache, exact_cache = (
        DecodeCache(config, rows=rows, max_length=slots, device=device, dtype=kind, fold_every=options.fold_every)
        for kind in (dtype, torch.float64)
    )
    # The library reads all slots, so it is right at the last token alone.
    steps = 1 if arm.library else 2 * options.fold_every + 1
    fill(cache, slots - 1 if arm.library else GATE_SLOTS, options.seed)
    for mine, other in zip(exact_cache.layers, cache.layers, strict=True):
        for name, x in mine.tensors().items():
            x.copy_(other.tensors()[name])
    set_length(exact_cache, int(cache.lengths_B[0]))
    step = make_step(arm, model, cache, kernel, options)
    active = torch.ones(rows, dtype=torch.bool, device=device)
    gen = torch.Generator(device).manual_seed(options.seed)
    worst = 0.0
    for _ in range(steps):
        token = torch.randint(512, (rows,), generator=gen, device=device)
        got, expected = step(token, active).double(), decode_step(exact, exact_cache, token, active)
        error = float((got - expected).norm() / expected.norm())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def make_step(
    arm: Arm, model: RAttentionModel, cache: DecodeCache, kernel: str, options: argparse.Namespace
) -> TritonStep:
    tuning = tuning_of(options, cache.rows)
    if not arm.library:
        return TritonStep(model, cache, tuning=tuning)
    step = LibraryStep(model, cache, tuning=tuning)
    step.kernel = kernel
    return step


def fastest_library(
    config: RAttentionModel.Config, B: int, context: int, device: torch.device, dtype: torch.dtype
) -> str:
    """The library's kernel that is fastest for one layer at this point; those that refuse are passed over."""
    attention = config.layers[-1].attention
    H, G, D = attention.n_heads, attention.n_kv_heads or attention.n_heads, attention.head_dim
    q = torch.randn(B, H, D, device=device, dtype=dtype)
    k, v = (torch.randn(B, G, context, D, device=device, dtype=dtype) for _ in range(2))
    times: dict[str, float] = {}
    for name, attend in LIBRARY.items():
        try:
            times[name] = gpu_seconds(partial(attend, q, k, v, D**-0.5), repeats=5)
        except Exception as error:
            logger.info("%s at B=%d, %d: %s", name, B, context, first_line(error))
    if not times:
        raise RuntimeError("no kernel of the library runs here")
    logger.info("B=%d, %d: %s", B, context, ", ".join(f"{name} {1e3 * s:.3f} ms" for name, s in times.items()))
    return min(times, key=lambda name: times[name])


def gpu_seconds(call: Callable[[], Any], *, repeats: int) -> float:
    """Median time on the GPU of one of several calls in a row."""
    for _ in range(3):
        call()
    found = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(4):
            call()
        end.record()
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end) / 4e3)
    return statistics.median(found)


def bandwidth_and_flops(device: torch.device) -> tuple[float, float]:
    """Bytes/s of a copy of 2 GiB (read and written both counted), FLOP/s of a bf16 matrix product."""
    source = torch.empty(2 * GIB, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / gpu_seconds(partial(target.copy_, source), repeats=7)
    del source, target
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return bandwidth, 2 * 8192**3 / gpu_seconds(partial(torch.mm, a, b), repeats=7)


class _Stepper(GraphStepper):
    """The engine's graph with another step in it."""

    def __init__(self, step: TritonStep, token_B: Tensor, active_B: Tensor, rows: SamplingRows):
        self.model, self.cache, self.run = step.model, step.cache, step
        self.token_B, self.active_B, self.rows, self.graphs = token_B, active_B, rows, {}


def time_arm(row: Row, arm: Arm, model: RAttentionModel, options: argparse.Namespace, device: torch.device) -> None:
    """Fill the row's measurements: cache, graph, samples of STEPS steps."""
    dtype = model.norm.weight.dtype
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    cache = DecodeCache(
        model.config,
        rows=row.B,
        max_length=row.context,
        device=device,
        dtype=dtype,
        fold_every=options.fold_every,
    )
    row.cache_bytes = (torch.cuda.memory_allocated() - before) // row.B
    assert row.formula_bytes is not None
    row.cache_over_formula = row.cache_bytes / row.formula_bytes
    first = row.context - STEPS
    fill(cache, first, options.seed)
    token_B = torch.randint(model.config.vocab_size, (row.B,), device=device)
    active_B = torch.ones(row.B, dtype=torch.bool, device=device)
    stepper = _Stepper(
        make_step(arm, model, cache, row.kernel, options), token_B, active_B, SamplingRows(row.B, device)
    )
    gpu, host = [], []
    stepper.step(Mode.GREEDY)  # compiles, and records the graph
    for _ in range(options.repeats):
        set_length(cache, first)
        torch.cuda.synchronize()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started = time.perf_counter()
        begin.record()
        for _ in range(STEPS):
            stepper.step(Mode.GREEDY)
        end.record()
        host.append(1e3 * (time.perf_counter() - started) / STEPS)
        torch.cuda.synchronize()
        gpu.append(begin.elapsed_time(end) / STEPS)
    fifths = statistics.quantiles(gpu, n=5, method="inclusive")
    row.step_ms, row.step_p20, row.step_p80 = statistics.median(gpu), fifths[0], fifths[3]
    row.host_ms = statistics.median(host)
    row.tokens_per_s = 1e3 * row.B / row.step_ms
    if row.formula_ms is not None:
        row.step_over_formula = row.step_ms / row.formula_ms


def largest_batch(formula_bytes: int, device: torch.device) -> int:
    """Sequences that fit beside what is allocated, with 6 % and 3 GiB left for activations and the graph."""
    _release()
    free, _ = torch.cuda.mem_get_info(device)
    return max(1, int((0.94 * free - 3 * GIB) // formula_bytes))


def _release() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def benchmark(
    options: argparse.Namespace, points: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> Iterator[list[Row]]:
    """Gate every arm, then the rows of each point."""
    about = environment(device)
    chosen = chosen_arms(options)
    tuning_of(options, 1)
    bandwidth, flops = bandwidth_and_flops(device)
    print(f"measured: {bandwidth / 1e12:.2f} TB/s copied, {flops / 1e12:.0f} TFLOP/s in bf16 products", flush=True)
    longest = max(T for _, T in [*points, *((1, T) for T in options.largest)])
    errors: dict[tuple[str, str], tuple[float | None, str]] = {}
    models: dict[str, RAttentionModel] = {}
    first_model: RAttentionModel | None = None
    changes = {} if options.layers is None else {"n_layers": options.layers}
    for arm in chosen:
        config = make_config(arm, options.flavor, max_length=longest, **changes)
        models[arm.name] = random_model(config, device, dtype, options.seed, like=first_model)
        first_model = first_model or models[arm.name]
        if first_model is models[arm.name]:
            # Joins the weights, so that the others share the joined ones.
            tiny = DecodeCache(config, rows=1, max_length=64, device=device, dtype=dtype)
            TritonStep(first_model, tiny)

    def judged(arm: Arm, kernel: str) -> tuple[float | None, str]:
        key = (arm.name, kernel)
        if key not in errors:
            try:
                errors[key] = gate(arm, options, device, dtype, kernel), ""
            except Exception as error:
                logger.info("gate of %s", arm.name, exc_info=True)
                errors[key] = None, f"{'unavailable' if arm.library else 'FAILED'}: {first_line(error)}"
            _release()
        return errors[key]

    for (B, context), largest in [*((p, False) for p in points), *(((0, T), True) for T in options.largest)]:
        rows = []
        for arm in chosen:
            model = models[arm.name]
            itemsize = dtype.itemsize
            cache_bytes = formula_cache_bytes(model.config, context, itemsize)
            batch = largest_batch(cache_bytes, device) if largest else B
            parameters = sum(p.numel() for p in model.parameters())
            seconds = formula_seconds(
                B=batch, cache=cache_bytes, parameters=parameters, itemsize=itemsize, bandwidth=bandwidth, flops=flops
            )
            row = Row(
                contender=arm.name,
                B=batch,
                context=context,
                formula_bytes=cache_bytes,
                formula_ms=1e3 * seconds,
                tolerance=TOLERANCE[dtype],
                fold_every=options.fold_every if "RAttention" in arm.name else None,
                largest=largest,
                bandwidth_TB_s=bandwidth / 1e12,
                matmul_TFLOP_s=flops / 1e12,
                layers=len(model.config.layers),
                flavor=options.flavor,
                dtype=options.dtype,
                device=about["device"],
                torch=about["torch"],
                triton=about["triton"],
            )
            rows.append(row)
            logger.info("%s, B=%d, context %d", arm.name, batch, context)
            free, _ = torch.cuda.mem_get_info(device)
            if batch * cache_bytes > free:
                row.note = "out of memory: the cache alone does not fit"
                continue
            try:
                if arm.library:
                    row.kernel = fastest_library(model.config, batch, context, device, dtype)
                    _release()
                row.error, row.note = judged(arm, row.kernel)
                if row.error is not None and not row.error < TOLERANCE[dtype]:
                    row.note = f"WRONG: the logits are off by {row.error:.1e}, allowed {TOLERANCE[dtype]:.0e}"
                if not row.note:
                    time_arm(row, arm, model, options, device)
            except Exception as error:
                row.note = first_line(error) if arm.library else f"FAILED: {first_line(error)}"
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    row.note = "out of memory"
                logger.info("%s", arm.name, exc_info=True)
            _release()
        set_ratios(rows)
        yield rows
