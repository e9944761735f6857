"""Decoding with a cache that does not grow in local layers: prefill, steps, sampling, an engine (docs/generate.md)."""

from flexrattn.decode.cache import DecodeCache
from flexrattn.decode.prompt import prefill
from flexrattn.decode.step import decode_step

__all__ = ["DecodeCache", "decode_step", "prefill"]
