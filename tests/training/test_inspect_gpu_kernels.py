"""All Triton kernels, compiled for five GPUs without one of them."""

import json

import pytest

from inspect_gpu_kernels import CASES, GPUS, TARGETS, resident_warps
from support.child_process import run_python

pytest.importorskip("triton")

KERNELS = ["conv_backward", "conv_forward", "match", "merge", "merge_backward", "scan_backward", "scan_forward"]
# By kernel, registers of a thread that leave enough warps on a processor; 255 is where spilling begins.
_MOST_REGISTERS = {
    "conv_forward": 128, "conv_backward": 168, "scan_forward": 168, "scan_backward": 255,
    "match": 128, "merge": 168, "merge_backward": 128,
}  # fmt: skip
# Innermost loops; compilers for AMD and sm_100 take turns out of one, or wait for tensor cores in loops.
_LOOPS = {"scan_forward": {1}, "scan_backward": {2}, "match": {3, 4, 5, 6}}
_OTHER_CASES = [name for name in CASES if name != "vim-ti"]


def inspected(folder, targets, cases):
    """Records of the script, run without the interpreter of the other tests."""
    file = folder / "kernels.json"
    words = ["--targets", *targets, "--cases", *cases, "--json", file]
    result = run_python("training/inspect_gpu_kernels.py", *words, TRITON_INTERPRET="0")
    assert result.returncode == 0, result.stderr
    records = json.loads(file.read_text())
    found = sorted((record["target"], record["kernel"]) for record in records)
    assert found == sorted((target, kernel) for target in targets for kernel in KERNELS for _ in cases)
    return records, result.stdout


def check(records):
    for record in records:
        name = f"{record['kernel']} for {record['target']}, {record['dtype']}, {record['state_size']} states"
        assert record["spills"] == 0, f"{name}: spills {record['spills']} bytes"
        # AMD has twice as many registers
        most = _MOST_REGISTERS[record["kernel"]] * (1 + (record["target"] == "gfx942"))
        assert 0 < record["registers"] <= most, f"{name}: {record['registers']} registers"
        assert record["shared_memory"] <= 32 << 10, f"{name}: {record['shared_memory']} bytes of shared memory"
        assert record["resident_warps"] >= 8, f"{name}: {record['resident_warps']} warps"
        # Those that wait for a tensor core are short
        assert sum(loop["instructions"] > 20 for loop in record["loops"]) >= min(3, len(record["loops"])), name
        assert len(record["loops"]) in _LOOPS.get(record["kernel"], {1}), name


def test_vim_ti(tmp_path):
    records, printed = inspected(tmp_path, list(TARGETS), ["vim-ti"])
    check(records)
    for gpu in GPUS.values():
        estimates = {record["kernel"]: record["estimated_ms"] for record in records if record["target"] == gpu.target}
        assert sorted(estimates) == KERNELS
        for by_gpu in estimates.values():
            (by_cause,) = by_gpu.values()
            assert list(by_cause) == ["memory", "issue", "special", "latency"]
            assert min(by_cause["memory"], by_cause["issue"], by_cause["latency"]) > 0 <= by_cause["special"]
        # The convolution reads B*T*E bfloat16 and writes two of them; weights and biases are small
        (by_cause,) = estimates["conv_forward"].values()
        assert by_cause["memory"] == pytest.approx(1000 * 3 * 128 * 197 * 384 * 2 / gpu.bandwidth, rel=0.01)
    assert "estimated" in printed and printed.count("H100") == printed.count("A100") == len(KERNELS)


@pytest.mark.slow
def test_other_dtypes_and_sizes(tmp_path):
    check(inspected(tmp_path, list(TARGETS), _OTHER_CASES)[0])


def test_interpreted_kernels_are_refused():
    result = run_python("training/inspect_gpu_kernels.py", TRITON_INTERPRET="1")
    assert result.returncode == 1 and result.stderr.startswith("error: TRITON_INTERPRET=1: expected it unset")


@pytest.mark.parametrize(
    "target, registers, shared_memory, num_warps, expected",
    [
        ("sm_90", 72, 128, 1, 28),  # 65536 / (72 * 32)
        ("sm_90", 20, 0, 1, 32),  # no more programs
        ("sm_90", 20, 0, 4, 64),  # no more warps
        ("sm_89", 20, 0, 4, 48),
        ("sm_80", 32, 40 << 10, 4, 16),  # four programs of 41 KiB
        ("gfx942", 164, 128, 1, 12),  # 131072 / (168 * 64)
    ],
)
def test_resident_warps(target, registers, shared_memory, num_warps, expected):
    assert resident_warps(TARGETS[target], registers, shared_memory, num_warps) == expected
