"""Losses by position and by bigram against loops over tokens, and what a run writes of them."""

from __future__ import annotations

import json
import math
from collections import defaultdict

import pytest
import torch
import torch.nn.functional as F
from torchtitan.components.loss import IGNORE_INDEX, ChunkedLossWrapper, CrossEntropyLoss

from flexrattn import evaluation
from flexrattn.config_registry import rattention
from flexrattn.evaluation import GROUPS, LossTally, PerTokenLoss, bigram_distance, position_bins
from tests.flexrattn.runs import losses, train, write_config


def random_batch(seed: int, *, batch: int = 3, tokens: int = 61, vocabulary: int = 3):
    """Packed rows of few different tokens, so that bigrams recur at all distances and across documents' borders."""
    generator = torch.Generator().manual_seed(seed)
    stream = torch.randint(0, vocabulary, (batch, tokens + 1), generator=generator)
    positions = torch.zeros(batch, tokens, dtype=torch.int64)
    for b in range(batch):
        start = 0
        for t in range(tokens):
            if t == 0 or torch.rand((), generator=generator) < 0.06:
                start = t
            positions[b, t] = t - start
    labels = stream[:, 1:].clone()
    # A document's last label is its own next token, not the next document's first.
    borders = F.pad(positions[:, 1:] == 0, (0, 1))
    labels[borders] = torch.randint(0, vocabulary, labels.shape, generator=generator)[borders]
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = IGNORE_INDEX
    return stream[:, :-1], labels, positions


def distance_by_loop(inputs, labels, positions) -> list[list[int]]:
    """For each t the youngest s < t of its document with the same pair of tokens."""
    found = []
    for row, label, position in zip(inputs.tolist(), labels.tolist(), positions.tolist(), strict=True):

        def second(t, row=row, label=label, position=position):
            if label[t] != IGNORE_INDEX:
                return label[t]
            return row[t + 1] if t + 1 < len(row) and position[t + 1] != 0 else None

        distances = []
        for t in range(len(row)):
            start = t - position[t]
            earlier = [s for s in range(start, t) if row[s] == row[t] and second(s) == second(t) is not None]
            distances.append(t - earlier[-1] if earlier else 0)
        found.append(distances)
    return found


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("vocabulary", [2, 7])
def test_bigram_distance_is_the_loops(seed, vocabulary):
    batch = random_batch(seed, vocabulary=vocabulary)
    assert bigram_distance(*batch).tolist() == distance_by_loop(*batch)


def test_bigrams_of_large_ids():
    """Pairs that a key of 32 bits would confuse, and one token alone."""
    big = 2**31 - 1
    inputs = torch.tensor([[big, 0, big, 1, big, 0]])
    labels = torch.tensor([[0, big, 1, big, 0, 5]])
    positions = torch.arange(6)[None]
    assert bigram_distance(inputs, labels, positions).tolist() == [[0, 0, 0, 0, 4, 0]]
    colliding = torch.tensor([[0, 1]]), torch.tensor([[2**30, 0]])
    assert bigram_distance(*colliding, torch.arange(2)[None]).tolist() == [[0, 0]]
    one = torch.zeros(1, 1, dtype=torch.int64)
    assert bigram_distance(one, one, one).tolist() == [[0]]


@pytest.mark.parametrize("window", [0, 5, 12, 200])
def test_tally_is_the_loops(window):
    seq_len = 61
    tally = LossTally(seq_len=seq_len, reference_window=window, device="cpu")
    sums = defaultdict(lambda: [0.0, 0])
    rows = []
    for seed in range(3):
        inputs, labels, positions = random_batch(seed)
        loss = torch.rand(labels.shape, generator=torch.Generator().manual_seed(seed))
        # What is not counted may hold anything.
        loss[labels == IGNORE_INDEX] = math.nan
        tally.add(inputs, labels, positions, loss)
        distances = distance_by_loop(inputs, labels, positions)
        for b in range(len(inputs)):
            rows.append([0.0, 0])
            for t in range(seq_len):
                if labels[b, t] == IGNORE_INDEX:
                    continue
                p, d = int(positions[b, t]), distances[b][t]
                where = ["all", p, "in_window" if p <= window else "beyond_window"]
                where.append("no_bigram" if d == 0 else "bigram_in_window" if d <= window else "bigram_beyond_window")
                for key in where:
                    sums[key][0] += float(loss[b, t])
                    sums[key][1] += 1
                rows[-1][0] += float(loss[b, t])
                rows[-1][1] += 1
    result = tally.result(step=7, tokens=700)
    assert list(result) == [
        "step", "tokens", "loss", "n_tokens", "by_position", "groups", "reference_window", "rows",
    ]  # fmt: skip
    assert (result["step"], result["tokens"], result["reference_window"]) == (7, 700, window)
    assert result["n_tokens"] == sums["all"][1]
    assert result["loss"] == pytest.approx(sums["all"][0] / sums["all"][1], rel=1e-12)
    assert list(result["groups"]) == list(GROUPS)
    for name in GROUPS:
        total, n = sums[name]
        assert result["groups"][name]["n"] == n
        assert result["groups"][name]["loss"] == (pytest.approx(total / n, rel=1e-12) if n else None)
    assert [n for _, n in result["rows"]] == [n for _, n in rows]
    assert [total for total, _ in result["rows"]] == pytest.approx([total for total, _ in rows], rel=1e-12)
    for each in result["by_position"]:
        inside = [sums[p] for p in range(each["from"], each["to"] + 1) if p in sums]
        n = sum(count for _, count in inside)
        assert each["n"] == n
        assert each["loss"] == (pytest.approx(sum(total for total, _ in inside) / n, rel=1e-12) if n else None)
    assert json.loads(json.dumps(result)) == result


@pytest.mark.parametrize(("seq_len", "window"), [(1, 0), (17, 512), (1024, 128), (1024, 100), (1025, 1024), (64, 0)])
def test_bins_cover_every_position_once_and_none_straddles_the_window(seq_len, window):
    bins = position_bins(seq_len, window)
    assert [p for first, last in bins for p in range(first, last + 1)] == list(range(seq_len))
    assert not any(first <= window < last for first, last in bins)


def test_one_line_and_scalars_leave_out_what_is_empty():
    tally = LossTally(seq_len=4, reference_window=9, device="cpu")
    tally.add(torch.tensor([[1, 2, 1, 2]]), torch.tensor([[2, 1, 2, 3]]), torch.arange(4)[None], torch.ones(1, 4))
    result = tally.result(step=0, tokens=0)
    assert evaluation.log_line(result) == (
        "loss at window 9: in 1.0000, beyond -; bigram beyond -, in 1.0000, new 1.0000"
    )
    assert evaluation.scalars(result) == {
        "loss_by_bigram_and_window/in_window": 1.0,
        "loss_by_bigram_and_window/bigram_in_window": 1.0,
        "loss_by_bigram_and_window/no_bigram": 1.0,
        "loss_by_position/0-3": 1.0,
    }


@pytest.mark.parametrize("chunks", [1, 4])
def test_token_losses_sum_to_torchtitans(chunks):
    """Whole logits, or those of a quarter of the sequence at a time: the same sum, and the tokens in their order."""
    torch.manual_seed(0)
    hidden, labels = torch.randn(2, 8, 16), torch.randint(0, 11, (2, 8))
    labels[0, 3] = IGNORE_INDEX
    head = torch.nn.Linear(16, 11)
    loss_fn = CrossEntropyLoss.Config(global_vocab_size=11).build()
    pred = head(hidden)
    if chunks > 1:
        loss_fn = ChunkedLossWrapper.Config(num_chunks=chunks, loss_fn=CrossEntropyLoss.Config()).build()
        loss_fn.set_lm_head(head)
        pred = hidden
    inner = getattr(loss_fn, "loss_fn", None)
    seen: list[torch.Tensor] = []
    with torch.no_grad():
        total, _ = PerTokenLoss(loss_fn, seen.append)(pred, labels)
        expected, _ = loss_fn(pred, labels)
        log_p = head(hidden).double().log_softmax(-1)
    assert total == pytest.approx(float(expected), rel=1e-6)
    assert getattr(loss_fn, "loss_fn", None) is inner
    by_hand = -log_p.gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert torch.allclose(seen[0].double(), torch.where(labels == IGNORE_INDEX, 0.0, by_hand), atol=1e-6)
    assert PerTokenLoss.takes(loss_fn)
    assert not PerTokenLoss.takes(object())


def test_bad_reference_window():
    for window in (-1, True, 1.5):
        with pytest.raises(ValueError, match=r"reference_window must be an integer >= 0"):
            LossTally(seq_len=4, reference_window=window, device="cpu")


def test_reference_window_is_the_layers_unless_given():
    for arguments, window in (
        ({"window": 8}, 8),
        ({"window": None}, 512),
        ({"layer_kind": "full", "window": None}, 512),
        ({"window": 8, "reference_window": 3}, 3),
    ):
        assert rattention(**arguments).validator.reference_window == window
    with pytest.raises(ValueError, match=r"reference_window must be an integer >= 0 .* got -1"):
        rattention(reference_window=-1)


VALIDATED = {
    # Wider than the layers' window: the same for arms with other windows.
    "recipe_args": {"reference_window": 24},
    "training": {"steps": 4},
    "validator": {
        "enable": True,
        "freq": 100,
        "steps": 3,
        "dataloader": {"shard_by": "rows", "validation_fraction": 0.5},
    },
    "checkpoint": {"enable": False},
}


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_rank")
    done = train(write_config(folder, **VALIDATED))
    return folder / "out", done.output


def test_run_writes_what_it_measured(one_rank):
    out, log = one_rank
    result = json.loads((out / "eval.json").read_text())
    assert (result["step"], result["tokens"]) == (4, 4 * 4 * 64)
    assert result["reference_window"] == 24
    assert len(result["rows"]) == 3 * 4
    assert sum(n for _, n in result["rows"]) == result["n_tokens"]
    assert result["loss"] == pytest.approx(losses(out, "validation_metrics/loss")[4], rel=1e-6)
    groups = result["groups"]
    assert groups["in_window"]["n"] + groups["beyond_window"]["n"] == result["n_tokens"]
    assert sum(groups[name]["n"] for name in GROUPS[2:]) == result["n_tokens"]
    assert all(groups[name]["n"] for name in GROUPS)
    assert f"validate step:  4  {evaluation.log_line(result)}" in log
    for tag, loss in evaluation.scalars(result).items():
        found = losses(out, tag)
        assert list(found) == [0, 4]
        assert found[4] == pytest.approx(loss, rel=1e-6)
    assert [path.name for path in out.glob("*eval.json*")] == ["eval.json"]


@pytest.mark.parametrize(
    ("ranks", "flags"),
    [
        pytest.param(2, ["--training.local_batch_size", "2"], id="fsdp-2"),
        pytest.param(2, ["--parallelism.tensor_parallel_degree", "2"], id="tp-2"),
        pytest.param(
            2,
            ["--parallelism.tensor_parallel_degree", "2", "--parallelism.spmd_backend", "partial_dtensor",
             "--recipe_args.loss", "chunked"],
            id="tp-2-dtensor-chunked",
        ),
    ],
)  # fmt: skip
def test_ranks_measure_the_same(one_rank, tmp_path, ranks, flags):
    """Sums over data-parallel ranks, rows in the stream's order, and a vocabulary that is split."""
    expected = json.loads((one_rank[0] / "eval.json").read_text())
    train(write_config(tmp_path, **VALIDATED), *flags, ranks=ranks)
    result = json.loads((tmp_path / "out/eval.json").read_text())
    assert result["n_tokens"] == expected["n_tokens"]
    assert [n for _, n in result["rows"]] == [n for _, n in expected["rows"]]
    for (actual, _), (wanted, _) in zip(result["rows"], expected["rows"], strict=True):
        assert actual == pytest.approx(wanted, rel=1e-4)
    for name in GROUPS:
        assert result["groups"][name]["n"] == expected["groups"][name]["n"]
        assert result["groups"][name]["loss"] == pytest.approx(expected["groups"][name]["loss"], rel=1e-4)
