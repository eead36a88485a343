"""Times as medians over interleaved rounds, and the memory of training steps."""

import contextlib
import dataclasses
import multiprocessing
import statistics
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from fambav_training.benchmark.cases import Case
from fambav_training.benchmark.workload import CoreOperations, Workload
from fambav_training.machine.memory import give_back_freed_memory, keep_freed_memory
from fambav_training.machine.provenance import status_bytes
from modeling_fambav import set_selective_scan_backend


def measure(cases: list[Case], device: torch.device, rounds: int, train: bool, with_memory: bool) -> list[dict]:
    """Measure cases against each other. Returns a record for each, in seconds, bytes and images/s.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: if a compiled model would run uncompiled from some call on.
    """
    with _compiler_of(cases):
        return _measure(cases, device, rounds, train, with_memory)


@contextlib.contextmanager
def _compiler_of(cases: list[Case]) -> Iterator[None]:
    """Without the graphs of tables before: all models share one code object, for which torch keeps only a few."""
    if not any(case.compile_mode for case in cases):
        yield
        return
    torch._dynamo.reset()
    # Beyond that number torch would go on uncompiled, with no more than a warning
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        yield


def _measure(cases: list[Case], device: torch.device, rounds: int, train: bool, with_memory: bool) -> list[dict]:
    give_back_freed_memory()  # so that no table starts in the scattered heap of those before it
    workloads = [Workload(case, device) for case in cases]
    kinds = ("forward", "step") if train else ("forward",)
    seconds = {(workload.case, kind): [] for workload in workloads for kind in kinds}
    for kind in kinds:
        for workload in workloads:  # warm-up: compilation, caches, the allocator
            for _ in range(3 if device.type == "cuda" else 1):
                workload.seconds(getattr(workload, kind), 0.0)
        for _ in range(rounds):
            for workload in workloads:
                seconds[workload.case, kind].append(workload.seconds(getattr(workload, kind), 0.2))
    records = []
    for workload in workloads:
        case = workload.case
        record = {"label": case.label, **dataclasses.asdict(case), "mean_tokens": case.mean_tokens()}
        for kind in kinds:
            record[f"{kind}_seconds"] = statistics.median(seconds[case, kind])
            record[f"{kind}_images_per_second"] = case.batch_size / record[f"{kind}_seconds"]
        if train and with_memory:
            record["step_peak_bytes"] = peak_bytes(workload)
        records.append(record)
    return records


def measure_core_operations(device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of a forward pass without fusion, of its matrix products alone and of its scans alone."""
    case = Case("famba-v")
    workload, core = Workload(case, device), CoreOperations(case, device)
    functions = {"forward": workload.forward, "matrix products": core.products, "scans": core.scans}
    seconds = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            value = workload.seconds(function, 0.2)
            if round_number > 0:  # the first one warms up
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_bytes(workload: Workload) -> int:
    """Memory that training steps need at their peak beside the weights: activations, gradients, AdamW's averages."""
    set_selective_scan_backend(workload.case.backend)
    if workload.device.type == "cuda":
        torch.cuda.empty_cache()
        states = workload.optimizer.state.values()
        averages = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))
        before = torch.cuda.memory_allocated() - averages
        torch.cuda.reset_peak_memory_stats()
        workload.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # A process whose heap nothing else has grown
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak_bytes_on_cpu, workload.case).result()


def _peak_bytes_on_cpu(case: Case) -> int:
    """How far three training steps raise the resident set above what was there before them."""
    workload = Workload(case, torch.device("cpu"))
    set_selective_scan_backend(case.backend)
    warm = Workload(dataclasses.replace(case, batch_size=1), torch.device("cpu"))
    warm.step()  # compiled kernels and libraries are not part of a step's memory
    del warm
    give_back_freed_memory()
    keep_freed_memory()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        workload.step()
    return status_bytes("VmHWM") - before
