"""Which layers, shapes and hardware a command line asks for; GPUs are made up here."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from flexrattn.inspect import command, device, health
from flexrattn.inspect.gpus import GPUS
from flexrattn.inspect.problem import load
from score_mods import dense_mask


def asked(*flags: str, source: str = "configs/debug.yaml", **options):
    defaults = {"layers": ["local", "global"], "seq_len": None, "batch": None, "dtype": None, "documents": None}
    return load(source, flags, **(defaults | {"arch": None, "gpu": None, "device": "auto"} | options))


@pytest.fixture
def gpu(monkeypatch):
    """Calls that make torch tell of a GPU: gpu("NVIDIA H200", (9, 0))."""

    def there(name: str, capability: tuple[int, int]) -> None:
        monkeypatch.setenv("FLEXRATTN_DEVICE", "cuda")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)

    return there


def test_the_gpu_here_is_looked_at(gpu):
    gpu("NVIDIA H200", (9, 0))
    for options in ({}, {"arch": "sm_90"}, {"device": "cuda"}):
        made = asked(**options)
        assert (made.on_device, made.arch, made.gpu) == (True, "sm_90", GPUS["h200"])
    made = asked(gpu="h100")  # another's roofline
    assert (made.on_device, made.gpu) == (True, GPUS["h100"])


def test_another_architecture_than_the_gpus_is_compiled_for(gpu):
    gpu("NVIDIA H200", (9, 0))
    made = asked(arch="sm_80")
    assert (made.on_device, made.arch, made.gpu) == (False, "sm_80", GPUS["a100"])
    assert not asked(device="cpu").on_device
    with pytest.raises(ValueError, match=r"the GPU here is sm_90 .*, not sm_80: leave --arch out"):
        asked(arch="sm_80", device="cuda")


def test_a_gpu_without_kernels_is_told(gpu):
    gpu("NVIDIA GeForce RTX 4090", (8, 9))
    with pytest.raises(ValueError, match="is sm_89, and the kernels are made for sm_80, sm_90, sm_100: name one"):
        asked()
    assert not asked(arch="sm_90").on_device


def test_a_gpu_that_is_not_in_the_table_wants_a_name(gpu):
    gpu("NVIDIA GH200 480GB", (9, 0))
    with pytest.raises(ValueError, match="is not in the table of GPUs: name a similar one with --gpu"):
        asked()
    assert asked(gpu="h200").on_device


def test_the_environment_hides_a_gpu(gpu, monkeypatch):
    gpu("NVIDIA H200", (9, 0))
    monkeypatch.setenv("FLEXRATTN_DEVICE", "cpu")
    assert not asked().on_device
    with pytest.raises(ValueError, match="FLEXRATTN_DEVICE=cpu hides it"):
        asked(device="cuda")


def test_without_a_gpu_the_architecture_chooses_the_roofline(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (asked().arch, asked().gpu) == ("sm_90", GPUS["h200"])
    assert asked(gpu="b200").arch == "sm_100"
    assert asked(arch="sm_80").gpu == GPUS["a100"]


def test_layers_are_named_and_counted():
    made = asked(source="configs/rattn_3b.yaml")
    assert [(x.name, x.index, x.count) for x in made.layers] == [("local", 0, 42), ("global", 3, 14)]
    assert [x.name for x in asked(source="configs/full_3b.yaml").layers] == ["local", "global"]
    assert [(x.name, x.index, x.count) for x in asked(layers=["2", "global"]).layers] == [
        ("layer 2", 2, 3),
        ("global", 3, 1),
    ]
    only = asked("--recipe_args.pattern", "[local]")
    assert [(x.name, x.count) for x in only.layers] == [("local", 4)]
    with pytest.raises(ValueError, match="--layer global: the model has only local layers"):
        asked("--recipe_args.pattern", "[local]", layers=["global"])


@pytest.mark.parametrize("kind", ["rattention", "swa", "hymba"])
def test_global_layers_with_rope_are_still_global(kind):
    made = asked("--recipe_args.global_rope", "true", "--recipe_args.layer_kind", kind)
    assert [(x.name, x.index, x.count) for x in made.layers] == [("local", 0, 3), ("global", 3, 1)]


def test_sinks_begin_anew_with_each_document():
    """The mask of a report is the model's: it is asked for positions in the document."""
    flags = "--recipe_args.layer_masks.0.attention_sink.sinks", "2", "--recipe_args.window", "3"
    made = asked(*flags, seq_len=40, batch=1, documents=[15, 25], layers=["0"])
    model = made.model.build()
    kept = model.get_attention_masks(made.positions("cpu"))[made.layers[0].attention.mask]
    shown = dense_mask(made.mask(made.layers[0], whole=True), batch=1, q_len=40, kv_len=40, device="cpu")
    assert torch.equal(shown, kept)
    assert kept[0, 0, 39, 15]
    assert not kept[0, 0, 39, 0]


def test_a_report_on_a_gpu_uses_what_was_measured(gpu, monkeypatch):
    """The order of the parts that take a GPU, each replaced by one that notes that it was asked."""
    gpu("NVIDIA H200", (9, 0))
    made = asked(layers=["global"], seq_len=128, batch=1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # for what traces the layer
    measured = GPUS["h200"].with_ceilings(bf16=7e14, bandwidth=4e12)
    calls = []
    healthy = {"graph_breaks": [], "host_syncs": [], "recompiles": []}
    monkeypatch.setattr(device, "ceilings", lambda gpu: measured)

    def measure(problem, layer, found, ceilings):
        calls.append((layer.name, problem.gpu, ceilings))
        return ["something odd"]

    monkeypatch.setattr(device, "measure_layer", measure)
    monkeypatch.setattr(health, "watch_step", lambda problem: healthy)
    report = command.make_report(made, processes=1)
    assert calls == [("global", measured, measured)]
    assert report["health"] == healthy
    assert report["gpu"]["bf16"] == 7e14
    assert report["warnings"][0] == "global, something odd"
    assert command.make_report(dataclasses.replace(made, dtype="fp16"), processes=1)["health"] is None
