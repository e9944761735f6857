"""Decoding on a GPU: the law at 32k tokens, the graph, what the host waits for. `python -m pytest tests/gpu -m gpu`.

FLEXRATTN_SOAK=10000 runs the soak with that many requests.
"""

from __future__ import annotations

import csv
import gc
import itertools
import os
from collections import Counter

import pytest
import torch

from benchmarks import run
from flexrattn import build_model_config, make_layers, resolve_flavor
from flexrattn.decode import DecodeCache, decode_step, prefill
from flexrattn.decode.checkpoint import empty_model
from flexrattn.decode.engine import EagerStepper, Engine
from flexrattn.decode.fast import GraphStepper, TritonStep, TritonStepper, Tuning
from flexrattn.decode.sampling import Mode, Sampling
from tests.closeness import relative_error

pytestmark = pytest.mark.gpu

VOCAB = 256


def build(*, dtype: torch.dtype, max_length: int, head_dim: int = 64, n_layers: int = 4, **layers):
    """A model whose every branch matters, on the GPU."""
    size = resolve_flavor(
        "debug",
        {
            "vocab_size": VOCAB,
            "dim": 256,
            "n_layers": n_layers,
            "n_heads": 8,
            "n_kv_heads": 2,
            "head_dim": head_dim,
            "ffn_dim": 512,
            "max_seq_len": max_length,
        },
    )
    config = build_model_config(size, make_layers(**({"window": 512} | layers)))
    model = empty_model(config, device="cuda", dtype=dtype)
    gen = torch.Generator("cuda").manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and "norm" not in name:
            parameter.normal_(std=2 * parameter.shape[-1] ** -0.5, generator=gen)
        else:
            parameter.uniform_(0.5, 1.5, generator=gen)
    return model


def tokens_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(seed)).cuda()


def cache_of(model, *, rows: int = 1, max_length: int, fold_every: int = 8) -> DecodeCache:
    return DecodeCache(
        model.config,
        rows=rows,
        max_length=max_length,
        device="cuda",
        dtype=model.norm.weight.dtype,
        fold_every=fold_every,
    )


@pytest.mark.parametrize(
    "layers",
    [{}, {"learned_initial_state": True, "learned_qk_scale": True}, {"window": None}, {"layer_kind": "swa"}],
    ids=["rattention", "options", "linear only", "swa"],
)
def test_32k_tokens_in_fp32(layers):
    """Prefill, prefill behind it, 300 steps: the logits of one prefill over everything, which is the full forward."""
    T, first, second = 32768, 20000, 32768 - 300
    model = build(dtype=torch.float32, max_length=T, **layers)
    tokens = tokens_of(1, T)
    positions = torch.arange(T, device="cuda")[None]
    expected = model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))[0, second - 1 :]
    cache = cache_of(model, max_length=T)
    prefill(model, cache, tokens[:, :first], rows=[0])
    got = [prefill(model, cache, tokens[:, first:second], rows=[0])]
    step = TritonStep(model, cache)
    active = torch.ones(1, dtype=torch.bool, device="cuda")
    got += [step(tokens[:, i], active) for i in range(second, T)]
    assert relative_error(torch.cat(got), expected) < 1e-4


@pytest.mark.parametrize("layers", [{"window": 100}, {"window": None}, {"layer_kind": "swa", "window": 100}], ids=str)
def test_documents_in_ragged_rows(layers):
    """Packed documents in two prefills of rows of different lengths, and steps: the full forward of each row."""
    T, first, new = 700, 400, 30
    model = build(dtype=torch.float32, max_length=T + new, **layers)
    tokens = tokens_of(2, T + new)
    counts = [first, first - 90], [T - first, 150]
    lengths = [[250, 300, 180], [390, 1, 339]]
    at = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths]).cuda()
    cache = cache_of(model, rows=2, max_length=T + new)
    seen = [0, 0]

    def rows_now(width: int) -> tuple[torch.Tensor, torch.Tensor]:
        cut = [(x[i, seen[i] : seen[i] + width], i) for x in (tokens, at) for i in range(2)]
        padded = [torch.nn.functional.pad(x, (0, width - len(x))) for x, _ in cut]
        return torch.stack(padded[:2]), torch.stack(padded[2:])

    def expected() -> torch.Tensor:
        found = []
        for i, n in enumerate(seen):
            where = at[i : i + 1, :n]
            logits = model(tokens[i : i + 1, :n], positions=where, attention_masks=model.get_attention_masks(where))
            found.append(logits[0, -1])
        return torch.stack(found)

    for count in counts:
        x, positions = rows_now(max(count))
        got = prefill(model, cache, x, rows=[0, 1], counts=count, positions=positions)
        seen = [a + b for a, b in zip(seen, count, strict=True)]
        assert relative_error(got, expected()) < 1e-4, seen
    step, active = TritonStep(model, cache), torch.ones(2, dtype=torch.bool, device="cuda")
    for _ in range(new):
        x, _ = rows_now(1)
        got = step(x[:, 0], active)
        seen = [n + 1 for n in seen]
    assert relative_error(got, expected()) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    "layers",
    [
        {"window": 100},
        {"window": 100, "learned_initial_state": True, "learned_qk_scale": True},
        {"window": 70, "feature_map": "relu"},
        {"window": 0, "feature_map": "softmax_single"},
        {"window": None, "feature_map": "identity"},
        {"layer_kind": "swa", "window": 130},
        {"layer_kind": "full", "window": None},
    ],
    ids=["softmax", "options", "relu", "window 0", "linear only", "swa", "full"],
)
@pytest.mark.parametrize(("head_dim", "rows"), [(32, 3), (128, 3), (128, 40)])
def test_triton_steps_are_the_float64_steps(layers, dtype, head_dim, rows):
    """Rows of different lengths, one that rests; bf16 against float64 on the same rounded weights and caches."""
    model = build(dtype=dtype, max_length=512, head_dim=head_dim, n_layers=4, **layers)
    exact = empty_model(model.config, device="cuda", dtype=torch.float64)
    for name, x in exact.state_dict().items():
        x.copy_(model.state_dict()[name])
    cache = cache_of(model, rows=rows, max_length=512, fold_every=4)
    exact_cache = cache_of(exact, rows=rows, max_length=512, fold_every=4)
    counts = ([301, 5, 140] * rows)[:rows]
    prefill(model, cache, tokens_of(rows, 301), rows=list(range(rows)), counts=counts)
    for mine, other in zip(exact_cache.layers, cache.layers, strict=True):
        for name, x in mine.tensors().items():
            x.copy_(other.tensors()[name])
    exact_cache.lengths_B.copy_(cache.lengths_B)
    for window, x in exact_cache.absorbed.items():
        x.copy_(cache.absorbed[window])
    step = TritonStep(model, cache)
    for i in range(9):
        token = tokens_of(rows, seed=i)
        active = torch.ones(rows, dtype=torch.bool, device="cuda")
        active[2] = i % 3 != 1
        got, expected = step(token, active), decode_step(exact, exact_cache, token, active)
        error = relative_error(got[active].double(), expected[active])
        assert error < (5e-5 if dtype == torch.float32 else 6e-2), (i, error)
    assert torch.equal(cache.lengths_B, exact_cache.lengths_B)


def engine_of(stepper, *, slots: int = 4, **options) -> Engine:
    model = build(dtype=torch.bfloat16, max_length=1024, window=100)
    return Engine(model, slots=slots, max_length=1024, stepper=stepper, fold_every=8, **options)


def requests():
    kinds = itertools.cycle(({}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 20, "top_p": 0.9}))
    for i, n in enumerate((3, 300, 64, 65, 129, 17)):
        yield tokens_of(n, seed=n).tolist(), 20 + 7 * i, Sampling(seed=i, **next(kinds))


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(num_stages=2, block_s=32),
        Tuning(resident=1, block_f=32, num_warps=4),
        Tuning(ring_resident=16, fused_products=0, late_pending=1),
        Tuning.measured(64),
    ],
    ids=str,
)
def test_tuning_changes_nothing(tuning):
    """But the order in which splits are added: inside a graph, with rows of different lengths."""
    model = build(dtype=torch.float32, max_length=512, window=100)
    results = []
    for each in (Tuning(), tuning):
        cache = cache_of(model, rows=3, max_length=512)
        prefill(model, cache, tokens_of(3, 301), rows=[0, 1, 2], counts=[301, 5, 140])
        step = TritonStep(model, cache, tuning=each)
        token, active = tokens_of(3), torch.zeros(3, dtype=torch.bool, device="cuda")
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step(token, active)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = step(token, active)
        active.fill_(True)
        found = []
        for i in range(20):
            token.copy_(tokens_of(3, seed=i))
            graph.replay()
            found.append(logits.clone())
        results.append(torch.stack(found))
    assert relative_error(results[1], results[0]) < 1e-5


def test_the_graph_is_the_eager_step():
    """Bit for bit, also while requests come and go."""
    results = []
    for stepper in (GraphStepper, TritonStepper):
        engine = engine_of(stepper)
        for prompt, new, sampling in requests():
            engine.add(prompt, max_new_tokens=new, sampling=sampling)
        results.append(engine.run())
    assert results[0] == results[1]
    assert all(len(tokens) for tokens in results[0].values())


def test_greedy_tokens_beside_the_torch_step():
    """In fp32 both take the same tokens."""
    results = []
    for stepper in (GraphStepper, EagerStepper):
        model = build(dtype=torch.float32, max_length=1024, window=100)
        engine = Engine(model, slots=3, max_length=1024, stepper=stepper)
        for prompt, new, _ in requests():
            engine.add(prompt, max_new_tokens=new)
        results.append(engine.run())
    assert results[0] == results[1]


def test_no_host_sync_and_one_graph_launch_a_token():
    engine = engine_of(GraphStepper, lag=2)
    for prompt, _, _ in itertools.islice(requests(), 4):
        engine.add(prompt, max_new_tokens=200)
    for _ in range(5):
        engine.step()
    launched = []
    graph = engine.stepper.graphs[Mode.GREEDY]

    class Counted:
        def replay(self) -> None:
            launched.append(1)
            graph.replay()

    engine.stepper.graphs[Mode.GREEDY] = Counted()
    torch.cuda.synchronize()
    steps = 50
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.record_function("steps"):
                outputs = [output for _ in range(steps) for output in engine.step()]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(outputs) == 4 * steps
    assert len(launched) == steps
    # The profiler itself synchronizes the device when it ends.
    events = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CPU]
    (during,) = (event.time_range for event in events if event.name == "steps")
    calls = Counter(event.name for event in events if during.start <= event.time_range.start <= during.end)
    assert calls["cudaGraphLaunch"] == steps
    # Besides the graph: the copy of the tokens to the host, and nothing that computes.
    unwanted = "LaunchKernel", "StreamSynchronize", "DeviceSynchronize"
    assert not [name for name in calls if any(part in name for part in unwanted)], calls


def kernel_seconds(call) -> float:
    """Time of the kernels of one call: the host's share depends on what else it does."""
    call()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(5):
            call()
        torch.cuda.synchronize()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 5e6


def test_prefill_takes_what_the_forward_takes():
    """On the kernels of training: logits of all tokens, the caches besides."""
    B, T = 4, 8192
    model = build(dtype=torch.bfloat16, max_length=T, head_dim=128)
    tokens, positions = tokens_of(B, T), torch.arange(T, device="cuda").expand(B, T)
    cache = cache_of(model, rows=B, max_length=T)

    def forward() -> None:
        with torch.no_grad():
            model(tokens, positions=positions, attention_masks=model.get_attention_masks(positions))

    def filled() -> None:
        cache.reset(list(range(B)))
        prefill(model, cache, tokens, rows=list(range(B)), all_logits=True)

    assert kernel_seconds(filled) < 1.25 * kernel_seconds(forward)


def test_memory_of_local_layers_does_not_grow():
    sizes, caches = [], []
    for length in (2048, 131072):
        model = build(dtype=torch.bfloat16, max_length=length, pattern=["local"])
        # What earlier tests left in cycles must not be freed in between.
        gc.collect()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        # Kept: a first one that is freed hides the second.
        caches.append(cache_of(model, rows=4, max_length=length))
        sizes.append(torch.cuda.memory_allocated() - before)
        assert abs(sizes[-1] / caches[-1].nbytes - 1) < 0.01
    assert sizes[0] == sizes[1]


def test_a_soak_leaks_nothing():
    engine = engine_of(GraphStepper, slots=16)
    waves = int(os.environ.get("FLEXRATTN_SOAK", "240")) // 40
    done = 0
    allocated = 0
    for wave in range(waves):
        for i in range(40):
            engine.add(tokens_of(1 + (i * 37) % 200, seed=i).tolist(), max_new_tokens=1 + i % 30)
        done += len(engine.run())
        torch.cuda.synchronize()
        if wave == 2:
            allocated = torch.cuda.memory_allocated()
    assert done == 40 * waves
    assert engine.free_slots == 16
    assert torch.cuda.memory_allocated() <= allocated + 2**20


def test_the_benchmark(tmp_path):
    path = tmp_path / "rows.csv"
    sizes = "--flavor debug --points 2x512 5x300 --largest --window 100 --swa-window 200 --repeats 3"
    assert run.main(["decode", *sizes.split(), "--csv", str(path), "--plot", str(tmp_path / "rows.png")]) == 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    for row in rows:
        if row["contender"] != "full, library":
            assert row["note"] == "", row
            assert float(row["tokens_per_s"]) > 0
            assert float(row["error"]) < float(row["tolerance"])
            assert abs(float(row["cache_over_formula"]) - 1) < 0.1
