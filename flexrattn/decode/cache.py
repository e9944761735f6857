"""What a sequence keeps between steps, and how many bytes that is.

| layer | keeps of each sequence |
|---|---|
| window (local) | a ring of window + fold_every keys and values, with a linear branch; window + 1 without |
| linear branch | beside it one state (G, F, Dv) in fp32 |
| linear branch alone | the state |
| causal, or any other mask | keys and values of `max_length` tokens |

Key p of the running document lies in slot p mod S. Keys are kept once, as the softmax branch reads them (after RoPE);
what the linear branch takes in is turned back, which costs one rounding of the key. The state holds the keys
p < absorbed; those from there up to t - window - 1 are read from the ring, and `fold_every` of them at a time enter the
state. So a state is never rounded, and written once in `fold_every` steps.

Letters: B rows of the cache, S slots, H query heads, G KV heads, D head width, F features (scan_kernels/README.md).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flexrattn.attention import LayerKind, RAttention
from flexrattn.model import RAttentionModel
from scan_kernels import feature_dim
from score_mods import MaskMod, mask_info, reads_ahead

FORMAT = "flexrattn.decode.cache/2"


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What one layer needs kept. `window` is the softmax branch's; None: it sees all (or there is none)."""

    softmax: bool
    residual: bool
    window: int | None
    rope: bool
    mask: MaskMod | None  # a mask that is neither causal nor a window; evaluated on positions of the document
    H: int
    G: int
    D: int
    F: int
    feature_map: str

    def slots(self, max_length: int, fold_every: int) -> int:
        """Keys that a sequence keeps."""
        if not self.softmax:
            return 0
        if self.window is None:
            return max_length
        return min(self.window + (fold_every if self.residual else 1), max_length)

    def described(self) -> dict[str, Any]:
        """What tensors of the layer mean, for a file."""
        known: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        return known | {"mask": None if self.mask is None else getattr(self.mask, "__name__", repr(self.mask))}


def layer_spec(attention: RAttention.Config, model: RAttentionModel.Config) -> LayerSpec:
    """Of a layer's config. ValueError for what has no cache: see `check_decodable`."""
    if reason := _no_cache(attention):
        raise ValueError(reason)
    H, D = attention.n_heads, attention.head_dim
    G = attention.n_kv_heads or H
    assert D is not None
    window, mask = None, None
    if attention.has_softmax:
        mask_mod = model.masks[attention.mask].build()
        info = mask_info(mask_mod)
        if info is not None and info.exact and info.causal and not info.documents:
            window = info.window
        else:
            mask = mask_mod
        if mask is not None and reads_ahead(mask):
            raise ValueError(f"decoding needs causal masks: {attention.mask} lets queries read later tokens")
        if attention.inner_attention.score_mod is not None:
            raise ValueError(
                f"decoding has no score mods yet, the model has {attention.inner_attention.score_mod.name!r}"
            )
    residual = attention.residual
    if residual is not None and residual.sinks:
        raise ValueError(
            f"decoding keeps no sinks beside a linear branch yet, the model has mask {attention.mask}: "
            "layer_kind 'swa' decodes with it"
        )
    if residual is not None and attention.kind is LayerKind.RATTENTION and residual.window != window:
        raise ValueError(f"a linear branch behind window {residual.window} beside mask {attention.mask!r} has no cache")
    feature_map = residual.feature_map if residual is not None else "softmax"
    return LayerSpec(
        softmax=attention.has_softmax,
        residual=residual is not None,
        window=window,
        rope=attention.use_rope and attention.has_softmax,
        mask=mask,
        H=H,
        G=G,
        D=D,
        F=feature_dim(feature_map, D) if residual is not None else 0,
        feature_map=feature_map,
    )


def check_decodable(model: RAttentionModel.Config) -> None:
    """ValueError for what trains and has no cache: a decay gate, heads split between the branches, a linear branch
    beside another mask than its window, a score mod, and masks that let queries read later keys."""
    for layer in model.layers:
        layer_spec(layer.attention, model)


def _no_cache(attention: RAttention.Config) -> str:
    named = {"decay_gate true": attention.decay_gate is not None, "layer_kind 'hymba'": attention.splits_heads}
    there = " and ".join(name for name, has in named.items() if has)
    if not there:
        return ""
    return f"a model with {there} trains and can be evaluated, but decoding has no cache for it yet"


@dataclass(kw_only=True)
class LayerCache:
    """One layer's part: k and v (B, G, S, D), state (B, G, F, D); None where the layer has none."""

    spec: LayerSpec
    k_BGSD: Tensor | None
    v_BGSD: Tensor | None
    state_BGFD: Tensor | None

    @property
    def slots(self) -> int:
        return 0 if self.k_BGSD is None else self.k_BGSD.shape[2]

    def tensors(self) -> dict[str, Tensor]:
        named = {"k": self.k_BGSD, "v": self.v_BGSD, "state": self.state_BGFD}
        return {name: x for name, x in named.items() if x is not None}


class DecodeCache:
    """Caches of all layers for `rows` sequences of up to `max_length` tokens each.

    lengths_B: tokens of the running document that a row has seen; the next one gets this position.
    absorbed: per window of a linear branch, (B,): keys of the running document that its states hold.
    Rows are independent; `reset` empties some. All tensors have fixed addresses from the start.
    """

    def __init__(
        self,
        model: RAttentionModel.Config,
        *,
        rows: int,
        max_length: int,
        device: torch.device | str,
        dtype: torch.dtype,
        fold_every: int = 1,
    ):
        for name, value in (("rows", rows), ("max_length", max_length), ("fold_every", fold_every)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, got {value!r}")
        if max_length > model.max_seq_len:
            raise ValueError(
                f"max_length {max_length} is more than the model's max_seq_len {model.max_seq_len}: use a shorter one"
            )
        self.rows, self.max_length, self.fold_every = rows, max_length, fold_every
        self.device, self.dtype = torch.device(device), dtype
        self._model = model
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=device)
        self.absorbed: dict[int, Tensor] = {}
        self.layers: list[LayerCache] = []
        state_dtype = torch.promote_types(dtype, torch.float32)
        for config in model.layers:
            spec = layer_spec(config.attention, model)
            k = v = state = None
            if slots := spec.slots(max_length, fold_every):
                k = torch.zeros(rows, spec.G, slots, spec.D, dtype=dtype, device=device)
                v = torch.zeros_like(k)
            if spec.residual:
                state = torch.zeros(rows, spec.G, spec.F, spec.D, dtype=state_dtype, device=device)
                if spec.window is not None and spec.window not in self.absorbed:
                    self.absorbed[spec.window] = torch.zeros_like(self.lengths_B)
            self.layers.append(LayerCache(spec=spec, k_BGSD=k, v_BGSD=v, state_BGFD=state))

    @property
    def nbytes(self) -> int:
        """Bytes of the keys, values and states of all rows."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer.tensors().values())

    @property
    def bytes_per_sequence(self) -> int:
        return self.nbytes // self.rows

    def check_model(self, model: RAttentionModel.Config) -> None:
        """ValueError if the cache was made for layers that keep something else."""
        if model is self._model:
            return
        own, theirs = ([layer_spec(layer.attention, x).described() for layer in x.layers] for x in (self._model, model))
        if own != theirs:
            raise ValueError("the cache was made for another model: make one with DecodeCache(model.config, ...)")
        self._model = model

    def reset(self, rows: Sequence[int] | Tensor) -> None:
        """Empty rows: their next token begins a document. ValueError for rows that the cache does not have."""
        index = self._index(rows)
        self.lengths_B[index] = 0
        for absorbed_B in self.absorbed.values():
            absorbed_B[index] = 0
        for layer in self.layers:
            # Keys need nothing: a slot is read only for positions below the length.
            if layer.state_BGFD is not None:
                layer.state_BGFD[index] = 0

    def _index(self, rows: Sequence[int] | Tensor) -> Tensor:
        if not isinstance(rows, Tensor):  # looking at a tensor would wait for the device
            rows = list(rows)
            if not rows or len(set(rows)) < len(rows) or min(rows) < 0 or max(rows) >= self.rows:
                raise ValueError(f"rows must be different and from 0 to {self.rows - 1}, got {rows}")
        return torch.as_tensor(rows, dtype=torch.int64, device=self.device)

    def save(self, path: str | Path, rows: Sequence[int]) -> None:
        """Write rows to a safetensors file: the keys in use, the states, the lengths. ValueError where it cannot."""
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        index = self._index(rows)
        longest = int(self.lengths_B[index].max())
        tensors = {"lengths": self.lengths_B[index]}
        tensors |= {f"absorbed.{window}": absorbed_B[index] for window, absorbed_B in self.absorbed.items()}
        for i, layer in enumerate(self.layers):
            for name, x in layer.tensors().items():
                part = x[index] if name == "state" else x[index][:, :, : max(longest, 1)]
                tensors[f"layers.{i}.{name}"] = part
        metadata = {"format": FORMAT, "fold_every": str(self.fold_every), "max_length": str(self.max_length)}
        metadata["layers"] = json.dumps([layer.spec.described() for layer in self.layers])
        contiguous = {name: x.contiguous().cpu() for name, x in tensors.items()}
        try:
            save_file(contiguous, str(path), metadata=metadata)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"the cache cannot be written to {path}: {error}") from None

    def load(self, path: str | Path, rows: Sequence[int]) -> None:
        """Fill rows from a file of `save`. ValueError where it is of another model, or its sequences do not fit."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt", device=str(self.device)) as file:
                metadata: dict[str, Any] = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{path} cannot be read as a cache: {error}") from None
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is no cache that this version wrote: its format is {metadata.get('format')!r}")
        if int(metadata["fold_every"]) != self.fold_every:
            raise ValueError(
                f"{path} was made with fold_every {metadata['fold_every']}, this cache has {self.fold_every}"
            )
        lengths = tensors["lengths"]
        if len(lengths) != len(rows):
            raise ValueError(f"{path} holds {len(lengths)} sequences, {len(rows)} rows were given")
        longest = int(lengths.max())
        if longest > self.max_length:
            raise ValueError(f"{path} holds {longest} tokens, this cache has room for {self.max_length}")
        self._check_same_layers(tensors, path)
        self._check_same_meaning(json.loads(metadata["layers"]), path)
        index = self._index(rows)
        saved_length = int(metadata["max_length"])
        self.lengths_B[index] = lengths
        for window, absorbed_B in self.absorbed.items():
            absorbed_B[index] = tensors[f"absorbed.{window}"]
        for i, layer in enumerate(self.layers):
            saved_slots = layer.spec.slots(saved_length, self.fold_every)
            for name, x in layer.tensors().items():
                saved = tensors[f"layers.{i}.{name}"]
                if name == "state":
                    x[index] = saved
                else:
                    _copy_slots(x, index, saved, saved_slots, lengths)

    def _check_same_layers(self, tensors: dict[str, Tensor], path: str | Path) -> None:
        expected = {
            f"layers.{i}.{name}": x for i, layer in enumerate(self.layers) for name, x in layer.tensors().items()
        }
        expected |= {f"absorbed.{window}": self.lengths_B for window in self.absorbed}
        found = set(tensors) - {"lengths"}
        if found != set(expected):
            different = sorted(found ^ set(expected))[0]
            raise ValueError(f"{path} is the cache of another model: {different} is not in both")
        for name, x in expected.items():
            saved = tensors[name]
            own, theirs = (
                (*y.shape[1:2], *y.shape[3:]) if name[-2:] in (".k", ".v") else y.shape[1:] for y in (x, saved)
            )
            if own != theirs or saved.dtype != x.dtype:
                raise ValueError(
                    f"{path} is the cache of another model or dtype: {name} is {tuple(saved.shape)} {saved.dtype}, "
                    f"this cache has {tuple(x.shape)} {x.dtype}"
                )

    def _check_same_meaning(self, saved: list[dict[str, Any]], path: str | Path) -> None:
        for i, (layer, theirs) in enumerate(zip(self.layers, saved, strict=True)):
            for name, own in layer.spec.described().items():
                if theirs[name] != own:
                    raise ValueError(
                        f"{path} is the cache of another model: layer {i} there has {name} {theirs[name]!r}, "
                        f"here {own!r}"
                    )


def _copy_slots(x_BGSD: Tensor, index: Tensor, saved_BGSD: Tensor, saved_slots: int, lengths: Tensor) -> None:
    """Move keys between caches whose rings may differ in size (a short `max_length` shortens them)."""
    slots = x_BGSD.shape[2]
    if slots == saved_slots or int(lengths.max()) <= min(slots, saved_slots):
        used = min(saved_BGSD.shape[2], slots)
        x_BGSD[index, :, :used] = saved_BGSD[:, :, :used]
        return
    for row, (target, length) in enumerate(zip(index.tolist(), lengths.tolist(), strict=True)):
        positions = torch.arange(max(length - min(slots, saved_slots), 0), length, device=x_BGSD.device)
        x_BGSD[target, :, positions % slots] = saved_BGSD[row, :, positions % saved_slots]
