"""What a result was made with: a hash of the sources and the versions that compute it."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Whatever a training run can import from here. This package only starts runs: what it gives them is hashed by itself.
SOURCES = ("flexrattn", "score_mods", "scan_kernels")
NOT_RUN = ("flexrattn/ablate/", "flexrattn/decode/", "flexrattn/inspect/", "flexrattn/generate.py")
VERSIONS = ("torch", "triton", "torchtitan")


def digest_of(value: Any) -> str:
    """16 hex digits of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


@cache
def code_hash() -> str:
    """16 hex digits of the sources that a run computes with and the versions below them."""
    files = {}
    for path in [ROOT / "train.py", *(p for folder in SOURCES for p in sorted((ROOT / folder).rglob("*.py")))]:
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and not name.startswith(NOT_RUN):
            files[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return digest_of([files, versions()])


def versions() -> dict[str, str]:
    found = {}
    for name in VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    return found


@cache
def commit() -> str:
    """`git describe` of the checkout, to find the code again; empty where there is no git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return described.stdout.strip() if described.returncode == 0 else ""
