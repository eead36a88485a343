"""CPU kernels touch no memory but that of their tensors: their own tests once more, between guard pages."""

import re
import sys

import pytest
import torch

from support.child_process import REPOSITORY, run_python
from support.guarded_memory import Guarded

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory as Linux does"),
]

TESTS = [
    "test_selective_scan.py::test_scan_equals_the_reference",
    "test_selective_scan.py::test_scan_without_optional_arguments",
    "test_selective_scan.py::test_non_contiguous_inputs",
    "test_causal_conv1d.py::test_convolution_equals_torchs_own",
    "test_causal_conv1d.py::test_convolution_of_non_contiguous_inputs",
    "test_bidirectional_scan.py::test_equals_separate_operators_in_float64",
    "test_rms_norm.py",
    "test_token_fusion_numba.py",
]
# A norm that looks for its input a few rows from where it is
SHIFTED = """
from support import guarded_memory
import torch
from modeling_fambav import numba_jobs, rms_norm_numba

guarded_memory.pytest_configure()
address_of = numba_jobs._address

def shifted_address_of(kernel, operand):
    address, row_bytes, value_bytes = address_of(kernel, operand)
    return address + ROWS * row_bytes * (operand.name == "x"), row_bytes, value_bytes

numba_jobs._address = shifted_address_of
rms_norm_numba.rms_norm_forward(torch.ones(64, 32), torch.ones(32), 1e-5)
"""


def test_kernels_stay_between_guard_pages():
    files = [REPOSITORY / "tests" / "modeling_fambav" / test for test in TESTS]
    options = ["-q", "-p", "support.guarded_memory", "-p", "no:xdist", "-p", "no:cacheprovider"]
    options += ["-m", "not slow and not gpu"]
    result = run_python("-m", "pytest", *options, *files, PYTHONPATH=str(REPOSITORY / "tests"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    launches = re.findall(r"^(\w+\.\w+): (\d+) launches between guard pages$", result.stdout, re.MULTILINE)
    assert len(launches) == 10 and all(int(number) > 0 for _, number in launches), launches


@pytest.mark.parametrize("rows", [0, 1, -1])
def test_a_row_outside_would_end_the_process(rows):
    code = SHIFTED.replace("ROWS", str(rows))
    result = run_python("-c", code, PYTHONPATH=str(REPOSITORY / "tests"))
    assert result.returncode == 0 if rows == 0 else result.returncode < 0, result.stderr[-3000:]


@pytest.mark.parametrize("at_end", [True, False])
def test_a_value_between_rows_would_be_noticed(at_end):
    rows = torch.arange(12.0).view(3, 4)[:, :3]
    place = Guarded(rows, at_end)
    assert torch.equal(place.tensor, rows)
    place.check("rows")
    place.tensor.as_strided((1,), (1,), place.tensor.storage_offset() + 3).fill_(1.0)
    with pytest.raises(AssertionError, match="^rows: written between its rows$"):
        place.check("rows")
