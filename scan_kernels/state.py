"""What a sequence leaves behind for its continuation, and the one problem that every implementation solves.

Letters: B batch, T tokens of this call, P tokens pending inside the window, M = P + T keys of this call, H query heads,
G KV heads, X heads of the start state (G or H), F features, D width.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from scan_kernels.feature_maps import FeatureMap, apply_feature_map
from scan_kernels.precision import accumulation_dtype, without_autocast
from scan_kernels.window import residual_shift


class ResidualState(NamedTuple):
    """Continues a sequence: pass it as `initial_state` of the call that holds the next tokens.

    The state is what the last query read; the keys that came after are pending. For the document that runs at the end,

        S = carried + exp(start_log_decay) * start

    so `carried` stays one per KV head where `start` has one per query head, and a later document begins at `start`
    again. All of it is differentiable; `detach()` cuts the gradient between segments.
    """

    carried_BGFD: Tensor  # fp32: absorbed keys of the running document, without the start state
    pending_k_BPGD: Tensor  # the last min(tokens_seen, shift) keys, their values, decays and documents
    pending_v_BPGD: Tensor
    pending_decay_BPG: Tensor | None  # None: the sequence has no decay
    pending_document_BP: Tensor | None  # None: the sequence has no documents
    last_document_B: Tensor | None  # the running document
    start_BXFD: Tensor | None  # the plain initial state, where every document begins; None: zero
    start_log_decay_BG: Tensor | None  # float64: decay of the start state in the running document
    tokens_seen: int
    window: int | None
    feature_map: str

    def detach(self) -> "ResidualState":
        return ResidualState._make(x.detach() if isinstance(x, Tensor) else x for x in self)


@dataclass(frozen=True)
class ScanProblem:
    """Query i reads the keys j <= i - lag of its own document, and the state that its document began with.

    The keys are the pending ones followed by this call's. `lag` is the shift minus P: 0 once the window has filled.
    With documents, `carried` belongs to `carried_document` alone; if it is not zero, the first key does too.
    """

    q_BTHD: Tensor
    k_BMGD: Tensor
    v_BMGD: Tensor
    lag: int
    feature_map: FeatureMap
    decay_BMG: Tensor | None
    query_document_BT: Tensor | None
    key_document_BM: Tensor | None
    carried_BGFD: Tensor | None
    carried_document_B: Tensor | None
    start_BXFD: Tensor | None
    start_log_decay_BG: Tensor | None


class ScanResult(NamedTuple):
    o_BTHD: Tensor
    carried_BGFD: Tensor
    start_log_decay_BG: Tensor | None


def begin(
    q_BTHD: Tensor,
    k_BTGD: Tensor,
    v_BTGD: Tensor,
    *,
    window: int | None,
    feature_map: FeatureMap,
    decay_BTG: Tensor | None,
    document_BT: Tensor | None,
    initial_state: Tensor | ResidualState | None,
) -> ScanProblem:
    """The problem of a call: a fresh sequence, or one that goes on behind a state."""
    shift = residual_shift(window)
    if not isinstance(initial_state, ResidualState):
        return ScanProblem(
            q_BTHD=q_BTHD,
            k_BMGD=k_BTGD,
            v_BMGD=v_BTGD,
            lag=shift,
            feature_map=feature_map,
            decay_BMG=decay_BTG,
            query_document_BT=document_BT,
            key_document_BM=document_BT,
            carried_BGFD=None,
            carried_document_B=None if document_BT is None else document_BT[:, 0],
            start_BXFD=initial_state,
            start_log_decay_BG=None,
        )
    state = initial_state

    def behind(pending: Tensor | None, new: Tensor | None) -> Tensor | None:
        return None if pending is None or new is None else torch.cat((pending, new.to(pending.dtype)), dim=1)

    return ScanProblem(
        q_BTHD=q_BTHD,
        k_BMGD=torch.cat((state.pending_k_BPGD, k_BTGD), dim=1),
        v_BMGD=torch.cat((state.pending_v_BPGD, v_BTGD), dim=1),
        lag=shift - state.pending_k_BPGD.shape[1],
        feature_map=feature_map,
        decay_BMG=behind(state.pending_decay_BPG, decay_BTG),
        query_document_BT=document_BT,
        key_document_BM=behind(state.pending_document_BP, document_BT),
        carried_BGFD=state.carried_BGFD,
        carried_document_B=state.last_document_B,
        start_BXFD=state.start_BXFD,
        start_log_decay_BG=state.start_log_decay_BG,
    )


def end(problem: ScanProblem, result: ScanResult, *, window: int | None, tokens_before: int) -> ResidualState:
    """The state after the last query of `problem`."""
    T = problem.q_BTHD.shape[1]
    first_pending = max(T - problem.lag, 0)

    def pending(x: Tensor | None) -> Tensor | None:
        # A copy: a view would keep the whole sequence alive.
        return None if x is None else x[:, first_pending:].clone()

    k_BPGD, v_BPGD = pending(problem.k_BMGD), pending(problem.v_BMGD)
    assert k_BPGD is not None
    assert v_BPGD is not None
    documents = problem.query_document_BT
    return ResidualState(
        carried_BGFD=result.carried_BGFD,
        pending_k_BPGD=k_BPGD,
        pending_v_BPGD=v_BPGD,
        pending_decay_BPG=pending(problem.decay_BMG),
        pending_document_BP=pending(problem.key_document_BM),
        last_document_B=None if documents is None else documents[:, -1].clone(),
        start_BXFD=problem.start_BXFD,
        start_log_decay_BG=result.start_log_decay_BG,
        tokens_seen=tokens_before + T,
        window=window,
        feature_map=problem.feature_map.value,
    )


def initial_state_from_pairs(k_BMXD: Tensor, v_BMXD: Tensor, *, feature_map: FeatureMap | str) -> Tensor:
    """S_0 = sum_m phi(k_m)^T v_m of (learned) pairs (B, M, X, D), X = G or H: fp32 (B, X, F, Dv)."""
    phi_BMXF = apply_feature_map(k_BMXD, feature_map)
    with without_autocast(k_BMXD.device.type):
        return torch.einsum("bmxf,bmxd->bxfd", phi_BMXF, v_BMXD.to(accumulation_dtype(v_BMXD.dtype)))
