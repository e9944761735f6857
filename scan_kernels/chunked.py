"""`impl="torch"`: chunks of C tokens, linear time and memory in T, fp32 throughout, gradients by autograd.

Inside a chunk the pairs are computed as a masked C x C product; everything older comes through a state per chunk. The
shift is a row offset of the keys: row i of the shifted keys is key i - lag, the youngest one that query i reads, so
that the rest is plain causal linear attention. Rows without a key hold v = 0 (phi(0) is not 0).

Letters (README.md): B batch, T tokens, M keys, H query heads, G KV heads, R = H/G, N chunks, C chunk length, D width,
F features, S = R * C.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from scan_kernels.feature_maps import apply_feature_map
from scan_kernels.ops import chunk_state_scan
from scan_kernels.precision import accumulation_dtype, without_autocast
from scan_kernels.state import ScanProblem, ScanResult

CHUNK = 64
# exp(-100) is 0 beside any fp32 sum, and a finite bound keeps differences of cumulative decays defined for -inf.
SMALLEST_LOG_DECAY = -100.0


def chunked(problem: ScanProblem, chunk: int = CHUNK) -> ScanResult:
    with without_autocast(problem.q_BTHD.device.type):
        return _chunked(problem, chunk)


def _chunked(problem: ScanProblem, chunk: int) -> ScanResult:
    B, T, H, _ = problem.q_BTHD.shape
    G, Dv = problem.v_BMGD.shape[2:]
    R, C = H // G, min(chunk, T)
    N = -(-T // C)
    fill = N * C - T
    fp32 = accumulation_dtype(problem.q_BTHD.dtype)

    q_BNCGRD = nnf.pad(problem.q_BTHD, (0, 0, 0, 0, 0, fill)).view(B, N, C, G, R, -1)
    phi_q_BGNRCF = apply_feature_map(q_BNCGRD.permute(0, 3, 1, 4, 2, 5), problem.feature_map)
    rows_BGNSF = phi_q_BGNRCF.flatten(3, 4)  # S = R * C: the group's heads share keys, so they share a product
    k_BNCGD = _shifted_keys(problem.k_BMGD, problem.lag, T, fill).unflatten(1, (N, C))
    v_BNCGD = _shifted_keys(problem.v_BMGD, problem.lag, T, fill).unflatten(1, (N, C))
    phi_k_BGNCF = apply_feature_map(k_BNCGD.permute(0, 3, 1, 2, 4), problem.feature_map)
    v_BGNCD = v_BNCGD.permute(0, 3, 1, 2, 4).to(fp32)
    decay_BGT = cumulative_BGNC = None
    if problem.decay_BMG is not None:
        # float64: at the end of a chunk of strong decays, fp32 differences of neighbours would keep four digits.
        decay_fp64 = problem.decay_BMG.double().clamp(min=SMALLEST_LOG_DECAY)
        decay_BGT = _shifted_keys(decay_fp64, problem.lag, T, fill).transpose(1, 2)
        cumulative_BGNC = decay_BGT.unflatten(2, (N, C)).cumsum(-1)
    documents = None if problem.query_document_BT is None else _ChunkDocuments(problem, T, N, C, fill)

    # Pairs inside the chunk.
    pairs_CC = torch.ones(C, C, dtype=torch.bool, device=v_BGNCD.device).tril()
    pairs = pairs_CC if documents is None else pairs_CC & documents.same_B1N1CC()
    o_BGNRCD = _within_chunks(rows_BGNSF, phi_k_BGNCF, v_BGNCD, pairs, cumulative_BGNC).unflatten(3, (R, C))

    # One state per chunk: the keys before it, of the document that runs into it.
    update_k_BGNCF, update_v_BGNCD, factor_BGN = phi_k_BGNCF, v_BGNCD, None
    if cumulative_BGNC is not None:
        total_BGN1 = cumulative_BGNC[..., -1:]
        update_v_BGNCD = v_BGNCD * (total_BGN1 - cumulative_BGNC).exp().to(fp32)[..., None]
        factor_BGN = total_BGN1[..., 0].exp().to(fp32)
    if documents is not None:
        update_k_BGNCF = torch.where(documents.runs_on_B1NC1, update_k_BGNCF, 0.0)
        update_v_BGNCD = torch.where(documents.runs_on_B1NC1, update_v_BGNCD, 0.0)
        ones = phi_k_BGNCF.new_ones(B, G, N) if factor_BGN is None else factor_BGN
        factor_BGN = torch.where(documents.keeps_B1N, ones, 0.0)
    first_BGFD = problem.carried_BGFD
    if first_BGFD is None:
        first_BGFD = phi_k_BGNCF.new_zeros(B, G, phi_k_BGNCF.shape[-1], Dv)
    states = chunk_state_scan(update_k_BGNCF.mT @ update_v_BGNCD, first_BGFD.to(fp32), factor_BGN)
    if documents is None:
        older_BGNRCD = (rows_BGNSF @ states[:, :, :-1]).unflatten(3, (R, C))
    else:
        # Masked before and after: neither the product nor its gradient may see another document's NaN.
        reads = documents.reads_state_B1N1C1
        own_BGNRCF = torch.where(reads, phi_q_BGNRCF, 0.0)
        older_BGNRCD = (own_BGNRCF.flatten(3, 4) @ states[:, :, :-1]).unflatten(3, (R, C))
        older_BGNRCD = torch.where(reads, older_BGNRCD, 0.0)
    if cumulative_BGNC is not None:
        older_BGNRCD = older_BGNRCD * cumulative_BGNC.exp().to(fp32)[:, :, :, None, :, None]
    o_BGNRCD = o_BGNRCD + older_BGNRCD

    final_log_decay_BG = None
    if problem.start_BXFD is not None:
        log_decay_BGT = start_log_decay(problem, decay_BGT, documents)
        final_log_decay_BG = log_decay_BGT[..., T - 1]
        start_BGXFD = problem.start_BXFD.to(fp32).unflatten(1, (G, -1)).expand(B, G, R, -1, Dv)
        start_BGNRCD = torch.einsum("bgnrcf,bgrfd->bgnrcd", phi_q_BGNRCF, start_BGXFD)
        if decay_BGT is not None:
            start_BGNRCD = start_BGNRCD * log_decay_BGT.exp().to(fp32).view(B, G, N, 1, C, 1)
        o_BGNRCD = o_BGNRCD + start_BGNRCD

    o_BTHD = o_BGNRCD.permute(0, 2, 4, 1, 3, 5).reshape(B, N * C, H, Dv)[:, :T]
    final_BGFD = states[:, :, -1]
    if documents is not None:
        final_BGFD = torch.where(documents.ends_running_B111, final_BGFD, 0.0)
    return ScanResult(o_BTHD.to(problem.q_BTHD.dtype).contiguous(), final_BGFD.contiguous(), final_log_decay_BG)


def _shifted_keys(x_BM: Tensor, lag: int, T: int, fill: int) -> Tensor:
    """Row i is key i - lag (zero where there is none), T rows and `fill` rows of zeros."""
    old_enough = max(T - lag, 0)
    sides = (0, 0) * (x_BM.dim() - 2) + (T - old_enough, fill)
    return nnf.pad(x_BM[:, :old_enough], sides)


def _within_chunks(
    rows_BGNSF: Tensor, phi_k_BGNCF: Tensor, v_BGNCD: Tensor, pairs: Tensor, cumulative_BGNC: Tensor | None
) -> Tensor:
    C = phi_k_BGNCF.shape[3]
    # A masked score is 0, but 0 * NaN is NaN. So keys that are not finite leave the products, and mark with NaN the
    # scores of the queries that may read them.
    finite_BGNC = torch.isfinite(phi_k_BGNCF).all(-1) & torch.isfinite(v_BGNCD).all(-1)
    phi_k_BGNCF = torch.where(finite_BGNC[..., None], phi_k_BGNCF, 0.0)
    v_BGNCD = torch.where(finite_BGNC[..., None], v_BGNCD, 0.0)
    mark_BGN11C = torch.where(finite_BGNC, 0.0, torch.nan).to(v_BGNCD.dtype)[:, :, :, None, None, :]
    scores_BGNRCC = (rows_BGNSF @ phi_k_BGNCF.mT).unflatten(3, (-1, C)) + mark_BGN11C
    if cumulative_BGNC is not None:
        between_BGNCC = cumulative_BGNC[..., :, None] - cumulative_BGNC[..., None, :]
        between_BGN1CC = between_BGNCC[:, :, :, None].to(v_BGNCD.dtype).masked_fill(~pairs, -torch.inf)
        scores_BGNRCC = scores_BGNRCC * between_BGN1CC.exp()
    return torch.where(pairs, scores_BGNRCC, 0.0).flatten(3, 4) @ v_BGNCD


class _ChunkDocuments:
    """Who may read what, per chunk. Rows without a key take a neighbour's id: their v is 0."""

    def __init__(self, problem: ScanProblem, T: int, N: int, C: int, fill: int) -> None:
        query_BT, key_BM = problem.query_document_BT, problem.key_document_BM
        carried_B = problem.carried_document_B
        assert query_BT is not None
        assert key_BM is not None
        assert carried_B is not None
        B = query_BT.shape[0]
        old_enough = max(T - problem.lag, 0)
        key_BT = torch.cat((key_BM[:, :1].expand(B, T - old_enough), key_BM[:, :old_enough]), dim=1)
        self.query_BT = torch.cat((query_BT, query_BT[:, -1:].expand(B, fill)), dim=1)
        self.key_BT = torch.cat((key_BT, key_BT[:, -1:].expand(B, fill)), dim=1)
        self.carried_B = carried_B
        self.query_BNC = query_BNC = self.query_BT.unflatten(1, (N, C))
        self.key_BNC = key_BNC = self.key_BT.unflatten(1, (N, C))
        # The document of the state at each border: before the first chunk, and behind every chunk.
        border_BN1 = torch.cat((carried_B[:, None], key_BNC[:, :, -1]), dim=1)
        before_BN, behind_BN = border_BN1[:, :-1], border_BN1[:, 1:]
        self.reads_state_B1N1C1 = (query_BNC == before_BN[:, :, None])[:, None, :, None, :, None]
        self.runs_on_B1NC1 = (key_BNC == behind_BN[:, :, None])[:, None, :, :, None]
        self.keeps_B1N = (before_BN == behind_BN)[:, None]
        self.ends_running_B111 = (behind_BN[:, -1] == query_BT[:, -1])[:, None, None, None]

    def same_B1N1CC(self) -> Tensor:
        """Pairs of one document. Made on demand: the fused scan takes all rows as one chunk and needs no pairs."""
        return (self.query_BNC[:, :, :, None] == self.key_BNC[:, :, None, :])[:, None, :, None]


def start_log_decay(problem: ScanProblem, decay_BGT: Tensor | None, documents: _ChunkDocuments | None) -> Tensor:
    """Log of the share of the start state that query i still reads (float64): its document's decays so far.

    `decay_BGT` belongs to the shifted keys: column i is the decay of the youngest key that query i reads.
    """
    B, T, G = problem.q_BTHD.shape[0], problem.q_BTHD.shape[1], problem.v_BMGD.shape[2]
    before_BG = problem.start_log_decay_BG
    if decay_BGT is None:
        zeros = torch.zeros(B, G, T, dtype=torch.float64, device=problem.q_BTHD.device)
        return zeros if before_BG is None else zeros + before_BG[..., None]
    upto_BGT = decay_BGT.cumsum(-1)
    if documents is None:
        return upto_BGT if before_BG is None else upto_BGT + before_BG[..., None]
    key_BT, query_BT = documents.key_BT, documents.query_BT
    begins_BT = torch.cat((torch.ones_like(key_BT[:, :1], dtype=torch.bool), key_BT[:, 1:] != key_BT[:, :-1]), dim=1)
    position_T = torch.arange(key_BT.shape[1], device=key_BT.device)
    first_BT = torch.where(begins_BT, position_T, 0).cummax(dim=1).values
    before_first_BGT = (upto_BGT - decay_BGT).gather(2, first_BT[:, None].expand_as(upto_BGT))
    log_decay_BGT = torch.where((key_BT == query_BT)[:, None], upto_BGT - before_first_BGT, 0.0)
    if before_BG is not None:
        runs_BT = query_BT == documents.carried_B[:, None]
        log_decay_BGT = log_decay_BGT + torch.where(runs_BT[:, None], before_BG[..., None], 0.0)
    return log_decay_BGT
