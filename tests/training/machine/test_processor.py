"""Whether the processor has bfloat16 arithmetic, from what Linux says of it."""

import pytest

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
