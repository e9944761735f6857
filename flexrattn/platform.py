"""Make the CPU a device that torchtitan accepts, where there is no GPU.

torchtitan binds `device_type` and `device_module` at import in several of its modules, so `setup` has to run before
any of them is imported: `import flexrattn` does it. On a machine with a GPU nothing here takes effect, unless the
environment says FLEXRATTN_DEVICE=cpu.
"""

from __future__ import annotations

import os
import socket
import types

import torch

DEVICE_VARIABLE = "FLEXRATTN_DEVICE"


def device_type() -> str:
    """ "cuda" where a GPU can be used and FLEXRATTN_DEVICE does not ask for the CPU, else "cpu"."""
    wanted = os.environ.get(DEVICE_VARIABLE)
    if wanted not in (None, "", "cpu", "cuda"):
        raise ValueError(f"{DEVICE_VARIABLE} must be 'cpu' or 'cuda', got {wanted!r}")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{DEVICE_VARIABLE}=cuda, but torch {torch.__version__} sees no GPU on this machine")
    if wanted:
        return wanted
    return "cuda" if torch.cuda.is_available() else "cpu"


def _host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _peak_process_bytes() -> int:
    import resource

    # Linux counts in KiB.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _cpu_module() -> types.ModuleType:
    """torch.cpu with the calls torchtitan makes on a device module; memory is that of the process."""
    module = types.ModuleType("flexrattn_cpu_device")
    module.__dict__.update({k: v for k, v in torch.cpu.__dict__.items() if not k.startswith("__")})

    def memory_stats(device: object = None) -> dict[str, int]:
        peak = _peak_process_bytes()
        return {
            "active_bytes.all.peak": peak,
            "reserved_bytes.all.peak": peak,
            "num_alloc_retries": 0,
            "num_ooms": 0,
        }

    module.__dict__.update(
        get_device_name=lambda device=None: "CPU",
        current_device=lambda: 0,
        # Ranks on one machine share the CPU, so every LOCAL_RANK maps to device 0.
        device_count=lambda: 1,
        set_device=lambda device: None,
        get_device_properties=lambda device=None: types.SimpleNamespace(name="CPU", total_memory=_host_memory_bytes()),
        memory_stats=memory_stats,
        reset_peak_memory_stats=lambda device=None: None,
        empty_cache=lambda: None,
    )
    return module


def setup() -> None:
    """Tell torchtitan which device to use. Idempotent; must run before other torchtitan modules are imported."""
    if device_type() != "cpu":
        return
    from torchtitan.tools import utils

    utils.device_type = "cpu"
    utils.device_module = _cpu_module()


def ensure_process_group_environment() -> None:
    """Give a plain `python train.py` the variables that torchrun would set for one rank."""
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def world_size() -> int:
    """Ranks of this launch, before or after the process group exists."""
    return int(os.environ.get("WORLD_SIZE", "1"))
