"""A layer's attention over its cache, in plain torch: the reference of the kernels, and the path of the CPU.

    swa:  o_t = softmax over t-window <= p <= t of (q_t . k_p / sqrt(D)) v_p        over the ring
    rla:  o_t = phi(q_t) (S_absorbed + sum of phi(k_p)^T v_p over absorbed <= p <= t-window-1)

Nothing here asks the device for a value, and every shape is fixed, so a step can be captured as a CUDA graph.
Letters: B rows, S slots, R = H/G, P pending keys, the others as in cache.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor

from flexrattn.attention import RAttention
from flexrattn.decode.cache import DecodeCache, LayerCache
from scan_kernels import apply_feature_map


@dataclass(frozen=True, kw_only=True)
class Clock:
    """One step's time: position of the new token (0 for a row that rests), who takes part, and what the states hold
    before and after."""

    position_B: Tensor
    active_B: Tensor
    absorbed: dict[int, Tensor]
    absorbed_after: dict[int, Tensor]


def make_clock(cache: DecodeCache, active_B: Tensor) -> Clock:
    """The clock of the next step. Keys fold when `fold_every` of them have left the next query's window."""
    t_B = cache.lengths_B
    after = {}
    for window, absorbed_B in cache.absorbed.items():
        outside_B = t_B + 1 - window
        folds_B = active_B & (outside_B - absorbed_B >= cache.fold_every)
        after[window] = torch.where(folds_B, outside_B, absorbed_B)
    # A full row that rests would stand behind the end of the table of rotations.
    position_B = torch.where(active_B, t_B, 0)
    return Clock(position_B=position_B, active_B=active_B, absorbed=cache.absorbed, absorbed_after=after)


def rotate_back(attention: RAttention, k_BGPD: Tensor, position_BP: Tensor) -> Tensor:
    """Keys before RoPE from keys after it, in fp32 or wider: the inverse rotation. Positions below 0 give any value."""
    k_BGPD = k_BGPD.to(torch.promote_types(k_BGPD.dtype, torch.float32))
    if attention.rope is None:
        return k_BGPD
    table = attention.rope.cache[position_BP.clamp(min=0)][:, None].to(k_BGPD.dtype)
    cos, sin = table.chunk(2, dim=-1)
    first, second = k_BGPD.chunk(2, dim=-1)
    return k_BGPD * cos - torch.cat((-second, first), dim=-1) * sin


def kept_pairs(
    attention: RAttention, layer: LayerCache, position_BP: Tensor, valid_BP: Tensor, row_B: Tensor
) -> tuple[Tensor, Tensor]:
    """phi(k) (B, G, P, F) and v (B, G, P, D), of positions still in the ring; both 0 where `valid` is not."""
    assert layer.k_BGSD is not None
    assert layer.v_BGSD is not None
    slot_BP = position_BP.clamp(min=0) % layer.slots
    # Two index tensors with a slice between them put the heads behind: (B, P, G, D).
    k_BGPD = layer.k_BGSD[row_B[:, None], :, slot_BP].transpose(1, 2)
    v_BGPD = layer.v_BGSD[row_B[:, None], :, slot_BP].transpose(1, 2)
    k_BGPD = rotate_back(attention, k_BGPD, position_BP)
    if attention.k_scale is not None:
        k_BGPD = k_BGPD * attention.k_scale.weight.to(k_BGPD.dtype)
    keep = valid_BP[:, None, :, None]
    phi_BGPF = apply_feature_map(k_BGPD, layer.spec.feature_map)
    return torch.where(keep, phi_BGPF, 0.0), torch.where(keep, v_BGPD.to(phi_BGPF.dtype), 0.0)


def absorb(
    attention: RAttention, layer: LayerCache, *, row_B: Tensor, first_B: Tensor, end_B: Tensor, most: int
) -> None:
    """Fold the keys first <= p < end of some rows into their states; `most` bounds end - first."""
    assert layer.state_BGFD is not None
    position_BP = first_B[:, None] + torch.arange(most, device=first_B.device)
    phi_BGPF, v_BGPD = kept_pairs(attention, layer, position_BP, position_BP < end_B[:, None], row_B)
    layer.state_BGFD[row_B] += phi_BGPF.mT @ v_BGPD


def attend(
    attention: RAttention,
    layer: LayerCache,
    q_B1HD: Tensor,
    k_B1GD: Tensor,
    v_B1GD: Tensor,
    clock: Clock,
    fold_every: int,
) -> Tensor:
    """One token's attention, from q, k (after qk-norm, before RoPE) and v to what `wo` takes. The cache takes it in."""
    spec = layer.spec
    branches = []
    if spec.softmax:
        q_rot, k_rot = q_B1HD, k_B1GD
        if attention.rope is not None:
            q_rot, k_rot = attention.rope(q_B1HD, k_B1GD, clock.position_B[:, None])
        _write(layer, k_rot, v_B1GD, clock)
        o_B1HD = _softmax(attention, layer, q_rot, clock)
        branches.append(o_B1HD if attention.swa_norm is None else attention.swa_norm(o_B1HD))
    if spec.residual:
        q_lin = q_B1HD if attention.q_scale is None else attention.q_scale(q_B1HD)
        if spec.softmax:
            o_B1HD = _linear(attention, layer, q_lin, clock, fold_every)
        else:
            o_B1HD = _linear_alone(attention, layer, q_lin, k_B1GD, v_B1GD, clock)
        branches.append(o_B1HD if attention.rla_norm is None else attention.rla_norm(o_B1HD))
    return branches[0] if len(branches) == 1 else branches[0] + branches[1]


def _write(layer: LayerCache, k_B1GD: Tensor, v_B1GD: Tensor, clock: Clock) -> None:
    row_B = torch.arange(k_B1GD.shape[0], device=k_B1GD.device)
    slot_B = clock.position_B % layer.slots
    active = clock.active_B[:, None, None]
    for cached, new in ((layer.k_BGSD, k_B1GD), (layer.v_BGSD, v_B1GD)):
        assert cached is not None
        # A row that rests may be full: its next slot is that of its first key.
        cached[row_B, :, slot_B] = torch.where(active, new[:, 0].to(cached.dtype), cached[row_B, :, slot_B])


def slot_positions(length_B: Tensor, slots: int) -> Tensor:
    """(B, S): the position whose key a slot holds after `length` tokens; negative where none has been written."""
    last_B1 = length_B[:, None] - 1
    return last_B1 - (last_B1 - torch.arange(slots, device=length_B.device)) % slots


def _softmax(attention: RAttention, layer: LayerCache, q_B1HD: Tensor, clock: Clock) -> Tensor:
    spec, t_B1 = layer.spec, clock.position_B[:, None]
    assert layer.k_BGSD is not None
    assert layer.v_BGSD is not None
    position_BS = slot_positions(clock.position_B + 1, layer.slots)
    visible_BS = position_BS >= 0
    if spec.window is not None:
        visible_BS = visible_BS & (position_BS >= t_B1 - spec.window)
    mask_BXXS = visible_BS[:, None, None, :]
    if spec.mask is not None:
        b = torch.arange(q_B1HD.shape[0], device=q_B1HD.device).view(-1, 1, 1, 1)
        h = torch.arange(spec.H, device=q_B1HD.device).view(1, -1, 1, 1)
        # Unwritten slots are shown to the mask as the query's own position: it may index a table with them.
        shown = torch.where(visible_BS, position_BS, t_B1)[:, None, None, :]
        mask_BXXS = mask_BXXS & spec.mask(b, h, t_B1[:, None, None], shown)
    o_BH1D = nnf.scaled_dot_product_attention(
        q_B1HD.transpose(1, 2),
        layer.k_BGSD,
        layer.v_BGSD,
        attn_mask=mask_BXXS,
        scale=attention.scaling,
        enable_gqa=spec.H != spec.G,
    )
    return o_BH1D.transpose(1, 2).contiguous()


def _read(attention: RAttention, layer: LayerCache, q_B1HD: Tensor) -> tuple[Tensor, Tensor]:
    """phi(q) (B, G, R, F), and the state's part of the output with the learned initial state's (B, G, R, D)."""
    spec = layer.spec
    assert layer.state_BGFD is not None
    phi_BGRF = apply_feature_map(q_B1HD[:, 0], spec.feature_map).unflatten(1, (spec.G, -1)).to(layer.state_BGFD.dtype)
    o_BGRD = phi_BGRF @ layer.state_BGFD
    if attention.initial_state is not None:
        start_GRFD = attention.initial_state().to(phi_BGRF.dtype).unflatten(0, (spec.G, -1))
        o_BGRD = o_BGRD + torch.einsum("bgrf,grfd->bgrd", phi_BGRF, start_GRFD)
    return phi_BGRF, o_BGRD


def _linear(attention: RAttention, layer: LayerCache, q_B1HD: Tensor, clock: Clock, fold_every: int) -> Tensor:
    window = layer.spec.window
    assert window is not None
    assert layer.state_BGFD is not None
    phi_BGRF, o_BGRD = _read(attention, layer, q_B1HD)
    # The keys that the next query's window leaves out and the state does not hold: t - window enters after the read.
    row_B = torch.arange(q_B1HD.shape[0], device=q_B1HD.device)
    before_B, after_B = clock.absorbed[window], clock.absorbed_after[window]
    youngest_B1 = clock.position_B[:, None] - window
    position_BP = youngest_B1 - torch.arange(fold_every, device=row_B.device)
    pending_BP = position_BP >= before_B[:, None]
    phi_k_BGPF, v_BGPD = kept_pairs(attention, layer, position_BP, pending_BP, row_B)
    if fold_every > 1:
        o_BGRD = o_BGRD + (phi_BGRF @ phi_k_BGPF[:, :, 1:].mT) @ v_BGPD[:, :, 1:]
    folds_B111 = (after_B > before_B)[:, None, None, None]
    layer.state_BGFD += torch.where(folds_B111, phi_k_BGPF.mT @ v_BGPD, 0.0)
    return o_BGRD.flatten(1, 2)[:, None].to(q_B1HD.dtype)


def _linear_alone(
    attention: RAttention, layer: LayerCache, q_B1HD: Tensor, k_B1GD: Tensor, v_B1GD: Tensor, clock: Clock
) -> Tensor:
    assert layer.state_BGFD is not None
    if attention.k_scale is not None:
        k_B1GD = attention.k_scale(k_B1GD)
    phi_BGF = apply_feature_map(k_B1GD[:, 0], layer.spec.feature_map).to(layer.state_BGFD.dtype)
    added = phi_BGF[..., :, None] * v_B1GD[:, 0, :, None].to(phi_BGF.dtype)
    layer.state_BGFD += torch.where(clock.active_B[:, None, None, None], added, 0.0)
    _, o_BGRD = _read(attention, layer, q_B1HD)
    return o_BGRD.flatten(1, 2)[:, None].to(q_B1HD.dtype)
