"""What the CPU kernels are made of: rows of float32 and bfloat16, and compiled code that is not kept too long."""

import re

import numpy as np
import pytest
import torch

pytest.importorskip("numba")

from modeling_fambav import numba_jobs, selective_scan_numba
from modeling_fambav.numba_jobs import kernel, launch, next_task, open_job, rows_of_any, sizes
from modeling_fambav.numba_vectors import LANES, load, store


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
    names = ("numba_vectors.py", "numba_jobs.py", "numba_channels.py", "selective_scan.py")
    folder = tmp_path / "package"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("before")
    monkeypatch.setattr(numba_jobs, "__file__", str(folder / "numba_jobs.py"))
    before = numba_jobs._digest_of_sources()
    for name in names:
        (folder / name).write_text("after")
        assert numba_jobs._digest_of_sources() != before
        (folder / name).write_text("before")
    assert numba_jobs._digest_of_sources() == before
    assert re.fullmatch(r"_scan_forward_[0-9a-f]{8}", selective_scan_numba._scan_forward.__wrapped__.__qualname__)
