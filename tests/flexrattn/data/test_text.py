"""The stream: each document once, whatever deals it; a resumed stream is the uninterrupted one, bit for bit."""

import itertools
import re
from collections import Counter

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torchtitan.components.loss import IGNORE_INDEX

from flexrattn.data.text import TextDataLoader, check_saved_dp_degree
from flexrattn.data.tokenizer import ByteTokenizer
from flexrattn.packing import document_ids_from_positions

T, B = 32, 2
BOS, EOS = ByteTokenizer.bos_id, 257
WORKERS = [0, 1, 2, 3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """24 documents of 3 to 200 tokens, so that rows hold several documents and documents several rows."""
    root = tmp_path_factory.mktemp("corpus")
    for i in range(24):
        (root / f"{i:02}.txt").write_text("".join(chr(97 + (i * 7 + j * j) % 26) for j in range(1 + (i * 53) % 200)))
    return root


@pytest.fixture
def texts(folder):
    return [path.read_text() for path in sorted(folder.iterdir())]


def loader(folder, *, dp=1, rank=0, seq_len=T, batch=B, snapshot=1, tokenizer=None, **options):
    options = {"dataset": "local", "dataset_path": str(folder), "validation_fraction": 0.0} | options
    return TextDataLoader.Config(**options).build(
        dp_world_size=dp,
        dp_rank=rank,
        tokenizer=tokenizer or ByteTokenizer(),
        seq_len=seq_len,
        local_batch_size=batch,
        snapshot_every_n_steps=snapshot,
    )


def take(stream, count):
    return [(x["input"], x["positions"], y) for x, y in itertools.islice(stream, count)]


def assert_same(batches, others):
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))


def rows(batches):
    return [tuple(part[i] for part in batch) for batch in batches for i in range(len(batch[0]))]


def documents(stream_rows):
    """Texts in the order of the stream, from the counted (input, label) pairs; the last one may be incomplete."""
    inputs = torch.cat([x[y != IGNORE_INDEX] for x, _, y in stream_rows]).tolist()
    labels = torch.cat([y[y != IGNORE_INDEX] for _, _, y in stream_rows]).tolist()
    starts = [i for i, token in enumerate(inputs) if token == BOS] + [len(inputs)]
    found = []
    for start, stop in itertools.pairwise(starts):
        # Inside a document the label is the next input: nothing is lost or repeated at a row's border.
        assert labels[start : stop - 1] == inputs[start + 1 : stop]
        found.append(ByteTokenizer().decode(inputs[start:stop]))
    return found


def test_rows_are_what_torchtitan_expects(folder):
    batches = take(loader(folder), 40)
    for x, positions, y in batches:
        assert x.shape == positions.shape == y.shape == (B, T)
        assert x.dtype == positions.dtype == y.dtype == torch.int64
        assert (positions[:, 0] == 0).all()
        assert positions.max() < T
        # A label is the next token of the same document, or its end.
        ids = document_ids_from_positions(positions)
        inside = ids[:, :-1] == ids[:, 1:]
        assert torch.equal(y[:, :-1][inside], x[:, 1:][inside])
        assert (y[:, :-1][~inside] == EOS).all()
        assert (x[:, 1:][~inside] == BOS).all()
    assert max(int(document_ids_from_positions(p).max()) for _, p, _ in batches) > 1


@pytest.mark.parametrize(("dp", "workers"), [(1, 0), (2, 0), (1, 2), (2, 3)])
def test_documents_of_an_epoch_are_dealt_once(folder, texts, dp, workers):
    shards = dp * max(1, workers)
    epoch = []
    for rank in range(dp):
        batches = take(loader(folder, dp=dp, rank=rank, num_workers=workers), 45 * max(1, workers))
        for worker in range(max(1, workers)):
            shard = rank * max(1, workers) + worker
            own = documents(rows(batches[worker :: max(1, workers)]))
            share = len(range(shard, len(texts), shards))
            assert len(own) > share
            epoch += own[:share]
            # The second epoch follows without a gap, in another order.
    assert Counter(epoch) == Counter(texts)


@pytest.mark.parametrize(("dp", "workers"), [(1, 0), (1, 3), (2, 0), (3, 2)])
def test_a_finite_stream_is_each_document_once_in_equal_full_batches(folder, texts, dp, workers):
    ranks = [list(loader(folder, dp=dp, rank=r, num_workers=workers, infinite=False)) for r in range(dp)]
    ranks = [[(x["input"], x["positions"], y) for x, y in batches] for batches in ranks]
    assert len({len(batches) for batches in ranks}) == 1
    assert all(batch[0].shape == (B, T) for batches in ranks for batch in batches)
    assert all((batch[1][:, 0] == 0).all() for batches in ranks for batch in batches)
    dealt = [row for group in zip(*map(rows, ranks), strict=True) for row in group]
    whole = rows(take(loader(folder, infinite=False, batch=1), None))
    assert_same(dealt[: len(whole)], whole)
    assert all((y == IGNORE_INDEX).all() for _, _, y in dealt[len(whole) :])
    assert len(dealt) - len(whole) < B * dp
    # What fills a row is a document of its own: no counted token shares its attention.
    for _, positions, y in dealt:
        ids = document_ids_from_positions(positions)
        assert not set(ids[y == IGNORE_INDEX].tolist()) & set(ids[y != IGNORE_INDEX].tolist())
    assert Counter(documents(dealt)) == Counter(texts)


@pytest.mark.parametrize(("dp", "batch", "workers"), [(2, 2, 0), (4, 1, 0), (1, 4, 3), (2, 2, 2)])
def test_global_batches_by_rows_depend_on_nothing_but_their_size(folder, dp, batch, workers):
    expected = take(loader(folder, batch=4, shard_by="rows"), 30)
    ranks = [
        take(loader(folder, dp=dp, rank=r, batch=batch, num_workers=workers, shard_by="rows"), 30) for r in range(dp)
    ]
    for i, whole in enumerate(expected):
        dealt = [row for group in zip(*(rows([batches[i]]) for batches in ranks), strict=True) for row in group]
        assert_same(dealt, rows([whole]))


# A rank's epoch is about 20 batches: 15 stops inside the first, 60 in a later one and between two snapshots.
@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("shard_by", ["documents", "rows"])
def test_resume_is_the_uninterrupted_stream(folder, workers, shard_by):
    options = {"num_workers": workers, "shard_by": shard_by, "dp": 2, "rank": 1}
    expected = take(loader(folder, **options), 64)
    for stop, snapshot in [(15, 1), (60, 8)]:
        first = loader(folder, snapshot=snapshot, **options)
        assert_same(take(first, stop), expected[:stop])
        state = first.state_dict()
        # The state that is saved is the place behind the last batch handed out, however much workers read ahead.
        second = loader(folder, snapshot=snapshot, **options)
        second.load_state_dict(state)
        assert_same(take(second, 64 - stop), expected[stop:])


def test_resume_at_every_step_of_a_stream_twice(folder):
    expected = take(loader(folder), 100)
    state, places = loader(folder).state_dict(), set()
    for i in range(100):
        # Each step is taken by a loader that was just restored, from the state of one that was restored too.
        one = loader(folder)
        one.load_state_dict(state)
        assert_same(take(one, 1), expected[i : i + 1])
        state = one.state_dict()
        place = one.dataset.state_dict()
        places.add((place["epoch"], place["token"] > 0))
    assert {(0, True), (1, True), (2, True)} <= places  # inside documents, of three epochs


@pytest.mark.parametrize("workers", [0, 2, 3])
def test_resume_of_a_finite_stream(folder, workers):
    options = {"num_workers": workers, "infinite": False, "batch": 4, "dp": 2, "rank": 1}
    expected = take(loader(folder, **options), None)
    for stop in (0, 3, len(expected) - 1):
        first = loader(folder, **options)
        take(first, stop)
        second = loader(folder, **options)
        second.load_state_dict(first.state_dict())
        assert_same(take(second, None), expected[stop:])


def test_a_loader_iterated_again_begins_again(folder):
    validation = loader(folder, infinite=False)
    assert_same(take(validation, None), take(validation, None))


def test_state_survives_a_checkpoint_and_is_small(folder, tmp_path):
    first = loader(folder)
    stream = iter(first)
    take(stream, 9)
    dcp.save({"dataloader": first}, checkpoint_id=tmp_path / "step-9", no_dist=True)
    assert sum(path.stat().st_size for path in (tmp_path / "step-9").iterdir()) < 20_000
    second = loader(folder)
    dcp.load({"dataloader": second}, checkpoint_id=tmp_path / "step-9", no_dist=True)
    assert_same(take(second, 5), take(stream, 5))


def test_more_ranks_than_saved_are_refused_by_name(folder, tmp_path):
    dcp.save({"dataloader": loader(folder)}, checkpoint_id=tmp_path / "step-1", no_dist=True)
    check_saved_dp_degree(tmp_path / "step-1", 1)
    with pytest.raises(ValueError, match="dp_world_size was 1, is 2"):
        check_saved_dp_degree(tmp_path / "step-1", 2)


class ReversedBytes(ByteTokenizer):
    def encode(self, text, **options):
        return super().encode(text[::-1], **options)


OTHER_STREAMS = [
    pytest.param({"dp": 2}, "dp_world_size was 1, is 2", id="dp"),
    pytest.param({"num_workers": 2}, "num_workers was 0, is 2", id="workers"),
    pytest.param({"seed": 5}, "seed was 0, is 5", id="seed"),
    pytest.param({"shard_by": "rows"}, "shard_by was documents, is rows", id="shard-by"),
    pytest.param({"max_document_bytes": 64}, "corpus was", id="corpus"),
    pytest.param({"tokenizer": ReversedBytes()}, "tokenizer was", id="tokenizer"),
]


@pytest.mark.parametrize(("change", "message"), OTHER_STREAMS)
def test_another_stream_is_refused(folder, change, message):
    first = loader(folder)
    take(first, 3)
    other = loader(folder, **change)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        other.load_state_dict(first.state_dict())
    assert "\n" not in str(caught.value)


def test_state_of_another_dataloader_is_refused(folder):
    with pytest.raises(ValueError, match="not of a TextDataLoader"):
        loader(folder).load_state_dict({"dp_rank_0": b"", "world_size": 1})
    loader(folder).load_state_dict({})  # torchtitan: nothing to restore


def test_rows_may_change_length_on_resume_by_documents(folder, texts):
    first = loader(folder)
    begin = rows(take(first, 10))
    second = loader(folder, seq_len=2 * T)
    second.load_state_dict(first.state_dict())
    assert Counter(documents(begin + rows(take(second, 25)))[: len(texts)]) == Counter(texts)


def test_too_few_documents_for_the_shards(folder):
    with pytest.raises(ValueError, match="24 documents, too few for 13 data-parallel ranks x 2 workers"):
        loader(folder, dp=13, num_workers=2)
    assert take(loader(folder, dp=13, num_workers=2, shard_by="rows"), 2)


def test_a_tokenizer_that_gives_no_pairs_is_an_error(folder):
    class Nothing(ByteTokenizer):
        def encode(self, text, **options):
            return []

    with pytest.raises(ValueError, match="no document has two tokens"):
        take(loader(folder, tokenizer=Nothing()), 1)


def test_vocabulary_is_checked_when_the_model_is_named(folder):
    with pytest.raises(ValueError, match="ids up to 258, the model's vocabulary has 256"):
        loader(folder, model_vocab_size=256)
    loader(folder, model_vocab_size=259)


@pytest.mark.parametrize("option", [{"split": "test"}, {"shard_by": "moon"}, {"num_workers": -1}], ids=str)
def test_bad_loader_options(option):
    with pytest.raises(ValueError, match=f"{next(iter(option))} must be"):
        TextDataLoader.Config(**option)
