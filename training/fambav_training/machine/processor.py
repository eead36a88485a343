"""What the processor of this machine can do."""

from pathlib import Path

import torch
from transformers.utils import logging

logger = logging.get_logger(__name__)

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


def warn_of_slow_precision(device: torch.device, mixed_precision: str) -> None:
    """bfloat16 saves memory everywhere, and time only on a processor that multiplies it."""
    if device.type == "cpu" and mixed_precision == "bf16" and has_bf16_arithmetic() is False:
        logger.warning(
            "--mixed_precision bf16: this processor has no bfloat16 arithmetic and takes longer than in float32; "
            "--mixed_precision no is faster"
        )
