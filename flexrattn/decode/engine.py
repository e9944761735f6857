"""Continuous batching over a fixed pool of cache slots: requests join and leave between steps.

A step prefills what fits into free slots, then decodes one token of every running request. Tokens stay on the device
from step to step. The host reads them `lag` steps later, from a copy that does not hold the device up: a request that
an end token or a stop string ends has then computed up to `lag` tokens too many, which nobody sees. What ends by its
number of tokens ends exactly.
"""

from __future__ import annotations

import itertools
import operator
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from numbers import Integral
from typing import Protocol

import torch
from torch import Tensor

from flexrattn.decode.cache import DecodeCache
from flexrattn.decode.prompt import SHORTEST, prefill
from flexrattn.decode.sampling import Mode, Sampling, SamplingRows, sample, widest
from flexrattn.decode.step import decode_step
from flexrattn.model import RAttentionModel


class Finish(StrEnum):
    STOP = "stop"  # an end token or the caller's stop condition
    LENGTH = "length"  # max_new_tokens, or the cache is full
    CANCELLED = "cancelled"


@dataclass(frozen=True, kw_only=True)
class Output:
    """A token of a request, or its end (token None): what `Engine.step` returns."""

    id: int
    token: int | None
    finish: Finish | None = None


class StopCondition(Protocol):
    def __call__(self, token: int) -> bool:
        """True ends the request; called once for each of its tokens, in order."""
        ...


@dataclass(kw_only=True)
class _Request:
    id: int
    prompt: list[int]
    max_new_tokens: int
    sampling: Sampling
    end_ids: frozenset[int]
    stop: StopCondition | None
    slot: int = -1
    dispatched: int = 0  # tokens that the device has been asked for
    received: int = 0


@dataclass(kw_only=True)
class _Read:
    """Tokens on their way to the host."""

    requests: list[_Request]
    token_B: Tensor
    ready: torch.cuda.Event | None = field(default=None)


def whole(name: str, value: int, least: int) -> int:
    """The value. ValueError if it is no integer, or below `least`."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")
    return int(value)


def _token_ids(what: str, tokens: Sequence[int] | Tensor) -> list[int]:
    try:
        return [operator.index(token) for token in tokens]
    except TypeError:
        shown = f"a tensor {tuple(tokens.shape)}" if isinstance(tokens, Tensor) else repr(tokens)
        raise ValueError(f"{what} must be a row of token ids, got {shown[:60]}") from None


class EagerStepper:
    """One token for all rows: `step` reads token_B and active_B, and writes the sampled tokens into token_B.

    This one is `decode_step` and `sample`; a faster one is a subclass.
    """

    fold_every = 1  # what it is fastest with

    def __init__(
        self, model: RAttentionModel, cache: DecodeCache, token_B: Tensor, active_B: Tensor, rows: SamplingRows
    ):
        self.model, self.cache, self.token_B, self.active_B, self.rows = model, cache, token_B, active_B, rows

    @torch.no_grad()
    def step(self, mode: Mode) -> None:
        logits_BV = decode_step(self.model, self.cache, self.token_B, self.active_B)
        self.token_B.copy_(sample(logits_BV, self.rows, self.cache.lengths_B, mode))


class Engine:
    """Generate for many requests at once. The results are those of running each alone.

    slots: requests that run at the same time; further ones queue. max_length: tokens of a request, its prompt included.
    lag: steps after which the host reads tokens (default: 1 on a GPU, 0 on a CPU).
    prefill_chunk, prefill_rows: the most prompt tokens and the most prompts of one call; a GPU compiles a kernel for
    each shape, so that the default there is one prompt.
    fold_every: keys that enter a linear branch's state at a time (default: the stepper's).
    stepper: `EagerStepper` by default; `flexrattn.decode.fast.GraphStepper` is one CUDA graph a step.
    """

    def __init__(
        self,
        model: RAttentionModel,
        *,
        slots: int,
        max_length: int,
        fold_every: int | None = None,
        lag: int | None = None,
        prefill_chunk: int = 8192,
        prefill_rows: int | None = None,
        stepper: type[EagerStepper] = EagerStepper,
    ):
        weight = model.norm.weight
        on_gpu = weight.device.type == "cuda"
        whole("slots", slots, 1)
        self.model = model
        self.cache = DecodeCache(
            model.config,
            rows=slots,
            max_length=max_length,
            device=weight.device,
            dtype=weight.dtype,
            fold_every=stepper.fold_every if fold_every is None else fold_every,
        )
        self.lag = (1 if on_gpu else 0) if lag is None else whole("lag", lag, 0)
        self.prefill_chunk = whole("prefill_chunk", prefill_chunk, 1)
        self.prefill_rows = (1 if on_gpu else slots) if prefill_rows is None else whole("prefill_rows", prefill_rows, 1)
        self._buckets = on_gpu
        device = self.cache.device
        self.token_B = torch.zeros(slots, dtype=torch.int64, device=device)
        self.active_B = torch.zeros(slots, dtype=torch.bool, device=device)
        self.sampling = SamplingRows(slots, device)
        self.stepper = stepper(model, self.cache, self.token_B, self.active_B, self.sampling)
        self._ids = itertools.count()
        self._queue: deque[_Request] = deque()
        self._slots: list[_Request | None] = [None] * slots
        self._alive: dict[int, _Request] = {}
        self._reads: deque[_Read] = deque()
        self._outputs: list[Output] = []  # not returned yet
        self._flags: list[bool] = [False] * slots  # active_B, as the host knows it
        self.decode_steps = 0

    @property
    def busy(self) -> bool:
        """Whether a further `step` has something to do or to return."""
        return bool(self._alive or self._outputs)

    @property
    def free_slots(self) -> int:
        return sum(request is None for request in self._slots)

    @property
    def queued(self) -> int:
        return len(self._queue)

    def add(
        self,
        prompt: Sequence[int] | Tensor,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        end_ids: Sequence[int] = (),
        stop: StopCondition | None = None,
    ) -> int:
        """Queue a request; its id. ValueError: an empty or too long prompt, unknown ids, no new tokens.

        A stop condition that raises ends its request as cancelled, and `step` raises what it raised.
        """
        prompt = _token_ids("the prompt", prompt)
        if not prompt:
            raise ValueError("the prompt is empty: give at least one token")
        if len(prompt) >= self.cache.max_length:
            raise ValueError(
                f"the prompt has {len(prompt)} tokens, the limit is {self.cache.max_length} with at least one new "
                "token: shorten it or raise max_length"
            )
        vocabulary = self.model.config.vocab_size
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            wrong = next(token for token in prompt if not 0 <= token < vocabulary)
            raise ValueError(f"the prompt holds token {wrong}, the model's vocabulary is 0 to {vocabulary - 1}")
        max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
        if sampling is not None and not isinstance(sampling, Sampling):
            raise ValueError(f"sampling must be a Sampling, got {sampling!r}")
        if stop is not None and not callable(stop):
            raise ValueError(f"stop must be called with each token, got {stop!r}")
        room = self.cache.max_length - len(prompt)
        request = _Request(
            id=next(self._ids),
            prompt=prompt,
            max_new_tokens=min(max_new_tokens, room),
            sampling=sampling or Sampling(),
            end_ids=frozenset(_token_ids("end_ids", end_ids)),
            stop=stop,
        )
        self._queue.append(request)
        self._alive[request.id] = request
        return request.id

    def cancel(self, id: int) -> bool:
        """End a request now; the next step returns its end. False if it had ended already."""
        request = self._alive.get(id)
        if request is None:
            return False
        if request.slot < 0:
            self._queue.remove(request)
        self._end(request)
        self._outputs.append(Output(id=id, token=None, finish=Finish.CANCELLED))
        return True

    @torch.no_grad()
    def step(self) -> list[Output]:
        """Prefill what fits, decode one token of every running request, return what has reached the host.

        Where a prefill or a stop condition raises, nothing is lost: what had reached the host comes with the next step,
        and prompts whose prefill failed wait again.
        """
        self._admit()
        running = [r for r in self._slots if r is not None and r.dispatched < r.max_new_tokens]
        if running:
            self._set_active(running)
            self.stepper.step(widest([r.sampling.mode for r in running]))
            self.decode_steps += 1
            self._sent(running)
        # Nothing new is under way: what is left need not wait for later steps.
        behind = self.lag if running else 0
        while len(self._reads) > behind:
            self._receive(self._reads.popleft())
        outputs, self._outputs = self._outputs, []
        return outputs

    def run(self) -> dict[int, list[int]]:
        """Step until nothing is left: the new tokens of every request that ends on the way."""
        tokens: dict[int, list[int]] = {id: [] for id in self._alive}
        while self.busy:
            for output in self.step():
                if output.token is not None:
                    tokens.setdefault(output.id, []).append(output.token)
        return tokens

    def _admit(self) -> None:
        while self._queue and self.free_slots:
            joining: list[_Request] = []
            for slot, holder in enumerate(self._slots):
                if holder is None and self._queue and len(joining) < self.prefill_rows:
                    request = self._queue.popleft()
                    request.slot, self._slots[slot] = slot, request
                    joining.append(request)
            try:
                self._prefill(joining)
            except BaseException:
                self._wait_again(joining)
                raise

    def _wait_again(self, requests: list[_Request]) -> None:
        ids = {request.id for request in requests}
        # Those whose prompts were short may have drawn a token. They draw the same one again.
        self._reads = deque(read for read in self._reads if not ids & {request.id for request in read.requests})
        for request in reversed(requests):
            self._slots[request.slot] = None
            request.slot, request.dispatched = -1, 0
            self._queue.appendleft(request)

    def _prefill(self, joining: list[_Request]) -> None:
        for request in joining:
            self.sampling.set(request.slot, request.sampling)
        self.cache.reset([request.slot for request in joining])
        longest = max(len(request.prompt) for request in joining)
        for begin in range(0, longest, self.prefill_chunk):
            now = [r for r in joining if len(r.prompt) > begin]
            parts = [r.prompt[begin : begin + self.prefill_chunk] for r in now]
            T = self._bucket(max(map(len, parts)))
            tokens = torch.tensor([part + [0] * (T - len(part)) for part in parts], device=self.cache.device)
            rows = [r.slot for r in now]
            logits_NV = prefill(self.model, self.cache, tokens, rows=rows, counts=[len(part) for part in parts])
            last = [i for i, r in enumerate(now) if len(r.prompt) <= begin + self.prefill_chunk]
            if last:
                row_N = torch.tensor([rows[i] for i in last], device=self.cache.device)
                settings, ends = self.sampling.of(row_N), [now[i] for i in last]
                mode = widest([r.sampling.mode for r in ends])
                self.token_B[row_N] = sample(logits_NV[last], settings, self.cache.lengths_B[row_N], mode)
                self._sent(ends)

    def _bucket(self, length: int) -> int:
        """Prompt lengths that get a kernel of their own on a GPU: powers of two, up to the chunk."""
        if not self._buckets:
            return length
        bucket = max(SHORTEST, 1 << (length - 1).bit_length())
        return min(bucket, self.prefill_chunk) if length <= self.prefill_chunk else length

    def _set_active(self, running: list[_Request]) -> None:
        slots = {request.slot for request in running}
        flags = [slot in slots for slot in range(len(self._slots))]
        if flags != self._flags:
            self._flags = flags
            self.active_B.copy_(torch.tensor(flags), non_blocking=True)

    def _sent(self, requests: list[_Request]) -> None:
        for request in requests:
            request.dispatched += 1
        if self.token_B.device.type == "cuda":
            token_B = torch.empty(self.token_B.shape, dtype=self.token_B.dtype, pin_memory=True)
            token_B.copy_(self.token_B, non_blocking=True)
            ready = torch.cuda.Event()
            ready.record()
            self._reads.append(_Read(requests=requests, token_B=token_B, ready=ready))
        else:
            self._reads.append(_Read(requests=requests, token_B=self.token_B.clone()))

    def _receive(self, read: _Read) -> None:
        if read.ready is not None:
            read.ready.synchronize()
        values = read.token_B.tolist()
        failure: Exception | None = None
        for request in read.requests:
            if request.id not in self._alive:
                continue  # it ended while the token was computed
            token = values[request.slot]
            request.received += 1
            finish = None
            try:
                if token in request.end_ids or (request.stop is not None and request.stop(token)):
                    finish = Finish.STOP
                elif request.received == request.max_new_tokens:
                    finish = Finish.LENGTH
            except Exception as error:  # the caller's; the others' tokens are here, too
                finish, failure = Finish.CANCELLED, failure or error
            self._outputs.append(Output(id=request.id, token=token, finish=finish))
            if finish is not None:
                self._end(request)
        if failure is not None:
            raise failure

    def _end(self, request: _Request) -> None:
        del self._alive[request.id]
        if request.slot >= 0:
            self._slots[request.slot] = None
