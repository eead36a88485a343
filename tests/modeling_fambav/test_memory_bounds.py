"""CPU kernels touch no memory but that of their tensors: their own tests once more, between guard pages."""

import re
import sys

import pytest

from support.child_process import REPOSITORY, run_python

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
KERNELS = {
    "causal_conv1d_numba._conv_backward",
    "causal_conv1d_numba._conv_forward",
    "rms_norm_numba._backward",
    "rms_norm_numba._forward",
    "selective_scan_numba._scan_backward",
    "selective_scan_numba._scan_forward",
    "token_fusion_numba._choose",
    "token_fusion_numba._find_partners",
    "token_fusion_numba._merge",
    "token_fusion_numba._merge_backward",
}
# A norm of 64 rows whose input has fewer, as the check of shapes does not notice here
TOO_FEW_ROWS = """
import torch
from modeling_fambav import rms_norm_numba
from support import guarded_memory

guarded_memory.pytest_configure()
check = rms_norm_numba.launch
rms_norm_numba.launch = lambda kernel, num_tasks, sizes, operands: check(
    kernel, num_tasks, sizes, [operands[0]._replace(tensor=operands[0].tensor[:ROWS]), *operands[1:]]
)
address = guarded_memory.numba_jobs._address
guarded_memory.numba_jobs._address = lambda kernel, operand: address(
    kernel, operand if operand.tensor is None else operand._replace(num_rows=len(operand.tensor))
)
rms_norm_numba.rms_norm_forward(torch.ones(64, 32), torch.ones(32), 1e-5)
"""


def test_kernels_stay_between_guard_pages():
    files = [REPOSITORY / "tests" / "modeling_fambav" / test for test in TESTS]
    options = ["-q", "-p", "support.guarded_memory", "-p", "no:xdist", "-p", "no:cacheprovider"]
    options += ["-m", "not slow and not gpu"]
    result = run_python("-m", "pytest", *options, *files, PYTHONPATH=str(REPOSITORY / "tests"))
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert set(re.findall(r"^guarded (\S+) \d+$", result.stdout, re.MULTILINE)) == KERNELS


@pytest.mark.parametrize("num_rows, is_ended", [(64, False), (63, True)])
def test_a_row_too_few_would_end_the_process(num_rows, is_ended):
    code = TOO_FEW_ROWS.replace("ROWS", str(num_rows))
    result = run_python("-c", code, PYTHONPATH=str(REPOSITORY / "tests"))
    assert (result.returncode < 0) == is_ended and (is_ended or result.returncode == 0), result.stderr[-3000:]
