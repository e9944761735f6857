"""Windows drawn by training step."""

import hashlib
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WindowSchedule:
    """window(step), uniform over `values`, from `seed` and the step alone; `window` from step `until` on.

    No generator has a state here: a resumed run draws what an uninterrupted one draws, and so does every rank.
    """

    values: range | tuple[int, ...]
    window: int
    seed: int = 0
    until: int | None = None

    def at(self, step: int) -> int:
        """The window of a training step, counted from 1."""
        if self.until is not None and step >= self.until:
            return self.window
        drawn = hashlib.blake2b(f"{self.seed} {step}".encode(), digest_size=8).digest()
        return self.values[int.from_bytes(drawn, "big") % len(self.values)]
