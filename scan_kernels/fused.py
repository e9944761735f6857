"""`impl="triton"`: the stages of kernels/ in order, forward and backward. Importing this file needs Triton."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from scan_kernels.feature_maps import apply_feature_map
from scan_kernels.fused_ops import NO_OTHERS, Inputs, OtherGrads
from scan_kernels.kernels import common, configs
from scan_kernels.kernels.border_states import kept_rows, launch_border_states
from scan_kernels.kernels.chunk_dkv import launch_chunk_dkv
from scan_kernels.kernels.chunk_dq import launch_chunk_dq
from scan_kernels.kernels.chunk_given import launch_chunk_given
from scan_kernels.kernels.chunk_output import launch_chunk_output_fwd
from scan_kernels.kernels.chunk_state import launch_chunk_state_bwd, launch_chunk_state_fwd
from scan_kernels.kernels.configs import Plan
from scan_kernels.kernels.empty_rows import launch_empty_rows
from scan_kernels.kernels.hopper_dkv import launch_hopper_dkv
from scan_kernels.kernels.hopper_query import launch_hopper_dq, launch_hopper_output
from scan_kernels.kernels.hopper_state import (
    launch_hopper_state_bwd,
    launch_hopper_state_fwd,
    launch_hopper_totals,
    reorder_state,
)
from scan_kernels.kernels.launch import Launch, Sizes, States, Tensors
from scan_kernels.kernels.state_scan import launch_state_scan
from scan_kernels.kernels.tape import Tapes
from scan_kernels.precision import without_autocast

MAPS = {
    "softmax": (common.SOFTMAX.value, 2),
    "softmax_single": (common.SOFTMAX.value, 1),
    "relu": (common.RELU.value, 2),
    "identity": (common.IDENTITY.value, 1),
}


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """What the products multiply. A sum over a long sequence can leave the range of fp16, so states are bf16 then."""
    return torch.float32 if dtype == torch.float32 else torch.bfloat16


def empty_chunks(T: int, lag: int, chunk: int) -> int:
    """Chunks in front whose queries are all too young for a key, but never all."""
    return min(max(lag, 0) // chunk, -(-T // chunk) - 1)


def sizes_of(
    q: Tensor, k: Tensor, v: Tensor, lag: int, feature_map: str, plan: Plan, *, from_zero: bool = True
) -> Sizes:
    """from_zero: a query without keys reads nothing, neither what is carried nor a start state."""
    number, halves = MAPS[feature_map]
    sizes = Sizes(
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
        empty=empty_chunks(q.shape[1], lag, plan.chunk) if from_zero else 0,
        reordered=plan.hopper,
    )
    return replace(sizes, segment=sizes.even(plan.segment))


def split_init(sizes: Sizes, state_BGFD: Tensor | None) -> Tensor | None:
    """(B * G, F + 1, DV) fp32: a state as the scan carries it, less the sum of its values (the last row) over D."""
    if state_BGFD is None:
        return None
    state = state_BGFD.float().flatten(0, 1)
    sums = torch.zeros_like(state[:, :1])
    if sizes.feature_map == common.SOFTMAX.value:
        sums = state.sum(1, keepdim=True) / sizes.halves
        state = state - sums / sizes.D
    if sizes.reordered:
        state = reorder_state(state, sizes.D)
    return torch.cat((state, sums), dim=1)


def join_final(sizes: Sizes, final: Tensor) -> Tensor:
    """The inverse of `split_init`: (B, G, F, DV) fp32."""
    state, sums = final[:, :-1], final[:, -1:]
    if sizes.reordered:
        state = reorder_state(state, sizes.D)
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


class Kept(NamedTuple):
    """What a forward leaves for its backward: the states before every m-th chunk (kernels/border_states.py)."""

    every: int
    states: Tensor
    sums: Tensor


def kept_states(sizes: Sizes, x: Tensors, kept: Kept, plan: Plan, run=Launch.run) -> tuple[Sizes, States]:
    """The states of all chunks from the kept ones, without a scan, and the sizes that their readers take."""
    if kept.every == 1:
        return sizes, States(kept.states, kept.sums, None, None, None)
    sizes = replace(sizes, segment=sizes.even(kept.every))
    first = launch_chunk_state_fwd(sizes, x, plan.state_fwd, compute_dtype(x.q.dtype), with_totals=False)
    run(first)
    made = first.args
    return sizes, States(made["states"], made["value_sums"], made["factors"], kept.states, kept.sums)


def forward(
    sizes: Sizes, x: Tensors, init: Tensor | None, plan: Plan, *, with_final: bool, save_every: int = 0, run=Launch.run
) -> tuple[Tensor, Tensor | None, Kept | None]:
    if plan.hopper:
        return _hopper_forward(sizes, x, init, plan, with_final=with_final, save_every=save_every, run=run)
    compute = compute_dtype(x.q.dtype)
    first = launch_chunk_state_fwd(sizes, x, plan.state_fwd, compute)
    states, final = scan_states(sizes, first, init, backward=False, with_final=with_final, run=run)
    o = _new_rows(sizes, x.q, sizes.DV, None, run)
    run(launch_chunk_output_fwd(sizes, x, states, o, plan.output, compute))
    return o, final, _keep(sizes, states, save_every, run)


def _new_rows(sizes: Sizes, q: Tensor, width: int, other: Tensor | None, run) -> Tensor:
    """(B, T, H, width) of q's dtype, only the rows of the empty chunks written: zeros, or those of `other`."""
    x = torch.empty(sizes.B, sizes.T, sizes.H, width, dtype=q.dtype, device=q.device)
    if sizes.empty:
        run(launch_empty_rows(sizes, x, other))
    return x


def _keep(sizes: Sizes, states: States, save_every: int, run) -> Kept | None:
    if not save_every:
        return None
    if save_every == 1 and states.carry is None:
        return Kept(1, states.chunks, states.sums)
    launch, *tensors = launch_border_states(sizes, states, save_every, sizes.feature_map == common.SOFTMAX.value)
    run(launch)
    return Kept(save_every, *tensors)


class DecayParts(NamedTuple):
    """do . o by pairs of a key and a query, as the gradient of decays sums it (`_rows_grad`)."""

    read: Tensor  # (B, T, H) fp32: by query, from keys of other rows and the carried state
    paired: Tensor  # (B, G, N * C) fp32: by key, to queries of later rows of its chunk
    given: Tensor  # (B, G, N * C) fp32: by key, to queries behind its chunk
    across: Tensor  # (B * G, N): from before the chunk to behind it


class Gradients(NamedTuple):
    dq: Tensor
    dk: Tensor
    dv: Tensor
    decays: DecayParts | None
    d_start: Tensor | None  # (B, T, H) fp32: do . o, as far as it comes through the start state
    d_init: Tensor | None  # split


def backward(
    sizes: Sizes,
    x: Tensors,
    init: Tensor | None,
    do: Tensor,
    final_init: Tensor | None,
    plan: Plan,
    *,
    with_init_grad: bool,
    kept: Kept | None = None,
    others: OtherGrads = NO_OTHERS,
    run=Launch.run,
) -> Gradients:
    if plan.hopper:
        return _hopper_backward(
            sizes, x, init, do, final_init, plan, with_init_grad=with_init_grad, kept=kept, others=others, run=run
        )
    compute = compute_dtype(x.q.dtype)
    if kept is None:
        first = launch_chunk_state_fwd(sizes, x, plan.state_fwd, compute)
        states, _ = scan_states(sizes, first, init, backward=False, with_final=False, run=run)
        del first
        cut = sizes
    else:
        cut, states = kept_states(sizes, x, kept, plan, run)
    dk, dv = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for like in (x.k, x.v))
    d_read = d_paired = d_start = None
    if x.cum_hi is not None:
        d_read = torch.empty(sizes.B, sizes.T, sizes.H, device=x.q.device)
        d_paired = torch.empty(sizes.B, sizes.G, sizes.N * sizes.chunk, device=x.q.device)
    if x.start_log is not None:
        d_start = torch.empty(sizes.B, sizes.T, sizes.H, device=x.q.device)
    dq = _new_rows(sizes, x.q, sizes.D, others.dq, run)
    run(launch_chunk_dq(cut, x, states, do, dq, d_read, d_paired, d_start, plan.dq, compute, others.dq))
    if x.cum_hi is None:
        del states
        last = launch_chunk_state_bwd(sizes, x, do, plan.state_bwd, compute)
    else:
        borders = _states_at_borders(sizes, cut, states)
        # Kept states stay for another backward.
        overwrite = kept is None or kept.every > 1
        last = launch_chunk_state_bwd(sizes, x, do, plan.state_bwd, compute, states, cut.segment, overwrite=overwrite)
        del states
    behind, d_init = scan_states(sizes, last, final_init, backward=True, with_final=with_init_grad, run=run)
    run(launch_chunk_dkv(sizes, x, behind, do, dk, dv, plan.dkv, compute, others.dk, others.dv))
    decays = None
    if d_read is not None and d_paired is not None:
        given = launch_chunk_given(sizes, x, behind, plan.dkv, compute)
        run(given)
        across = last.args["d_across"].sum(2)
        if behind.carry is not None:
            across += _across_segments(sizes, borders, behind, last.args["total_factors"], given.args["beyond"])
        decays = DecayParts(d_read, d_paired, given.args["given"], across)
    return Gradients(dq, dk, dv, decays, d_start, d_init)


def _states_at_borders(sizes: Sizes, cut: Sizes, states: States) -> tuple[Tensor, Tensor]:
    """The whole state in front of every segment of `sizes`, (B * G, segments, F, DV), and its sums, fp32.

    `cut`: the sizes that `states` came with. A copy, since the backward writes over the states.
    """
    chunks = states.chunks[:, :: sizes.segment].to(torch.float32, copy=True)
    sums = states.sums[:, :: sizes.segment]
    if states.carry is None or states.carry_sums is None or states.factors is None:
        return chunks, sums
    border = torch.arange(0, sizes.N, sizes.segment, device=states.sums.device) // cut.segment
    factors = states.factors[:, :: sizes.segment, None]
    sums = sums + _scaled(factors, states.carry_sums.index_select(1, border))
    return chunks + _scaled(factors[..., None], states.carry.index_select(1, border)), sums


def _scaled(factor: Tensor, x: Tensor) -> Tensor:
    """As kernels/common.py: a factor of 0 lets nothing pass, not even NaN."""
    return torch.where(factor == 0, 0.0, factor * x)


def _across_segments(
    sizes: Sizes, borders: tuple[Tensor, Tensor], behind: States, total_factors: Tensor, beyond: Tensor
) -> Tensor:
    """(B * G, N): what passes from before each chunk to behind its segment.

    From before the segment, by the states at both of its ends, and from each of its chunks so far.
    """
    assert behind.carry is not None
    assert behind.carry_sums is not None
    (states, sums), ends, end_sums = borders, behind.carry[:, 1:], behind.carry_sums[:, 1:]
    through = (states * ends).sum((2, 3))
    if sizes.feature_map == common.SOFTMAX.value:
        through = through + sizes.halves / sizes.D * (sums * end_sums).sum(2)
    fill = sizes.segments * sizes.segment - sizes.N
    beyond = nnf.pad(beyond, (0, fill)).unflatten(1, (sizes.segments, sizes.segment))
    across = _scaled(total_factors, through)[..., None] + (beyond.cumsum(2) - beyond)
    return across.flatten(1)[:, : sizes.N]


def _rows_of_16_bytes(x: Tensor) -> Tensor:
    """x, or a copy where the 16-byte loads of the Hopper stages could not read it."""
    fits = x.stride(-1) == 1 and x.data_ptr() % 16 == 0 and not any(stride % 16 for stride in x.stride()[:-1])
    fits &= x.stride(1) * 64 < 2**31  # offsets inside a chunk
    # Not `contiguous`, which returns a contiguous view that begins anywhere as it is.
    return x if fits else x.clone(memory_format=torch.contiguous_format)


def _aligned_others(others: OtherGrads) -> OtherGrads:
    return OtherGrads(*(None if x is None else _rows_of_16_bytes(x) for x in others))


def _hopper_states(
    sizes: Sizes, x: Tensors, init: Tensor | None, plan: Plan, *, with_final: bool, run
) -> tuple[Launch, Tensor | None]:
    """The launch that wrote the states in front of every chunk, and (with_final) the state behind the last key."""
    carry = carry_sums = final = None
    if sizes.segments > 1 or init is not None or with_final:
        totals = launch_hopper_totals(sizes, x, plan.state_fwd)
        run(totals)
        scan, carry, carry_sums, final = launch_state_scan(
            sizes,
            totals.args["totals"],
            totals.args["total_factors"],
            init,
            dtype=torch.float32,
            backward=False,
            with_final=with_final,
        )
        run(scan)
    states = launch_hopper_state_fwd(sizes, x, carry, carry_sums, plan.state_fwd)
    run(states)
    return states, final


def _hopper_forward(
    sizes: Sizes, x: Tensors, init: Tensor | None, plan: Plan, *, with_final: bool, save_every: int, run
) -> tuple[Tensor, Tensor | None, Kept | None]:
    made, final = _hopper_states(sizes, x, init, plan, with_final=with_final, run=run)
    states = States(made.args["states"], made.args["value_sums"], None, None, None)
    o = _new_rows(sizes, x.q, sizes.DV, None, run)
    run(launch_hopper_output(sizes, x, states, o, plan.output))
    return o, final, _keep(sizes, states, save_every, run)


def _hopper_backward(
    sizes: Sizes,
    x: Tensors,
    init: Tensor | None,
    do: Tensor,
    final_init: Tensor | None,
    plan: Plan,
    *,
    with_init_grad: bool,
    kept: Kept | None,
    others: OtherGrads,
    run,
) -> Gradients:
    if not do.is_meta:
        do, others = _rows_of_16_bytes(do), _aligned_others(others)
    dk, dv = (torch.empty(like.shape, dtype=like.dtype, device=like.device) for like in (x.k, x.v))
    last = launch_hopper_state_bwd(sizes, x, do, plan.state_bwd)
    logs = last.args["logs"]
    behind, d_init = scan_states(sizes, last, final_init, backward=True, with_final=with_init_grad, run=run)
    run(launch_hopper_dkv(sizes, x, behind, do, logs, dk, dv, plan.dkv, others.dk, others.dv))
    # The states behind the chunks make room for those in front of them.
    del last, behind
    if kept is None:
        made, _ = _hopper_states(sizes, x, init, plan, with_final=False, run=run)
        chunks = made.args["states"]
        del made
    elif kept.every == 1:
        chunks = kept.states
    else:
        cut = replace(sizes, segment=sizes.even(kept.every))
        first = launch_hopper_state_fwd(cut, x, kept.states, kept.sums, plan.state_fwd)
        run(first)
        chunks = first.args["states"]
        del first
    dq = _new_rows(sizes, x.q, sizes.D, others.dq, run)
    run(launch_hopper_dq(sizes, x, chunks, do, logs, dq, plan.dq, others.dq))
    return Gradients(dq, dk, dv, None, None, d_init)


def plan_of(inputs: Inputs, capability: int = 90) -> Plan:
    """The plan of a problem on the GPU that its tensors are on, or for `capability` if they are meta tensors."""
    q, v = inputs.q, inputs.v
    if q.device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(q.device)
        capability = 10 * major + minor
    elif q.device.type == "cpu":
        capability = 80  # Triton's interpreter runs no Hopper stages
    with_start, with_decay = inputs.start is not None, inputs.rows is not None
    return configs.plan_for(q.dtype, q.shape[3], v.shape[3], capability, with_start, with_decay)


def from_zero(inputs: Inputs) -> bool:
    """See `sizes_of`. Decays have sums over all chunks of their own."""
    return inputs.rows is None and inputs.carried is None and inputs.start is None


def rows_kept(inputs: Inputs, lag: int, feature_map: str, save_every: int) -> int:
    """States that a forward keeps for each KV head of each sequence."""
    sizes = sizes_of(*inputs[:3], lag, feature_map, plan_of(inputs), from_zero=from_zero(inputs))
    return kept_rows(sizes, save_every)


def prepare(
    inputs: Inputs, lag: int, feature_map: str, *, capability: int = 90, plan: Plan | None = None
) -> tuple[Sizes, Tensors, Tensor | None, Plan]:
    """The arguments of the ops as the stages take them. `capability`: of meta tensors."""
    plan = plan or plan_of(inputs, capability)
    q, k, v, rows, query_doc, key_doc, carried_doc, carried, start, start_log = inputs
    sizes = sizes_of(q, k, v, lag, feature_map, plan, from_zero=from_zero(inputs))
    if plan.hopper and not q.is_meta:
        q, k, v = _rows_of_16_bytes(q), _rows_of_16_bytes(k), _rows_of_16_bytes(v)
    cum_hi = cum_lo = start_sum = None
    if rows is not None:
        cum = nnf.pad(rows.double(), (0, sizes.N * sizes.chunk - sizes.T)).unflatten(2, (sizes.N, sizes.chunk))
        cum = cum.cumsum(-1).contiguous()
        cum_hi = cum.float()
        cum_lo = (cum - cum_hi.double()).float()
    if start is not None:
        start = start.float()
        if sizes.feature_map == common.SOFTMAX.value:
            halves = start.unflatten(2, (sizes.halves, sizes.D))
            mean = halves.mean(3, keepdim=True)
            start_sum = mean[:, :, :, 0].sum(2)
            start = (halves - mean).flatten(2, 3)
        else:
            start_sum = torch.zeros_like(start[:, :, 0])
        start, start_sum = start.to(compute_dtype(q.dtype)).contiguous(), start_sum.contiguous()
    x = Tensors(
        q,
        k,
        v,
        cum_hi=cum_hi,
        cum_lo=cum_lo,
        query_doc=query_doc,
        key_doc=key_doc,
        # A column of the ids: the kernels read it without a stride.
        carried_doc=None if carried_doc is None else carried_doc.contiguous(),
        start=start,
        start_sum=start_sum,
        start_log=None if start_log is None else start_log.float().contiguous(),
    )
    return sizes, x, split_init(sizes, carried), plan


_forward_tapes, _backward_tapes = Tapes(), Tapes()


def _taped(inputs: Inputs, *others: Tensor | None) -> bool:
    """Whether a call launches kernels alone: Hopper stages, and nothing that torch computes before or behind them."""
    computed = (inputs.rows, inputs.carried, inputs.start, inputs.start_log, *others)
    return inputs.q.is_cuda and all(x is None for x in computed) and plan_of(inputs).hopper


def _aligned(inputs: Inputs) -> Inputs:
    """As the Hopper stages read them."""
    q, k, v = map(_rows_of_16_bytes, inputs[:3])
    carried_doc = None if inputs.carried_doc is None else inputs.carried_doc.contiguous()
    return inputs._replace(q=q, k=k, v=v, carried_doc=carried_doc)


def _hopper_problem(inputs: Inputs, lag: int, feature_map: str) -> tuple[Sizes, Tensors, Plan]:
    plan = plan_of(inputs)
    q, k, v, _, query_doc, key_doc, carried_doc, *_ = inputs
    x = Tensors(q, k, v, query_doc=query_doc, key_doc=key_doc, carried_doc=carried_doc)
    return sizes_of(q, k, v, lag, feature_map, plan), x, plan


def _solve_taped(inputs: Inputs, lag: int, feature_map: str, save_every: int) -> Sequence[Tensor]:
    """o and, with save_every, what is kept."""

    def build(tensors: Sequence[Any], run: Callable[[Launch], None]) -> Sequence[Tensor]:
        sizes, x, plan = _hopper_problem(Inputs(*tensors), lag, feature_map)
        o, _, kept = _hopper_forward(sizes, x, None, plan, with_final=False, save_every=save_every, run=run)
        return (o,) if kept is None else (o, kept.states, kept.sums)

    return _forward_tapes.call(_aligned(inputs), (lag, feature_map, save_every), build)


def _solve_bwd_taped(
    do: Tensor, inputs: Inputs, kept: Kept | None, others: OtherGrads, lag: int, feature_map: str, save_every: int
) -> Sequence[Tensor]:
    """dq, dk, dv."""

    def build(tensors: Sequence[Any], run: Callable[[Launch], None]) -> Sequence[Tensor]:
        do, states, sums, *rest = tensors
        others, problem = OtherGrads(*rest[:3]), Inputs(*rest[3:])
        sizes, x, plan = _hopper_problem(problem, lag, feature_map)
        kept = Kept(save_every, states, sums) if save_every else None
        grads = _hopper_backward(
            sizes, x, None, do, None, plan, with_init_grad=False, kept=kept, others=others, run=run
        )
        return grads.dq, grads.dk, grads.dv

    states = (None, None) if kept is None else (kept.states, kept.sums)
    tensors = (_rows_of_16_bytes(do), *states, *_aligned_others(others), *_aligned(inputs))
    return _backward_tapes.call(tensors, (lag, feature_map, save_every), build)


def solve(
    inputs: Inputs, lag: int, feature_map: str, with_final: bool, save_every: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What `fused_ops.fused_fwd` returns."""
    q = inputs.q
    with torch.cuda.device_of(q):
        if not with_final and _taped(inputs):
            o, *parts = _solve_taped(inputs, lag, feature_map, save_every)
            parts = parts or _nothing(q, compute_dtype(q.dtype), torch.float32)
            return o, _nothing(q, torch.float32)[0], parts[0], parts[1]
        sizes, x, init, plan = prepare(inputs, lag, feature_map)
        o, final, kept = forward(sizes, x, init, plan, with_final=with_final, save_every=save_every)
        parts = _nothing(q, compute_dtype(q.dtype), torch.float32) if kept is None else [kept.states, kept.sums]
        final = _nothing(q, torch.float32)[0] if final is None else join_final(sizes, final).contiguous()
        return o, final, parts[0], parts[1]


def _nothing(like: Tensor, *dtypes: torch.dtype) -> list[Tensor]:
    """Empty tensors of their own: outputs of an op must not share memory."""
    return [like.new_empty(0, dtype=dtype) for dtype in dtypes]


def solve_bwd(
    do: Tensor,
    d_final: Tensor | None,
    inputs: Inputs,
    kept_chunks: Tensor | None,
    kept_sums: Tensor | None,
    lag: int,
    feature_map: str,
    save_every: int,
    others: OtherGrads = NO_OTHERS,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `fused_ops.fused_bwd` returns."""
    q, _, _, rows, *_, carried, start, start_log = inputs
    kept = None
    if kept_chunks is not None and kept_sums is not None:
        kept = Kept(save_every, kept_chunks, kept_sums)
    with torch.cuda.device_of(q), without_autocast(q.device.type):
        if _taped(inputs, d_final):
            dq, dk, dv = _solve_bwd_taped(do, inputs, kept, others, lag, feature_map, save_every)
            d_rows, d_carried, d_start, d_start_log = _nothing(q, *[q.dtype] * 4)
            return dq, dk, dv, d_rows, d_carried, d_start, d_start_log
        sizes, x, init, plan = prepare(inputs, lag, feature_map)
        final_init = split_init(sizes, d_final)
        with_init_grad = carried is not None
        grads = backward(sizes, x, init, do, final_init, plan, with_init_grad=with_init_grad, kept=kept, others=others)
        d_rows, d_carried, d_start, d_start_log = _nothing(q, *[q.dtype] * 4)
        if rows is not None:
            assert grads.decays is not None
            d_rows = _rows_grad(sizes, grads.decays)
        if carried is not None:
            assert grads.d_init is not None
            d_carried = join_final(sizes, grads.d_init).to(carried.dtype).contiguous()
        if start is not None:
            d_start = _start_grad(sizes, x, do, start.shape[1], feature_map).to(start.dtype)
        if start_log is not None:
            assert grads.d_start is not None
            d_start_log = grads.d_start.double().unflatten(2, (sizes.G, sizes.R)).sum(3).transpose(1, 2).contiguous()
        return grads.dq, grads.dk, grads.dv, d_rows, d_carried, d_start, d_start_log


def _rows_grad(sizes: Sizes, parts: DecayParts) -> Tensor:
    """A decay is felt by all pairs of an older key and a query from its row on, by do . o of each.

    What all rows from it on read less what keys from it on gave would be the same, and the difference of sums that were
    rounded apart. So: the pairs that pass the whole chunk; those that end or begin in it, behind or before the row; and
    of those inside the difference, where both sums are of the same numbers.
    """
    chunks = (sizes.N, sizes.chunk)
    read = parts.read.double().unflatten(2, (sizes.G, sizes.R)).sum(3).transpose(1, 2)
    read = nnf.pad(read, (0, sizes.N * sizes.chunk - sizes.T)).unflatten(2, chunks)
    net = read - parts.paired.double().unflatten(2, chunks)
    given = parts.given.double().unflatten(2, chunks)
    d_rows = parts.across.double().unflatten(0, (sizes.B, sizes.G))[..., None]
    d_rows = d_rows + net.flip(3).cumsum(3).flip(3) + (given.cumsum(3) - given)
    return d_rows.flatten(2)[..., : sizes.T].contiguous()


def _start_grad(sizes: Sizes, x: Tensors, do: Tensor, X: int, feature_map: str) -> Tensor:
    """sum_i share_i phi(q_i)^T do_i for every head of the start state: (B, X, F, DV) fp32."""
    phi = apply_feature_map(x.q, feature_map).float()
    if x.start_log is not None:
        phi = phi * x.start_log.exp().transpose(1, 2).repeat_interleave(sizes.R, dim=2)[..., None]
    grad = torch.einsum("bthf,bthd->bhfd", phi, do.float())
    return grad.unflatten(1, (X, sizes.H // X)).sum(2).contiguous()
