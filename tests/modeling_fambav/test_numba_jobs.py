"""What the CPU kernels are made of: rows of float32 and bfloat16, and compiled code that is not kept too long."""

import os
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from modeling_fambav import numba_jobs, selective_scan_numba
from modeling_fambav.numba_jobs import kernel, launch, next_task, open_job, rows_of_any, sizes
from modeling_fambav.numba_vectors import LANES, load, store
from support.child_process import REPOSITORY, run_python


@kernel
def _copy(address):
    job = open_job(address, 2)
    width = sizes(job)[0]
    source, target = rows_of_any(job, 0), rows_of_any(job, 1)
    while True:
        row = next_task(job)
        if row < 0:
            break
        for column in range(0, width, LANES):
            store(target, row, column, load(source, row, column))


def _copied(values, dtype):
    result = torch.empty(values.shape, dtype=dtype)
    launch(_copy, len(values), (values.shape[1],), [values, result])
    return result


def _every_bfloat16():
    return torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).view(-1, 64)


def test_every_bfloat16_is_read_as_torch_reads_it():
    values = _every_bfloat16()
    torch.testing.assert_close(_copied(values, torch.float32), values.float(), rtol=0, atol=0, equal_nan=True)


def test_every_bfloat16_is_written_back():
    values = _every_bfloat16()
    torch.testing.assert_close(_copied(values.float(), torch.bfloat16), values, rtol=0, atol=0, equal_nan=True)


def test_float32_is_rounded_as_torch_rounds_it():
    random_bits = np.random.default_rng(0).integers(0, 2**32, size=(64, 4096), dtype=np.uint32)
    # Exactly between two bfloat16, a bit below and a bit above: to the even one, down and up
    random_bits[:8] = random_bits[:8] & 0xFFFF0000 | 0x8000
    random_bits[8:16] = random_bits[8:16] & 0xFFFF0000 | 0x7FFF
    random_bits[16:24] = random_bits[16:24] & 0xFFFF0000 | 0x8001
    values = torch.from_numpy(random_bits.view(np.float32))
    assert values.isnan().any() and values.isfinite().any()
    torch.testing.assert_close(
        _copied(values, torch.bfloat16), values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True
    )


def test_compiled_code_is_named_by_the_files_it_is_made_of(monkeypatch, tmp_path):
    """numba looks only at the file of a kernel; code that was compiled with other helpers would crash."""
    package = Path(numba_jobs.__file__).parent
    names = set()
    for path in package.glob("*_numba.py"):
        imported = re.findall(r"^from \.(\w+) import", path.read_text(), flags=re.MULTILINE)
        names |= {f"{name}.py" for name in imported if not name.endswith("_numba")}
    assert names == set(numba_jobs._SHARED_SOURCES) and len(names) >= 4
    for name in names:
        (tmp_path / name).write_text("before")
    monkeypatch.setattr(numba_jobs, "__file__", str(tmp_path / "numba_jobs.py"))
    before = numba_jobs._digest_of_sources()
    for name in names:
        (tmp_path / name).write_text("after")
        assert numba_jobs._digest_of_sources() != before
        (tmp_path / name).write_text("before")
    assert numba_jobs._digest_of_sources() == before
    assert re.fullmatch(r"_scan_forward_[0-9a-f]{8}", selective_scan_numba._scan_forward.__wrapped__.__qualname__)


@pytest.mark.slow
def test_a_package_in_a_zip_file(tmp_path):
    package = Path(numba_jobs.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for path in package.glob("*.py"):
            archive.write(path, f"modeling_fambav/{path.name}")
    code = (
        "from modeling_fambav import numba_jobs; "
        "print(numba_jobs.__file__, numba_jobs._digest_of_sources() == numba_jobs._SOURCES)"
    )
    result = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "package.zip"))
    assert result.returncode == 0, result.stderr
    assert "package.zip" in result.stdout and result.stdout.endswith("True\n")
    assert numba_jobs._SOURCES == numba_jobs._digest_of_sources()


# By one thread and by two: results, forward and backward, of the scan and the convolution
_TWO_THREADS = """
import sys
import torch
from support.helpers import random_tensor, scan_inputs
from modeling_fambav.causal_conv1d_numba import conv_backward, conv_forward
from modeling_fambav.selective_scan_numba import scan_backward, scan_forward

num_tokens = int(sys.argv[1])
x, dout = random_tensor(16, num_tokens, 384, seed=1), random_tensor(2, 16, num_tokens, 384, seed=2)
weight, bias = random_tensor(2, 384, 4, seed=3), random_tensor(2, 384, seed=4)
inputs = scan_inputs(2, 16, num_tokens, 384, 4)
results = []
for num_threads in (1, 2):
    torch.set_num_threads(num_threads)
    out, states = scan_forward(**inputs, keep_states=True)
    scan = [out, states, *scan_backward(out, **inputs, states=states)]
    results.append([*scan, conv_forward(x, weight, bias), *conv_backward(dout, x, weight, bias)])
print(all(torch.equal(one, two) for one, two in zip(*results)))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("num_tokens", "variable", "value"),
    [(65, "MALLOC_ARENA_MAX", "1"), (600, "MALLOC_MMAP_THRESHOLD_", "131072")],
)
def test_scratch_memory_lives_as_long_as_its_kernel(num_tokens, variable, value):
    """Where freed memory goes to the next thread that asks, or back to the system."""
    tests = str(Path(__file__).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join([tests, str(REPOSITORY)]), variable: value}
    result = run_python("-c", _TWO_THREADS, str(num_tokens), **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "True\n"
