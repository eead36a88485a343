"""What the processor of this machine can do."""

from pathlib import Path

_CPUINFO = Path("/proc/cpuinfo")
# As Linux names the instructions that multiply bfloat16 numbers, on x86 and on Arm
_BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}


def has_bf16_arithmetic() -> bool | None:
    """Whether the CPU multiplies bfloat16 numbers itself; None where the system does not say, as macOS and Windows."""
    try:
        lines = _CPUINFO.read_text().splitlines()
    except OSError:
        return None
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), None)
    return None if flags is None else not _BF16_FLAGS.isdisjoint(flags.split())
