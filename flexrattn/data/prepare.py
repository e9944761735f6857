"""Tokenise a text once for many runs: python -m flexrattn.data.prepare --out DIR --site-packages --split-by package

Trains a byte-pair tokenizer on the training split (or takes the one in --tokenizer), drops near-duplicates, and writes
ids and tokenizer into DIR: train with `recipe_args: {data: tokens, data_path: DIR, tokenizer: huggingface}` and
`hf_assets_path: DIR`. Prints the tokens of each split.

A document is a near-duplicate, and dropped, when more than `--similar` of its lines (of 16 characters or more, spaces
at their ends aside) stand in documents kept before it. Validation comes first: what training repeats of it goes.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer
from torchtitan.components.tokenizer import HuggingFaceTokenizer

from flexrattn.data.corpus import Corpus, hash64
from flexrattn.data.sources import SPLIT_BY, TextSource
from flexrattn.data.tokenizer import largest_token_id, tokenizer_fingerprint
from flexrattn.data.tokens import FORMAT, MANIFEST, write_split
from flexrattn.data.train_bpe import save, train_bpe

SHORTEST_LINE = 16
# Texts handed to the tokenizer's threads at a time.
BATCH = 4096


class NearDuplicates:
    """Remembers the lines of the documents it let through."""

    def __init__(self, similar: float):
        self.similar = similar
        self.seen: set[int] = set()
        self.dropped = self.dropped_bytes = 0

    def drops(self, text: str) -> bool:
        """Whether the document repeats too much of what was kept; if not, it is kept."""
        # A process' own `hash` salts strings, which changes no answer: only equality counts.
        lines = [hash(line) for line in map(str.strip, text.splitlines()) if len(line) >= SHORTEST_LINE]
        repeated = sum(line in self.seen for line in lines)
        if lines and repeated > self.similar * len(lines):
            self.dropped += 1
            self.dropped_bytes += len(text.encode())
            return True
        self.seen.update(lines)
        return False


def kept_texts(corpus: Corpus, duplicates: NearDuplicates) -> list[tuple[int, str]]:
    """(digest, text) of the documents that are no near-duplicates, in the order of epoch 0."""
    kept = []
    for document in corpus.epoch_order(seed=0, epoch=0):
        text = corpus.read(int(document))
        if not duplicates.drops(text):
            kept.append((int(corpus.digests[document]), text))
    return kept


def encoded(
    texts: list[tuple[int, str]], tokenizer: Tokenizer, bos: list[int], eos: list[int]
) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(texts), BATCH):
        part = texts[start : start + BATCH]
        for (digest, _), encoding in zip(part, tokenizer.encode_batch_fast([t for _, t in part]), strict=True):
            yield digest, [*bos, *encoding.ids, *eos]


def sample(texts: list[tuple[int, str]], max_bytes: int) -> Iterator[str]:
    used = 0
    for _, text in texts:
        if used >= max_bytes:
            return
        used += len(text)
        yield text


def run(arguments: argparse.Namespace) -> None:
    started = time.monotonic()
    out = Path(arguments.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: name a folder")
    if (out / MANIFEST).exists() and not arguments.overwrite:
        raise ValueError(f"{out} is already prepared: name another folder, or give --overwrite")
    if not 0 < arguments.similar <= 1:
        raise ValueError(f"--similar must be above 0 and at most 1 (1 drops nothing), got {arguments.similar}")
    local = arguments.source != "python_source"
    source = TextSource(
        dataset="local" if local else "python_source",
        dataset_path=arguments.source if local else None,
        validation_path=arguments.validation_path,
        site_packages=arguments.site_packages,
        validation_fraction=arguments.validation_fraction,
        split_by=arguments.split_by,
        suffixes=tuple(arguments.suffixes),
    )
    corpora = {"validation": source.corpus("validation"), "train": source.corpus("train")}
    duplicates = NearDuplicates(arguments.similar)
    texts = {split: kept_texts(corpus, duplicates) for split, corpus in corpora.items()}
    out.mkdir(parents=True, exist_ok=True)
    if arguments.tokenizer:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(Path(arguments.tokenizer) / name, out / name)
    else:
        save(train_bpe(sample(texts["train"], arguments.max_bytes), vocab_size=arguments.vocab_size), str(out))
    # As the trainer will load it, so that its special tokens are the same.
    loaded = HuggingFaceTokenizer.Config().build(tokenizer_path=str(out))
    bos = [] if loaded.hf_adds_bos or loaded.bos_id is None else [loaded.bos_id]
    eos = [] if loaded.hf_adds_eos or loaded.eos_id is None else [loaded.eos_id]
    dtype = "uint16" if largest_token_id(loaded) < 2**16 else "uint32"
    manifest: dict[str, object] = {
        "format": FORMAT,
        "dtype": dtype,
        "tokenizer": tokenizer_fingerprint(loaded),
        "vocab_size": loaded.get_vocab_size(),
        "source": arguments.source,
        "split_by": arguments.split_by,
        "similar": arguments.similar,
        "near_duplicates": duplicates.dropped,
        "near_duplicate_bytes": duplicates.dropped_bytes,
    }
    digests = []
    for split in ("train", "validation"):
        documents, tokens, digest = write_split(
            out, split, encoded(texts[split], loaded.tokenizer, bos, eos), dtype=dtype
        )
        nbytes = sum(len(text.encode()) for _, text in texts[split])
        manifest[split] = {"documents": documents, "tokens": tokens, "bytes": nbytes, "digest": digest}
        digests.append(digest)
        print(f"{split}: {documents:,} documents, {nbytes / 1e6:.1f} MB, {tokens:,} tokens", flush=True)
    manifest["fingerprint"] = f"{hash64(' '.join(digests).encode()):016x}"
    # Last: a folder without it counts as not prepared.
    (out / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    print(
        f"dropped {duplicates.dropped:,} near-duplicates ({duplicates.dropped_bytes / 1e6:.1f} MB); "
        f"wrote {out} in {time.monotonic() - started:.0f} s: --recipe_args.data tokens --recipe_args.data_path {out} "
        f"--recipe_args.tokenizer huggingface --hf_assets_path {out}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flexrattn.data.prepare", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for ids and tokenizer")
    add("--source", default="python_source", metavar="PATH", help="python_source (default), or a file or folder")
    add("--site-packages", action="store_true", help="python_source: the installed packages too")
    add("--split-by", default="file", choices=SPLIT_BY, help="what stays on one side of the split (default: file)")
    add("--validation-path", metavar="PATH", help="held-out text of its own")
    add("--validation-fraction", type=float, default=0.05, help="share of the text held out (default: 0.05)")
    add("--suffixes", nargs="+", default=[".txt", ".jsonl"], help="files of a folder that are read")
    add("--similar", type=float, default=0.5, help="share of known lines above which a document goes (default: 0.5)")
    add("--tokenizer", metavar="DIR", help="a tokenizer.json to take instead of training one")
    add("--vocab-size", type=int, default=8192, help="of the tokenizer that is trained (default: 8192)")
    add("--max-bytes", type=int, default=50_000_000, help="text it is trained on at most (default: 50 MB)")
    add("--overwrite", action="store_true", help="replace what --out holds")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"prepare: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
