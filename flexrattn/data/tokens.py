"""Text that was tokenised once: `python -m flexrattn.data.prepare` writes it, `dataset="tokens"` trains from it.

A folder holds `tokens.json` (what it is), and for each split `SPLIT.bin` (all documents' ids behind each other, bos
and eos included, uint16 or uint32) and `SPLIT.npz` (`starts`, one more than documents, and `digests` of the texts).
Runs map the ids into memory: several on one machine share them, and none tokenises or scans anything.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from flexrattn.data.corpus import epoch_order

MANIFEST = "tokens.json"
FORMAT = "flexrattn.data.tokens/1"


@dataclass(frozen=True, eq=False)
class TokenizedCorpus:
    """Documents d = 0..len-1: ids `starts[d]` to `starts[d + 1]` of the split's file; `digests` are of the texts.

    tokenizer: fingerprint of the tokenizer that made the ids; a run with another one is refused.
    """

    name: str
    path: Path
    dtype: str
    tokenizer: str
    starts: np.ndarray
    digests: np.ndarray

    def __len__(self) -> int:
        return len(self.digests)

    @property
    def n_tokens(self) -> int:
        return int(self.starts[-1])

    @cached_property
    def _ids(self) -> np.ndarray:
        return np.memmap(self.path, self.dtype, mode="r", shape=(self.n_tokens,))

    @cached_property
    def fingerprint(self) -> str:
        """Equal for two corpora with the same set of texts."""
        return blake2b(np.sort(self.digests).tobytes(), digest_size=8).hexdigest()

    def tokens(self, document: int) -> np.ndarray:
        """(n,) int64, bos and eos included."""
        return self._ids[self.starts[document] : self.starts[document + 1]].astype(np.int64)

    def epoch_order(self, *, seed: int, epoch: int) -> np.ndarray:
        """That of the text's own corpus: tokenising beforehand changes no batch."""
        return epoch_order(self.digests, seed=seed, epoch=epoch)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """What `tokens.json` says. ValueError where the folder holds none."""
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(
            f"{folder} holds no {MANIFEST}: write it with python -m flexrattn.data.prepare --out {folder}"
        ) from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path} is of the form {manifest.get('format')!r}, expected {FORMAT!r}: prepare it again")
    return manifest


def open_tokens(folder: str | Path, split: str) -> TokenizedCorpus:
    """One split of a prepared folder. ValueError for a folder that is not one or is cut short."""
    manifest = read_manifest(folder)
    path = Path(folder) / f"{split}.bin"
    with np.load(Path(folder) / f"{split}.npz") as index:
        starts, digests = index["starts"], index["digests"]
    expected = int(starts[-1]) * np.dtype(manifest["dtype"]).itemsize
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, expected {expected}: prepare it again")
    return TokenizedCorpus(
        name=f"{folder}/{split}",
        path=path,
        dtype=manifest["dtype"],
        tokenizer=manifest["tokenizer"],
        starts=starts,
        digests=digests,
    )


def write_split(
    folder: Path, split: str, documents: Iterable[tuple[int, list[int]]], *, dtype: str
) -> tuple[int, int, str]:
    """Write (digest, ids) pairs; returns how many documents and tokens, and a digest of all the ids."""
    starts, digests, digest = [0], [], blake2b(digest_size=16)
    with (folder / f"{split}.bin").open("wb") as file:
        for text_digest, ids in documents:
            data = np.asarray(ids, dtype).tobytes()
            file.write(data)
            digest.update(data)
            starts.append(starts[-1] + len(ids))
            digests.append(text_digest)
    np.savez(folder / f"{split}.npz", starts=np.array(starts, np.int64), digests=np.array(digests, np.uint64))
    return len(digests), starts[-1], digest.hexdigest()
