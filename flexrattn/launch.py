"""What `train.py` runs: read the configuration, train, and end with a line that says where everything is.

A mistake of the user ends in one line on stderr and exit code 2; FLEXRATTN_TRACEBACK=1 shows where it was noticed.
"""

from __future__ import annotations

import logging
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

import flexrattn  # noqa: F401  (fills what an older torch lacks and sets the device, before torchtitan is imported)
from flexrattn import platform
from flexrattn.yaml_config import USAGE, YamlConfigManager

TRACEBACK_VARIABLE = "FLEXRATTN_TRACEBACK"
# What torchtitan and we raise for a configuration that cannot be built. Anything raised by training itself is a bug or
# a broken machine, and keeps its traceback.
USER_ERRORS = (ValueError, AssertionError, NotImplementedError, FileNotFoundError)


def main(args: list[str]) -> int:
    """Train as `args` say. Returns the process's exit code: 0, or 2 for bad input."""
    if args in (["-h"], ["--help"]):
        print(USAGE)
        return 0
    from torchtitan.tools.logging import init_logger, logger

    logger.addFilter(_worth_saying)
    trainer = None
    try:
        config = YamlConfigManager().parse_args(args)
        platform.ensure_process_group_environment()
        init_logger()
        trainer = config.build()
        trainer.train()
    except BaseException as error:
        if trainer is not None:
            trainer.close()
        theirs = isinstance(error, USER_ERRORS) and not (trainer is not None and trainer.training_started)
        if not theirs or os.environ.get(TRACEBACK_VARIABLE):
            raise
        _close()
        print(f"train.py: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    trainer.close()
    if platform.world_size() == 1 or int(os.environ["RANK"]) == 0:
        logger.info(_last_line(trainer, args))
    _close()
    return 0


def _worth_saying(record: logging.LogRecord) -> bool:
    # torchtitan's own default, warned of each time a checkpoint section is built or replaced.
    return "initial_load_model_only=True has no effect" not in record.getMessage()


def _close() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _last_line(trainer: Any, args: list[str]) -> str:
    """Where the checkpoint and the curves are, and what to run next."""
    config, metrics = trainer.config, trainer.metrics_processor
    folder = Path(config.dump_folder)
    said = [f"Step {trainer.step} of {config.training.steps} done."]
    if metrics.last_loss is None:
        said = [f"Nothing left to do: {folder} is at step {trainer.step} of {config.training.steps}."]
    losses = [metrics.validation_losses[s] for s in sorted(metrics.validation_losses)]
    if losses:
        said.append(
            "Validation loss " + " -> ".join(f"{loss:.3f}" for loss in (losses[0], losses[-1])[: len(losses)]) + "."
        )
    if config.checkpoint.enable:
        said.append(f"Checkpoint: {folder / config.checkpoint.folder / f'step-{trainer.step}'}.")
    if config.metrics.enable_tensorboard:
        said.append(f"Curves: tensorboard --logdir {folder / config.metrics.save_tb_folder}.")
    further = [*_without_flag(args, "--training.steps"), "--training.steps", str(2 * config.training.steps)]
    said.append(f"Train further: python train.py {shlex.join(further)}")
    if config.checkpoint.enable and _decodable(config.model_spec.model):
        said.append(f"Generate: python -m flexrattn.generate --checkpoint {folder} --prompt ...")
    return " ".join(said)


def _decodable(model: Any) -> bool:
    from flexrattn.decode.cache import check_decodable

    try:
        check_decodable(model)
    except ValueError:
        return False
    return True


def _without_flag(args: list[str], flag: str) -> list[str]:
    kept: list[str] = []
    skip = False
    for arg in args:
        if not skip and arg != flag and not arg.startswith(f"{flag}="):
            kept.append(arg)
        skip = not skip and arg == flag
    return kept
