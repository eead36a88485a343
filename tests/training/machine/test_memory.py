"""Freed memory is kept for the next tensor, by all scripts that compute much."""

import importlib
import sys

import pytest

from support.child_process import REPOSITORY, run_python

TRAINING = REPOSITORY / "training"
SCRIPTS = {  # and what they cannot do without
    "benchmark": [],
    "demo_app": ["model"],
    "evaluate_checkpoint": ["model", "--dataset_name", "digits"],
    "quantize": ["model", "out", "--dataset_name", "digits"],
    "segment_shapes": [],
    "store_teacher_views": ["teacher", "out", "--dataset_name", "digits"],
    "study_checkpoint": ["model", "--dataset_name", "digits"],
    "train": [],
    "train_teacher": ["out", "--dataset_name", "digits"],
}
COUNT_PAGES = """
import resource, sys, torch
sys.path.insert(0, sys.argv[2])
from fambav_training.machine.memory import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):
    torch.ones(2**24)  # larger than what malloc keeps of itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the allocator of glibc")
def test_kept_memory_is_not_fetched_from_the_system_again():
    kept, fetched = (int(run_python("-c", COUNT_PAGES, word, TRAINING).stdout) for word in ("keep", "fetch"))
    assert kept < fetched / 10


@pytest.mark.parametrize("name", SCRIPTS)
def test_script_keeps_freed_memory(name, monkeypatch):
    class Kept(Exception):
        pass

    def keep():
        raise Kept

    script = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *SCRIPTS[name]])
    monkeypatch.setattr(script, "keep_freed_memory", keep)
    with pytest.raises(Kept):
        script.main()
