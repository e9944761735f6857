"""A corpus: an index of documents, which are spans of files that are read when they are needed.

The index holds about 30 bytes a document and no text. Everything that decides the order of training (which documents,
which split, which permutation) depends on names and contents alone, never on the order in which a file system lists.
"""

import json
import logging
import os
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from typing import BinaryIO, NamedTuple

import numpy as np

logger = logging.getLogger(__name__)


class SourceFile(NamedTuple):
    """`name` is the path below the corpus' root with forward slashes: what splits and order are made of."""

    name: str
    path: str


def hash64(data: bytes) -> int:
    """The same 64 bits on every machine and in every process, unlike `hash`."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------------- documents


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents d = 0..len-1: `sizes[d]` bytes of `paths[file_ids[d]]` from `offsets[d]` on; `digests` are of texts."""

    name: str
    paths: tuple[str, ...]
    text_field: str
    file_ids: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def nbytes(self) -> int:
        return int(self.sizes.sum())

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two corpora with the same set of texts, wherever the files lie."""
        return blake2b(np.sort(self.digests).tobytes(), digest_size=8).hexdigest()

    def read(self, document: int) -> str:
        """The text. ValueError when the file is gone or no longer holds what was indexed."""
        path = self.paths[self.file_ids[document]]
        try:
            with open(path, "rb") as handle:
                handle.seek(int(self.offsets[document]))
                data = handle.read(int(self.sizes[document]))
            text = _record_text(data, self.text_field, where=path) if is_jsonl(path) else data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} changed while it was being used as training text: {error}") from error
        # A stream that goes on over edited files could not be resumed or repeated: better to stop.
        if hash64(text.encode()) != self.digests[document]:
            raise ValueError(f"{path} changed while it was being used as training text: restore it, or start a new run")
        return text

    def epoch_order(self, *, seed: int, epoch: int) -> np.ndarray:
        return epoch_order(self.digests, seed=seed, epoch=epoch)


def epoch_order(digests: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of the documents: by a hash of (text, seed, epoch), so library versions cannot change it."""
    salt = _mix64(_mix64(np.array([epoch], np.uint64)) ^ np.array([seed % 2**64], np.uint64))
    return np.argsort(_mix64(digests ^ salt), kind="stable")


def shuffled(n: int, *, seed: int, epoch: int) -> np.ndarray:
    """A permutation of 0..n-1 that is the same everywhere."""
    return epoch_order(np.arange(1, n + 1, dtype=np.uint64), seed=seed, epoch=epoch)


def _mix64(x: np.ndarray) -> np.ndarray:
    """splitmix64 on uint64, modulo 2^64."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def is_jsonl(path: str) -> bool:
    return path.endswith(".jsonl")


def _record_text(line: bytes, text_field: str, *, where: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError
        raise ValueError(f"{where}: not valid JSON ({error})") from error
    if not isinstance(record, dict) or text_field not in record:
        found = f"it has {', '.join(map(repr, record))}" if isinstance(record, dict) else f"it is {record!r:.40}"
        raise ValueError(f"{where}: needs an object with the field {text_field!r}, {found}")
    text = record[text_field]
    if not isinstance(text, str):
        raise ValueError(f"{where}: the field {text_field!r} must be a string, got {text!r:.40}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the field {text_field!r} is not Unicode text ({error.reason})") from error
    return text


def _pieces(handle: BinaryIO, max_bytes: int) -> Iterator[bytes]:
    """The file cut at line ends into pieces of at most max_bytes; inside a longer line, between two characters."""
    rest = b""
    while True:
        data = rest + handle.read(max_bytes - len(rest))
        if len(data) < max_bytes:
            if data:
                yield data
            return
        cut = data.rfind(b"\n") + 1
        if cut == 0:
            # Back to the lead byte of the last character, which may be incomplete.
            cut = len(data) - 1
            while cut > 0 and data[cut] & 0xC0 == 0x80:
                cut -= 1
            cut = cut or len(data)
        yield data[:cut]
        rest = data[cut:]


# ------------------------------------------------------------------------------------------------------ indexing


class Index:
    """Documents of a list of files in the order of their names, before duplicates are dropped and splits are made."""

    def __init__(
        self, files: Sequence[SourceFile], *, text_field: str, max_document_bytes: int, split_by: str = "file"
    ) -> None:
        self.files = sorted(files)
        self.text_field = text_field
        self.max_document_bytes = max_document_bytes
        self.split_by = split_by
        self.skipped: list[str] = []
        self.blank = 0
        self.file_ids, self.offsets, self.sizes = array("i"), array("q"), array("q")
        self.digests, self.split_keys = array("Q"), array("Q")
        for file_id, file in enumerate(self.files):
            if is_jsonl(file.path):
                self._add_jsonl(file_id, file)
            else:
                self._add_text(file_id, file)

    def _add(self, file_id: int, offset: int, size: int, text: bytes, split_key: str) -> None:
        if not text.strip():
            self.blank += 1
            return
        self.file_ids.append(file_id)
        self.offsets.append(offset)
        self.sizes.append(size)
        self.digests.append(hash64(text))
        self.split_keys.append(hash64(split_key.encode("utf-8", "surrogateescape")))

    def _split_key(self, file: SourceFile, part: int | None) -> str:
        if self.split_by == "top_directory":
            # "torch/nn/x.py" -> "torch"; a file at the top is a directory of its own.
            return file.name.split("/", 1)[0]
        if self.split_by == "package":
            # "site-packages/torch/nn/x.py" -> "site-packages/torch"
            return "/".join(file.name.split("/", 2)[:2])
        return file.name if part is None else f"{file.name}:{part}"

    def _add_jsonl(self, file_id: int, file: SourceFile) -> None:
        offset = 0
        with open(file.path, "rb") as handle:
            for number, line in enumerate(handle, start=1):
                if line.strip():
                    text = _record_text(line, self.text_field, where=f"{file.path}, line {number}")
                    self._add(file_id, offset, len(line), text.encode(), self._split_key(file, number))
                offset += len(line)

    def _add_text(self, file_id: int, file: SourceFile) -> None:
        # A corpus of one file is split by its pieces, any other by whole files.
        lone = len(self.files) == 1
        try:
            spans: list[tuple[int, bytes]] = []
            offset = 0
            with open(file.path, "rb") as handle:
                for piece in _pieces(handle, self.max_document_bytes):
                    piece.decode()
                    spans.append((offset, piece))
                    offset += len(piece)
        except (OSError, UnicodeDecodeError):
            self.skipped.append(file.path)
            return
        if not spans:
            self.blank += 1
        for part, (offset, piece) in enumerate(spans):
            self._add(file_id, offset, len(piece), piece, self._split_key(file, part if lone else None))

    def corpus(self, name: str, keep: np.ndarray) -> Corpus:
        return Corpus(
            name=name,
            paths=tuple(file.path for file in self.files),
            text_field=self.text_field,
            file_ids=np.array(self.file_ids, np.int32)[keep],
            offsets=np.array(self.offsets, np.int64)[keep],
            sizes=np.array(self.sizes, np.int64)[keep],
            digests=np.array(self.digests, np.uint64)[keep],
        )

    def first_occurrences(self) -> np.ndarray:
        """(documents,) bool: false where an earlier document has the same text."""
        digests = np.array(self.digests, np.uint64)
        first = np.zeros(len(digests), bool)
        first[np.unique(digests, return_index=True)[1]] = True
        return first


@dataclass(frozen=True, eq=False)
class Splits:
    """Two corpora that share no text. Either may be empty."""

    train: Corpus
    validation: Corpus


def split_index(index: Index, name: str, *, validation_fraction: float) -> Splits:
    """Each text once; validation holds the split keys whose hash lies below the fraction.

    With a fraction above 0 validation also holds the smallest hash, so that no small corpus is left without one.
    """
    keep = index.first_occurrences()
    validation = np.zeros_like(keep)
    if validation_fraction > 0 and keep.any():
        keys = np.array(index.split_keys, np.uint64)
        threshold = max(int(validation_fraction * 2**64), int(keys[keep].min()) + 1)
        validation = keep & (keys < np.uint64(min(threshold, 2**64 - 1)))
        if index.split_by == "package":
            validation = keep & _small_packages(keys, np.array(index.sizes, np.int64) * keep, validation_fraction)
    splits = Splits(index.corpus(f"{name}/train", keep & ~validation), index.corpus(f"{name}/validation", validation))
    _report(name, [index], splits, duplicates=int((~keep).sum()))
    return splits


def _small_packages(keys: np.ndarray, sizes: np.ndarray, fraction: float) -> np.ndarray:
    """Packages in the order of their hashes, as long as they fit into the fraction of the bytes; the others train.

    A few packages hold most of an installation: by hash alone one of them could be the whole validation split. Each is
    at most a quarter of it.
    """
    packages, inverse = np.unique(keys, return_inverse=True)
    nbytes = np.bincount(inverse, weights=sizes)
    room = fraction * nbytes.sum()
    largest = room / 4
    chosen = np.zeros(len(packages), bool)
    for i, size in enumerate(nbytes):
        if 0 < size <= min(room, largest):
            chosen[i] = True
            room -= size
    if not chosen.any():
        chosen[np.argmin(np.where(nbytes > 0, nbytes, np.inf))] = True
    return chosen[inverse]


def pair_indices(train: Index, validation: Index, name: str) -> Splits:
    """Splits given by the user: a training document whose text is also a validation document is dropped."""
    held_out = validation.corpus(f"{name}/validation", validation.first_occurrences())
    keep = train.first_occurrences() & ~np.isin(np.array(train.digests, np.uint64), held_out.digests)
    splits = Splits(train.corpus(f"{name}/train", keep), held_out)
    total = len(train.digests) + len(validation.digests)
    _report(name, [train, validation], splits, duplicates=total - int(keep.sum()) - len(held_out))
    return splits


def _report(name: str, indices: list[Index], splits: Splits, *, duplicates: int) -> None:
    skipped = [path for index in indices for path in index.skipped]
    if skipped:
        logger.warning(
            "%s: skipped %d files that cannot be read or are not UTF-8 (the first: %s)", name, len(skipped), skipped[0]
        )
    parts = [
        f"{split} {len(corpus):,} documents of {len(np.unique(corpus.file_ids)):,} files, {corpus.nbytes / 1e6:.2f} MB"
        for split, corpus in (("train", splits.train), ("validation", splits.validation))
    ]
    blank = sum(index.blank for index in indices)
    logger.info("%s: %s; dropped %d duplicates, %d blank", name, "; ".join(parts), duplicates, blank)


def walk_files(
    root: str, suffixes: Sequence[str], *, skip_directories: frozenset[str] = frozenset()
) -> list[SourceFile]:
    """Every file below `root` that ends in one of `suffixes`. Hidden directories and linked ones are not entered.

    In the order of the file system: `Index` sorts.
    """
    found = []
    for directory, subdirectories, names in os.walk(root):
        subdirectories[:] = [d for d in subdirectories if not d.startswith(".") and d not in skip_directories]
        for name in names:
            if name.endswith(tuple(suffixes)):
                path = os.path.join(directory, name)
                found.append(SourceFile(os.path.relpath(path, root).replace(os.sep, "/"), path))
    return found
