"""Where a result comes from: hardware, versions, code, and the memory that it took."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator

try:
    import resource
except ImportError:  # Windows
    resource = None

_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "mamba-ssm", "causal-conv1d")


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: what torch allocated on a GPU, the resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes on Linux, bytes on macOS


def used_memory_bytes(device: torch.device) -> int:
    """Memory of this process now, counted as `peak_memory_bytes` counts."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return psutil.Process().memory_info().rss


def status_bytes(field: str) -> int:
    """A field of /proc/self/status, such as VmRSS (in use) or VmHWM (peak).

    Raises:
        OSError: if the system has no such file, which Linux has.
    """
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def environment(accelerator: Accelerator) -> dict[str, Any]:
    """Device, processes, precision, versions and commit of this run."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor_name()
    return {
        "device": f"{device.type}: {name}",
        "num_processes": accelerator.num_processes,
        "num_threads": torch.get_num_threads(),
        "mixed_precision": accelerator.mixed_precision,
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": git_commit(),
    }


def git_commit() -> str | None:
    """Commit of the code, with `-dirty` if it was changed since; None outside a repository."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        answer = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()


def _versions() -> dict[str, str]:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"
