"""Times as medians over interleaved rounds, and the memory of training steps."""

import contextlib
import dataclasses
import multiprocessing
import statistics
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch

from fambav_training.benchmark.cases import Case
from fambav_training.benchmark.workload import CoreOperations, Workload
from fambav_training.machine.memory import give_back_freed_memory, keep_freed_memory
from fambav_training.machine.provenance import status_bytes
from modeling_fambav import set_selective_scan_backend


def measure(
    cases: list[Case],
    device: torch.device,
    rounds: int,
    train: bool,
    with_memory: bool,
    seconds: float = 0.2,
    on_error: Callable[[Case, Exception], None] | None = None,
) -> list[dict]:
    """Measure cases against each other.

    Args:
        cases: of one table.
        device: where they run.
        rounds: in which they take turns.
        train: whether training steps are measured, too.
        with_memory: whether their memory is.
        seconds: how long a timing in a round takes at least.
        on_error: called if a case fails, which is left out then; by default, its error ends the measurement.

    Returns:
        a record for each, in seconds, bytes and images/s.

    Raises:
        torch._dynamo.exc.FailOnRecompileLimitHit: if a compiled model would run uncompiled from some call on.
    """
    with _compiler_of(cases):
        return _measure(cases, device, rounds, train, with_memory, seconds, on_error)


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


def _measure(
    cases: list[Case],
    device: torch.device,
    rounds: int,
    train: bool,
    with_memory: bool,
    min_seconds: float,
    on_error: Callable[[Case, Exception], None] | None,
) -> list[dict]:
    give_back_freed_memory()  # so that no table starts in the scattered heap of those before it
    kinds = ("forward", "step") if train else ("forward",)
    seconds = {(case, kind): [] for case in cases for kind in kinds}
    bytes_of = {}
    workloads: dict[Case, Workload] = {}

    def prepare(case: Case) -> None:
        workloads[case] = Workload(case, device)

    def warm_up(case: Case, kind: str) -> None:  # compilation, caches, the allocator
        for _ in range(3 if device.type == "cuda" else 1):
            workloads[case].seconds(getattr(workloads[case], kind), 0.0)

    def take_time(case: Case, kind: str) -> None:
        seconds[case, kind].append(workloads[case].seconds(getattr(workloads[case], kind), min_seconds))

    def take_memory(case: Case) -> None:
        bytes_of[case] = peak_bytes(workloads[case])

    def of_all(function: Callable[..., None], *arguments: str) -> None:
        for case in tuple(left):
            try:
                function(case, *arguments)
            except Exception as error:
                if on_error is None:
                    raise
                left.remove(case)
                workloads.pop(case, None)
                on_error(case, error)

    left = list(cases)
    of_all(prepare)
    for kind in kinds:
        of_all(warm_up, kind)
        for _ in range(rounds):
            of_all(take_time, kind)
    if train and with_memory:
        of_all(take_memory)
    records = []
    for case in left:
        record = {"label": case.label, **dataclasses.asdict(case), "mean_tokens": case.mean_tokens()}
        for kind in kinds:
            record[f"{kind}_seconds"] = statistics.median(seconds[case, kind])
            record[f"{kind}_images_per_second"] = case.batch_size / record[f"{kind}_seconds"]
        if bytes_of.get(case) is not None:
            record["step_peak_bytes"] = bytes_of[case]
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


def peak_bytes(workload: Workload) -> int | None:
    """Memory that training steps need at their peak beside the weights: activations, gradients, AdamW's averages.

    None for CUDA graphs of torch.compile, whose tensors lie in a pool of their own that was made before; of recorded
    passes it is the memory of the same passes launched one by one.
    """
    if workload.case.compile_mode == "reduce-overhead":
        return None
    if workload.case.is_recorded:
        workload = Workload(dataclasses.replace(workload.case, is_recorded=False), workload.device)
        workload.step()
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
