"""Refusals in one line that says what was given and what would do. Nothing here reads device memory in the hot path."""

import torch
from torch import Tensor

from scan_kernels.feature_maps import FeatureMap, feature_dim
from scan_kernels.state import ResidualState
from scan_kernels.window import residual_shift

INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
COMPUTE_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _shape(x: Tensor) -> tuple[int, ...]:
    return tuple(x.shape)


def check_values(*, document_ids: Tensor | None = None, decay: Tensor | None = None) -> None:
    """Raise ValueError unless document ids never fall along T and decays are <= 0. Waits for the device: to debug."""
    if document_ids is not None and bool((document_ids[:, 1:] < document_ids[:, :-1]).any()):
        raise ValueError("document_ids must not fall along T (packed documents count upwards)")
    # The negated form also refuses NaN.
    if decay is not None and not bool((decay <= 0).all()):
        raise ValueError(f"decay is logarithmic and must be <= 0 everywhere, got a maximum of {decay.max().item()}")


def _values_are_free(x: Tensor | None) -> bool:
    # Subclasses (fake, distributed) have no plain values; a read of another device would wait for it.
    return x is not None and type(x) is Tensor and x.device.type == "cpu"


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    feature_map: FeatureMap,
    decay: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | ResidualState | None,
    save_every: int | None = None,
) -> None:
    if save_every is not None and (isinstance(save_every, bool) or not isinstance(save_every, int) or save_every < 0):
        raise ValueError(
            f"save_every must be an int >= 0 (chunks from one kept state to the next) or None, got {save_every!r}"
        )
    if window is not None and (isinstance(window, bool) or not isinstance(window, int) or window < 0):
        raise ValueError(f"window must be an int >= 0 (previous keys of the softmax branch) or None, got {window!r}")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise ValueError(f"{name} must be (batch, tokens, heads, width), got shape {_shape(x)}")
        if x.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16, float16 or float64, got {x.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them to one")
    B, T, H, D = q.shape
    G, Dv = k.shape[2], v.shape[3]
    if _shape(k) != (B, T, G, D):
        raise ValueError(f"k must match q in batch, tokens and width: q {_shape(q)}, k {_shape(k)}")
    if _shape(v) != (B, T, G, Dv):
        raise ValueError(f"v must match k in batch, tokens and heads: k {_shape(k)}, v {_shape(v)}")
    if T == 0:
        raise ValueError("the sequence is empty (T = 0): pass at least one token")
    if G == 0 or H % G != 0:
        raise ValueError(f"query heads must be a multiple of KV heads, got {H} and {G}")

    if decay is not None:
        if _shape(decay) != (B, T, G):
            raise ValueError(f"decay must be (batch, tokens, KV heads) = {(B, T, G)}, got {_shape(decay)}")
        if decay.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"decay must be floating point (logarithmic, <= 0), got {decay.dtype}")
    if document_ids is not None:
        if _shape(document_ids) != (B, T):
            raise ValueError(f"document_ids must be (batch, tokens) = {(B, T)}, got {_shape(document_ids)}")
        if document_ids.dtype not in INTEGER_DTYPES:
            raise ValueError(f"document_ids must be integers, got {document_ids.dtype}")

    F = feature_dim(feature_map, D)
    if isinstance(initial_state, ResidualState):
        _validate_state(initial_state, k, v, F, window, feature_map, decay, document_ids)
    elif isinstance(initial_state, Tensor):
        if _shape(initial_state) not in ((B, G, F, Dv), (B, H, F, Dv)):
            raise ValueError(
                f"initial_state must be (batch, KV heads or query heads, features, value width) = {(B, G, F, Dv)} or "
                f"{(B, H, F, Dv)}, got {_shape(initial_state)}; .expand() a state that the batch shares"
            )
        if initial_state.dtype not in COMPUTE_DTYPES:
            raise ValueError(f"initial_state must be floating point, got {initial_state.dtype}")
    elif initial_state is not None:
        raise ValueError(f"initial_state must be a Tensor, a ResidualState or None, got {type(initial_state).__name__}")

    state_tensor = initial_state.carried_BGFD if isinstance(initial_state, ResidualState) else initial_state
    for name, other in (
        ("k", k),
        ("v", v),
        ("decay", decay),
        ("document_ids", document_ids),
        ("initial_state", state_tensor),
    ):
        if other is not None and other.device != q.device:
            raise ValueError(f"{name} is on {other.device} but q is on {q.device}; move them to one device")

    if torch.compiler.is_compiling():
        return
    check_values(
        document_ids=document_ids if _values_are_free(document_ids) else None,
        decay=decay.detach() if decay is not None and _values_are_free(decay) else None,
    )
    if isinstance(initial_state, ResidualState) and document_ids is not None and _values_are_free(document_ids):
        last_B = initial_state.last_document_B
        assert last_B is not None
        if bool((document_ids[:, 0] < last_B).any()):
            raise ValueError(
                "document_ids must not fall behind the document that the state ends in: ids count on over segments"
            )


def _validate_state(
    state: ResidualState,
    k: Tensor,
    v: Tensor,
    F: int,
    window: int | None,
    feature_map: FeatureMap,
    decay: Tensor | None,
    document_ids: Tensor | None,
) -> None:
    B, _, G, D = k.shape
    Dv = v.shape[3]
    P = min(state.tokens_seen, residual_shift(window))
    if state.window != window:
        raise ValueError(f"the state was made with window={state.window}, this call has window={window}")
    if state.feature_map != feature_map.value:
        raise ValueError(f"the state was made with feature_map={state.feature_map!r}, not {feature_map.value!r}")
    if _shape(state.carried_BGFD) != (B, G, F, Dv) or _shape(state.pending_k_BPGD) != (B, P, G, D):
        raise ValueError(
            f"the state does not fit: it holds {_shape(state.carried_BGFD)} and pending keys "
            f"{_shape(state.pending_k_BPGD)}, this call needs {(B, G, F, Dv)} and {(B, P, G, D)}"
        )
    if state.pending_k_BPGD.dtype != k.dtype:
        raise ValueError(f"the state holds {state.pending_k_BPGD.dtype} keys, this call {k.dtype}; keep one dtype")
    for name, before, now in (
        ("decay", state.pending_decay_BPG, decay),
        ("document_ids", state.last_document_B, document_ids),
    ):
        if (before is None) != (now is None):
            said = "without" if before is None else "with"
            raise ValueError(f"the state was made {said} {name}: pass {name} to every segment of a sequence or to none")
