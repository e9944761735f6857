"""What is looked at: layers of a configuration, the shapes of a step, and the GPU that it is for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexrattn import platform
from flexrattn.attention import LayerKind, RAttention
from flexrattn.inspect.gpus import DEFAULT_GPU, GPU, GPUS, LIMITS, choose_arch, choose_gpu, find_gpu
from flexrattn.model import describe_layer
from flexrattn.packing import document_ids_from_positions, positions_from_lengths
from flexrattn.quiet import quiet_log
from flexrattn.suggest import choose
from flexrattn.yaml_config import YamlConfigManager
from score_mods import MaskMod, in_documents

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of the model. `count`: how many of the model's layers are the same as this one."""

    name: str
    index: int
    count: int
    block: Any  # Block.Config

    @property
    def attention(self) -> RAttention.Config:
        return self.block.attention

    def describe(self) -> str:
        return describe_layer(self.attention)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """documents: the lengths that every row is packed from. on_device: the GPU that is here is looked at, too."""

    source: str
    flags: tuple[str, ...]
    config: Any  # RAttentionTrainer.Config
    layers: tuple[Layer, ...]
    batch: int
    seq_len: int
    dtype: str
    documents: tuple[int, ...]
    arch: str
    gpu: GPU
    on_device: bool

    @property
    def model(self) -> Any:
        return self.config.model_spec.model

    @property
    def tokens(self) -> int:
        return self.batch * self.seq_len

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    def positions(self, device: torch.device | str) -> Tensor:
        """(B, T), restarting at 0 with each document."""
        row = positions_from_lengths(self.documents)
        return row.expand(self.batch, self.seq_len).contiguous().to(device)

    def mask(self, layer: Layer, *, whole: bool) -> MaskMod:
        """The layer's mask; `whole`: within the documents of one row, where there are several."""
        mask = self.model.masks[layer.attention.mask].build()
        if not whole or len(self.documents) == 1:
            return mask
        positions = positions_from_lengths(self.documents)[None]
        return in_documents(mask, document_ids=document_ids_from_positions(positions), positions=positions)


def load(
    source: str,
    flags: Sequence[str],
    *,
    layers: Sequence[str],
    seq_len: int | None,
    batch: int | None,
    dtype: str | None,
    documents: Sequence[int] | None,
    arch: str | None,
    gpu: str | None,
    device: str,
) -> Problem:
    """Everything checked before anything is compiled. ValueError of one line."""
    # torchtitan warns of its own defaults, and says nothing here that a reader of the report needs.
    with quiet_log():
        config = YamlConfigManager().parse_args([source, *flags])
    training = config.training
    seq_len = training.seq_len if seq_len is None else seq_len
    batch = training.local_batch_size if batch is None else batch
    for name, value in (("--seq-len", seq_len), ("--batch", batch)):
        if value < 1:
            raise ValueError(f"{name} must be positive, got {value}")
    model = config.model_spec.model
    if seq_len > model.max_seq_len:
        raise ValueError(
            f"--seq-len {seq_len} is more than the model's max_seq_len {model.max_seq_len}: "
            "use a shorter one or --recipe_args.model.max_seq_len"
        )
    if documents is None:
        documents = (seq_len,)
    if min(documents) < 1 or sum(documents) != seq_len:
        raise ValueError(
            f"--documents {','.join(map(str, documents))} must be lengths >= 1 that add up to the sequence, "
            f"{seq_len} tokens"
        )
    dtype = _NAMES[training.mixed_precision_param] if dtype is None else choose(dtype, DTYPES, what="dtype")
    arch, chosen, on_device = _hardware(arch, gpu, device)
    return Problem(
        source=source,
        flags=tuple(flags),
        config=config,
        layers=choose_layers(model, layers),
        batch=batch,
        seq_len=seq_len,
        dtype=dtype,
        documents=tuple(documents),
        arch=arch,
        gpu=chosen,
        on_device=on_device,
    )


def _hardware(arch: str | None, gpu: str | None, device: str) -> tuple[str, GPU, bool]:
    """Architecture, the GPU for the roofline, and whether the one that is here is measured."""
    there = device != "cpu" and torch.cuda.is_available() and platform.device_type() == "cuda"
    if device == "cuda" and not there:
        hidden = f"{platform.DEVICE_VARIABLE}=cpu hides it" if torch.cuda.is_available() else "torch sees none here"
        raise ValueError(f"--device cuda needs a GPU, and {hidden}: --device cpu compiles for --arch without one")
    wanted = None if arch is None else choose_arch(arch)
    if gpu is not None and wanted is None and not there:
        wanted = GPUS[choose(gpu.lower(), GPUS, what="GPU")].arch
    if there:
        major, minor = torch.cuda.get_device_capability()
        here, name = f"sm_{10 * major + minor}", torch.cuda.get_device_name()
        if here not in LIMITS and wanted is None:
            raise ValueError(
                f"{name} is {here}, and the kernels are made for {', '.join(LIMITS)}: name one with --arch, which "
                "compiles for it and runs nothing"
            )
        if wanted is None or wanted == here:
            found = find_gpu(name, here)
            if gpu is not None:
                found = choose_gpu(gpu, here)
            if found is None:
                raise ValueError(
                    f"{name} is not in the table of GPUs: name a similar one with --gpu ({', '.join(GPUS)})"
                )
            return here, found, True
        if device == "cuda":
            raise ValueError(f"--device cuda: the GPU here is {here} ({name}), not {wanted}: leave --arch out")
    arch = wanted or "sm_90"
    return arch, choose_gpu(gpu or DEFAULT_GPU[arch], arch), False


def choose_layers(model: Any, wanted: Sequence[str]) -> tuple[Layer, ...]:
    """ "local", "global" or an index each. Layers of equal configs are one, counted; a kind that is not there is left
    out, unless nothing remains."""
    kinds = _kinds(model)
    chosen: dict[int, str] = {}
    for name in wanted:
        if name.isdigit():
            if int(name) >= len(model.layers):
                raise ValueError(f"--layer {name}: the model has layers 0 to {len(model.layers) - 1}")
            chosen.setdefault(int(name), f"layer {name}")
            continue
        choose(name, ("local", "global"), what="layer (or an index)")
        if name in kinds:
            chosen.setdefault(kinds.index(name), name)
    if not chosen:
        raise ValueError(f"--layer {' '.join(wanted)}: the model has only {kinds[0]} layers")
    described = [_same(block) for block in model.layers]
    return tuple(
        Layer(name=name, index=index, count=described.count(described[index]), block=model.layers[index])
        for index, name in chosen.items()
    )


def _kinds(model: Any) -> list[str]:
    """Of every layer. Global ones are those of kind "full", or where all are, those without positions."""
    attentions = [block.attention for block in model.layers]
    all_full = all(attention.kind is LayerKind.FULL for attention in attentions)
    return [
        "local" if attention.kind is not LayerKind.FULL or (all_full and attention.use_rope) else "global"
        for attention in attentions
    ]


def _same(block: Any) -> str:
    return describe_layer(block.attention)


def config_name(source: str) -> str:
    return Path(source).stem
