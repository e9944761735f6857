"""The text stream: documents -> tokens -> packed rows, resumable to the row, as a torchtitan dataloader.

One law: the stream is a pure function of (corpus, tokenizer, seed, sharding), and a place in it is four integers:
epoch, documents finished in it, tokens used of the next one, rows cut. No token is stored in a checkpoint: a resumed
stream tokenises the current document again and goes on behind the last token used.

Shapes: T tokens of a row. A document of n+1 tokens gives n (input, label) pairs, labels shifted by one inside it, so
no label belongs to another document and the pair at the end of a row still has its label.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.stateful import Stateful
from torch.utils.data import IterableDataset, get_worker_info
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import IGNORE_INDEX
from torchtitan.components.tokenizer import BaseTokenizer

from flexrattn.data.corpus import Corpus, shuffled
from flexrattn.data.sources import SPLITS, TextSource
from flexrattn.data.tokenizer import check_vocabulary, tokenizer_fingerprint
from flexrattn.data.tokens import TokenizedCorpus
from flexrattn.packing import positions_from_lengths

logger = logging.getLogger(__name__)

Sample = tuple[dict[str, Tensor], Tensor]
SHARD_BY = ("documents", "rows")


class PackedTextDataset(IterableDataset, Stateful):
    """Rows `({"input": (T,), "positions": (T,)}, labels (T,))`, all int64, for one data-parallel rank and worker.

    Every epoch is a permutation of the documents, packed in that order with no gap; an infinite stream packs across the
    border of two epochs. How it is dealt to R ranks of W workers (`shard_by`):

    - "documents": of an epoch's permutation, (rank, worker) takes every R*W-th document and packs its own rows.
      Each document is tokenised once.
    - "rows": there is one stream of rows; each consecutive batch_size * R of them are one global batch. The global
      batches are the same for every R with the same batch_size * R, and for every W, but every process tokenises all.

    A finite stream (one epoch) is always dealt by rows. It ends with labels IGNORE_INDEX so that all ranks get equally
    many full batches: no rank waits for another that has stopped, and no last batch has another shape.
    """

    def __init__(
        self,
        corpus: Corpus | TokenizedCorpus,
        tokenizer: BaseTokenizer,
        *,
        seq_len: int,
        batch_size: int,
        seed: int,
        dp_rank: int,
        dp_world_size: int,
        infinite: bool,
        shard_by: str,
        shuffle_rows: bool = False,
    ) -> None:
        self.corpus = corpus
        self.tokenizer = tokenizer
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.seed = seed
        self.dp_rank = dp_rank
        self.dp_world_size = dp_world_size
        self.infinite = infinite
        self.by_rows = shard_by == "rows" or not infinite
        self.shuffle_rows = shuffle_rows and infinite
        self._resumed = False
        self._rewind()

    def _rewind(self) -> None:
        self._epoch = 0
        self._document = 0
        self._token = 0
        self._row = 0

    def state_dict(self) -> dict[str, int]:
        """The place behind the last row yielded."""
        return {"epoch": self._epoch, "document": self._document, "token": self._token, "row": self._row}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._epoch = state_dict["epoch"]
        self._document = state_dict["document"]
        self._token = state_dict["token"]
        self._row = state_dict["row"]
        self._resumed = True

    def __iter__(self) -> Iterator[Sample]:
        """From the place loaded last, once; else from the beginning."""
        if not self._resumed:
            self._rewind()
        self._resumed = False
        worker = get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        if self.by_rows:
            return self._own_rows(worker_id, num_workers)
        shard = self.dp_rank * num_workers + worker_id
        return map(self._sample, self._rows(shard, self.dp_world_size * num_workers))

    def _own_rows(self, worker_id: int, num_workers: int) -> Iterator[Sample]:
        global_batch = self.batch_size * self.dp_world_size
        for segments in self._rows(0, 1):
            batch, place = divmod(self._row - 1, global_batch)
            # The loader takes batches from its workers in turn, so batch i must come from worker i mod num_workers.
            if place % self.dp_world_size == self.dp_rank and batch % num_workers == worker_id:
                yield self._sample(segments)

    def _rows(self, shard: int, num_shards: int) -> Iterator[list[np.ndarray]]:
        """Rows of T pairs as segments of n+1 tokens, n pairs each; the state is that behind the row when it is yielded.

        Shorter than T in total only at the end of a finite stream, where rows without any segment follow.
        """
        if self.shuffle_rows:
            yield from self._shuffled_rows(shard, num_shards)
            return
        segments: list[np.ndarray] = []
        room = self.seq_len
        while self.infinite or self._epoch == 0:
            order = self.corpus.epoch_order(seed=self.seed, epoch=self._epoch)[shard::num_shards]
            empty = self._document == 0 and self._token == 0
            while self._document < len(order):
                tokens = self._tokens(int(order[self._document]))
                while (pairs := min(room, len(tokens) - 1 - self._token)) > 0:
                    segments.append(tokens[self._token : self._token + pairs + 1])
                    self._token += pairs
                    room -= pairs
                    empty = False
                    if room == 0:
                        self._row += 1
                        yield segments
                        segments, room = [], self.seq_len
                self._document += 1
                self._token = 0
            if empty:
                raise ValueError(f"{self.corpus.name}: no document has two tokens; does the tokenizer fit the text?")
            self._epoch += 1
            self._document = 0
            if self.infinite and shard == 0:
                logger.info("%s: epoch %d begins", self.corpus.name, self._epoch)
        if segments:
            self._row += 1
            yield segments
        while self._row % (self.batch_size * self.dp_world_size):
            self._row += 1
            yield []

    def _shuffled_rows(self, shard: int, num_shards: int) -> Iterator[list[np.ndarray]]:
        """An epoch's rows, cut from its permuted documents as ever, in an order of their own; a last one that would not
        be full is left out. `document` of the state counts the rows taken of the epoch."""
        assert isinstance(self.corpus, TokenizedCorpus)
        while True:
            order = self.corpus.epoch_order(seed=self.seed, epoch=self._epoch)
            # Pair p of the epoch is in document order[i] where ends[i] <= p < ends[i + 1].
            pairs = np.maximum(np.diff(self.corpus.starts)[order] - 1, 0)
            ends = np.concatenate([[0], np.cumsum(pairs)])
            rows = shuffled(int(ends[-1]) // self.seq_len, seed=self.seed, epoch=self._epoch)[shard::num_shards]
            if not len(rows):
                raise ValueError(
                    f"{self.corpus.name}: {ends[-1]} pairs of tokens, too few for {num_shards} rows of {self.seq_len}"
                )
            while self._document < len(rows):
                segments, place = [], int(rows[self._document]) * self.seq_len
                stop = place + self.seq_len
                i = int(np.searchsorted(ends, place, side="right")) - 1
                while place < stop:
                    take = min(stop, int(ends[i + 1])) - place
                    if take > 0:
                        first = place - int(ends[i])
                        segments.append(self._tokens(int(order[i]))[first : first + take + 1])
                        place += take
                    i += 1
                self._document += 1
                self._row += 1
                yield segments
            self._epoch += 1
            self._document = 0
            if shard == 0:
                logger.info("%s: epoch %d begins", self.corpus.name, self._epoch)

    def _tokens(self, document: int) -> np.ndarray:
        if isinstance(self.corpus, TokenizedCorpus):
            return self.corpus.tokens(document)
        return np.asarray(self.tokenizer.encode(self.corpus.read(document), add_bos=True, add_eos=True), np.int64)

    def _sample(self, segments: list[np.ndarray]) -> Sample:
        lengths = [len(segment) - 1 for segment in segments]
        inputs = [segment[:-1] for segment in segments]
        labels = [segment[1:] for segment in segments]
        if (rest := self.seq_len - sum(lengths)) > 0:
            # What fills the row is one more document, which no loss counts.
            lengths.append(rest)
            inputs.append(np.full(rest, self.tokenizer.eos_id or 0, np.int64))
            labels.append(np.full(rest, IGNORE_INDEX, np.int64))
        row = {"input": torch.from_numpy(np.concatenate(inputs)), "positions": positions_from_lengths(lengths)}
        return row, torch.from_numpy(np.concatenate(labels))


class TextDataLoader(ParallelAwareDataloader):
    """Batches `({"input": (B, T), "positions": (B, T)}, labels (B, T))` of `python_source` or of local text.

    ValueError, one line, for a bad option, path or file, a split without text, fewer documents than shards, a tokenizer
    that does not fit `model_vocab_size`, and a state that was saved by another stream (`load_state_dict`).
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        dataset: str = "python_source"
        """python_source: the .py files of the Python that runs; local: dataset_path; tokens: a prepared folder."""

        dataset_path: str | None = None
        """For local: a .txt or .jsonl file, or a folder, read recursively. For tokens: what data.prepare wrote."""

        validation_path: str | None = None
        """For local: validation text of its own (nothing is split off dataset_path). Both splits need both paths."""

        site_packages: bool = False
        """For python_source: the installed packages too, not only the standard library."""

        split: Literal["train", "validation"] = "train"
        """Which of the two splits this loader reads."""

        validation_fraction: float = 0.05
        """Share of files (lines of a .jsonl, pieces of a lone .txt) that are validation, by a hash of their names."""

        split_by: Literal["file", "top_directory", "package"] = "file"
        """top_directory keeps a folder on one side: for corpora with near-duplicates inside packages. package: the same
        for python_source, with packages that are small beside validation_fraction."""

        suffixes: list[str] = field(default_factory=lambda: [".txt", ".jsonl"])
        """For local folders: which files are read. All but .jsonl are read as text."""

        text_field: str = "text"
        """Field of a .jsonl record that holds its text."""

        max_document_bytes: int = 65536
        """A longer text file is cut at line ends into documents of at most this many bytes (.jsonl records are not)."""

        seed: int = 0
        """Of the order of documents."""

        infinite: bool = True
        """Begin another epoch, in another order, after each; else end after one."""

        shard_by: Literal["documents", "rows"] = "documents"
        """documents: each tokenised once, by one rank and worker. rows: global batches do not depend on the number of
        ranks and workers, each of which tokenises everything."""

        shuffle_rows: bool = False
        """For tokens: deal the rows of an epoch in a random order. A batch is then of as many files as it has rows;
        else of the few that follow each other."""

        model_vocab_size: int | None = None
        """If given, a tokenizer that can produce ids from here on is refused."""

        def __post_init__(self) -> None:
            if self.split not in SPLITS:
                raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {self.split!r}")
            if self.shard_by not in SHARD_BY:
                raise ValueError(f"shard_by must be one of {', '.join(SHARD_BY)}, got {self.shard_by!r}")
            if self.shuffle_rows and self.dataset != "tokens":
                raise ValueError(
                    f"shuffle_rows needs dataset 'tokens' (python -m flexrattn.data.prepare), got {self.dataset!r}"
                )
            if self.num_workers < 0:
                raise ValueError(f"num_workers must be 0 or more, got {self.num_workers}")

        def source(self) -> TextSource:
            return TextSource(
                dataset=self.dataset,
                dataset_path=self.dataset_path,
                validation_path=self.validation_path,
                site_packages=self.site_packages,
                validation_fraction=self.validation_fraction,
                split_by=self.split_by,
                suffixes=tuple(self.suffixes),
                text_field=self.text_field,
                max_document_bytes=self.max_document_bytes,
            )

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        tokenizer: BaseTokenizer,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
    ) -> None:
        if config.model_vocab_size is not None:
            check_vocabulary(tokenizer, config.model_vocab_size)
        corpus = config.source().documents(config.split)
        if isinstance(corpus, TokenizedCorpus) and corpus.tokenizer != tokenizer_fingerprint(tokenizer):
            raise ValueError(
                f"{config.dataset_path} was tokenised with another tokenizer than this run's: set "
                f"recipe_args.tokenizer 'huggingface' and hf_assets_path {config.dataset_path}, or prepare it again"
            )
        dataset = PackedTextDataset(
            corpus,
            tokenizer,
            seq_len=seq_len,
            batch_size=local_batch_size,
            seed=config.seed,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            infinite=config.infinite,
            shard_by=config.shard_by,
            shuffle_rows=config.shuffle_rows,
        )
        shards = dp_world_size * max(1, config.num_workers)
        if not dataset.by_rows and len(dataset.corpus) < shards:
            raise ValueError(
                f"{dataset.corpus.name} has {len(dataset.corpus)} documents, too few for {dp_world_size} data-parallel "
                f"ranks x {max(1, config.num_workers)} workers: lower max_document_bytes, or set shard_by to 'rows'"
            )
        self._stream_identity = _stream_identity(dataset, config)
        super().__init__(
            dataset,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            num_workers=config.num_workers,
            persistent_workers=config.persistent_workers,
            pin_memory=config.pin_memory,
            prefetch_factor=config.prefetch_factor,
            snapshot_every_n_steps=snapshot_every_n_steps,
            batch_size=local_batch_size,
        )

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "stream": dict(self._stream_identity)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved stream exactly. ValueError, with all the differences, when this is not the same stream."""
        if not state_dict:
            return
        saved = state_dict.get("stream")
        if saved is None:
            raise ValueError(
                "the checkpoint's data state is not of a TextDataLoader: resume with the dataloader it had"
            )
        differences = [
            f"{name} was {saved.get(name)}, is {self._stream_identity.get(name)}"
            for name in {**self._stream_identity, **saved}
            if saved.get(name) != self._stream_identity.get(name)
        ]
        if differences:
            raise ValueError(
                "the checkpoint's data stream cannot be continued exactly: " + "; ".join(differences) + " (set them "
                "back, or leave the data state out with --checkpoint.exclude_from_loading dataloader)"
            )
        super().load_state_dict(state_dict)


def check_saved_dp_degree(checkpoint_folder: str | Path, dp_world_size: int) -> None:
    """ValueError when a checkpoint's data state is of another number of data-parallel ranks.

    To be called before loading. With fewer ranks `load_state_dict` says so itself; with more, the new ranks look for
    keys that were never saved and torch reports only `Missing key ... dataloader.dp_rank_N`.
    """
    keys = FileSystemReader(checkpoint_folder).read_metadata().state_dict_metadata
    saved = sum(key.startswith("dataloader.dp_rank_") for key in keys)
    if saved not in (0, dp_world_size):
        raise ValueError(
            f"the checkpoint's data stream cannot be continued exactly: dp_world_size was {saved}, is {dp_world_size} "
            f"(resume {checkpoint_folder} with {saved} data-parallel ranks, or leave the data state out with "
            "--checkpoint.exclude_from_loading dataloader)"
        )


def _stream_identity(dataset: PackedTextDataset, config: TextDataLoader.Config) -> dict[str, Any]:
    """All that two streams must share for a place in one to be that place in the other."""
    identity: dict[str, Any] = {
        "dp_world_size": dataset.dp_world_size,
        "num_workers": config.num_workers,
        "seed": dataset.seed,
        "infinite": dataset.infinite,
        "shard_by": "rows" if dataset.by_rows else "documents",
        "corpus": dataset.corpus.fingerprint,
        "tokenizer": tokenizer_fingerprint(dataset.tokenizer),
    }
    if dataset.shuffle_rows:
        identity |= {"shuffle_rows": True, "seq_len": dataset.seq_len}
    if dataset.by_rows:
        # Ranks and workers stand at different rows of one stream: what deals the rows must stay.
        identity |= {"seq_len": dataset.seq_len, "local_batch_size": dataset.batch_size}
    return identity
