"""A model for decoding from what training wrote (a DCP folder and config.json), or from an exported one (safetensors).

The run's config.json says what the model is; the model is built from it anew and must describe itself in the same
words, so that weights are never read with another meaning.
"""

from __future__ import annotations

import json
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.tokenizer import BaseTokenizer, HuggingFaceTokenizer
from torchtitan.models.common.rope import RoPE

from flexrattn.attention import LayerKind
from flexrattn.data.tokenizer import ByteTokenizer, check_vocabulary
from flexrattn.flavors import Flavor, Layers, build_model_config
from flexrattn.masked_attention import MaskSpec, ScoreModSpec
from flexrattn.model import RAttentionModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
BYTES = "bytes"
_IGNORED = ("param_init", "sharding_config")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a model lies: `weights` is a DCP folder or a safetensors file; `config` the run's recorded config."""

    weights: Path
    config: dict[str, Any]
    folder: Path  # of config.json

    @property
    def exported(self) -> bool:
        return self.weights.suffix == ".safetensors"


def find_checkpoint(path: str | Path) -> Checkpoint:
    """What `path` means: a run's dump folder (its newest complete step), its checkpoint folder, one step, an exported
    folder or its safetensors file. ValueError says what is missing."""
    path = Path(path)
    if not path.exists():
        raise ValueError(f"checkpoint {path} does not exist: give the dump_folder of a run, a step of it, or an export")
    weights = path if path.suffix == ".safetensors" else path / WEIGHTS_FILE
    if not weights.is_file():
        steps = [path] if (path / ".metadata").is_file() else _complete_steps(path)
        if not steps:
            raise ValueError(f"{path} holds no complete checkpoint: neither step-N/.metadata nor {WEIGHTS_FILE}")
        weights = max(steps, key=_step_number)
    for folder in (weights.parent, *list(weights.resolve().parents)[1:3]):
        if (folder / CONFIG_FILE).is_file():
            try:
                config = json.loads((folder / CONFIG_FILE).read_text())
                config["model_spec"]["model"]["layers"]
            except (ValueError, KeyError, TypeError):
                raise ValueError(f"{folder / CONFIG_FILE} is no config of a flexrattn run") from None
            return Checkpoint(weights=weights, config=config, folder=folder)
    raise ValueError(f"{weights} has no {CONFIG_FILE} beside it or above it: without it the model is unknown")


def _complete_steps(folder: Path) -> list[Path]:
    return [
        found.parent for pattern in ("step-*", "checkpoint/step-*") for found in folder.glob(f"{pattern}/.metadata")
    ]


def _step_number(folder: Path) -> int:
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdigit() else -1


def model_config(saved: dict[str, Any], *, source: str) -> RAttentionModel.Config:
    """The model config that wrote itself down as `saved`. ValueError where this version would build another model."""
    attentions = [layer["attention"] for layer in saved["layers"]]
    # Where all layers are full attention, global ones are told by not rotating, or else by a mask of their own.
    all_full = all(a["kind"] == LayerKind.FULL for a in attentions)
    all_rotate = all(a["use_rope"] for a in attentions)

    def is_global(a: dict[str, Any]) -> bool:
        if not all_full:
            return a["kind"] == LayerKind.FULL
        return a["mask"] != attentions[0]["mask"] if all_rotate else not a["use_rope"]

    patterns = ["global" if is_global(a) else "local" for a in attentions]
    first, feed_forward = attentions[0], saved["layers"][0]["feed_forward"]
    local = next((a for a, kind in zip(attentions, patterns, strict=True) if kind == "local"), None)
    size = Flavor(
        dim=saved["dim"],
        n_layers=len(attentions),
        n_heads=first["n_heads"],
        n_kv_heads=first["n_kv_heads"],
        head_dim=first["head_dim"],
        ffn_dim=feed_forward["w1"]["out_features"],
        activation=feed_forward["activation"],
        vocab_size=saved["vocab_size"],
        tied=saved["enable_weight_tying"],
        qk_norm=first["qk_norm"] is not None,
        rope_theta=first["rope"]["theta"],
        max_seq_len=first["rope"]["max_seq_len"],
        norm_eps=saved["norm"]["eps"],
    )
    masks = {key: MaskSpec(name=spec["name"], args=spec["args"]) for key, spec in saved["masks"].items()}
    residual = (local or {}).get("residual")
    own: dict[str, Any] = {
        "kind": LayerKind(local["kind"]) if local else LayerKind.FULL,
        "window": local["window"] if local else None,
        "pattern": tuple(patterns),
        "global_rope": any(a["use_rope"] for a, kind in zip(attentions, patterns, strict=True) if kind == "global"),
    }
    if local and residual:
        own |= {
            "feature_map": residual["feature_map"],
            "branch_norm": local["rla_norm"] is not None,
            "decay_gate": local.get("decay_gate") is not None,
            "learned_initial_state": local["initial_state"] is not None,
            "learned_qk_scale": local["q_scale"] is not None,
            "scan_impl": residual["impl"],
            "scan_save_every": residual.get("save_every"),
        }
    # Layer by layer: whichever of the ways to choose masks and score mods the run took, this is what they came to.
    score_mods = [(a["inner_attention"] or {}).get("score_mod") for a in attentions]
    layers = Layers(
        **own,
        layer_masks=tuple((str(i), masks[a["mask"]]) for i, a in enumerate(attentions) if a["mask"] in masks),
        layer_score_mods=tuple((str(i), ScoreModSpec(**spec)) for i, spec in enumerate(score_mods) if spec),
    )
    built = build_model_config(size, layers)
    different = _difference(saved, json.loads(json.dumps(built.to_dict())))
    if different:
        raise ValueError(f"{source} describes a model that this version does not build: {different}")
    return built


def _difference(saved: Any, built: Any, path: str = "") -> str:
    """The first place where `built` is not as `saved` says; fields that are newer than the run are not looked at."""
    if isinstance(saved, dict) and isinstance(built, dict):
        for key, value in saved.items():
            if key in _IGNORED:
                continue
            where = f"{path}.{key}" if path else key
            if key not in built:
                return f"{where} is unknown"
            if different := _difference(value, built[key], where):
                return different
        return ""
    if isinstance(saved, list) and isinstance(built, list) and len(saved) == len(built):
        found = (_difference(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(saved, built, strict=True)))
        return next(filter(None, found), "")
    return "" if saved == built else f"{path} is {saved!r} there and {built!r} here"


def empty_model(config: RAttentionModel.Config, *, device: torch.device | str, dtype: torch.dtype) -> RAttentionModel:
    """The model without values, its parameters in `dtype`; the table of rotations is fp32 and one for all layers."""
    with torch.device("meta"):
        model = config.build()
    ropes = [module for module in model.modules() if isinstance(module, RoPE)]
    for rope in ropes:
        rope.cache = torch.empty(0, device="meta")
    model.to(dtype).to_empty(device=device)
    tables: dict[str, Tensor] = {}
    for rope in ropes:
        key = repr(rope.config)
        if key not in tables:
            with torch.device(device):
                tables[key] = rope._precompute_cache()
        rope.cache = tables[key]
    if config.enable_weight_tying:
        model.tok_embeddings.weight = model.lm_head.weight
    return model.requires_grad_(False).eval()


def load_model(checkpoint: Checkpoint, *, device: torch.device | str, dtype: torch.dtype) -> RAttentionModel:
    """The checkpoint's model with its weights. ValueError where they are of another model."""
    config = model_config(checkpoint.config["model_spec"]["model"], source=str(checkpoint.folder / CONFIG_FILE))
    model = empty_model(config, device=device, dtype=dtype)
    wanted = dict(model.state_dict())
    read = _read_safetensors if checkpoint.exported else _read_dcp
    read(checkpoint.weights, wanted)
    return model


def _check_same(found: dict[str, tuple[int, ...]], wanted: dict[str, Tensor], path: Path) -> None:
    for name, x in wanted.items():
        if name not in found:
            raise ValueError(f"{path} is a checkpoint of another model than its {CONFIG_FILE} says: it has no {name}")
        if found[name] != tuple(x.shape):
            raise ValueError(
                f"{path} is a checkpoint of another model than its {CONFIG_FILE} says: "
                f"{name} has shape {found[name]}, {tuple(x.shape)} is wanted"
            )


def _read_dcp(folder: Path, wanted: dict[str, Tensor]) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = dcp.FileSystemReader(str(folder))
    try:
        entries = reader.read_metadata().state_dict_metadata
    except Exception as error:
        raise ValueError(f"{folder} cannot be read as a checkpoint: {error}") from None
    tensors = {name: x for name, x in entries.items() if isinstance(x, TensorStorageMetadata)}
    _check_same({name: tuple(x.size) for name, x in tensors.items()}, wanted, folder)
    # In the dtype in which they were saved, and cast afterwards: rounding happens once, here.
    saved = {name: torch.empty(x.shape, dtype=tensors[name].properties.dtype) for name, x in wanted.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as meant: one process reads all
        try:
            dcp.load(saved, storage_reader=reader, no_dist=True)
        except dcp.CheckpointException as error:  # a file of it is missing or cut
            first, _ = next(iter(error.failures.values()))
            why = " ".join(f"{type(first).__name__} {first}".split())
            raise ValueError(f"{folder} cannot be read as a checkpoint: {why}") from None
    for name, x in wanted.items():
        x.copy_(saved[name])


def _read_safetensors(path: Path, wanted: dict[str, Tensor]) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            names = set(file.keys())
            # A tied weight is written once.
            if "lm_head.weight" in names and "tok_embeddings.weight" not in names:
                wanted = {name: x for name, x in wanted.items() if name != "tok_embeddings.weight"}
            _check_same({name: tuple(file.get_slice(name).get_shape()) for name in names}, wanted, path)
            for name, x in wanted.items():
                x.copy_(file.get_tensor(name))
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from None


def progress(checkpoint: Checkpoint) -> tuple[int | None, int | None]:
    """(steps, tokens of all ranks) that the weights were trained for; None where the checkpoint does not say."""
    if checkpoint.exported:
        from safetensors import safe_open

        with safe_open(str(checkpoint.weights), framework="pt") as file:
            written = file.metadata() or {}
        return tuple(int(written[name]) if name in written else None for name in ("step", "tokens"))  # type: ignore[return-value]
    import torch.distributed.checkpoint as dcp

    reader = dcp.FileSystemReader(str(checkpoint.weights))
    there = reader.read_metadata().state_dict_metadata
    names = ("train_state.step", "train_state.ntokens_seen", "dataloader.world_size")
    read: dict[str, Any] = {name: 0 for name in names if name in there}
    if read:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            dcp.load(read, storage_reader=reader, no_dist=True)
    step, of_rank, ranks = (read.get(name) for name in names)
    if step is None and (number := _step_number(checkpoint.weights)) >= 0:
        step = number
    return step, None if of_rank is None or ranks is None else of_rank * ranks


def load_tokenizer(checkpoint: Checkpoint, given: str | None = None) -> BaseTokenizer:
    """The run's tokenizer, or `given`: "bytes" or a folder with tokenizer.json. ValueError where it is missing."""
    recorded = (checkpoint.config.get("tokenizer") or {}).get("class")
    if given is None:
        if recorded is None:
            raise ValueError(
                f"{checkpoint.folder / CONFIG_FILE} does not say which tokenizer the run used: "
                f"name it with --tokenizer {BYTES} or --tokenizer FOLDER"
            )
        given = BYTES if recorded == ByteTokenizer.__name__ else _recorded_folder(checkpoint)
    if given == BYTES:
        tokenizer: BaseTokenizer = ByteTokenizer()
    else:
        if not (Path(given) / "tokenizer.json").is_file():
            raise ValueError(f"tokenizer {given} is missing: no tokenizer.json there; name one with --tokenizer FOLDER")
        tokenizer = HuggingFaceTokenizer(tokenizer_path=given)
    check_vocabulary(tokenizer, checkpoint.config["model_spec"]["model"]["vocab_size"])
    return tokenizer


def _recorded_folder(checkpoint: Checkpoint) -> str:
    beside = checkpoint.folder / "tokenizer"
    return str(beside) if checkpoint.exported and beside.is_dir() else checkpoint.config["hf_assets_path"]


def export(checkpoint: Checkpoint, folder: str | Path, *, dtype: torch.dtype | None = None) -> Path:
    """Write the weights alone as safetensors, with the config and the tokenizer's files: a folder that stands alone.

    dtype: None keeps fp32. ValueError if the folder holds an export already, or cannot be made. Returns the folder.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    if (folder / WEIGHTS_FILE).exists():
        raise ValueError(f"{folder / WEIGHTS_FILE} exists already: choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"cannot write an export to {folder}: {error.strerror or error}") from None
    model = load_model(checkpoint, device="cpu", dtype=dtype or torch.float32)
    weights = {name: x.contiguous() for name, x in model.state_dict().items()}
    if model.config.enable_weight_tying:
        del weights["tok_embeddings.weight"]
    if checkpoint.config.get("tokenizer", {}).get("class") == HuggingFaceTokenizer.__name__:
        assets = Path(_recorded_folder(checkpoint))
        if assets.is_dir():
            shutil.copytree(assets, folder / "tokenizer", dirs_exist_ok=True)
    (folder / CONFIG_FILE).write_text(json.dumps(checkpoint.config, indent=2))
    trained = dict(zip(("step", "tokens"), progress(checkpoint), strict=True))
    known = {name: str(value) for name, value in trained.items() if value is not None}
    save_file(weights, str(folder / WEIGHTS_FILE), metadata={"format": "pt", **known})
    return folder
