"""`impl="triton"`: the stages of kernels/ in order, forward and backward. Importing this file needs Triton."""

import torch
from torch import Tensor

from scan_kernels.kernels import common
from scan_kernels.kernels.chunk_dkv import launch_chunk_dkv
from scan_kernels.kernels.chunk_dq import launch_chunk_dq
from scan_kernels.kernels.chunk_output import launch_chunk_output_fwd
from scan_kernels.kernels.chunk_state import launch_chunk_state_bwd, launch_chunk_state_fwd
from scan_kernels.kernels.configs import Plan
from scan_kernels.kernels.launch import Launch, Sizes, States, Tensors
from scan_kernels.kernels.state_scan import launch_state_scan

MAPS = {
    "softmax": (common.SOFTMAX.value, 2),
    "softmax_single": (common.SOFTMAX.value, 1),
    "relu": (common.RELU.value, 2),
    "identity": (common.IDENTITY.value, 1),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the products multiply. A sum over a long sequence can leave the range of fp16, so states are bf16 then."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def sizes_of(q: Tensor, k: Tensor, v: Tensor, lag: int, feature_map: str, plan: Plan) -> Sizes:
    number, halves = MAPS[feature_map]
    return Sizes(
        B=q.shape[0],
        T=q.shape[1],
        M=k.shape[1],
        H=q.shape[2],
        G=k.shape[2],
        D=q.shape[3],
        DV=v.shape[3],
        lag=lag,
        feature_map=number,
        halves=halves,
        chunk=plan.chunk,
        segment=plan.segment,
    )


def split_init(sizes: Sizes, state_BGFD: Tensor | None) -> Tensor | None:
    """(B * G, F + 1, DV) fp32: a state as the scan carries it, less the sum of its values (the last row) over D."""
    if state_BGFD is None:
        return None
    state = state_BGFD.float().flatten(0, 1)
    sums = torch.zeros_like(state[:, :1])
    if sizes.feature_map == common.SOFTMAX.value:
        sums = state.sum(1, keepdim=True) / sizes.halves
        state = state - sums / sizes.D
    return torch.cat((state, sums), dim=1)


def join_final(sizes: Sizes, final: Tensor) -> Tensor:
    """The inverse of `split_init`: (B, G, F, DV) fp32."""
    state, sums = final[:, :-1], final[:, -1:]
    if sizes.feature_map == common.SOFTMAX.value:
        state = state + sums / sizes.D
    return state.unflatten(0, (sizes.B, sizes.G))


def scan_states(
    sizes: Sizes, first: Launch, init: Tensor | None, *, backward: bool, with_final: bool, run=Launch.run
) -> tuple[States, Tensor | None]:
    """Stages 1 and 2: the states of all chunks, and (with_final) the state at the far end."""
    run(first)
    made, carry, carry_sums, final = first.args, None, None, None
    if sizes.segments > 1 or init is not None or with_final:
        scan, carry, carry_sums, final = launch_state_scan(
            sizes,
            made["totals"],
            made["total_factors"],
            init,
            dtype=made["states"].dtype,
            backward=backward,
            with_final=with_final,
        )
        run(scan)
    if sizes.segments == 1 and init is None:
        carry = carry_sums = None
    return States(made["states"], made["value_sums"], made["factors"], carry, carry_sums), final


def forward(
    sizes: Sizes, x: Tensors, init: Tensor | None, plan: Plan, *, with_final: bool, run=Launch.run
) -> tuple[Tensor, Tensor | None]:
    compute = compute_dtype(x.q.dtype)
    first = launch_chunk_state_fwd(sizes, x, plan.state_fwd, compute)
    states, final = scan_states(sizes, first, init, backward=False, with_final=with_final, run=run)
    o = x.q.new_empty(sizes.B, sizes.T, sizes.H, sizes.DV)
    run(launch_chunk_output_fwd(sizes, x, states, o, plan.output, compute))
    return o, final


def backward(
    sizes: Sizes,
    x: Tensors,
    init: Tensor | None,
    do: Tensor,
    final_init: Tensor | None,
    plan: Plan,
    *,
    with_init_grad: bool,
    run=Launch.run,
):
    """dq, dk, dv, do . o by keys and by the start state (B, T, H), v . dv (B, G, N * C), gradient of init (split)."""
    compute = compute_dtype(x.q.dtype)
    first = launch_chunk_state_fwd(sizes, x, plan.state_fwd, compute)
    states, _ = scan_states(sizes, first, init, backward=False, with_final=False, run=run)
    dq = torch.empty(x.q.shape, dtype=x.q.dtype, device=x.q.device)
    dk = torch.empty(x.k.shape, dtype=x.q.dtype, device=x.q.device)
    dv = torch.empty(x.v.shape, dtype=x.q.dtype, device=x.q.device)
    d_read = d_start = d_given = None
    if x.cum_hi is not None:
        d_read = torch.empty(sizes.B, sizes.T, sizes.H, device=x.q.device)
        d_given = torch.empty(sizes.B, sizes.G, sizes.N * sizes.chunk, device=x.q.device)
    if x.start_log is not None:
        d_start = torch.empty(sizes.B, sizes.T, sizes.H, device=x.q.device)
    run(launch_chunk_dq(sizes, x, states, do, dq, d_read, d_start, plan.dq, compute))
    del states, first
    last = launch_chunk_state_bwd(sizes, x, do, plan.state_bwd, compute)
    states, d_init = scan_states(sizes, last, final_init, backward=True, with_final=with_init_grad, run=run)
    run(launch_chunk_dkv(sizes, x, states, do, dk, dv, d_given, plan.dkv, compute))
    return dq, dk, dv, d_read, d_start, d_given, d_init
