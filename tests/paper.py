"""The paper's layer, written down once more as float64 loops over tokens: shares no code with the package.

Source: arXiv 2506.15545, section 3, and the options of the authors' code. Slow and plain on purpose.
"""

from __future__ import annotations

import math

import torch


def phi(x: torch.Tensor, name: str) -> torch.Tensor:
    """The feature maps by their definitions: a pair is the map of x beside the map of -x."""
    if name == "softmax":
        return torch.cat([torch.exp(x) / torch.exp(x).sum(-1, keepdim=True), _softmin(x)], -1)
    if name == "softmax_single":
        return torch.exp(x) / torch.exp(x).sum(-1, keepdim=True)
    if name == "relu":
        return torch.cat([x * (x > 0), -x * (x < 0)], -1)
    assert name == "identity"
    return x


def _softmin(x: torch.Tensor) -> torch.Tensor:
    return torch.exp(-x) / torch.exp(-x).sum(-1, keepdim=True)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps) * weight


def rope(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Rotate the halves of x (..., D) by the angles of `position`."""
    half = x.shape[-1] // 2
    angle = position * theta ** (-torch.arange(half, dtype=torch.float64) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def softmax_branch(q, k, v, positions, *, window: int | None, theta: float | None):
    """o_t over the keys t-window <= j <= t of its document; q (T, H, D), k, v (T, G, D); window None: all of them."""
    T, H, D = q.shape
    group = H // k.shape[1]
    out = torch.zeros_like(q)
    for t in range(T):
        start = t - int(positions[t])
        first = start if window is None else max(start, t - window)
        for h in range(H):
            q_t = q[t, h] if theta is None else rope(q[t, h], int(positions[t]), theta)
            logits = []
            for j in range(first, t + 1):
                k_j = k[j, h // group]
                k_j = k_j if theta is None else rope(k_j, int(positions[j]), theta)
                logits.append(q_t @ k_j / math.sqrt(D))
            weights = torch.softmax(torch.stack(logits), 0)
            out[t, h] = weights @ v[first : t + 1, h // group]
    return out


def decay_gate(x, weights) -> torch.Tensor:
    """Mamba2's scalar gate, the log of what is kept, (T, G): -exp(A) log(1 + exp(W x + b))."""
    pre = x @ weights["decay_gate.proj.weight"].T + weights["decay_gate.dt_bias"]
    return -torch.exp(weights["decay_gate.A_log"]) * torch.log(1 + torch.exp(pre))


def linear_branch(q, k, v, positions, *, window: int | None, feature_map: str, initial_state=None, log_decay=None):
    """o_t = phi(q_t) S of the keys of its document up to t-window-1 (up to t without a window).

    With log_decay (T, G), a key's entry first shrinks the state by exp of that key's decay.
    """
    T, H, _ = q.shape
    group = H // k.shape[1]
    lag = 0 if window is None else window + 1
    out = torch.zeros_like(q)
    for t in range(T):
        start = t - int(positions[t])
        for h in range(H):
            state = 0 if initial_state is None else initial_state[h]
            for s in range(start, t - lag + 1):
                if log_decay is not None:
                    state = state * torch.exp(log_decay[s, h // group])
                state = state + torch.outer(phi(k[s, h // group], feature_map), v[s, h // group])
            if isinstance(state, torch.Tensor):
                out[t, h] = phi(q[t, h], feature_map) @ state
    return out


def layer(
    x,
    weights,
    positions,
    *,
    n_heads: int,
    n_kv_heads: int,
    kind: str,
    window: int | None,
    feature_map: str = "softmax",
    theta: float | None,
    qk_eps: float = 1e-6,
    norm_eps: float = 1e-8,
):
    """A whole attention layer on one sequence x (T, dim); `weights` are the module's, by name, in float64."""
    T = x.shape[0]
    q = (x @ weights["qkv_linear.wq.weight"].T).view(T, n_heads, -1)
    k = (x @ weights["qkv_linear.wk.weight"].T).view(T, n_kv_heads, -1)
    v = (x @ weights["qkv_linear.wv.weight"].T).view(T, n_kv_heads, -1)
    if "q_norm.weight" in weights:
        q = rms_norm(q, weights["q_norm.weight"], qk_eps)
        k = rms_norm(k, weights["k_norm.weight"], qk_eps)
    log_decay = decay_gate(x, weights) if "decay_gate.A_log" in weights else None
    if kind == "hymba":
        o = torch.zeros_like(q)
        group = n_heads // n_kv_heads
        soft = [h for h in range(n_heads) if h // group % 2 == 0]
        lin = [h for h in range(n_heads) if h // group % 2 == 1]
        o_soft = softmax_branch(q[:, soft], k[:, ::2], v[:, ::2], positions, window=window, theta=theta)
        o_lin = linear_branch(
            q[:, lin], k[:, 1::2], v[:, 1::2], positions, window=None, feature_map=feature_map, log_decay=log_decay
        )
        o[:, soft] = rms_norm(o_soft, weights["swa_norm.weight"], norm_eps)
        o[:, lin] = rms_norm(o_lin, weights["rla_norm.weight"], norm_eps)
        return o.reshape(T, -1) @ weights["wo.weight"].T
    branches = []
    if not (kind == "rattention" and window is None):
        swa = softmax_branch(q, k, v, positions, window=None if kind == "full" else window, theta=theta)
        if "swa_norm.weight" in weights:
            swa = rms_norm(swa, weights["swa_norm.weight"], norm_eps)
        branches.append(swa)
    if kind == "rattention":
        q_lin, k_lin = q, k
        if "q_scale.weight" in weights:
            q_lin, k_lin = q * weights["q_scale.weight"], k * weights["k_scale.weight"]
        state = None
        if "initial_state.k_tokens" in weights:
            k_tokens, v_tokens = weights["initial_state.k_tokens"], weights["initial_state.v_tokens"]
            state = [phi(k_tokens[h], feature_map).T @ v_tokens[h] for h in range(n_heads)]
        rla = linear_branch(
            q_lin,
            k_lin,
            v,
            positions,
            window=window,
            feature_map=feature_map,
            initial_state=state,
            log_decay=log_decay,
        )
        if "rla_norm.weight" in weights:
            rla = rms_norm(rla, weights["rla_norm.weight"], norm_eps)
        branches.append(rla)
    return sum(branches).reshape(T, -1) @ weights["wo.weight"].T
