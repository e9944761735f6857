"""One training run as a process of its own, which ends when the one that started it does."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from flexrattn.ablate.code import ROOT

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None
SECONDS_TO_END = 15.0


def train_command(config: Path, *, ranks: int) -> list[str]:
    """`python train.py CONFIG`, or the same under torchrun with a port of its own."""
    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    return [sys.executable, *launcher, str(ROOT / "train.py"), str(config)]


@dataclass(frozen=True, kw_only=True)
class Slot:
    """A place for one run at a time. `devices`: what CUDA_VISIBLE_DEVICES says, None: as it is."""

    devices: str | None
    threads: int

    def environment(self) -> dict[str, str]:
        inherited = {
            k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT")
        }
        inherited.setdefault("OMP_NUM_THREADS", str(self.threads))
        # A mask of the user's own is found where this command was started.
        inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), inherited.get("PYTHONPATH")]))
        if self.devices is not None:
            inherited["CUDA_VISIBLE_DEVICES"] = self.devices
        return inherited


@dataclass
class Child:
    """A running command, its output in `log`."""

    process: subprocess.Popen[bytes]
    log: Path
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def returncode(self) -> int | None:
        """None while it runs."""
        return self.process.poll()


def start(command: Sequence[str], environment: Mapping[str, str], log: Path) -> Child:
    """Start a command in a session of its own: Ctrl-C reaches this process alone, which then ends its children."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        process = subprocess.Popen(
            command,
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_end_with_parent if _libc is not None else None,
        )
    return Child(process, log)


def _end_with_parent() -> None:
    # Even when the parent is killed with -9: an orphan would go on writing where the resumed study writes. SIGTERM and
    # not SIGKILL, so that torchrun ends its workers.
    assert _libc is not None
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def stop(children: Sequence[Child]) -> None:
    """End them and what they started, gently first."""
    for child in children:
        _signal_group(child, signal.SIGTERM)
    deadline = time.monotonic() + SECONDS_TO_END
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            _signal_group(child, signal.SIGKILL)
            child.process.wait()


def _signal_group(child: Child, number: int) -> None:
    try:
        os.killpg(child.process.pid, number)
    except ProcessLookupError:
        return


def last_line(log: Path) -> str:
    """What a failed run said last, its traceback's error where there is one."""
    try:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    except OSError:
        return "no output"
    for line in reversed(lines):
        if line.startswith("train.py: error:"):
            return line
    errors = [
        line for line in lines if "Error: " in line or line.startswith(("torch.OutOfMemoryError", "RuntimeError"))
    ]
    return (errors or lines or ["no output"])[-1][:300]
