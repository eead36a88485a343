"""What the CPU kernels are made of: rows of float32 and bfloat16, and compiled code that is not kept too long."""

import importlib.util
import os
import re
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from transformers.testing_utils import CaptureLogger

pytest.importorskip("numba")

from modeling_fambav import numba_jobs, selective_scan_numba
from modeling_fambav.numba_channels import FLOATS
from modeling_fambav.numba_jobs import Operand, buffer, float_rows, kernel, launch, next_task, open_job, sizes
from modeling_fambav.numba_vectors import LANES, load, store
from support.child_process import REPOSITORY, run_python


@kernel
def _copy(address):
    job = open_job(address, 2)
    width = sizes(job)[0]
    source, target = float_rows(job, 0), float_rows(job, 1)
    while True:
        row = next_task(job)
        if row < 0:
            break
        for column in range(0, width, LANES):
            store(target, row, column, load(source, row, column))


def _copied(values, dtype):
    num_rows, num_columns = values.shape
    result = buffer("target", num_rows, num_columns, dtype)
    launch(_copy, num_rows, (num_columns,), [Operand("source", values, num_rows, num_columns, FLOATS), result])
    return result.tensor


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


@pytest.mark.parametrize(
    "source",
    [
        torch.zeros(4, 16, dtype=torch.float64),
        torch.zeros(4, 16, dtype=torch.float16),
        torch.zeros(4, 16, dtype=torch.int64),
        torch.zeros(4, 16, device="meta"),
        torch.zeros(3, 16),
        torch.zeros(4, 15),
        torch.zeros(64),
        torch.zeros(16, 4).mT,
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}{tensor.device}{tensor.stride()}",
)
def test_a_kernel_refuses_what_it_would_misread(source):
    target = buffer("target", 4, 16, fill=7)
    with pytest.raises(ValueError, match=r"^source of the kernel _copy (is|has) .*: expected"):
        launch(_copy, 4, (16,), [Operand("source", source, 4, 16, FLOATS), target])
    assert torch.equal(target.tensor, torch.full((4, 16), 7.0))
    zeros = Operand("source", torch.zeros(4, 16), 4, 16)
    with pytest.raises(ValueError, match="^target of the kernel _copy"):
        launch(_copy, 4, (16,), [zeros, Operand("target", source, 4, 16)])


def test_compiled_code_is_named_by_the_files_it_is_made_of():
    """numba looks only at the file of a kernel; code that was compiled with other helpers would crash."""
    package = Path(numba_jobs.__file__).parent
    names = set()
    for path in package.glob("*_numba.py"):
        imported = re.findall(r"^from \.(\w+) import", path.read_text(), flags=re.MULTILINE)
        names |= {name for name in imported if not name.endswith("_numba")}
    assert names == set(numba_jobs._SHARED_SOURCES) and len(names) >= 4
    assert re.fullmatch(r"_scan_forward_[0-9a-f]{8}", selective_scan_numba._scan_forward.__wrapped__.__qualname__)


_DOUBLE = """
import numpy as np
from modeling_fambav.numba_jobs import kernel, open_job, rows, sizes
from modeling_fambav.numba_vectors import load_scalar, store_scalar


@kernel
def double(address):
    job = open_job(address, 1)
    values = rows(job, 0)
    for column in range(sizes(job)[0]):
        store_scalar(values, 0, column, np.float32(2.0) * load_scalar(values, 0, column))
"""


def _doubled(path: Path) -> tuple[list[float], str]:
    """Compile a kernel of a new file, or load it from the files beside it, and run it; also what was logged."""
    path.write_text(_DOUBLE)
    os.utime(path, (0, 0))  # numba compiles a file again that is newer
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {path.stem: module}), CaptureLogger(numba_jobs.logger) as captured:
        spec.loader.exec_module(module)
    values = buffer("values", 1, 3, fill=4)
    launch(module.double, 1, (3,), [values])
    return values.tensor[0].tolist(), captured.out


@pytest.fixture
def no_warning_yet(monkeypatch):
    monkeypatch.setattr(numba_jobs, "_has_warned", False)
    monkeypatch.setattr(numba_jobs, "_has_said_why", False)
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)


def test_compiled_code_is_kept_beside_its_file(no_warning_yet, tmp_path):
    values, said = _doubled(tmp_path / "kernels.py")
    assert values == [8.0] * 3
    assert {path.suffix for path in (tmp_path / "__pycache__").iterdir()} >= {".nbi", ".nbc"}
    assert said.count("\n") == 1 and f"the next process finds them in {tmp_path / '__pycache__'}." in said


def test_compiling_is_said_once_and_only_where_it_is_done(no_warning_yet, monkeypatch, tmp_path):
    assert _doubled(tmp_path / "first.py")[1] != ""
    assert _doubled(tmp_path / "second.py") == ([8.0] * 3, "")
    monkeypatch.setattr(numba_jobs, "_has_said_why", False)  # as in another process
    assert _doubled(tmp_path / "first.py") == ([8.0] * 3, "")


def test_without_a_place_to_keep_compiled_code(no_warning_yet, monkeypatch, tmp_path):
    def is_read_only(locator):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("numba.core.caching._CacheLocator.ensure_cache_path", is_read_only)
    values, said = _doubled(tmp_path / "kernels.py")
    assert values == [8.0] * 3
    assert said.count("\n") == 1 and "no locator available" in said and "Set NUMBA_CACHE_DIR to a folder" in said
    assert _doubled(tmp_path / "kernels.py") == ([8.0] * 3, "")  # said once


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_damaged_compiled_code(no_warning_yet, tmp_path, suffix, kept_bytes):
    _doubled(tmp_path / "kernels.py")
    (damaged,) = (tmp_path / "__pycache__").glob(f"*{suffix}")
    damaged.write_bytes(damaged.read_bytes()[:kept_bytes])
    values, said = _doubled(tmp_path / "kernels.py")
    assert values == [8.0] * 3
    assert "cannot be kept on disk" in said and "empty the one that is there" in said


def test_a_kernel_that_cannot_be_compiled_says_why(no_warning_yet):
    with pytest.raises(Exception, match="nonsense"), CaptureLogger(numba_jobs.logger) as captured:
        kernel(lambda address: address.nonsense)
    assert captured.out == ""


@pytest.mark.slow
def test_processes_that_compile_at_the_same_time(tmp_path):
    code = (
        "import torch; from modeling_fambav.rms_norm import rms_norm; from support.helpers import random_tensor; "
        "print(rms_norm(random_tensor(3, 32, seed=1), torch.ones(32), 1e-5).sum().item())"
    )
    tests = str(Path(__file__).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join([tests, str(REPOSITORY)]), "NUMBA_CACHE_DIR": str(tmp_path)}
    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(lambda _: run_python("-c", code, **environment), range(2)))
    after = run_python("-c", code, **environment)
    assert {result.stdout for result in (*first, after)} == {first[0].stdout} and first[0].stdout
    assert all(result.stderr.count("compiles its CPU kernels") == 1 for result in first)
    assert after.stderr == ""


@pytest.mark.slow
def test_a_package_in_a_zip_file(tmp_path):
    package = Path(numba_jobs.__file__).parent
    with zipfile.ZipFile(tmp_path / "package.zip", "w") as archive:
        for path in package.glob("*.py"):
            archive.write(path, f"modeling_fambav/{path.name}")
    code = "from modeling_fambav import numba_jobs; print(numba_jobs.__file__, numba_jobs._SUFFIX)"
    result = run_python("-c", code, cwd=tmp_path, PYTHONPATH=str(tmp_path / "package.zip"))
    assert result.returncode == 0, result.stderr
    assert "package.zip" in result.stdout and result.stdout.endswith(f" {numba_jobs._SUFFIX}\n")


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
    [(73, "MALLOC_ARENA_MAX", "1"), (600, "MALLOC_MMAP_THRESHOLD_", "131072")],
)
def test_scratch_memory_lives_as_long_as_its_kernel(num_tokens, variable, value):
    """Where freed memory goes to the next thread that asks, or back to the system."""
    tests = str(Path(__file__).parents[1])
    environment = {"PYTHONPATH": os.pathsep.join([tests, str(REPOSITORY)]), variable: value}
    result = run_python("-c", _TWO_THREADS, str(num_tokens), **environment)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "True\n"
