"""Prompts into a cache, by the kernels that training uses; also behind what the cache already holds.

The chunk's queries read the chunk's keys and, where rows have seen tokens before, the cached ones in front of them.
Two facts make rows of different lengths exact in one call, with tokens past a row's length of any value:

- no real query's linear branch reads a key younger than n - window - 2 (n the row's tokens), so these keys' values are
  zeroed in the linear branch, and the state behind the padded chunk is the one behind the row's own last token;
- a cache holds the running document alone, so each document of a chunk but the first begins at an empty cache.

Letters: N rows of the call, T tokens of the chunk, S cached slots, M = S + T, the others as in cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from flexrattn.attention import RAttention
from flexrattn.decode.cache import DecodeCache, LayerCache, LayerSpec
from flexrattn.decode.layer import absorb, rotate_back, slot_positions
from flexrattn.masked_attention import Mask
from flexrattn.model import RAttentionModel
from flexrattn.packing import document_ids_from_positions
from scan_kernels import ResidualState, residual_linear_attention
from score_mods import MaskMod, build_block_mask, causal, dense_mask, sliding_window


@dataclass(frozen=True, kw_only=True)
class _Chunk:
    """Where the call's tokens stand. `continues`: some row reads cached keys; `packed`: some row starts a document."""

    row_N: Tensor
    count_N: Tensor  # real tokens
    before_N: Tensor  # tokens of the running document before the chunk, 0 where the chunk starts one
    length_N: Tensor  # tokens of the running document behind it
    position_NT: Tensor
    document_NT: Tensor  # 0 is the one that ran before the chunk
    continues: bool
    packed: bool


@torch.no_grad()
def prefill(
    model: RAttentionModel,
    cache: DecodeCache,
    token_NT: Tensor,
    *,
    rows: Sequence[int],
    counts: Sequence[int] | None = None,
    positions: Tensor | None = None,
    all_logits: bool = False,
) -> Tensor:
    """Logits (N, V) behind each row's last token (all_logits: (N, T, V)); the cache rows hold their tokens.

    token_NT: tokens of N different cache rows, left-aligned; counts: how many of a row are real (default: all), at
    least 1; what follows them is never read. Rows go on where they are; `cache.reset` starts one anew.
    positions (N, T): positions restart at 0 with every document packed into a row, and go on from the cache's length
    where a row continues. Default: no new document.

    Equal to the full forward over the same tokens: for every split into calls of `prefill` and `decode_step`.

    Raises ValueError: shapes, rows or counts that do not fit, positions that do not go on, no room in the cache, a
    cache of another model.
    """
    cache.check_model(model.config)
    T = token_NT.shape[-1]
    token_NT, chunk = _check(cache, token_NT, rows, counts, positions)
    with _every_shape_compiled(cache.device):
        logits = _prefill(model, cache, token_NT, chunk, all_logits)
    return logits[:, :T] if all_logits else logits


# FlexAttention is compiled once for each shape of a prompt. Past dynamo's limit of 8 it would go on in eager mode, and
# compute all scores.
_SHAPES = {"automatic_dynamic_shapes": False, "recompile_limit": 256, "accumulated_recompile_limit": 4096}


# FlexAttention has another kernel for fewer queries, one for decoding. It is not what training uses.
SHORTEST = 128


def _shortest(device: torch.device) -> int:
    return SHORTEST if device.type == "cuda" else 1


def _every_shape_compiled(device: torch.device) -> AbstractContextManager:
    if device.type == "cpu":
        return nullcontext()
    return torch._dynamo.config.patch({name: x for name, x in _SHAPES.items() if hasattr(torch._dynamo.config, name)})


def _prefill(model: RAttentionModel, cache: DecodeCache, token_NT: Tensor, chunk: _Chunk, all_logits: bool) -> Tensor:
    masks: dict[tuple[int | None, int, MaskMod | None], Mask] = {}
    h_NTD = model.tok_embeddings(token_NT)
    for block, layer in zip(model.layers.values(), cache.layers, strict=True):
        spec, attention = layer.spec, block.attention
        if spec.softmax and (key := (spec.window, layer.slots, spec.mask)) not in masks:
            masks[key] = _mask(spec, layer.slots, chunk)
        mask = masks[key] if spec.softmax else None
        h_NTD = h_NTD + _attention(attention, layer, block.attention_norm(h_NTD), mask, chunk, cache)
        h_NTD = h_NTD + block.feed_forward(block.ffn_norm(h_NTD))
    for window, absorbed_B in cache.absorbed.items():
        absorbed_B[chunk.row_N] = (chunk.length_N - window).clamp(min=0)
    cache.lengths_B[chunk.row_N] = chunk.length_N
    if not all_logits:
        last_N = torch.arange(h_NTD.shape[0], device=h_NTD.device)
        h_NTD = h_NTD[last_N, chunk.count_N - 1][:, None]
    logits = model.lm_head(model.norm(h_NTD))
    return logits if all_logits else logits[:, 0]


def _check(
    cache: DecodeCache,
    token_NT: Tensor,
    rows: Sequence[int],
    counts: Sequence[int] | None,
    positions: Tensor | None,
) -> tuple[Tensor, _Chunk]:
    """The tokens, filled up to what the kernels want, and where they stand."""
    if token_NT.ndim != 2 or token_NT.shape[1] < 1 or len(rows) != token_NT.shape[0]:
        raise ValueError(f"tokens must be ({len(rows)} rows, T >= 1), got {tuple(token_NT.shape)}")
    N, T = token_NT.shape
    if N < 1 or len(set(rows)) != N or min(rows) < 0 or max(rows) >= cache.rows:
        raise ValueError(f"rows must be different and from 0 to {cache.rows - 1}, got {list(rows)}")
    counts = [T] * N if counts is None else list(counts)
    if len(counts) != N or min(counts) < 1 or max(counts) > T:
        raise ValueError(f"counts must be {N} numbers from 1 to {T}, got {counts}")
    device = cache.device
    row_N = torch.tensor(list(rows), device=device)
    count_N = torch.tensor(counts, device=device)
    seen_N = cache.lengths_B[row_N]
    fill = max(_shortest(device) - T, 0)
    if positions is not None and positions.shape != (N, T):
        raise ValueError(f"positions must have the shape of the tokens {(N, T)}, got {tuple(positions.shape)}")
    token_NT, T = nnf.pad(token_NT, (0, fill)), T + fill
    real_NT = torch.arange(T, device=device) < count_N[:, None]
    if positions is None:
        position_NT = seen_N[:, None] + torch.arange(T, device=device)
        packed = False
    else:
        position_NT = nnf.pad(positions.to(device), (0, fill))
        steps = position_NT.diff(dim=1)
        goes_on = ((steps == 1) | (position_NT[:, 1:] == 0)) | ~real_NT[:, 1:]
        starts = (position_NT[:, 0] == seen_N) | (position_NT[:, 0] == 0)
        if not bool(goes_on.all() & starts.all()):
            raise ValueError("positions must count on from the row's length, or restart at 0 with a document")
        packed = True
    document_NT = document_ids_from_positions(position_NT)
    last_N1 = (count_N - 1)[:, None]
    # What follows a row's last token is of its document: the state behind the chunk is asked for.
    document_NT = torch.where(real_NT, document_NT, document_NT.gather(1, last_N1))
    length_N = position_NT.gather(1, last_N1)[:, 0] + 1
    if int(length_N.max()) > cache.max_length:
        raise ValueError(f"{int(length_N.max())} tokens do not fit into a cache of max_length {cache.max_length}")
    # Past a row's end positions may leave the table of rotations; nothing reads them.
    position_NT = torch.where(real_NT, position_NT, 0)
    before_N = torch.where(document_NT[:, 0] == 0, seen_N, 0)
    return token_NT, _Chunk(
        row_N=row_N,
        count_N=count_N,
        before_N=before_N,
        length_N=length_N,
        position_NT=position_NT,
        document_NT=document_NT,
        continues=bool((before_N > 0).any()),
        packed=packed,
    )


def _mask(spec: LayerSpec, slots: int, chunk: _Chunk) -> Mask:
    """Which of [cached keys, chunk] the chunk's queries read. A plain sequence has the layer's own mask."""
    N, T = chunk.position_NT.shape
    device = chunk.position_NT.device
    build = dense_mask if device.type == "cpu" else build_block_mask
    own: MaskMod = spec.mask or (causal() if spec.window is None else sliding_window(spec.window))
    if not chunk.continues and not chunk.packed:
        return build(own, q_len=T, kv_len=T, device=device)
    query_position, query_document = chunk.position_NT, chunk.document_NT
    key_position, key_document = query_position, query_document
    if chunk.continues:
        cached_position = slot_positions(chunk.before_N, slots)
        key_position = torch.cat((cached_position, query_position), dim=1)
        # Before the first token of the running document there is nothing: no query has document -1.
        cached_document = torch.where(cached_position >= 0, 0, -1).to(query_document.dtype)
        key_document = torch.cat((cached_document, query_document), dim=1)
    first = key_position.shape[1] - T

    def keep(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        same = query_document[b, q_idx] == key_document[b, kv_idx]
        # Positions past a row's end say nothing, so the order within the chunk is asked, too.
        in_order = kv_idx <= q_idx + first
        return same & in_order & own(b, h, query_position[b, q_idx], key_position[b, kv_idx])

    return build(keep, batch=N, heads=None if spec.mask is None else spec.H, q_len=T, kv_len=first + T, device=device)


def _attention(
    attention: RAttention, layer: LayerCache, x_NTD: Tensor, mask: Mask | None, chunk: _Chunk, cache: DecodeCache
) -> Tensor:
    spec = layer.spec
    q_NTHD, k_NTGD, v_NTGD = attention.qkv_linear(x_NTD)
    if attention.q_norm is not None and attention.k_norm is not None:
        q_NTHD, k_NTGD = attention.q_norm(q_NTHD), attention.k_norm(k_NTGD)
    swa_NTHD = rla_NTHD = None
    q_rot, k_rot = q_NTHD, k_NTGD
    if mask is not None:
        if attention.rope is not None:
            q_rot, k_rot = attention.rope(q_NTHD, k_NTGD, chunk.position_NT)
        swa_NTHD = _softmax(attention, layer, q_rot, k_rot, v_NTGD, mask, chunk)
    if spec.residual:
        rla_NTHD = _linear(attention, layer, q_NTHD, k_NTGD, v_NTGD, chunk, cache)
    if spec.softmax:
        _write(layer, k_rot, v_NTGD, chunk)
        if spec.residual:
            assert spec.window is not None
            outside_N = (chunk.length_N - spec.window).clamp(min=0)
            before_N = (chunk.length_N - 1 - spec.window).clamp(min=0)
            absorb(attention, layer, row_B=chunk.row_N, first_B=before_N, end_B=outside_N, most=1)
    return attention.wo(attention.join(swa_NTHD, rla_NTHD).flatten(2))


def _softmax(
    attention: RAttention, layer: LayerCache, q_NTHD: Tensor, k_NTGD: Tensor, v_NTGD: Tensor, mask: Mask, chunk: _Chunk
) -> Tensor:
    assert layer.k_BGSD is not None
    assert layer.v_BGSD is not None
    if chunk.continues:
        k_NTGD = torch.cat((layer.k_BGSD[chunk.row_N].transpose(1, 2), k_NTGD), dim=1)
        v_NTGD = torch.cat((layer.v_BGSD[chunk.row_N].transpose(1, 2), v_NTGD), dim=1)
    assert attention.inner_attention is not None
    return attention.inner_attention(
        q_NTHD, k_NTGD, v_NTGD, attention_masks=mask, scale=attention.scaling, enable_gqa=attention.enable_gqa
    ).contiguous()


def _linear(
    attention: RAttention,
    layer: LayerCache,
    q_NTHD: Tensor,
    k_NTGD: Tensor,
    v_NTGD: Tensor,
    chunk: _Chunk,
    cache: DecodeCache,
) -> Tensor:
    """The linear branch of the chunk; the layer's states hold all keys up to length - window - 2 afterwards."""
    spec, T = layer.spec, q_NTHD.shape[1]
    assert attention.residual is not None
    assert layer.state_BGFD is not None
    if attention.q_scale is not None and attention.k_scale is not None:
        q_NTHD, k_NTGD = attention.q_scale(q_NTHD), attention.k_scale(k_NTGD)
    # Chunk index behind the last key that may enter the state.
    end_N1 = (chunk.count_N if spec.window is None else chunk.count_N - 1 - spec.window)[:, None]
    index_T = torch.arange(T, device=q_NTHD.device)
    v_NTGD = torch.where((index_T < end_N1)[..., None, None], v_NTGD, 0.0)
    start = attention.initial_state() if attention.initial_state is not None else None
    if start is not None:
        start = start.expand(q_NTHD.shape[0], *start.shape)
    initial: Tensor | ResidualState | None = start
    if chunk.continues:
        initial = _state_before(attention, layer, chunk, cache, end_N1, start, k_NTGD.dtype)
    o_NTHD, behind = residual_linear_attention(
        q_NTHD,
        k_NTGD,
        v_NTGD,
        window=spec.window,
        feature_map=spec.feature_map,
        document_ids=chunk.document_NT if chunk.packed else None,
        initial_state=initial,
        return_final_state=True,
        impl=attention.residual.impl,
    )
    layer.state_BGFD[chunk.row_N] = behind.carried_BGFD.to(layer.state_BGFD.dtype)
    return o_NTHD


def _state_before(
    attention: RAttention,
    layer: LayerCache,
    chunk: _Chunk,
    cache: DecodeCache,
    end_N1: Tensor,
    start: Tensor | None,
    dtype: torch.dtype,
) -> ResidualState:
    """What the rows hold, as the linear branch's kernels continue it: the state, and the last window + 1 keys."""
    spec = layer.spec
    assert layer.state_BGFD is not None
    N, device = len(chunk.row_N), chunk.row_N.device
    runs_N = chunk.before_N > 0
    pending = 0 if spec.window is None else spec.window + 1
    k_NPGD = torch.zeros(N, pending, spec.G, spec.D, dtype=dtype, device=device)
    v_NPGD = torch.zeros_like(k_NPGD)
    if spec.window is not None:
        assert layer.k_BGSD is not None
        assert layer.v_BGSD is not None
        absorbed_N = torch.where(runs_N, cache.absorbed[spec.window][chunk.row_N], 0)
        outside_N = (chunk.before_N - spec.window).clamp(min=0)
        absorb(attention, layer, row_B=chunk.row_N, first_B=absorbed_N, end_B=outside_N, most=cache.fold_every)
        index_P = torch.arange(pending, device=device) - pending
        position_NP = chunk.before_N[:, None] + index_P
        slot_NP = position_NP.clamp(min=0) % layer.slots
        k_NGPD = layer.k_BGSD[chunk.row_N[:, None], :, slot_NP].transpose(1, 2)
        k_NPGD = rotate_back(attention, k_NGPD, position_NP).transpose(1, 2).to(dtype)
        if attention.k_scale is not None:
            k_NPGD = attention.k_scale(k_NPGD)
        # Not those that the state holds, and none that must not enter it.
        keep = (position_NP >= outside_N[:, None]) & (index_P < end_N1)
        v_NPGD = torch.where(keep[..., None, None], layer.v_BGSD[chunk.row_N[:, None], :, slot_NP], 0.0)
    carried = torch.where(runs_N[:, None, None, None], layer.state_BGFD[chunk.row_N], 0.0)
    zeros_N = torch.zeros(N, dtype=chunk.document_NT.dtype, device=device)
    return ResidualState(
        carried_BGFD=carried,
        pending_k_BPGD=k_NPGD,
        pending_v_BPGD=v_NPGD,
        pending_decay_BPG=None,
        pending_document_BP=zeros_N[:, None].expand(N, pending) if chunk.packed else None,
        last_document_B=zeros_N if chunk.packed else None,
        start_BXFD=start,
        start_log_decay_BG=None if start is None else torch.zeros(N, spec.G, dtype=torch.float64, device=device),
        tokens_seen=pending,
        window=spec.window,
        feature_map=spec.feature_map,
    )


def _write(layer: LayerCache, k_NTGD: Tensor, v_NTGD: Tensor, chunk: _Chunk) -> None:
    """The running document's keys into their slots, the newest of each slot."""
    T = k_NTGD.shape[1]
    position_NT = (chunk.length_N - chunk.count_N)[:, None] + torch.arange(T, device=k_NTGD.device)
    stays_NT = (position_NT >= 0) & (position_NT < chunk.length_N[:, None])
    stays_NT &= position_NT >= (chunk.length_N - layer.slots)[:, None]
    n, t = stays_NT.nonzero(as_tuple=True)
    for cached, new in ((layer.k_BGSD, k_NTGD), (layer.v_BGSD, v_NTGD)):
        assert cached is not None
        cached[chunk.row_N[n], :, position_NT[n, t] % layer.slots] = new[n, t].to(cached.dtype)
