"""torchtitan's Trainer with what a user looks for in the log: validation before and after, and the time left.

Nothing of the training loop is here: each class overrides one method that torchtitan offers for it.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.validate import Validator
from torchtitan.tools.logging import logger
from torchtitan.trainer import Trainer

from flexrattn import branch_shares, compat, evaluation, platform
from flexrattn.data.text import TextDataLoader, check_saved_dp_degree
from flexrattn.data.tokenizer import check_vocabulary
from flexrattn.masked_attention import check_backend
from flexrattn.model import RAttentionModel, log_layers, refuse_context_parallel, refuse_uneven_head_split

CONFIG_FILE = "config.json"


class ProgressMetrics(MetricsProcessor):
    """torchtitan's log line and TensorBoard scalars, the line with the time left appended."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    total_steps: int | None = None
    tokens_per_step: int | None = None
    last_loss: float | None = None
    validation_losses: dict[int, float]

    def __init__(self, config: Config, **kwargs: Any):
        super().__init__(config, **kwargs)
        self.validation_losses = {}
        self._warm = False
        if platform.device_type() == "cpu":
            # torchtitan knows no peak of a CPU and would log a share of an A100's; this is its switch for "no MFU".
            self.has_quantization = True

    def log(self, step: int, global_avg_loss: float, *args: Any, **kwargs: Any) -> None:
        self.last_loss = global_avg_loss
        with _suffix(f"  time left: {self._time_left(step)}"):
            super().log(step, global_avg_loss, *args, **kwargs)
        self._warm = True

    def log_validation(self, loss: float, step: int, *args: Any, **kwargs: Any) -> None:
        self.validation_losses[step] = loss
        super().log_validation(loss, step, *args, **kwargs)

    def _time_left(self, step: int) -> str:
        # The first line's interval holds compilation, so its rate says nothing about the rest.
        if self.total_steps is None or not self.tokens_per_step or not self._warm:
            return "-"
        seconds_per_token = (time.perf_counter() - self.time_last_log) / max(1, self.ntokens_since_last_log)
        return str(timedelta(seconds=round((self.total_steps - step) * self.tokens_per_step * seconds_per_token)))


class _suffix(logging.Filter):
    """Append a text to what torchtitan logs inside the `with`: its line is one f-string, without a hook."""

    def __init__(self, text: str):
        super().__init__()
        self.text = text

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg = f"{record.msg}{self.text}"
        return True

    def __enter__(self) -> None:
        logger.addFilter(self)

    def __exit__(self, *exception: object) -> None:
        logger.removeFilter(self)


class BeforeAfterValidator(Validator):
    """torchtitan's validator, run every `freq` steps and after the last one; the trainer runs it before the first.

    The same forward passes also give the losses of single tokens: by position, and by where their bigram was last seen
    (flexrattn.evaluation), in the log, in TensorBoard and in eval.json in the run's dump_folder; and TensorBoard the
    share of each branch (flexrattn.branch_shares).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(Validator.Config):
        reference_window: int = evaluation.DEFAULT_REFERENCE_WINDOW
        """Tokens are sorted by whether this window reaches what they need (flexrattn.evaluation)"""

        def __post_init__(self):
            Validator.Config.__post_init__(self)
            evaluation.check_reference_window(self.reference_window)

    # The trainer, which knows them, sets these.
    last_step: int | None = None
    dump_folder: str | None = None
    tokens_per_step: int = 0

    loss_fn: Any
    _batch: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None

    def should_validate(self, step: int) -> bool:
        return step % self.config.freq == 0 or step == self.last_step

    def post_dataloading_process(
        self, input_dict: dict[str, torch.Tensor], labels: torch.Tensor, model_parts: list[torch.nn.Module]
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        tokens_BT = input_dict["input"]
        whole_rows = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(tokens_BT)
        self._batch = tokens_BT, labels, input_dict.get("positions", whole_rows)
        return super().post_dataloading_process(input_dict, labels, model_parts)

    def not_measured(self) -> str:
        """Why the losses of single tokens cannot be seen in this run; "" if they can."""
        if self.parallel_dims.pp_enabled:
            return "pipeline parallelism keeps them in its last stage"
        if self.parallelism.spmd_backend == "full_dtensor":
            return "parallelism.spmd_backend is full_dtensor"
        if not evaluation.PerTokenLoss.takes(self.loss_fn):
            return f"the loss is {type(self.loss_fn).__name__}, not cross entropy"
        return ""

    def validate(self, model_parts: list[torch.nn.Module], step: int) -> None:
        if reason := self.not_measured():
            logger.warning(f"Losses of single tokens are not measured: {reason}")
            super().validate(model_parts, step)
            return
        tally = evaluation.LossTally(
            seq_len=self.seq_len, reference_window=self.config.reference_window, device=platform.device_type()
        )

        def seen(loss_BT: torch.Tensor) -> None:
            assert self._batch is not None
            tally.add(*self._batch, loss_BT)

        loss_fn: Any = self.loss_fn
        self.loss_fn = evaluation.PerTokenLoss(loss_fn, seen)
        branch_shares.begin(model_parts)
        try:
            super().validate(model_parts, step)
        finally:
            self.loss_fn, self._batch = loss_fn, None
        self._report(tally, branch_shares.end(model_parts), step)

    def _report(self, tally: evaluation.LossTally, shares: dict[str, float], step: int) -> None:
        group = self.parallel_dims.get_mesh("batch").get_group() if self.parallel_dims.dp_enabled else None
        result = tally.result(step=step, tokens=step * self.tokens_per_step, group=group)
        logger.info(f"validate step: {step:2}  {evaluation.log_line(result)}")
        self.metrics_processor.logger.log(evaluation.scalars(result) | shares, step)
        if self.dump_folder is not None and torch.distributed.get_rank() == 0:
            evaluation.write_json(Path(self.dump_folder) / evaluation.EVAL_FILE, result)


class RAttentionTrainer(Trainer):
    """torchtitan's trainer, with the checks that need no device made before any device is touched."""

    @dataclass(kw_only=True, slots=True)
    class Config(Trainer.Config):
        def to_dict(self) -> dict[str, Any]:
            # torchtitan writes a section's fields and not its class, and all tokenizers have the same fields: none.
            written = Trainer.Config.to_dict(self)
            written["tokenizer"] = {
                "class": type(self.tokenizer).__qualname__.partition(".")[0],
                **written["tokenizer"],
            }
            return written

    validator: BeforeAfterValidator
    metrics_processor: ProgressMetrics
    # Until data is asked for, what goes wrong is the configuration's or the checkpoint's: one line, no traceback.
    training_started: bool = False

    def __init__(self, config: Config):
        check_before_start(config)
        check_resumed_model(config)
        super().__init__(config)
        checkpoint = newest_checkpoint(config)
        if checkpoint is not None and isinstance(config.dataloader, TextDataLoader.Config):
            check_saved_dp_degree(checkpoint, self.dataloader.dp_world_size)
        if compat.filled:
            logger.info(
                f"torch {torch.__version__} lacks what torchtitan 0.3.0 names; filled: {', '.join(compat.filled)}"
            )
        assert config.model_spec is not None
        assert isinstance(config.model_spec.model, RAttentionModel.Config)
        log_layers(config.model_spec.model, config.training.seq_len)
        tokens = config.training.local_batch_size * config.training.seq_len * self.gradient_accumulation_steps
        ranks = self.parallel_dims.dp_replicate * self.parallel_dims.dp_shard
        self.metrics_processor.tokens_per_step = tokens
        self.metrics_processor.total_steps = config.training.steps
        if config.validator.enable:
            self.validator.last_step = config.training.steps
            self.validator.dump_folder = config.dump_folder
            self.validator.tokens_per_step = tokens * ranks
        total = tokens * ranks * config.training.steps
        logger.info(f"{tokens * ranks:,} tokens a step, {total:,} in {config.training.steps} steps")

    def batch_generator(self, data_iterable: Any) -> Iterator[Any]:
        self.training_started = True
        return self._seen_by_the_model(super().batch_generator(data_iterable))

    def _seen_by_the_model(self, batches: Iterator[Any]) -> Iterator[Any]:
        """The batches as they are. Here they are still on the host, where a look at them waits for no device."""
        for input_dict, labels in batches:
            for part in self.model_parts:
                assert isinstance(part, RAttentionModel)
                if "positions" in input_dict:
                    part.see_batch(input_dict["positions"])
            yield input_dict, labels

    def train_step(self, data_iterator: Iterator[Any]) -> None:
        if self.step == 1 and self.config.validator.enable:
            self.validator.validate(self.model_parts, 0)
        for part in self.model_parts:
            assert isinstance(part, RAttentionModel)
            part.set_step(self.step)
        super().train_step(data_iterator)


def check_before_start(config: RAttentionTrainer.Config) -> None:
    """Refuse what cannot work, in one line, before the process group and the model exist. Raises ValueError."""
    assert config.model_spec is not None
    model = config.model_spec.model
    assert isinstance(model, RAttentionModel.Config)
    compat.check_parallelism(config.parallelism, world_size=platform.world_size())
    training = config.training
    if training.steps < 1 or training.seq_len < 1 or training.local_batch_size < 1:
        raise ValueError(
            "training.steps, seq_len and local_batch_size must be positive, got "
            f"{training.steps}, {training.seq_len}, {training.local_batch_size}"
        )
    if training.seq_len > model.max_seq_len:
        raise ValueError(
            f"training.seq_len {training.seq_len} is more than the model's max_seq_len {model.max_seq_len}: "
            "use a shorter seq_len or recipe_args.model.max_seq_len"
        )
    chunks = getattr(config.loss, "num_chunks", 1)
    if training.seq_len % chunks:
        raise ValueError(f"training.seq_len {training.seq_len} must be a multiple of loss.num_chunks {chunks}")
    refuse_context_parallel(config.parallelism)
    refuse_uneven_head_split(model, config.parallelism)
    for layer in model.layers:
        check_backend(layer.attention.inner_attention.kernel_options, torch.device(platform.device_type()))
    check_vocabulary(config.tokenizer.build(tokenizer_path=config.hf_assets_path), model.vocab_size)


def model_fingerprint(config: Any) -> Any:
    """The model config as plain values without initialisers and placements: what a checkpoint's weights mean."""
    if isinstance(config, dict):
        return {k: model_fingerprint(v) for k, v in config.items() if k not in ("param_init", "sharding_config")}
    if isinstance(config, list | tuple):
        return [model_fingerprint(v) for v in config]
    return config


def newest_checkpoint(config: Trainer.Config) -> Path | None:
    """The folder that a run with this configuration resumes from: the newest step with metadata, written last."""
    if not config.checkpoint.enable:
        return None
    folder = Path(config.dump_folder) / config.checkpoint.folder
    wanted = "*" if config.checkpoint.load_step == -1 else str(config.checkpoint.load_step)
    complete = [path.parent for path in folder.glob(f"step-{wanted}/.metadata")]
    return max(complete, key=lambda path: int(path.name.removeprefix("step-")), default=None)


def check_resumed_model(config: RAttentionTrainer.Config) -> None:
    """Refuse to continue a folder's checkpoints with another model: shapes may fit where meanings do not."""
    assert config.model_spec is not None
    saved = Path(config.dump_folder) / CONFIG_FILE
    checkpoint = newest_checkpoint(config)
    if checkpoint is None or not saved.is_file():
        return
    before = model_fingerprint(json.loads(saved.read_text())["model_spec"]["model"])
    now = model_fingerprint(json.loads(json.dumps(config.model_spec.model.to_dict())))
    if before != now:
        raise ValueError(
            f"{checkpoint.parent} holds checkpoints of another model ({_first_difference(before, now)}): choose "
            "another --dump_folder, or start from its weights with --checkpoint.initial_load_path"
        )


def _first_difference(before: Any, now: Any, path: str = "") -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        for key in [*before, *(k for k in now if k not in before)]:
            if before.get(key) != now.get(key):
                return _first_difference(before.get(key), now.get(key), f"{path}.{key}" if path else str(key))
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            if old != new:
                return _first_difference(old, new, f"{path}[{i}]")
    shown = [text if len(text := repr(v)) < 60 else f"{text[:57]}..." for v in (before, now)]
    return f"{path} was {shown[0]}, is {shown[1]}"
