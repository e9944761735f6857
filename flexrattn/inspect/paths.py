"""Places in source files without what is in front of them on one machine, so that reports of two can be compared."""

from __future__ import annotations

import re
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
_INSTALLED = Path(torch.__file__).parents[1]
# Modules that Inductor generates: /tmp/torchinductor_NAME/ab/cabc...py
_GENERATED = re.compile(r"[^\s\"'()]*torchinductor_\w+/")
# Triton's cache gives kernels with the places of the environment that compiled them, which may be another.
_ELSEWHERE = re.compile(r"/[^\s\"'()]*/(?:site|dist)-packages/")


def without_paths(text: str) -> str:
    """`text` with this repository's files relative to it, and installed ones relative to site-packages."""
    for folder in (_INSTALLED, ROOT):
        text = text.replace(f"{folder}/", "")
    return _ELSEWHERE.sub("", _GENERATED.sub("torchinductor/", text))
