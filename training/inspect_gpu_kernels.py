"""Compile the Triton kernels for GPUs that need not be there, and say what the compiler made of them.

    python training/inspect_gpu_kernels.py
    python training/inspect_gpu_kernels.py --targets sm_90 --json kernels.json

For every kernel and GPU: registers of a thread, bytes spilled, shared memory of a program and warps that fit a
processor; of each innermost loop its instructions, its loads from and stores to global memory, and the cycles that a
lone warp takes for a pass. From those follow limits of the time per layer of Vim-Ti at 224 px, batch 128, in bfloat16,
on an H100 and an A100:

    memory      every tensor moved once, at full bandwidth
    issue       every instruction issued, four a cycle and processor
    special     every exponential and the like, sixteen a cycle and processor
    latency     every program waiting alone for its own results, as many at a time as fit

They are estimates, not measurements: a kernel takes at least the longest of the four.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from fambav_training.gpu.assembly import Assembly, assembly_of


@dataclass(frozen=True)
class Target:
    """An architecture, and what one of its processors (AMD: compute units) holds."""

    backend: str
    architecture: int | str
    warp_size: int
    max_warps: int
    max_programs: int
    shared_memory: int  # bytes
    registers: int  # of 32 bits, of all threads
    register_unit: int  # a thread gets a multiple of this


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 64, 32, 164 << 10, 65536, 8),  # A100
    "sm_89": Target("cuda", 89, 32, 48, 24, 100 << 10, 65536, 8),  # L4, L40S, RTX 4090
    "sm_90": Target("cuda", 90, 32, 64, 32, 228 << 10, 65536, 8),  # H100, H200
    "sm_100": Target("cuda", 100, 32, 64, 32, 228 << 10, 65536, 8),  # B200
    "gfx942": Target("hip", "gfx942", 64, 32, 32, 64 << 10, 131072, 8),  # MI300
}


class Gpu(NamedTuple):
    """What the time limits need to know of a card."""

    target: str
    processors: int
    clock: float  # Hz
    bandwidth: float  # bytes/s


GPUS = {"H100": Gpu("sm_90", 132, 1.83e9, 3.35e12), "A100": Gpu("sm_80", 108, 1.41e9, 2.04e12)}


class Case(NamedTuple):
    """What a layer passes to the kernels."""

    dtype: torch.dtype
    state_size: int
    channels: int
    batch_size: int = 128
    num_tokens: int = 197
    time_step_rank: int = 12

    @property
    def label(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} N={self.state_size} E={self.channels}"


VIM_TI = Case(torch.bfloat16, 16, 384)
CASES = {
    "vim-ti": VIM_TI,
    "float32": Case(torch.float32, 16, 384),
    "64-states": Case(torch.bfloat16, 64, 384),
    "33-channels": Case(torch.float32, 4, 33),
}


class Launch(NamedTuple):
    """One launch of a kernel that did not take place."""

    kernel: str
    compiled: Any
    grid: tuple[int, ...]
    bytes_moved: int


class _Driver:
    """Stands in for that of a GPU while kernels are compiled for it."""

    def __init__(self, name: str):
        from triton.backends.compiler import GPUTarget

        self.name = name
        self.target = GPUTarget(TARGETS[name].backend, TARGETS[name].architecture, TARGETS[name].warp_size)

    def get_current_device(self) -> str:
        return self.name

    def get_current_stream(self, device: str) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def _recorded_launches(target: str) -> Iterator[list[Launch]]:
    """Within it, launches compile their kernel for the target, run nothing and are listed.

    The driver stays: a process that inspects kernels cannot run them.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    launches: list[Launch] = []
    run = JITFunction.run

    def compile_only(kernel: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        compiled = run(kernel, *args, grid=grid, warmup=True, **options)
        # What one tensor stands in for another is counted once
        tensors = {
            (arg.untyped_storage()._cdata, arg.storage_offset()): arg for arg in args if isinstance(arg, Tensor)
        }
        moved = sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())
        launches.append(Launch(kernel.__name__.lstrip("_"), compiled, grid, moved))

    driver.set_active(_Driver(target))
    with mock.patch.object(JITFunction, "run", compile_only):
        yield launches


def _launch_layer(case: Case) -> None:
    """All kernels of a layer that fuses nine tokens, forward and backward, on tensors without data."""
    from modeling_fambav.causal_conv1d_triton import conv_backward, conv_forward
    from modeling_fambav.selective_scan_triton import scan_backward, scan_forward
    from modeling_fambav.token_fusion_triton import match, merge, merge_backward

    def empty(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    batch_size, num_tokens, channels, state_size = case.batch_size, case.num_tokens, case.channels, case.state_size
    rank, float32 = case.time_step_rank, torch.float32
    xz = empty(batch_size, num_tokens, 2 * channels)
    conv_input, z = xz.chunk(2, dim=-1)
    conv_weight, conv_bias = empty(2, channels, 4, dtype=float32), empty(2, channels, dtype=float32)
    x = conv_forward(conv_input, conv_weight, conv_bias)
    chosen = empty(2, batch_size, num_tokens, rank + 2 * state_size)
    _, B, C = chosen.split([rank, state_size, state_size], dim=-1)
    A, D, dt_bias = empty(2, channels, state_size, dtype=float32), *(empty(2, channels, dtype=float32) for _ in "ab")
    inputs = (x, torch.empty_like(x), A, B, C, D, z, dt_bias, None)
    out, states = scan_forward(*inputs, keep_states=True)
    dx, *_ = scan_backward(torch.empty_like(out), *inputs, states)
    conv_backward(dx.to(case.dtype), conv_input, conv_weight, conv_bias)
    tokens = [empty(batch_size, num_tokens, channels // 2) for _ in "ab"]
    new_index = match(tokens[0], 0, 9, "cosine", "raster", num_tokens)
    merged = merge(tokens, new_index, num_tokens - 9, None)
    merge_backward([torch.empty_like(tensor) for tensor in merged], new_index, None)


def resident_warps(target: Target, registers: int, shared_memory: int, num_warps: int) -> int:
    """Warps that one processor holds of a kernel with so many registers a thread and so much memory a program."""
    unit = target.register_unit
    warps = target.registers // (math.ceil(registers / unit) * unit * target.warp_size)
    programs = min(target.max_programs, min(warps, target.max_warps) // num_warps)
    # Each program takes a kilobyte for the system
    programs = min(programs, target.shared_memory // (shared_memory + 1024))
    return programs * num_warps


def passes_of(kernel: str, case: Case, loops: int) -> list[int]:
    """How often a program runs through each of its innermost loops."""
    if kernel == "match":
        blocks = math.ceil(math.ceil(case.num_tokens / 2) / 64) ** 2  # of evens and odds
        return [blocks * math.ceil(case.channels // 2 / 32), blocks, blocks]
    if kernel == "merge":
        return [2]  # few places receive more than two tokens
    if kernel == "conv_backward":
        from modeling_fambav.causal_conv1d_triton import CHUNK, STEPS

        chunks = math.ceil(case.num_tokens / CHUNK)
        return [math.ceil(case.num_tokens / (chunks * STEPS)) + 1]  # what leads up to a chunk is as long as a pass
    passes = {"scan_forward": case.num_tokens, "scan_backward": math.ceil(case.num_tokens / 2)}  # by pairs of steps
    return [passes.get(kernel, 1)] * loops


def limits(gpu: Gpu, launch: Launch, assembly: Assembly, warps: int, passes: list[int]) -> dict[str, float]:
    """Milliseconds that a launch takes at least, by what limits it.

    Args:
        warps: that fit a processor.
        passes: of each loop, in a program.
    """
    num_warps = launch.compiled.metadata.num_warps
    total_warps = math.prod(launch.grid) * num_warps
    loops = list(zip(passes, assembly.loops, strict=True))
    instructions = sum(times * loop.instructions for times, loop in loops)
    special = sum(times * loop.counts["special"] for times, loop in loops)
    cycles = sum(times * loop.cycles for times, loop in loops)
    rounds = math.ceil(total_warps / (gpu.processors * warps))
    seconds = {
        "memory": launch.bytes_moved / gpu.bandwidth,
        "issue": total_warps * instructions / (4 * gpu.processors * gpu.clock),
        "special": total_warps * 32 * special / (16 * gpu.processors * gpu.clock),
        "latency": rounds * cycles / gpu.clock,
    }
    return {name: round(1000 * value, 4) for name, value in seconds.items()}


def inspect(target: str, case: Case) -> list[dict[str, Any]]:
    """A record for each kernel of a layer."""
    with _recorded_launches(target) as launches:
        _launch_layer(case)
    records = []
    for launch in launches:
        assembly, metadata = assembly_of(launch.compiled), launch.compiled.metadata
        warps = resident_warps(TARGETS[target], assembly.registers, metadata.shared, metadata.num_warps)
        record = {
            "kernel": launch.kernel,
            "target": target,
            "dtype": str(case.dtype).removeprefix("torch."),
            "state_size": case.state_size,
            "channels": case.channels,
            "registers": assembly.registers,
            "spills": assembly.spills,
            "shared_memory": metadata.shared,
            "num_warps": metadata.num_warps,
            "resident_warps": warps,
            "loops": [dataclasses.asdict(loop) for loop in assembly.loops],
        }
        if case == VIM_TI:
            passes = passes_of(launch.kernel, case, len(assembly.loops))
            record["estimated_ms"] = {
                name: limits(gpu, launch, assembly, warps, passes)
                for name, gpu in GPUS.items()
                if gpu.target == target
            }
        records.append(record)
    return records


def _print(records: list[dict[str, Any]]) -> None:
    print(f"{'kernel':14} {'case':22} {'target':7} {'registers':>9} {'spills':>6} {'shared':>6} {'warps':>5}  loops")
    for record in records:
        case = f"{record['dtype']} N={record['state_size']} E={record['channels']}"
        loops = "; ".join(
            f"{loop['instructions']} instructions, {loop['counts']['load']}+{loop['counts']['store']} loads and stores"
            + (f", {loop['cycles']} cycles" if loop["cycles"] else "")
            for loop in record["loops"]
        )
        print(
            f"{record['kernel']:14} {case:22} {record['target']:7} {record['registers']:9} {record['spills']:6}"
            f" {record['shared_memory']:6} {record['resident_warps']:5}  {loops}"
        )
    print(f"\nAt least so many milliseconds a layer, estimated ({VIM_TI.label}, batch {VIM_TI.batch_size}):\n")
    print(f"{'kernel':14} {'GPU':5} {'memory':>8} {'issue':>8} {'special':>8} {'latency':>8}")
    for record in records:
        for gpu, by_cause in record.get("estimated_ms", {}).items():
            print(f"{record['kernel']:14} {gpu:5} " + " ".join(f"{value:8.4f}" for value in by_cause.values()))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="what the kernels are given")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records here too")
    args = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("error: TRITON_INTERPRET=1: expected it unset, since interpreted kernels are not compiled")
    records = [record for target in args.targets for case in args.cases for record in inspect(target, CASES[case])]
    _print(records)
    if args.json:
        args.json.write_text(json.dumps(records, indent=1) + "\n")


if __name__ == "__main__":
    main()
