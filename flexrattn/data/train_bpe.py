"""Train a byte-level BPE on local text: python -m flexrattn.data.train_bpe --out DIR --vocab-size 8192

Writes tokenizer.json and tokenizer_config.json, which torchtitan loads from `hf_assets_path`, and prints bytes/token on
the validation split, which it did not see.
"""

import argparse
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from flexrattn.data.corpus import Corpus
from flexrattn.data.sources import TextSource

BOS, EOS, PAD = SPECIAL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>")
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)


def documents(corpus: Corpus, *, max_bytes: int) -> Iterator[str]:
    """Whole documents in the order of epoch 0 until max_bytes are reached: a sample, not only its first files."""
    used = 0
    for document in corpus.epoch_order(seed=0, epoch=0):
        if used >= max_bytes:
            return
        used += int(corpus.sizes[document])
        yield corpus.read(int(document))


def train_bpe(texts: Iterator[str], *, vocab_size: int) -> Tokenizer:
    """Every byte is in the alphabet, so nothing is unknown; each digit is a token, so numbers look alike everywhere.

    Special tokens have ids 0, 1, 2 and count in vocab_size. Little text may give fewer tokens than asked for.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save(tokenizer: Tokenizer, folder: str) -> None:
    os.makedirs(folder, exist_ok=True)
    tokenizer.save(os.path.join(folder, "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        # For whoever encodes a prompt; the training stream asks for both by itself.
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    with open(os.path.join(folder, "tokenizer_config.json"), "w", encoding="utf-8") as handle:
        json.dump(config, handle, indent=2)
        handle.write("\n")


def bytes_per_token(tokenizer: Tokenizer, texts: Iterator[str]) -> tuple[int, int]:
    """(bytes, tokens), without special tokens."""
    nbytes = tokens = 0
    for text in texts:
        nbytes += len(text.encode())
        tokens += len(tokenizer.encode(text).ids)
    return nbytes, tokens


def run(arguments: argparse.Namespace) -> None:
    if arguments.vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(
            f"--vocab-size must be at least {SMALLEST_VOCABULARY} (256 bytes, {len(SPECIAL_TOKENS)} special tokens), "
            f"got {arguments.vocab_size}"
        )
    if arguments.max_bytes < 1:
        raise ValueError(f"--max-bytes must be positive, got {arguments.max_bytes}")
    if os.path.exists(arguments.out) and not os.path.isdir(arguments.out):
        raise ValueError(f"--out {arguments.out} is a file: name a folder")
    if os.path.exists(os.path.join(arguments.out, "tokenizer.json")) and not arguments.overwrite:
        raise ValueError(f"{arguments.out} already holds a tokenizer: name another folder, or give --overwrite")
    local = arguments.source != "python_source"
    source = TextSource(
        dataset="local" if local else "python_source",
        dataset_path=arguments.source if local else None,
        validation_path=arguments.validation_path,
        site_packages=arguments.site_packages,
        validation_fraction=arguments.validation_fraction,
        suffixes=tuple(arguments.suffixes),
        text_field=arguments.text_field,
    )
    train = source.corpus("train")
    held_out = source.corpus("validation")
    tokenizer = train_bpe(documents(train, max_bytes=arguments.max_bytes), vocab_size=arguments.vocab_size)
    save(tokenizer, arguments.out)
    nbytes, tokens = bytes_per_token(tokenizer, documents(held_out, max_bytes=10_000_000))
    size = tokenizer.get_vocab_size()
    if size < arguments.vocab_size:
        print(f"the text gives {size} tokens, fewer than the {arguments.vocab_size} asked for")
    print(f"{nbytes / tokens:.3f} bytes/token on {nbytes:,} held-out bytes of {held_out.name}")
    print(f"wrote {arguments.out}: {size} tokens; train with --hf_assets_path {arguments.out} and a model of that size")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flexrattn.data.train_bpe", description=__doc__.splitlines()[0])
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the tokenizer")
    parser.add_argument("--vocab-size", type=int, default=8192, help="tokens, special ones included (default: 8192)")
    parser.add_argument(
        "--source", default="python_source", metavar="PATH", help="python_source (default), or a file or folder of text"
    )
    parser.add_argument("--site-packages", action="store_true", help="python_source: the installed packages too")
    parser.add_argument("--validation-path", metavar="PATH", help="held-out text of its own")
    parser.add_argument("--validation-fraction", type=float, default=0.05, help="as in training (default: 0.05)")
    parser.add_argument("--suffixes", nargs="+", default=[".txt", ".jsonl"], help="files of a folder that are read")
    parser.add_argument("--text-field", default="text", help="field of a .jsonl record (default: text)")
    parser.add_argument(
        "--max-bytes", type=int, default=200_000_000, help="train on at most this much (default: 200 MB)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a tokenizer in --out")
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"train_bpe: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
