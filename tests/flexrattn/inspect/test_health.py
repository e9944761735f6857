"""A training step, watched: on the CPU, where nothing waits for a GPU; with its faults put in, they are found."""

from __future__ import annotations

import os
import warnings

import pytest
import torch

from flexrattn.inspect import health
from flexrattn.inspect.problem import load


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A step runs in this process: its process group holds a port that processes of later tests would inherit."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


def watch(*flags: str, **options):
    defaults = {"layers": ["local", "global"], "seq_len": 64, "batch": 2, "dtype": "fp32", "documents": (40, 24)}
    others = {"arch": None, "gpu": None, "device": "cpu"}
    return health.watch_step(load("configs/debug.yaml", flags, **(defaults | others | options)), "cpu")


COMPILED = ("--compile.enable", "--compile.backend", "aot_eager", "--recipe_args.scan_impl", "torch")


def test_a_compiled_step_is_healthy():
    found = watch(*COMPILED)
    assert (found["graph_breaks"], found["host_syncs"], found["recompiles"]) == ([], [], [])
    # One for the local layers and one for the global layer; the loss is compiled as well.
    assert found["graphs"] >= 2
    assert "4 layers (compiled" in found["what"]


def test_windows_are_drawn_in_the_watched_steps():
    """A window anew for each of them, and nothing compiles again."""
    found = watch(*COMPILED, "--recipe_args.local_mask.stochastic_window.values", "[3, 5, 9, 20, 33]")
    assert (found["graph_breaks"], found["recompiles"]) == ([], [])


def test_a_recompilation_in_the_step_is_found(monkeypatch):
    compiled = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    lengths = iter((3, 3, 4))

    @health.contextmanager
    def step_of(problem, config, device):
        yield lambda: compiled(torch.ones(next(lengths)))

    monkeypatch.setattr(health, "training_step", step_of)
    found = watch()
    (event,) = found["recompiles"]
    assert event["where"].startswith("tests/flexrattn/inspect/test_health.py:")
    assert found["warm_up_recompiles"] == []


@pytest.fixture
def no_cuda(monkeypatch):
    """The switches of torch.cuda, without a GPU."""
    modes = []
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return modes


def test_host_syncs_are_found_with_their_place(no_cuda):
    with health.host_syncs("cuda") as found:
        warnings.warn("called a synchronizing CUDA operation (Triggered internally ...)", stacklevel=1)  # waits
        warnings.warn("something else", stacklevel=1)
    with open(__file__) as file:
        line = next(i for i, text in enumerate(file, 1) if text.rstrip().endswith("# waits"))
    (event,) = found
    assert event.where == f"tests/flexrattn/inspect/test_health.py:{line}"
    assert event.why.startswith("called a synchronizing CUDA operation")
    assert no_cuda[0] == "warn"
    assert no_cuda[-1] == 0


def test_the_mode_is_put_back_when_a_step_fails(no_cuda):
    with pytest.raises(RuntimeError), health.host_syncs("cuda"):
        raise RuntimeError
    assert no_cuda[-1] == 0


def test_the_frame_is_the_callers_and_not_torchs():
    import traceback

    stack = traceback.extract_stack()
    stack.append(traceback.FrameSummary(f"{torch.__path__[0]}/_tensor.py", 7, "item"))
    assert health.own_frame(stack).startswith("tests/flexrattn/inspect/test_health.py:")
