"""Two float64 references that share nothing but the feature maps: a token loop and a quadratic form.

Both solve a `ScanProblem` (state.py) and differentiate by autograd; the result has the dtype of the inputs, so pass
float64 inputs to see float64 results.
"""

import torch
from torch import Tensor

from scan_kernels.feature_maps import FeatureMap, apply_feature_map, parse_feature_map
from scan_kernels.precision import accumulation_dtype, without_autocast
from scan_kernels.state import ResidualState, ScanProblem, ScanResult, begin
from scan_kernels.validation import validate


def _double(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.double()


def _finish(problem: ScanProblem, o_BTHD: Tensor, carried: Tensor, log_decay: Tensor | None) -> ScanResult:
    dtype = problem.q_BTHD.dtype
    return ScanResult(o_BTHD.to(dtype), carried.to(accumulation_dtype(dtype)), log_decay)


def token_loop(problem: ScanProblem) -> ScanResult:
    """One token at a time, as the law is written."""
    with without_autocast(problem.q_BTHD.device.type):
        return _token_loop(problem)


def _token_loop(problem: ScanProblem) -> ScanResult:
    B, T, H, _ = problem.q_BTHD.shape
    G, Dv = problem.v_BMGD.shape[2:]
    R = H // G
    phi_q_BTHF = apply_feature_map(problem.q_BTHD.double(), problem.feature_map)
    phi_k_BMGF = apply_feature_map(problem.k_BMGD.double(), problem.feature_map)
    v_BMGD = problem.v_BMGD.double()
    decay_BMG, start_BXFD = _double(problem.decay_BMG), _double(problem.start_BXFD)
    start_BHFD = None
    if start_BXFD is not None:
        start_BHFD = start_BXFD.repeat_interleave(H // start_BXFD.shape[1], dim=1)

    S_BGFD = _double(problem.carried_BGFD)
    if S_BGFD is None:
        S_BGFD = v_BMGD.new_zeros(B, G, phi_k_BMGF.shape[-1], Dv)
    log_decay_BG = problem.start_log_decay_BG
    if log_decay_BG is None:
        log_decay_BG = v_BMGD.new_zeros(B, G)
    # The document that S belongs to.
    document_B = problem.carried_document_B
    rows = []
    for t in range(T):
        j = t - problem.lag
        if j >= 0:
            if problem.key_document_BM is not None:
                assert document_B is not None
                begins_B = problem.key_document_BM[:, j] != document_B
                document_B = problem.key_document_BM[:, j]
                S_BGFD = torch.where(begins_B[:, None, None, None], 0.0, S_BGFD)
                log_decay_BG = torch.where(begins_B[:, None], 0.0, log_decay_BG)
            if decay_BMG is not None:
                S_BGFD = decay_BMG[:, j].exp()[:, :, None, None] * S_BGFD
                log_decay_BG = log_decay_BG + decay_BMG[:, j]
            S_BGFD = S_BGFD + phi_k_BMGF[:, j, :, :, None] * v_BMGD[:, j, :, None, :]
        read_BGFD, read_log_decay_BG = S_BGFD, log_decay_BG
        if problem.query_document_BT is not None:
            # No key of the query's own document is old enough yet: it reads its start state.
            assert document_B is not None
            mine_B = problem.query_document_BT[:, t] == document_B
            read_BGFD = torch.where(mine_B[:, None, None, None], S_BGFD, 0.0)
            read_log_decay_BG = torch.where(mine_B[:, None], log_decay_BG, 0.0)
        read_BHFD = read_BGFD.repeat_interleave(R, dim=1)
        if start_BHFD is not None:
            read_BHFD = read_BHFD + read_log_decay_BG.exp().repeat_interleave(R, dim=1)[:, :, None, None] * start_BHFD
        rows.append(torch.einsum("bhf,bhfd->bhd", phi_q_BTHF[:, t], read_BHFD))
    final_log_decay = None if start_BHFD is None else read_log_decay_BG
    return _finish(problem, torch.stack(rows, dim=1), read_BGFD, final_log_decay)


def quadratic(problem: ScanProblem) -> ScanResult:
    """All pairs at once: o_i = sum_j [j <= i - lag, same document] exp(decay between) (phi(q_i) . phi(k_j)) v_j."""
    with without_autocast(problem.q_BTHD.device.type):
        return _quadratic(problem)


def _quadratic(problem: ScanProblem) -> ScanResult:
    B, T, H, _ = problem.q_BTHD.shape
    M, G = problem.k_BMGD.shape[1:3]
    R = H // G
    device = problem.q_BTHD.device
    phi_q_BTHF = apply_feature_map(problem.q_BTHD.double(), problem.feature_map)
    phi_k_BMGF = apply_feature_map(problem.k_BMGD.double(), problem.feature_map)
    v_BMGD = problem.v_BMGD.double()

    youngest_T = torch.arange(T, device=device) - problem.lag
    pairs_BTM = (torch.arange(M, device=device)[None, :] <= youngest_T[:, None]).expand(B, T, M)
    mine_BT = torch.ones(B, T, dtype=torch.bool, device=device)
    if problem.query_document_BT is not None:
        assert problem.key_document_BM is not None
        assert problem.carried_document_B is not None
        pairs_BTM = pairs_BTM & (problem.query_document_BT[:, :, None] == problem.key_document_BM[:, None, :])
        mine_BT = problem.query_document_BT == problem.carried_document_B[:, None]

    weight_BGTM = pairs_BTM[:, None].double().expand(B, G, T, M)
    total_BGT = v_BMGD.new_zeros(B, G, T)
    if problem.decay_BMG is not None:
        decay_BGM = problem.decay_BMG.double().transpose(1, 2)
        # All that a query's state has been decayed by since its document (or this call) began ...
        total_BGT = torch.einsum("btm,bgm->bgt", pairs_BTM.double(), decay_BGM)
        # ... less what came up to key j: the decay between the pair.
        upto_BGTM = torch.where(pairs_BTM[:, None], decay_BGM[:, :, None, :], 0.0).cumsum(-1)
        between_BGTM = (total_BGT[..., None] - upto_BGTM).masked_fill(~pairs_BTM[:, None], -torch.inf)
        weight_BGTM = between_BGTM.exp()

    scores_BHTM = torch.einsum("bthf,bmhf->bhtm", phi_q_BTHF, phi_k_BMGF.repeat_interleave(R, dim=2))
    scores_BHTM = scores_BHTM * weight_BGTM.repeat_interleave(R, dim=1)
    o_BTHD = torch.einsum("bhtm,bmhd->bthd", scores_BHTM, v_BMGD.repeat_interleave(R, dim=2))
    last_BGFD = torch.einsum("bgm,bmgf,bmgd->bgfd", weight_BGTM[:, :, -1], phi_k_BMGF, v_BMGD)

    carried_BGFD = _double(problem.carried_BGFD)
    if carried_BGFD is not None:
        factor_BGT = torch.where(mine_BT[:, None], total_BGT.exp(), 0.0)
        read_BTHD = torch.einsum("bthf,bhfd->bthd", phi_q_BTHF, carried_BGFD.repeat_interleave(R, dim=1))
        o_BTHD = o_BTHD + factor_BGT.repeat_interleave(R, dim=1).transpose(1, 2)[..., None] * read_BTHD
        last_BGFD = last_BGFD + factor_BGT[:, :, -1, None, None] * carried_BGFD

    start_BXFD, log_decay_BG = _double(problem.start_BXFD), None
    if start_BXFD is not None:
        log_decay_BGT = total_BGT
        if problem.start_log_decay_BG is not None:
            log_decay_BGT = total_BGT + mine_BT[:, None] * problem.start_log_decay_BG[:, :, None]
        start_BHFD = start_BXFD.repeat_interleave(H // start_BXFD.shape[1], dim=1)
        factor_BTH = log_decay_BGT.exp().repeat_interleave(R, dim=1).transpose(1, 2)
        o_BTHD = o_BTHD + factor_BTH[..., None] * torch.einsum("bthf,bhfd->bthd", phi_q_BTHF, start_BHFD)
        log_decay_BG = log_decay_BGT[:, :, -1]
    return _finish(problem, o_BTHD, last_BGFD, log_decay_BG)


def residual_linear_attention_quadratic(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: int | None,
    feature_map: FeatureMap | str = FeatureMap.SOFTMAX,
    decay: Tensor | None = None,
    document_ids: Tensor | None = None,
    initial_state: Tensor | ResidualState | None = None,
) -> Tensor:
    """`residual_linear_attention` by its pairs, in float64: quadratic in T, finite decay only. For tests and demos."""
    feature_map = parse_feature_map(feature_map)
    options = {"window": window, "feature_map": feature_map, "initial_state": initial_state}
    validate(q, k, v, decay=decay, document_ids=document_ids, **options)  # type: ignore[arg-type]
    return quadratic(begin(q, k, v, decay_BTG=decay, document_BT=document_ids, **options)).o_BTHD  # type: ignore[arg-type]
