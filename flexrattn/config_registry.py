"""Recipes: functions that return a whole `Trainer.Config`.

A YAML file names one and its arguments; `python -m torchtitan.train --module flexrattn --config rattention_debug`
calls the ones without arguments. Everything a recipe sets can be overridden by torchtitan's own names.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

from torchtitan.components.checkpointer import CheckpointManager
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.config import DebugConfig, ParallelismConfig, TrainingConfig
from torchtitan.hf_datasets.text_datasets import DATASETS, HuggingFaceTextDataLoader

from flexrattn import compat
from flexrattn.data.text import TextDataLoader
from flexrattn.data.tokenizer import ByteTokenizer
from flexrattn.evaluation import default_reference_window
from flexrattn.flavors import DEFAULT_PATTERN
from flexrattn.registry import model_registry
from flexrattn.trainer import CONFIG_FILE, BeforeAfterValidator, ProgressMetrics, RAttentionTrainer


def rattention(
    *,
    flavor: str = "debug",
    model: dict[str, Any] | None = None,
    layer_kind: str = "rattention",
    window: int | None = 512,
    feature_map: str = "softmax",
    pattern: list[str] | None = None,
    local_mask: str | dict[str, Any] | None = None,
    local_mask_args: dict[str, Any] | None = None,
    global_mask: str | dict[str, Any] | None = None,
    global_mask_args: dict[str, Any] | None = None,
    layer_masks: dict[Any, Any] | None = None,
    local_score_mod: str | dict[str, Any] | None = None,
    local_score_mod_args: dict[str, Any] | None = None,
    global_score_mod: str | dict[str, Any] | None = None,
    global_score_mod_args: dict[str, Any] | None = None,
    layer_score_mods: dict[Any, Any] | None = None,
    branch_norm: bool = True,
    swa_norm_init: float | None = None,
    rla_norm_init: float | None = None,
    decay_gate: bool = False,
    global_rope: bool = False,
    learned_initial_state: bool = False,
    learned_qk_scale: bool = False,
    scan_impl: str = "auto",
    scan_save_every: int | None = None,
    softmax_backend: str = "triton",
    data: Literal["python_source", "local", "tokens", "huggingface"] = "python_source",
    data_path: str | None = None,
    data_name: str | None = None,
    site_packages: bool = False,
    tokenizer: Literal["bytes", "huggingface"] = "bytes",
    lr: float = 3e-4,
    weight_decay: float = 0.1,
    loss: Literal["cross_entropy", "chunked"] = "cross_entropy",
    reference_window: int | None = None,
) -> RAttentionTrainer.Config:
    """A local-global language model and its training run.

    flavor, model: a size of flexrattn.flavors, and fields of it to replace. layer_kind ... softmax_backend: what the
    layers compute (flexrattn.flavors.Layers). data: `python_source` is the Python installation's own source files
    (site_packages adds the installed packages'), `local` a .txt, .jsonl or folder at data_path, `tokens` a folder there
    that flexrattn.data.prepare wrote, `huggingface` one of torchtitan's data sets by data_name.
    tokenizer: `bytes`, or `huggingface` for the tokenizer.json in hf_assets_path.
    loss: `chunked` keeps the logits of an eighth of the sequence at a time. reference_window: the window by which
    validation sorts tokens (flexrattn.evaluation): by default the layers' own, or 512 where they have none.
    """
    if data == "local" and not data_path:
        raise ValueError("data 'local' needs recipe_args.data_path: a .txt or .jsonl file or a folder of them")
    if data == "tokens" and not data_path:
        raise ValueError(
            "data 'tokens' needs recipe_args.data_path: a folder written by python -m flexrattn.data.prepare"
        )
    if loss == "chunked" and compat.torch_version() < (2, 13):
        raise ValueError("loss 'chunked' needs torch 2.13 or newer: use recipe_args.loss 'cross_entropy'")
    spec = model_registry(
        flavor,
        model=model,
        layer_kind=layer_kind,
        window=window,
        feature_map=feature_map,
        pattern=DEFAULT_PATTERN if pattern is None else pattern,
        local_mask=local_mask,
        local_mask_args=local_mask_args,
        global_mask=global_mask,
        global_mask_args=global_mask_args,
        layer_masks=layer_masks,
        local_score_mod=local_score_mod,
        local_score_mod_args=local_score_mod_args,
        global_score_mod=global_score_mod,
        global_score_mod_args=global_score_mod_args,
        layer_score_mods=layer_score_mods,
        branch_norm=branch_norm,
        swa_norm_init=swa_norm_init,
        rla_norm_init=rla_norm_init,
        decay_gate=decay_gate,
        global_rope=global_rope,
        learned_initial_state=learned_initial_state,
        learned_qk_scale=learned_qk_scale,
        scan_impl=scan_impl,
        scan_save_every=scan_save_every,
        softmax_backend=softmax_backend,
    )

    def loader(split: Literal["train", "validation"]) -> Any:
        if data == "huggingface":
            name = data_name or "c4_test"
            if split == "validation" and f"{name}_validation" in DATASETS:
                name = f"{name}_validation"
            return HuggingFaceTextDataLoader.Config(dataset=name, dataset_path=data_path, infinite=split == "train")
        return TextDataLoader.Config(
            dataset=data, dataset_path=data_path, site_packages=site_packages, split=split, infinite=split == "train"
        )

    cross_entropy = CrossEntropyLoss.Config(global_vocab_size=spec.model.vocab_size)
    chosen_loss: BaseLoss.Config = cross_entropy
    if loss == "chunked":
        chosen_loss = ChunkedLossWrapper.Config(loss_fn=cross_entropy)
    chosen_tokenizer: BaseTokenizer.Config = ByteTokenizer.Config()
    if tokenizer == "huggingface":
        chosen_tokenizer = HuggingFaceTokenizer.Config()
    return RAttentionTrainer.Config(
        model_spec=spec,
        dump_folder=f"outputs/{flavor}",
        hf_assets_path="assets/tokenizer",
        tokenizer=chosen_tokenizer,
        dataloader=loader("train"),
        loss=chosen_loss,
        optimizer=default_adamw(lr=lr, weight_decay=weight_decay),
        lr_scheduler=LRSchedulersContainer.Config(decay_type="cosine", min_lr_factor=0.1),
        training=TrainingConfig(
            # torchtitan's CUDA graphs want block masks without captured tensors; ours carry the document borders.
            disable_cuda_graphs=True,
        ),
        parallelism=ParallelismConfig(spmd_backend=compat.default_spmd_backend()),
        metrics=ProgressMetrics.Config(enable_tensorboard=True),
        validator=BeforeAfterValidator.Config(
            enable=True,
            freq=500,
            steps=20,
            dataloader=loader("validation"),
            reference_window=default_reference_window(window) if reference_window is None else reference_window,
        ),
        # A model-only last checkpoint could not be continued by raising training.steps.
        checkpoint=CheckpointManager.Config(enable=True, last_save_model_only=False, keep_latest_k=3),
        activation_checkpoint=None,
        debug=DebugConfig(seed=0, save_config_file=CONFIG_FILE),
    )


# Zero-argument recipes for torchtitan's own entry point.
rattention_debug = partial(rattention, flavor="debug", window=64)
rattention_30m = partial(rattention, flavor="30m", window=128)
rattention_150m = partial(rattention, flavor="150m")
rattention_400m = partial(rattention, flavor="400m")
rattention_3b = partial(rattention, flavor="3b", loss="chunked", tokenizer="huggingface")
rattention_12b = partial(rattention, flavor="12b", loss="chunked", tokenizer="huggingface")

# What a YAML file can name.
RECIPES: dict[str, Callable[..., RAttentionTrainer.Config]] = {"rattention": rattention}
