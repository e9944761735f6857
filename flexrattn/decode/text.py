"""Tokens to text as they come, and where the text tells to stop."""

from __future__ import annotations

from collections.abc import Sequence

from torchtitan.components.tokenizer import BaseTokenizer

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """The text of a growing list of tokens, in pieces that are never taken back; it ends before a stop string.

    A character whose bytes are not all there yet is held back, and so is an end that may begin a stop string. A few
    tokens are decoded at a time, with the ones before them: how a token reads may depend on its neighbours.
    """

    def __init__(self, tokenizer: BaseTokenizer, stop: Sequence[str] = ()):
        if isinstance(stop, str):
            raise ValueError(f"stop takes a list of texts, got one: [{stop!r}] would be a list")
        for text in stop:
            if not text:
                raise ValueError("a stop string must not be empty")
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.tokens: list[int] = []
        self.text = ""  # what has been decoded, up to a stop string
        self.stopped = False
        self._given = 0  # characters of `text` that `take` has returned
        self._context = 0  # tokens [context, decoded) stand in front of what is decoded next
        self._decoded = 0

    def add(self, token: int) -> bool:
        """Take a token in; True once a stop string is in the text."""
        self.tokens.append(token)
        self._decode(final=False)
        return self.stopped

    def take(self, *, final: bool = False) -> str:
        """The text that is new and certain; with `final` all of it."""
        if final:
            self._decode(final=True)
        end = len(self.text)
        if not (final or self.stopped):
            end -= max((_overlap(self.text, stop) for stop in self.stop), default=0)
        piece = self.text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _decode(self, *, final: bool) -> None:
        if self.stopped:
            return
        before = self.tokenizer.decode(self.tokens[self._context : self._decoded])
        now = self.tokenizer.decode(self.tokens[self._context :])
        # Bytes of one character are at most four; what stays broken longer is broken.
        waits = now.endswith(_UNFINISHED) and len(self.tokens) - self._decoded < 4
        if len(now) <= len(before) or (waits and not final):
            return
        searched = max(0, len(self.text) - max(map(len, self.stop), default=0))
        self.text += now[len(before) :]
        self._context, self._decoded = self._decoded, len(self.tokens)
        found = [at for stop in self.stop if (at := self.text.find(stop, searched)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], True


def _overlap(text: str, stop: str) -> int:
    """The longest beginning of `stop` that `text` ends with."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
