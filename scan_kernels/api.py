"""The public op and the choice of its implementation."""

import logging
from typing import Literal, overload

import torch
from torch import Tensor

from scan_kernels.chunked import chunked
from scan_kernels.feature_maps import FeatureMap, parse_feature_map
from scan_kernels.fused_ops import fused_scan, fused_scan_and_inputs, refusal
from scan_kernels.impl import Impl, parse_impl
from scan_kernels.reference import token_loop
from scan_kernels.state import ResidualState, ScanProblem, begin, end
from scan_kernels.validation import validate

logger = logging.getLogger("scan_kernels")


_SOLVERS = {Impl.REFERENCE: token_loop, Impl.TORCH: chunked}
_announced: set[str] = set()


# Runs while a graph is traced, so that compiled programs are told too.
@torch.compiler.assume_constant_result
def _announce(device_type: str, chosen: str, why: str) -> bool:
    message = f'residual_linear_attention: impl="auto" uses {chosen!r} on {device_type}{why}'
    if message not in _announced:
        _announced.add(message)
        logger.info(message)
    return True


def _choose(q: Tensor, k: Tensor, v: Tensor) -> Impl:
    reason = refusal(q, k, v) if q.device.type == "cuda" else ""
    use_triton = q.device.type == "cuda" and not reason
    chosen = Impl.TRITON if use_triton else Impl.TORCH
    _announce(q.device.type, "triton" if use_triton else "torch", f": triton {reason}" if reason else "")
    return chosen


@overload
def residual_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    feature_map: FeatureMap | str = ...,
    decay: Tensor | None = ...,
    document_ids: Tensor | None = ...,
    initial_state: Tensor | ResidualState | None = ...,
    return_final_state: Literal[False] = ...,
    impl: Impl | str = ...,
    save_every: int | None = ...,
) -> Tensor: ...
@overload
def residual_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    feature_map: FeatureMap | str = ...,
    decay: Tensor | None = ...,
    document_ids: Tensor | None = ...,
    initial_state: Tensor | ResidualState | None = ...,
    return_final_state: Literal[True],
    impl: Impl | str = ...,
    save_every: int | None = ...,
) -> tuple[Tensor, ResidualState]: ...
def residual_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    feature_map: FeatureMap | str = FeatureMap.SOFTMAX,
    decay: Tensor | None = None,
    document_ids: Tensor | None = None,
    initial_state: Tensor | ResidualState | None = None,
    return_final_state: bool = False,
    impl: Impl | str = Impl.AUTO,
    save_every: int | None = None,
) -> Tensor | tuple[Tensor, ResidualState]:
    """The keys that a sliding window leaves out, read through a linear state (arXiv 2506.15545, section 3).

        S_t = exp(decay_t) S_{t-1} + phi(k_t)^T v_t
        o_t = phi(q_t) S_{t - window - 1}

    S_t before the first key is the initial state; without one, o_t is exactly 0 where no key is old enough. With
    `window=None` (no softmax branch) o_t = phi(q_t) S_t. There is no denominator and no softmax scale.

    Args:
        q: (B, T, H, D), before RoPE. float32, bfloat16, float16 or float64, as k and v.
        k: (B, T, G, D), H a multiple of G: query head h reads KV head h // (H / G).
        v: (B, T, G, Dv).
        window: previous keys that the softmax branch sees besides the query's own, >= 0, or None.
        feature_map: phi, one of `available_feature_maps()`.
        decay: (B, T, G), logarithmic, <= 0 (-inf forgets everything). It belongs to the *key*: key t's decay acts when
            key t enters the state, window + 1 tokens after it was the query.
        document_ids: (B, T) integers that never fall along T. A query reads keys of its own document alone, as if
            the document were a sequence of its own.
        initial_state: S before the first key. A Tensor (B, G, F, Dv) or, per query head, (B, H, F, Dv) is where *every*
            document begins; decayed by the keys that enter. A `ResidualState` continues the sequence that returned it:
            the running document goes on, later ones begin at the Tensor which that sequence began with (or zero).
        return_final_state: also return the `ResidualState` behind the last token.
        impl: "auto", "reference", "torch", "triton".
        save_every: what "triton" keeps between forward and backward, and nothing else: 0 keeps no states, and the
            backward computes them again; m >= 1 keeps the state before every m-th chunk (docs/kernels.md), and the
            backward starts from those. None is the measured choice. The other implementations take it and ignore it.

    Returns:
        o (B, T, H, Dv) in the dtype of q; with `return_final_state` the pair (o, state).

    Raises:
        ValueError: shapes, dtypes, options or the state do not fit; on CPU also falling ids and positive decay
            (`check_values` looks on any device); `impl="triton"` without a CUDA device, in float64, or with head sizes
            other than 16, 32, 64, 128 and 256.

    States are summed in fp32 (float64 for float64 inputs), also under autocast. Differentiable in q, k, v, decay and
    the initial state.
    """
    problem, impl = _pose(
        q,
        k,
        v,
        window=window,
        feature_map=feature_map,
        decay=decay,
        document_ids=document_ids,
        initial_state=initial_state,
        impl=impl,
        save_every=save_every,
    )
    if impl is Impl.TRITON:
        result = fused_scan(problem, with_final=return_final_state, save_every=save_every)
    else:
        result = _SOLVERS[impl](problem)
    if not return_final_state:
        return result.o_BTHD
    tokens_before = initial_state.tokens_seen if isinstance(initial_state, ResidualState) else 0
    return result.o_BTHD, end(problem, result, window=window, tokens_before=tokens_before)


def residual_linear_attention_and_inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    feature_map: FeatureMap | str = FeatureMap.SOFTMAX,
    decay: Tensor | None = None,
    document_ids: Tensor | None = None,
    initial_state: Tensor | None = None,
    impl: Impl | str = Impl.AUTO,
    save_every: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`residual_linear_attention` on the way of q, k, v to another branch: (o, q, k, v), the same tensors again.

    A softmax branch that reads the returned q, k, v gives its gradients to this one's kernels, which add them to their
    own and round the sum once. Three additions of tensors of that size are saved, and nothing else changes: values and
    gradients are those of two branches that read the given tensors, as they are with `impl` "torch" and "reference" and
    where values are too wide for one call of the kernels. Using only some of the returned tensors, or none, is fine.

    Args and Raises: those of `residual_linear_attention`. `initial_state` is a Tensor: a `ResidualState` is refused,
    since keys of an earlier call have no other reader here.
    """
    if isinstance(initial_state, ResidualState):
        raise ValueError("initial_state must be a Tensor here, got a ResidualState: use residual_linear_attention")
    problem, impl = _pose(
        q,
        k,
        v,
        window=window,
        feature_map=feature_map,
        decay=decay,
        document_ids=document_ids,
        initial_state=initial_state,
        impl=impl,
        save_every=save_every,
    )
    if impl is Impl.TRITON:
        return fused_scan_and_inputs(problem, save_every=save_every)
    return _SOLVERS[impl](problem).o_BTHD, q, k, v


def _pose(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    feature_map: FeatureMap | str,
    decay: Tensor | None,
    document_ids: Tensor | None,
    initial_state: Tensor | ResidualState | None,
    impl: Impl | str,
    save_every: int | None,
) -> tuple[ScanProblem, Impl]:
    """The checked problem, and who solves it."""
    feature_map, impl = parse_feature_map(feature_map), parse_impl(impl)
    validate(
        q,
        k,
        v,
        window=window,
        feature_map=feature_map,
        decay=decay,
        document_ids=document_ids,
        initial_state=initial_state,
        save_every=save_every,
    )
    if impl is Impl.AUTO:
        impl = _choose(q, k, v)
    elif impl is Impl.TRITON and (reason := refusal(q, k, v)):
        raise ValueError(f'impl="triton" {reason}; impl="torch" takes all inputs on every device')
    problem = begin(
        q,
        k,
        v,
        window=window,
        feature_map=feature_map,
        decay_BTG=decay,
        document_BT=document_ids,
        initial_state=initial_state,
    )
    return problem, impl
