"""Whether the processor has bfloat16 arithmetic, from what Linux says of it, and what follows."""

import pytest
import torch

from fambav_training.machine import processor


@pytest.mark.parametrize(
    "text, expected",
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512_bf16 clzero\n", True),
        ("processor\t: 0\nflags\t\t: fpu avx2 bmi2\n", False),
        ("processor\t: 0\nFeatures\t: fp asimd i8mm bf16\n", True),
        ("processor\t: 0\n", None),
        (None, None),
    ],
)
def test_flags_of_the_processor(text, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "_CPUINFO", tmp_path / "cpuinfo")
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    assert processor.has_bf16_arithmetic() is expected


@pytest.mark.parametrize(
    "device, precision, has_arithmetic, warns",
    [
        ("cpu", "bf16", False, True),
        ("cpu", "bf16", True, False),
        ("cpu", "bf16", None, False),
        ("cpu", "no", False, False),
        ("cuda", "bf16", False, False),
    ],
)
def test_bfloat16_without_its_arithmetic_is_said_to_be_slow(
    device, precision, has_arithmetic, warns, monkeypatch, caplog
):
    monkeypatch.setattr(processor, "has_bf16_arithmetic", lambda: has_arithmetic)
    processor.warn_of_slow_precision(torch.device(device), precision)
    assert ("--mixed_precision no is faster" in caplog.text) is warns
