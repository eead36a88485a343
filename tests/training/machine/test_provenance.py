"""Memory of the process against Linux's own account, and on systems that lack what Linux has."""

import sys
from types import SimpleNamespace

import pytest
import torch

from fambav_training.machine import provenance
from fambav_training.machine.provenance import peak_memory_bytes, status_bytes, used_memory_bytes
from support.child_process import run_python

CPU = torch.device("cpu")

# `resource` is missing on Windows, and so is the handle of the process itself that ctypes opens elsewhere.
_WINDOWS = """
import ctypes, os, sys
from types import SimpleNamespace
import psutil, torch, transformers.image_processing_utils  # which have Windows code of their own
sys.modules["resource"] = None
load, open_file = ctypes.CDLL.__init__, os.open

def load_by_name(self, name, *arguments, **options):
    if name is None:
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    load(self, name, *arguments, **options)

def open_no_folder(path, *arguments, **options):
    if os.path.isdir(path):
        raise PermissionError(13, "Permission denied", str(path))
    return open_file(path, *arguments, **options)

ctypes.CDLL.__init__, os.open = load_by_name, open_no_folder
sys.path.insert(0, "training")
import train
from fambav_training.machine import provenance
from fambav_training.run import checkpointing
memory = SimpleNamespace(rss=1, peak_wset=2)
provenance.psutil = SimpleNamespace(Process=lambda: SimpleNamespace(memory_info=lambda: memory))
checkpointing.os = SimpleNamespace(**{**vars(os), "name": "nt"})
sys.argv = ["train.py", *sys.argv[1:]]
train.main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_memory_is_that_of_the_system():
    block = torch.ones(2**23)  # 32 MiB
    assert used_memory_bytes(CPU) == pytest.approx(status_bytes("VmRSS"), rel=0.05)
    assert peak_memory_bytes(CPU) == pytest.approx(status_bytes("VmHWM"), rel=0.05)
    assert used_memory_bytes(CPU) > block.nbytes


def test_peak_without_the_resource_module(monkeypatch):
    monkeypatch.setattr(provenance, "resource", None)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(peak_wset=123))
    monkeypatch.setattr(provenance.psutil, "Process", lambda: process)
    assert peak_memory_bytes(CPU) == 123


@pytest.mark.slow
def test_training_where_windows_differs(tmp_path):
    """Without `resource`, without a handle of the process itself, and with folders that cannot be opened."""
    words = ["--dataset_name", "digits", "--max_train_samples", "128", "--max_train_steps", "2", "--image_size", "8"]
    words += ["--patch_size", "4", "--hidden_size", "16", "--num_hidden_layers", "2", "--fusion_tokens", "1", "--cpu"]
    words += ["--max_eval_samples", "32", "--checkpointing_steps", "1", "--output_dir", str(tmp_path / "out")]
    process = run_python("-c", _WINDOWS, *words)
    assert process.returncode == 0, process.stderr
    assert (tmp_path / "out" / "checkpoints" / "step_000002" / "trainer_state.json").exists()
    assert (tmp_path / "out" / "all_results.json").exists()
