"""One training step of the configuration, watched: graph breaks, recompilations, and where the host waits for the GPU.

The step is the trainer's own forward and backward with its loss, clipping, optimizer and schedule, from a batch that
is on the GPU, on as many layers as the pattern repeats. Copying a batch to the GPU, which torchtitan does with
blocking copies, and logging, which reads the loss, are not part of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from flexrattn import platform
from flexrattn.data.text import TextDataLoader
from flexrattn.data.tokenizer import ByteTokenizer
from flexrattn.inspect import compiler
from flexrattn.inspect.compiler import Event
from flexrattn.inspect.paths import without_paths
from flexrattn.inspect.problem import Problem

WARM_UP_STEPS = 2
# What torchtitan's mixed precision computes in.
DTYPES = {"bf16": "bfloat16", "fp32": "float32"}


def watch_step(problem: Problem, device: str = "cuda") -> dict[str, Any]:
    """What one step does behind WARM_UP_STEPS others, which compile."""
    with tempfile.TemporaryDirectory() as folder:
        config = short_config(problem, Path(folder))
        with training_step(problem, config, device) as step:
            torch.compiler.reset()
            with compiler.dynamo_events() as before:
                for _ in range(WARM_UP_STEPS):
                    step()
            with compiler.dynamo_events() as events, host_syncs(device) as syncs:
                step()
    layers = len(config.model_spec.model.layers)
    compiled = "compiled" if config.compile.enable and "model" in config.compile.components else "not compiled"
    return {
        "what": f"a training step of {layers} layers ({compiled} by blocks) behind {WARM_UP_STEPS} others",
        "graphs": before.graphs,
        "warm_up_recompiles": [vars(event) for event in before.recompiles],
        "graph_breaks": [vars(event) for event in (*before.graph_breaks, *events.graph_breaks)],
        "host_syncs": [vars(event) for event in syncs],
        "recompiles": [vars(event) for event in events.recompiles],
    }


def short_config(problem: Problem, folder: Path) -> Any:
    """The configuration with the layers up to the last one looked at (a whole pattern), on one GPU, without data,
    checkpoints, validation and logs."""
    config = problem.config
    number = max(layer.index for layer in problem.layers) + 1
    model = dataclasses.replace(problem.model, layers=problem.model.layers[:number])
    one = {
        "data_parallel_replicate_degree": 1,
        "data_parallel_shard_degree": 1,
        "tensor_parallel_degree": 1,
        "pipeline_parallel_degree": 1,
        "context_parallel_degree": 1,
        "expert_parallel_degree": 1,
    }
    fields = {field.name for field in dataclasses.fields(config.parallelism)}
    return dataclasses.replace(
        config,
        model_spec=dataclasses.replace(config.model_spec, model=model),
        dump_folder=str(folder),
        tokenizer=ByteTokenizer.Config(),
        dataloader=TextDataLoader.Config(dataset="python_source", split="train", infinite=True),
        validator=dataclasses.replace(config.validator, enable=False),
        checkpoint=dataclasses.replace(config.checkpoint, enable=False),
        metrics=dataclasses.replace(config.metrics, enable_tensorboard=False, log_freq=10**9),
        training=dataclasses.replace(
            config.training,
            seq_len=problem.seq_len,
            local_batch_size=problem.batch,
            global_batch_size=-1,
            mixed_precision_param=DTYPES[problem.dtype],
        ),
        parallelism=dataclasses.replace(
            config.parallelism, **{name: degree for name, degree in one.items() if name in fields}
        ),
        debug=dataclasses.replace(config.debug, save_config_file=None),
    )


@contextmanager
def training_step(problem: Problem, config: Any, device: str) -> Iterator[Callable[[], None]]:
    """A function that does one step on a fixed batch."""
    from torchtitan.distributed import utils as dist_utils

    platform.ensure_process_group_environment()
    logging.disable(logging.WARNING)
    trainer = None
    try:
        trainer = config.build()
        generator = torch.Generator().manual_seed(0)
        shape = (problem.batch, problem.seq_len)
        tokens = torch.randint(0, problem.model.vocab_size, shape, generator=generator).to(device)
        positions = problem.positions(device)
        number = torch.tensor(tokens.numel(), device=device)

        numbers = itertools.count(1)

        def step() -> None:
            for part in trainer.model_parts:
                part.set_step(next(numbers))
            trainer.optimizers.zero_grad()
            trainer.forward_backward_step(
                input_dict={"input": tokens, "positions": positions}, labels=tokens, global_valid_tokens=number
            )
            parameters = [p for part in trainer.model_parts for p in part.parameters()]
            dist_utils.clip_grad_norm_(parameters, config.training.max_norm, foreach=True)
            trainer.optimizers.step()
            trainer.lr_schedulers.step()

        logging.disable(logging.NOTSET)
        yield step
    finally:
        logging.disable(logging.NOTSET)
        if trainer is not None:
            trainer.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


@contextmanager
def host_syncs(device: str = "cuda") -> Iterator[list[Event]]:
    """Every operation inside that makes the host wait for the GPU, with the frames that led to it."""
    found: list[Event] = []
    lock = threading.Lock()

    def note(message: Any, *_: Any, **__: Any) -> None:
        if "called a synchronizing" not in str(message):
            return
        with lock:
            found.append(Event(where=own_frame(traceback.extract_stack()[:-1]), why=str(message).splitlines()[0]))

    if device == "cpu":
        yield found
        return
    mode = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
            torch.cuda.set_sync_debug_mode(mode)
            torch.cuda.synchronize()
        finally:
            torch.cuda.set_sync_debug_mode(mode)


def own_frame(stack: Any) -> str:
    """file:line of the innermost frame outside of torch, `warnings` and this file, else of the innermost one."""
    torch_folder = str(Path(torch.__file__).parent)
    inner = (torch_folder, "<", __file__, warnings.__file__)
    outside = [frame for frame in stack if not frame.filename.startswith(inner)]
    frame = (outside or list(stack))[-1]
    return without_paths(f"{frame.filename}:{frame.lineno}")
