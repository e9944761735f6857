"""Generate text from a checkpoint, on a CPU or a GPU.

    python -m flexrattn.generate --checkpoint outputs/debug --prompt "def main(" --max-new-tokens 200

--checkpoint is a run's dump folder (its newest step), one step of it, or a folder with an exported model.safetensors.
The same in Python:

    from flexrattn.generate import Generator

    generator = Generator.load("outputs/debug")
    print(generator.generate(["def main("], max_new_tokens=200)[0].text)

Exit code: 0, or 2 for bad input.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torchtitan.components.tokenizer import BaseTokenizer

from flexrattn import platform
from flexrattn.command_line import DTYPES, Parser, check_device
from flexrattn.decode.cache import check_decodable
from flexrattn.decode.checkpoint import export, find_checkpoint, load_model, load_tokenizer
from flexrattn.decode.engine import EagerStepper, Engine, whole
from flexrattn.decode.sampling import Sampling
from flexrattn.decode.text import TextStream
from flexrattn.model import RAttentionModel

logger = logging.getLogger(__name__)

IMPLS = ("auto", "torch", "triton")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What followed a prompt. finish: "stop" (end token or stop string) or "length"."""

    text: str
    tokens: list[int]
    finish: str


class Generator:
    """A model with its tokenizer. `max_length` bounds prompt and new tokens together (default: the model's limit)."""

    def __init__(self, model: RAttentionModel, tokenizer: BaseTokenizer, *, impl: str = "auto"):
        check_decodable(model.config)
        self.model, self.tokenizer = model, tokenizer
        self.stepper = choose_stepper(model, impl)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        *,
        device: str | None = None,
        dtype: torch.dtype | None = None,
        tokenizer: str | None = None,
        impl: str = "auto",
    ) -> Generator:
        """From a checkpoint; by default on the GPU in bf16 where there is one, else on the CPU in fp32.

        tokenizer: the run's, or "bytes", or a folder with tokenizer.json. impl: how a step is computed: "torch",
        "triton" (a CUDA graph of Triton kernels; never falls back), or "auto", the fastest that the model allows.
        ValueError: no checkpoint, another model, no tokenizer.
        """
        found = find_checkpoint(checkpoint)
        words = load_tokenizer(found, tokenizer)
        device = device or platform.device_type()
        if dtype is None:
            dtype = torch.float32 if device == "cpu" else torch.bfloat16
        return cls(load_model(found, device=device, dtype=dtype), words, impl=impl)

    @property
    def limit(self) -> int:
        return self.model.config.max_seq_len

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        slots: int | None = None,
    ) -> list[Completion]:
        """A completion for each prompt, in order. slots: prompts that run at once (default: all, at most 64).

        Prompt i draws with seed + i. ValueError: an empty prompt or one past the model's limit.
        """
        if isinstance(prompts, str):
            raise ValueError(f"generate takes a list of prompts, got one text: [{prompts[:20]!r}] would be a list")
        streams: list[TextStream] = [TextStream(self.tokenizer, stop) for _ in prompts]
        finish = ["length"] * len(prompts)
        for index, _, ended in self._run(prompts, max_new_tokens, sampling or Sampling(), streams, slots):
            if ended:
                finish[index] = ended
        done = []
        for stream, why in zip(streams, finish, strict=True):
            stream.take(final=True)
            done.append(Completion(text=stream.text, tokens=stream.tokens, finish=why))
        return done

    def stream(
        self, prompt: str, *, max_new_tokens: int, sampling: Sampling | None = None, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Pieces of one prompt's completion as they are certain."""
        text = TextStream(self.tokenizer, stop)
        for _, piece, ended in self._run([prompt], max_new_tokens, sampling or Sampling(), [text], 1):
            if piece or ended:
                yield piece

    def _run(
        self,
        prompts: Sequence[str],
        max_new_tokens: int,
        sampling: Sampling,
        streams: Sequence[TextStream],
        slots: int | None,
    ) -> Iterator[tuple[int, str, str]]:
        """(prompt's index, new text, "" or how it ended) in the order of arrival."""
        whole("max_new_tokens", max_new_tokens, 1)
        if not prompts:
            return
        encoded = [self.encode(prompt) for prompt in prompts]
        longest = max(map(len, encoded))
        engine = Engine(
            self.model,
            slots=min(64 if slots is None else slots, len(prompts)),
            max_length=min(longest + max_new_tokens, self.limit),
            stepper=self.stepper,
        )
        end = getattr(self.tokenizer, "eos_id", None)
        ids = {}
        for i, (tokens, stream) in enumerate(zip(encoded, streams, strict=True)):
            request = engine.add(
                tokens,
                max_new_tokens=max_new_tokens,
                sampling=dataclasses.replace(sampling, seed=(sampling.seed + i) % 2**63),
                end_ids=[] if end is None else [end],
                stop=stream.add,
            )
            ids[request] = i
        while engine.busy:
            for output in engine.step():
                i = ids[output.id]
                ended = output.finish.value if output.finish else ""
                yield i, streams[i].take(final=bool(ended)), ended

    def encode(self, prompt: str) -> list[int]:
        """The prompt's tokens as training saw a document begin. ValueError if there is none, or no room for another."""
        if not prompt:
            raise ValueError("the prompt is empty: give some text")
        tokens = self.tokenizer.encode(prompt, add_bos=True, add_eos=False)
        if not tokens:
            raise ValueError(f"the tokenizer makes no token of the prompt {prompt!r}")
        if len(tokens) >= self.limit:
            raise ValueError(
                f"the prompt has {len(tokens)} tokens, the model's limit is {self.limit} with at least one new token: "
                "use a shorter one"
            )
        return tokens


def choose_stepper(model: RAttentionModel, impl: str) -> type[EagerStepper]:
    """How steps are computed. "auto" takes the CUDA graph where the kernels take the model, and says why not."""
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(IMPLS)}, got {impl!r}")
    if impl == "torch":
        return EagerStepper
    weight = model.norm.weight
    # Imported here: without a GPU nobody needs Triton.
    from flexrattn.decode import fast

    reason = fast.refusal(model.config, device=weight.device, dtype=weight.dtype)
    if not reason:
        return fast.GraphStepper if weight.device.type == "cuda" else fast.TritonStepper
    if impl == "triton":
        raise ValueError(f"impl 'triton' {reason}; impl 'torch' takes every model on every device")
    if weight.device.type == "cuda":
        logger.warning("decoding by torch operations, which is slow: the Triton step %s", reason)
    return EagerStepper


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flexrattn.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="PATH", help="dump folder, step folder, or exported folder")
    add("--prompt", metavar="TEXT", help="what to go on from; '-' reads it from stdin")
    add("--max-new-tokens", type=int, default=200, metavar="N")
    add("--temperature", type=float, default=0.8, help="0 takes the likeliest token (default: 0.8)")
    add("--top-k", type=int, default=0, help="keep the k likeliest tokens; 0: all")
    add(
        "--top-p",
        type=float,
        default=0.95,
        help="keep the likeliest tokens of this probability; 1: all (default: 0.95)",
    )
    add("--seed", type=int, default=0)
    add("--stop", nargs="+", default=[], metavar="TEXT", help="end before any of these")
    add("--tokenizer", metavar="bytes|FOLDER", help="in place of the run's own")
    add("--device", choices=("cpu", "cuda"), help="default: the GPU if there is one")
    add("--dtype", choices=DTYPES, help="default: bf16 on a GPU, fp32 on a CPU")
    add("--impl", choices=IMPLS, default="auto", help="how a step is computed (docs/generate.md)")
    add("--no-stream", action="store_true", help="print when all is done")
    add("--quiet", action="store_true", help="the text alone: no prompt, no line about speed")
    add("--export", metavar="FOLDER", help="write config.json and model.safetensors there, and generate nothing")
    return parser


def run(options: argparse.Namespace) -> None:
    if options.export is not None:
        if not options.export:
            raise ValueError("--export needs a folder, got ''")
        folder = export(find_checkpoint(options.checkpoint), options.export, dtype=DTYPES.get(options.dtype))
        print(f"wrote {folder}: python -m flexrattn.generate --checkpoint {folder} --prompt ...")
        return
    if options.prompt is None:
        raise ValueError('no prompt given: --prompt "some text", or --prompt - to read it from stdin')
    prompt = sys.stdin.read() if options.prompt == "-" else options.prompt
    sampling = Sampling(temperature=options.temperature, top_k=options.top_k, top_p=options.top_p, seed=options.seed)
    if not prompt:
        raise ValueError("the prompt is empty: give some text")
    if options.max_new_tokens < 1:
        raise ValueError(f"--max-new-tokens must be 1 or more, got {options.max_new_tokens}")
    check_device(options.device)
    generator = Generator.load(
        options.checkpoint,
        device=options.device,
        dtype=DTYPES.get(options.dtype),
        tokenizer=options.tokenizer,
        impl=options.impl,
    )
    generator.encode(prompt)  # a prompt that is refused is not printed
    begun = time.perf_counter()
    text = TextStream(generator.tokenizer, options.stop)
    if not options.quiet:
        print(prompt, end="", flush=True)
    pieces = []
    for _, piece, _ in generator._run([prompt], options.max_new_tokens, sampling, [text], 1):
        pieces.append(piece)
        if not options.no_stream:
            print(piece, end="", flush=True)
    print("".join(pieces) if options.no_stream else "", flush=True)
    if not options.quiet:
        seconds = time.perf_counter() - begun
        device = generator.model.norm.weight.device.type.upper()
        print(f"[{len(text.tokens)} tokens in {seconds:.1f} s on the {device}, prompt included]", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    try:
        run(make_parser().parse_args(arguments))
    except ValueError as error:
        print(f"generate: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130
    except BrokenPipeError:  # who reads has seen enough
        _drop_output()
        return 141
    except OSError as error:
        print(f"generate: error: {error}", file=sys.stderr)
        _drop_output()
        return 2
    return 0


def _drop_output() -> None:
    """What stdout does not take is not tried again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
