"""Loss where it matters: by position, and on tokens that a layer could only copy from beyond its window.

The token behind position t completes the bigram (x_t, x_{t+1}). Where the same bigram stands earlier in the document,
the model can look its second token up; at what distance tells who can: a window of w keys, or only what reads past it
(associative recall; Zoology, arXiv 2312.04927, finds most of the gap between models on such tokens).

    in_window              t <= w: the whole document so far is within the window
    beyond_window          t > w
    bigram_in_window       the bigram was last seen at most w tokens ago
    bigram_beyond_window   it was last seen more than w tokens ago, so every earlier occurrence is
    no_bigram              it was not seen before in its document

t counts from the beginning of the document, w is the *reference window*: it says how tokens are sorted and not what a
model's layers see, so that all arms of a study are judged on the same tokens.
Shapes: B rows, T tokens of a row.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard
from torchtitan.components import loss as titan_loss
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.distributed import utils as dist_utils
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size

from flexrattn.packing import document_ids_from_positions

EVAL_FILE = "eval.json"
DEFAULT_REFERENCE_WINDOW = 512
GROUPS = ("in_window", "beyond_window", "bigram_beyond_window", "bigram_in_window", "no_bigram")
_FIRST_BIN = 16


def bigram_distance(input_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor) -> Tensor:
    """How many tokens ago the bigram (input_t, label_t) was last seen in its document: (B, T), int64, 0 for never.

    A label that no loss counts (IGNORE_INDEX) stands for the next input of the document; where there is none, the pair
    is no bigram: nothing matches it, and its distance is 0. One sort, no T x T, no host sync.
    """
    following_BT = torch.where(positions_BT[:, 1:] != 0, input_BT[:, 1:], -1)
    following_BT = F.pad(following_BT, (0, 1), value=-1)
    second_BT = torch.where(labels_BT == IGNORE_INDEX, following_BT, labels_BT).long()
    key_BT = (input_BT.long() << 32) + second_BT
    key_BT = torch.where(second_BT < 0, -1, key_BT)
    # Stable: equal bigrams stay in the order of the row, so the one before is the last earlier one. Documents are
    # runs of a row, so if that one is of another document, none of this one is earlier.
    sorted_BT, order_BT = torch.sort(key_BT, dim=-1, stable=True)
    document_BT = document_ids_from_positions(positions_BT).gather(1, order_BT)
    again = (sorted_BT[:, 1:] == sorted_BT[:, :-1]) & (document_BT[:, 1:] == document_BT[:, :-1])
    again &= sorted_BT[:, 1:] >= 0
    distance = F.pad(torch.where(again, order_BT[:, 1:] - order_BT[:, :-1], 0), (1, 0))
    return torch.zeros_like(order_BT).scatter_(1, order_BT, distance)


def position_bins(seq_len: int, reference_window: int) -> list[tuple[int, int]]:
    """Bins (first, last), both included, over positions 0 to seq_len - 1: doubling in width, none across the window."""
    ends = {reference_window, seq_len - 1}
    end = _FIRST_BIN
    while end < seq_len:
        ends.add(end)
        end *= 2
    ordered = sorted(end for end in ends if end < seq_len)
    starts = [0, *(end + 1 for end in ordered[:-1])]
    return list(zip(starts, ordered, strict=True))


class LossTally:
    """Sums of token losses by group, bin and row, on the device; the host waits once, in `result`.

    Sums are float64, in an order that does not depend on chance: the same losses give the same bits.
    """

    def __init__(self, *, seq_len: int, reference_window: int, device: torch.device | str):
        self.reference_window = check_reference_window(reference_window)
        self.bins = position_bins(seq_len, reference_window)
        # Row 0 counts all tokens. Columns: sum of losses, number of tokens.
        self.sums_K2 = torch.zeros(1 + len(GROUPS) + len(self.bins), 2, dtype=torch.float64, device=device)
        self.rows: list[Tensor] = []

    @torch.no_grad()
    def add(self, input_BT: Tensor, labels_BT: Tensor, positions_BT: Tensor, loss_BT: Tensor) -> None:
        """Token losses of one batch; where the label is IGNORE_INDEX they are not looked at."""
        window = self.reference_window
        counted_BT = labels_BT != IGNORE_INDEX
        distance_BT = bigram_distance(input_BT, labels_BT, positions_BT)
        groups = [
            positions_BT <= window,
            positions_BT > window,
            distance_BT > window,
            (distance_BT > 0) & (distance_BT <= window),
            distance_BT == 0,
        ]
        bins = [(positions_BT >= first) & (positions_BT <= last) for first, last in self.bins]
        loss_BT = torch.where(counted_BT, loss_BT.double(), 0.0)
        pairs_BT2 = torch.stack((loss_BT, counted_BT.double()), -1)
        masks_KBT = torch.stack([torch.ones_like(counted_BT), *groups, *bins]).double()
        self.sums_K2 += masks_KBT.flatten(1) @ pairs_BT2.flatten(0, 1)
        self.rows.append(pairs_BT2.sum(1))

    def result(self, *, step: int | None, tokens: int | None, group: dist.ProcessGroup | None = None) -> dict[str, Any]:
        """What eval.json holds, over the ranks of `group`; the mean of an empty group is None.

        Rows are in the order of the stream: step after step, and in a step the b-th rows of all ranks before the next
        ones, as `shard_by: rows` deals them.
        """
        sums_K2, rows_SBR2 = self.sums_K2.clone(), torch.stack(self.rows)[:, :, None]
        if group is not None and dist.get_world_size(group) > 1:
            dist.all_reduce(sums_K2, group=group)
            of_ranks = [torch.empty_like(rows_SBR2) for _ in range(dist.get_world_size(group))]
            dist.all_gather(of_ranks, rows_SBR2.contiguous(), group=group)
            rows_SBR2 = torch.cat(of_ranks, 2)
        sums = [(loss, round(n)) for loss, n in sums_K2.tolist()]
        means = [{"loss": loss / n if n else None, "n": n} for loss, n in sums]
        groups, bins = means[1 : 1 + len(GROUPS)], means[1 + len(GROUPS) :]
        return {
            "step": step,
            "tokens": tokens,
            "loss": means[0]["loss"],
            "n_tokens": means[0]["n"],
            "by_position": [
                {"from": first, "to": last, **mean} for (first, last), mean in zip(self.bins, bins, strict=True)
            ],
            "groups": dict(zip(GROUPS, groups, strict=True)),
            "reference_window": self.reference_window,
            "rows": [[loss, round(n)] for loss, n in rows_SBR2.flatten(0, 2).tolist()],
        }


def check_reference_window(window: object) -> int:
    if isinstance(window, bool) or not isinstance(window, int) or window < 0:
        raise ValueError(f"reference_window must be an integer >= 0 (tokens), got {window!r}")
    return window


def default_reference_window(window: int | None) -> int:
    """The layers' window, or 512 where they have none."""
    return DEFAULT_REFERENCE_WINDOW if window is None else window


def log_line(result: dict[str, Any]) -> str:
    """ "loss at window 128: in 2.711, beyond 2.402; bigram beyond 0.913, in 0.705, new 4.120": "-" where nothing is."""

    def mean(group: str) -> str:
        loss = result["groups"][group]["loss"]
        return "-" if loss is None else f"{loss:.4f}"

    return (
        f"loss at window {result['reference_window']}: in {mean('in_window')}, beyond {mean('beyond_window')}; "
        f"bigram beyond {mean('bigram_beyond_window')}, in {mean('bigram_in_window')}, new {mean('no_bigram')}"
    )


def scalars(result: dict[str, Any]) -> dict[str, float]:
    """TensorBoard's tags and numbers, without those of empty groups."""
    named = {f"loss_by_bigram_and_window/{name}": group["loss"] for name, group in result["groups"].items()}
    named |= {f"loss_by_position/{each['from']}-{each['to']}": each["loss"] for each in result["by_position"]}
    return {name: loss for name, loss in named.items() if loss is not None}


def write_json(path: str | Path, value: Any) -> None:
    """Whole or not at all: a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}")
    half.write_text(json.dumps(value, allow_nan=True))
    half.replace(path)


def per_token_cross_entropy(pred_BTV: Tensor, labels_BT: Tensor, *, vocab_size: int | None) -> Tensor:
    """(B, T), fp32, 0 where the label is IGNORE_INDEX: the terms of torchtitan's cross entropy, also where tensor
    parallelism has split the vocabulary. `vocab_size`: the whole vocabulary's."""
    group = None
    if isinstance(pred_BTV, DTensor):
        if pred_BTV.placements == (Shard(pred_BTV.ndim - 1),):
            group, vocab_size = pred_BTV.device_mesh.get_group("tp"), pred_BTV.shape[-1]
            pred_BTV = pred_BTV.to_local()
        else:
            pred_BTV = pred_BTV.full_tensor()
    elif dist_utils.get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
        group = current_spmd_mesh().get_group("tp")
    # A row at a time: the fp32 copy of the logits is that of one row.
    rows = []
    for pred_TV, labels_T in zip(pred_BTV, labels_BT, strict=True):
        if group is None:
            loss_T = F.cross_entropy(pred_TV.float(), labels_T, reduction="none", ignore_index=IGNORE_INDEX)
        else:
            assert vocab_size is not None
            loss_T = titan_loss._LossParallelCrossEntropy.apply(pred_TV.float(), labels_T, group, vocab_size, "none")
        rows.append(loss_T)
    return torch.stack(rows)


class PerTokenLoss:
    """In place of a run's loss while it validates: the same sum, with every token's loss (B, T) given to `seen`."""

    def __init__(self, loss_fn: Any, seen: Callable[[Tensor], None]):
        self.loss_fn, self.seen = loss_fn, seen

    @staticmethod
    def takes(loss_fn: Any) -> bool:
        inner = loss_fn.loss_fn if isinstance(loss_fn, ChunkedLossWrapper) else loss_fn
        return isinstance(inner, CrossEntropyLoss)

    def __call__(self, pred: Tensor, labels_BT: Tensor, *unused: Any, **options: Any) -> tuple[Tensor, dict]:
        parts: list[Tensor] = []
        whole = self.loss_fn
        inner = whole.loss_fn if isinstance(whole, ChunkedLossWrapper) else whole

        def of_tokens(pred: Tensor, labels_BT: Tensor, *unused: Any, **options: Any) -> tuple[Tensor, dict]:
            parts.append(per_token_cross_entropy(pred, labels_BT, vocab_size=inner.global_vocab_size))
            return parts[-1].sum(), {}

        if isinstance(whole, ChunkedLossWrapper):
            # It makes the logits of a piece of the sequence at a time, and asks its inner loss about them.
            whole.loss_fn = of_tokens
            try:
                total, metrics = whole(pred, labels_BT)
            finally:
                whole.loss_fn = inner
        else:
            total, metrics = of_tokens(pred, labels_BT)
        self.seen(torch.cat(parts, 1))
        return total, metrics
