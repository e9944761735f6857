"""Validation losses of a checkpoint: the mean, by position, and by where a bigram was last seen.

    python -m flexrattn.evaluate --checkpoint outputs/debug
    python -m flexrattn.evaluate --checkpoint outputs/debug --lengths 512 2048 8192 --out eval_lengths.json

--checkpoint is a run's dump folder (its newest step), one step of it, or a folder with an exported model.safetensors.
Without options the rows are those of the run's own validation on one data-parallel rank, and --out holds what the run's
eval.json holds (docs/evaluation.md). Other lengths pack the same number of tokens of the same text into other rows.
The same in Python:

    from flexrattn.evaluate import Evaluator

    result = Evaluator.load("outputs/debug").evaluate(length=2048)
    print(result["groups"]["bigram_beyond_window"])

Exit code: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchtitan.components.dataloader import BaseDataLoader
from torchtitan.components.tokenizer import BaseTokenizer
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader

from flexrattn import branch_shares, platform
from flexrattn.command_line import DTYPES, Parser, check_device
from flexrattn.data.text import TextDataLoader
from flexrattn.decode.checkpoint import CONFIG_FILE, Checkpoint, find_checkpoint, load_model, load_tokenizer, progress
from flexrattn.evaluation import (
    GROUPS,
    LossTally,
    check_reference_window,
    default_reference_window,
    per_token_cross_entropy,
    write_json,
)
from flexrattn.model import RAttentionModel


class Evaluator:
    """A model, its tokenizer, and the validation text of its run.

    length, batch_size, steps: tokens of a row, rows of a batch and batches of the run's validation; what `evaluate` is
    not told it takes from here. trained: steps and tokens behind the weights.
    """

    def __init__(
        self,
        model: RAttentionModel,
        tokenizer: BaseTokenizer,
        *,
        data: BaseDataLoader.Config,
        length: int,
        batch_size: int,
        steps: int,
        reference_window: int,
        trained: tuple[int | None, int | None] = (None, None),
    ):
        self.model, self.tokenizer, self.data = model, tokenizer, data
        self.length, self.batch_size, self.steps = length, batch_size, steps
        self.reference_window = check_reference_window(reference_window)
        self.trained = trained

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: str | None = None,
        data_path: str | None = None,
    ) -> Evaluator:
        """From a checkpoint; by default on the GPU in bf16 where there is one, else on the CPU in fp32.

        data_path: a .txt or .jsonl file or a folder, all of which is read, in place of the run's validation text.
        ValueError: no checkpoint, another model, no tokenizer, a run whose validation data cannot be had.
        """
        found = find_checkpoint(checkpoint)
        words = load_tokenizer(found, tokenizer)
        device = device or platform.device_type()
        if dtype is None:
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = load_model(found, device=device, dtype=dtype)
        training, validator = (_section(found, name) for name in ("training", "validator"))
        window = next((a.window for a in (x.attention for x in model.config.layers) if a.window is not None), None)
        return cls(
            model,
            words,
            data=_data(found, validator, data_path),
            length=training["seq_len"],
            batch_size=training["local_batch_size"],
            steps=validator["steps"],
            # Runs from before validation sorted tokens do not say by what.
            reference_window=validator.get("reference_window", default_reference_window(window)),
            trained=progress(found),
        )

    @torch.no_grad()
    def evaluate(
        self,
        *,
        length: int | None = None,
        steps: int | None = None,
        batch_size: int | None = None,
        reference_window: int | None = None,
    ) -> dict[str, Any]:
        """What eval.json holds, and `branches` (flexrattn.branch_shares), on rows of `length` tokens.

        steps, batch_size: batches to read, and rows of a batch, *at the run's own length*; other lengths read the same
        number of tokens, to a row. steps -1 reads the text once to its end. step and tokens are None where the
        checkpoint does not say them. ValueError: a length of none, or past the model's limit.
        """
        length = self.length if length is None else length
        steps = self.steps if steps is None else steps
        batch_size = self.batch_size if batch_size is None else batch_size
        limit = self.model.config.max_seq_len
        if not 1 <= length <= limit:
            raise ValueError(f"length must be from 1 to the model's limit {limit}, got {length}")
        if batch_size < 1 or (steps < 1 and steps != -1):
            raise ValueError(f"batch_size and steps must be positive (steps -1: all), got {batch_size} and {steps}")
        window = self.reference_window if reference_window is None else check_reference_window(reference_window)
        device = self.model.norm.weight.device
        rows = max(1, batch_size * self.length // length)
        batches = -1 if steps == -1 else -(-steps * batch_size * self.length // (rows * length))
        tally = LossTally(seq_len=length, reference_window=window, device=device)
        branch_shares.begin([self.model])
        for tokens_BT, labels_BT, positions_BT in self._batches(length, rows, batches, device):
            masks = self.model.get_attention_masks(positions_BT)
            logits_BTV = self.model(tokens_BT, positions=positions_BT, attention_masks=masks)
            tally.add(
                tokens_BT, labels_BT, positions_BT, per_token_cross_entropy(logits_BTV, labels_BT, vocab_size=None)
            )
        step, tokens = self.trained
        return tally.result(step=step, tokens=tokens) | {"branches": branch_shares.end([self.model])}

    def _batches(
        self, length: int, rows: int, batches: int, device: torch.device
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        loader = dataclasses.replace(self.data, infinite=batches != -1).build(
            dp_world_size=1, dp_rank=0, tokenizer=self.tokenizer, seq_len=length, local_batch_size=rows
        )
        for i, (inputs, labels) in enumerate(loader):
            if i == batches:
                return
            yield inputs["input"].to(device), labels.to(device), inputs["positions"].to(device)


def _section(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    section = checkpoint.config.get(name)
    if not isinstance(section, dict):
        raise ValueError(f"{checkpoint.folder / CONFIG_FILE} has no section {name!r}: it is no config of a run")
    return section


def _data(checkpoint: Checkpoint, validator: dict[str, Any], data_path: str | None) -> BaseDataLoader.Config:
    """The run's validation data, which its config.json describes by fields alone."""
    if data_path is not None:
        return TextDataLoader.Config(
            dataset="local", dataset_path=data_path, validation_path=data_path, split="validation"
        )
    fields = validator.get("dataloader") or {}
    kind: Any = TextDataLoader.Config if "split" in fields else HuggingFaceTextDataLoader.Config
    known = {field.name for field in dataclasses.fields(kind)}
    if unknown := sorted(set(fields) - known):
        raise ValueError(
            f"{checkpoint.folder / CONFIG_FILE} validates on data that this version does not know "
            f"({', '.join(unknown)}): name text with --data-path"
        )
    return kind(**fields)


def table(result: dict[str, Any]) -> str:
    """One length's result as lines of text."""
    window = result["reference_window"]
    named = {
        "in_window": f"position <= {window}",
        "beyond_window": f"position > {window}",
        "bigram_beyond_window": f"bigram last seen > {window} tokens ago",
        "bigram_in_window": f"bigram last seen <= {window} tokens ago",
        "no_bigram": "bigram not seen before",
    }
    lines = [("all tokens", result["loss"], result["n_tokens"])]
    lines += [(named[name], result["groups"][name]["loss"], result["groups"][name]["n"]) for name in GROUPS]
    lines += [(f"positions {each['from']} to {each['to']}", each["loss"], each["n"]) for each in result["by_position"]]
    width = max(len(name) for name, _, _ in lines)
    return "\n".join(
        f"  {name:<{width}}  {'-' if loss is None else f'{loss:.4f}':>9}  {n:>12,}" for name, loss, n in lines
    )


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flexrattn.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="dump folder, step folder, or exported folder")
    add("--lengths", type=int, nargs="+", metavar="N", help="tokens of a row; several make a list (default: the run's)")
    add("--steps", type=int, metavar="N", help="batches at the run's length; -1: all text once (default: the run's)")
    add("--batch-size", type=int, metavar="N", help="rows of a batch at the run's length (default: the run's)")
    add("--reference-window", type=int, metavar="W", help="the window by which tokens are sorted (default: the run's)")
    add("--data-path", metavar="PATH", help="text to read, all of it, in place of the run's validation text")
    add("--tokenizer", metavar="bytes|FOLDER", help="in place of the run's own")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    add("--out", metavar="FILE", help="write the numbers there as JSON")
    return parser


def run(options: argparse.Namespace) -> None:
    check_device(options.device)
    if options.out and Path(options.out).is_dir():
        raise ValueError(f"--out {options.out} is a folder: name a file")
    evaluator = Evaluator.load(
        options.checkpoint,
        device=options.device,
        dtype=DTYPES.get(options.dtype),
        tokenizer=options.tokenizer,
        data_path=options.data_path,
    )
    results = []
    for length in options.lengths or [evaluator.length]:
        result = evaluator.evaluate(
            length=length,
            steps=options.steps,
            batch_size=options.batch_size,
            reference_window=options.reference_window,
        )
        print(f"{options.checkpoint}, step {result['step']}, rows of {length} tokens: loss and tokens")
        print(table(result), flush=True)
        results.append({"seq_len": length, **result})
    if options.out:
        whole: Any = (
            {"lengths": results} if options.lengths else {k: v for k, v in results[0].items() if k != "seq_len"}
        )
        write_json(options.out, whole)
        print(f"wrote {options.out}")


def main(arguments: Sequence[str] | None = None) -> int:
    # torchdata's, of a name that torch no longer wants called.
    warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
    try:
        run(make_parser().parse_args(arguments))
    except (ValueError, OSError) as error:
        print(f"evaluate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
