"""Time and memory of Famba-V, with and without token fusion, beside DeiT of the same size.

    make bench                                             # this machine, about ten minutes on two cores
    python training/benchmark.py --suite gpu --device cuda # everything that only a GPU can show, under ten minutes

Times are medians over interleaved rounds after a warm-up, so that all cases of a table share whatever the machine is
doing; compare figures within one run only. Memory is the peak of training steps beside the weights, in a process of
its own on a CPU, of what torch allocated on a GPU. Writes benchmark.json, benchmark.md and benchmark.png to
`--output_dir`.
"""

import argparse
import dataclasses
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fambav_training.machine.memory import give_back_freed_memory, keep_freed_memory
from fambav_training.machine.provenance import environment, status_bytes
from fambav_training.markdown import markdown_table
from fambav_training.paper.tables import TABLE_1_TOKENS
from modeling_fambav import FambaVConfig, FambaVForImageClassification, set_selective_scan_backend
from modeling_fambav.selective_scan import selective_scan

_WIDTHS = {"ti": 192, "s": 384}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SMALL_R = "Ti geometry, upper, few tokens removed per layer"  # the table that asks when fusion begins to pay
# The paper's budgets at 224 px; other image sizes remove the same share of their tokens.
_PAPER_TOKENS = {"none": 9, **TABLE_1_TOKENS}


@dataclass(frozen=True)
class Case:
    """One model and one shape of input.

    Attributes:
        family: `"famba-v"` (24 layers) or `"deit"` (12 layers, transformers' ViT).
        size: `"ti"` or `"s"`.
        strategy: fusion strategy of famba-v.
        fusion_tokens: tokens removed per fused layer; the paper's budget if None.
        backend: scan backend; chosen by device if None.
        compile_mode: mode of torch.compile, or None for eager.
    """

    family: str
    size: str = "ti"
    strategy: str = "none"
    image_size: int = 224
    batch_size: int = 8
    dtype: str = "float32"
    fusion_tokens: int | None = None
    backend: str | None = None
    compile_mode: str | None = None

    @property
    def label(self) -> str:
        name = f"{'Famba-V' if self.family == 'famba-v' else 'DeiT'}-{self.size.capitalize()}"
        extras = [f"r={self.fusion_tokens}" if self.fusion_tokens else None, self.backend, self.compile_mode]
        return " ".join([name, *([self.strategy] if self.family == "famba-v" else []), *filter(None, extras)])

    def config(self) -> FambaVConfig:
        """Configuration of a famba-v case."""
        num_tokens = (self.image_size // 16) ** 2 + 1
        tokens = self.fusion_tokens or max(1, round(_PAPER_TOKENS[self.strategy] * num_tokens / 197))
        return FambaVConfig(
            image_size=self.image_size,
            hidden_size=_WIDTHS[self.size],
            num_labels=100,
            fusion_strategy=self.strategy,
            fusion_tokens=tokens,
        )

    def mean_tokens(self) -> float:
        """Tokens per layer, on average."""
        if self.family == "deit":
            return (self.image_size // 16) ** 2 + 1
        return statistics.mean(self.config().sequence_lengths)


class Subject:
    """A case made ready: a model, a batch, and the two things that are timed."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        self.case, self.device = case, device
        model = self._model(case).to(device)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=device.type == "cuda")
        self.model = torch.compile(model, mode=case.compile_mode) if case.compile_mode else model
        self.pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device)
        self.labels = torch.randint(0, 100, (case.batch_size,), device=device)

    @staticmethod
    def _model(case: Case) -> nn.Module:
        if case.family == "famba-v":
            return FambaVForImageClassification(case.config())
        width = _WIDTHS[case.size]
        return ViTForImageClassification(
            ViTConfig(
                image_size=case.image_size,
                hidden_size=width,
                num_hidden_layers=12,
                num_attention_heads=width // 64,
                intermediate_size=4 * width,
                num_labels=100,
            )
        )

    def _autocast(self) -> torch.autocast:
        dtype = _DTYPES[self.case.dtype]
        return torch.autocast(self.device.type, dtype, enabled=dtype != torch.float32)

    def forward(self) -> None:
        """Inference on one batch."""
        self.model.eval()
        with torch.inference_mode(), self._autocast():
            self.model(self.pixel_values)

    def step(self) -> None:
        """One training step: forward, loss, backward, AdamW."""
        self.model.train()
        with self._autocast():
            loss = self.model(self.pixel_values, labels=self.labels).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self, function: Callable[[], None], min_seconds: float) -> float:
        """Mean seconds of a call, over as many calls as fill `min_seconds`."""
        set_selective_scan_backend(self.case.backend)
        calls, started = 0, time.perf_counter()
        while calls == 0 or time.perf_counter() - started < min_seconds:
            function()
            calls += 1
            if self.device.type == "cuda":
                torch.cuda.synchronize()
        return (time.perf_counter() - started) / calls


def measure(cases: list[Case], device: torch.device, rounds: int, train: bool, with_memory: bool) -> list[dict]:
    """Measure cases against each other. Returns a record for each, in seconds, bytes and images/s."""
    give_back_freed_memory()  # so that no table starts in the scattered heap of those before it
    subjects = [Subject(case, device) for case in cases]
    kinds = ("forward", "step") if train else ("forward",)
    seconds = {(subject.case, kind): [] for subject in subjects for kind in kinds}
    for kind in kinds:
        for subject in subjects:  # warm-up: compilation, caches, the allocator
            for _ in range(3 if device.type == "cuda" else 1):
                subject.seconds(getattr(subject, kind), 0.0)
        for _ in range(rounds):
            for subject in subjects:
                seconds[subject.case, kind].append(subject.seconds(getattr(subject, kind), 0.2))
    records = []
    for subject in subjects:
        case = subject.case
        record = {"label": case.label, **dataclasses.asdict(case), "mean_tokens": case.mean_tokens()}
        for kind in kinds:
            record[f"{kind}_seconds"] = statistics.median(seconds[case, kind])
            record[f"{kind}_images_per_second"] = case.batch_size / record[f"{kind}_seconds"]
        if train and with_memory:
            record["step_peak_bytes"] = _peak_bytes(subject)
        records.append(record)
    return records


class Floor:
    """The matrix products and the scan kernels of an unfused forward pass, and nothing else, on random numbers."""

    def __init__(self, case: Case, device: torch.device):
        config = case.config()
        rank, state_size, channels = config.time_step_rank, config.state_size, config.intermediate_size
        self.num_layers = config.num_hidden_layers
        per_token = (2, case.batch_size, config.num_patches + 1)
        num_tokens = case.batch_size * (config.num_patches + 1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, device=device)

        self.projections = [
            (random(num_tokens, config.hidden_size), random(config.hidden_size, 2 * channels)),
            (random(2, num_tokens, channels), random(2, channels, rank + 2 * state_size)),
            (random(2, num_tokens, rank), random(2, rank, channels)),
            (random(num_tokens, channels), random(channels, config.hidden_size)),
        ]
        self.scan = [
            random(*per_token, channels),
            random(*per_token, channels),
            -torch.rand(2, channels, state_size, device=device),
            random(*per_token, state_size),
            random(*per_token, state_size),
            random(2, channels),
            random(*per_token[1:], channels),
            random(2, channels),
        ]

    @torch.inference_mode()
    def products(self) -> None:
        for _ in range(self.num_layers):
            for left, right in self.projections:
                torch.matmul(left, right)

    @torch.inference_mode()
    def scans(self) -> None:
        for _ in range(self.num_layers):
            selective_scan(*self.scan)


def measure_floor(device: torch.device, rounds: int) -> dict[str, float]:
    """Seconds of a forward pass without fusion, of its matrix products alone and of its scans alone."""
    case = Case("famba-v")
    subject, floor = Subject(case, device), Floor(case, device)
    functions = {"forward": subject.forward, "matrix products": floor.products, "scans": floor.scans}
    seconds = {name: [] for name in functions}
    for round_number in range(rounds + 1):
        for name, function in functions.items():
            value = subject.seconds(function, 0.2)
            if round_number > 0:  # the first one warms up
                seconds[name].append(value)
    return {name: statistics.median(values) for name, values in seconds.items()}


def floor_sentence(seconds: dict[str, float]) -> str:
    """One line on a result of `measure_floor`."""
    floor = seconds["matrix products"] + seconds["scans"]
    return (
        f"Forward pass without fusion {1e3 * seconds['forward']:.1f} ms, its matrix products alone "
        f"{1e3 * seconds['matrix products']:.1f} ms, its scans alone {1e3 * seconds['scans']:.1f} ms: "
        f"{seconds['forward'] / floor:.2f} times the two."
    )


def _peak_bytes(subject: Subject) -> int:
    """Memory that training steps need at their peak beside the weights: activations, gradients, AdamW's averages."""
    set_selective_scan_backend(subject.case.backend)
    if subject.device.type == "cuda":
        torch.cuda.empty_cache()
        states = subject.optimizer.state.values()
        averages = sum(value.nbytes for state in states for value in state.values() if torch.is_tensor(value))
        before = torch.cuda.memory_allocated() - averages
        torch.cuda.reset_peak_memory_stats()
        subject.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    command = [sys.executable, __file__, "--peak_of", json.dumps(dataclasses.asdict(subject.case))]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def _print_peak(case: Case) -> None:
    """Run three training steps and print how far the resident set rose above what was there before them."""
    subject = Subject(case, torch.device("cpu"))
    set_selective_scan_backend(case.backend)
    warm = Subject(dataclasses.replace(case, batch_size=1), torch.device("cpu"))
    warm.step()  # compiled kernels and libraries are not part of a step's memory
    del warm
    give_back_freed_memory()
    keep_freed_memory()
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(3):
        subject.step()
    print(status_bytes("VmHWM") - before)


# ---- suites: a title and the cases that are measured against each other ----


def cpu_suite() -> dict[str, list[Case]]:
    """Vim-Ti and Vim-S geometry against DeiT: every strategy, bfloat16, batch sizes, image sizes, and small r."""
    strategies = ("none", "all", "interleaved", "lower", "upper")
    suite = {
        f"{size.capitalize()} geometry, 224 px, batch 8": [
            Case("deit", size),
            *(Case("famba-v", size, strategy) for strategy in strategies),
        ]
        for size in _WIDTHS
    }
    suite["Ti geometry, 224 px, batch 8, bf16"] = _trio(dtype="bfloat16")
    for batch_size in (1, 32):
        suite[f"Ti geometry, 224 px, batch {batch_size}"] = _trio(batch_size=batch_size)
    for image_size in (384, 512, 768, 1024):
        suite[f"Ti geometry, {image_size} px, batch 1"] = _trio(image_size=image_size, batch_size=1)
    suite[SMALL_R] = [
        Case("famba-v"),
        *(Case("famba-v", strategy="upper", fusion_tokens=r) for r in range(1, 10)),
    ]
    return suite


def gpu_suite() -> dict[str, list[Case]]:
    """bf16 at batch 128: our kernels against mamba-ssm's and DeiT, compiled modes, image sizes."""
    common = {"batch_size": 128, "dtype": "bfloat16"}
    main = [Case("deit", **common)]
    for strategy in ("none", "all", "interleaved", "lower", "upper"):
        main += [Case("famba-v", strategy=strategy, backend="triton", **common)]
    for strategy in ("none", "upper"):
        main += [Case("famba-v", strategy=strategy, backend="mamba-ssm", **common)]
    compiled = [
        Case("famba-v", strategy=strategy, backend="triton", compile_mode=mode, **common)
        for strategy in ("none", "upper")
        for mode in (None, "default", "reduce-overhead")
    ]
    suite = {"Ti geometry, 224 px, batch 128, bf16": main, "Ti geometry, compiled, batch 128, bf16": compiled}
    for image_size, batch_size in ((384, 32), (512, 16), (768, 8), (1024, 4)):
        suite[f"Ti geometry, {image_size} px, batch {batch_size}, bf16"] = _trio(
            image_size=image_size, batch_size=batch_size, dtype="bfloat16"
        )
    return suite


def quick_suite() -> dict[str, list[Case]]:
    """A minute's worth: the comparison that matters most."""
    return {"Ti geometry, 224 px, batch 8": _trio()}


def _trio(**shape: Any) -> list[Case]:
    return [Case("deit", **shape), Case("famba-v", **shape), Case("famba-v", strategy="upper", **shape)]


_SUITES = {"cpu": cpu_suite, "gpu": gpu_suite, "quick": quick_suite}


# ---- reports ----


def table(records: list[dict]) -> str:
    """One table. Ratios are to the first row; the limit is what the number of tokens alone would allow."""
    first = records[0]
    unfused = next((r for r in records if r["family"] == "famba-v" and r["strategy"] == "none"), None)
    rows = []
    for record in records:
        row = {"model": record["label"], "tokens": f"{record['mean_tokens']:.1f}"}
        for kind, title in (("forward", "forward"), ("step", "training step")):
            if f"{kind}_seconds" in record:
                row[f"{title}, ms"] = f"{1000 * record[f'{kind}_seconds']:.1f}"
                row[f"{title}, images/s"] = f"{record[f'{kind}_images_per_second']:.1f}"
                row[f"{title}, ratio"] = f"{record[f'{kind}_seconds'] / first[f'{kind}_seconds']:.2f}"
        if "step_peak_bytes" in record:
            row["peak memory, MiB"] = f"{record['step_peak_bytes'] / 2**20:.0f}"
        if unfused is not None:
            row["saved of none (forward, step; limit)"] = _savings(record, unfused)
        rows.append(row)
    return markdown_table(rows)


def break_even(records: list[dict]) -> str:
    """The smallest number of removed tokens that is faster than none, of a table over r."""
    unfused = next(record for record in records if record["strategy"] == "none")
    sentences = []
    for kind, title in (("forward", "forward pass"), ("step", "training step")):
        faster = [r["fusion_tokens"] for r in records if r[f"{kind}_seconds"] < unfused[f"{kind}_seconds"]]
        sentences.append(f"{title} from r = {min(faster)}" if faster else f"{title} for none of these")
    return f"Fusion is faster than none: {', '.join(sentences)}."


def _savings(record: dict, unfused: dict) -> str:
    if record["family"] != "famba-v" or record["mean_tokens"] == unfused["mean_tokens"]:
        return ""
    saved = [
        f"{1 - record[name] / unfused[name]:.0%}" for name in ("forward_seconds", "step_seconds") if name in record
    ]
    return f"{', '.join(saved)}; {1 - record['mean_tokens'] / unfused['mean_tokens']:.0%}"


def plot(results: dict[str, list[dict]], path: Path) -> None:
    """Time and memory per image against the number of tokens of the image."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    records = [record for group in results.values() for record in group if record["size"] == "ti"]
    records = [record for record in records if record["dtype"] == records[0]["dtype"]]
    lines = {
        "DeiT-Ti": lambda r: r["family"] == "deit",
        "Famba-V-Ti, no fusion": lambda r: r["family"] == "famba-v" and r["strategy"] == "none",
        "Famba-V-Ti, upper fusion": lambda r: r["strategy"] == "upper" and r["fusion_tokens"] is None,
    }
    quantities = {
        "forward_seconds": ("forward, ms per image", 1e3),
        "step_seconds": ("training step, ms per image", 1e3),
        "step_peak_bytes": ("training memory, MiB per image", 2**-20),
    }
    figure, axes = plt.subplots(1, len(quantities), figsize=(13, 4))
    for axis, (name, (title, unit)) in zip(axes, quantities.items()):
        for (label, belongs), color in zip(lines.items(), ("tab:blue", "tab:gray", "tab:orange")):
            points = _per_image(filter(belongs, records), name, unit)
            axis.plot(*zip(*sorted(points.items())), "o-", color=color, label=label)
            if label.endswith("no fusion"):
                limits = {tokens: value * _token_share(tokens) for tokens, value in points.items()}
        limit_label = "limit of upper by its token count"
        axis.plot(*zip(*limits.items()), "_", color="tab:red", markersize=14, label=limit_label)
        axis.set(xscale="log", yscale="log", xlabel="tokens of an image", title=title)
        axis.set_xticks(sorted(points), labels=sorted(points))
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _per_image(records: Iterable[dict], name: str, unit: float) -> dict[int, float]:
    """A quantity per image over the tokens of an image; of several batch sizes, the one that needs least."""
    points = {}
    for record in records:
        if name in record and record["backend"] in (None, "triton") and record["compile_mode"] is None:
            tokens = (record["image_size"] // 16) ** 2 + 1
            value = record[name] / record["batch_size"] * unit
            points[tokens] = min(value, points.get(tokens, value))
    return points


def _token_share(num_tokens: int) -> float:
    """Share of the tokens that upper fusion leaves, over all layers."""
    image_size = 16 * math.isqrt(num_tokens - 1)
    return Case("famba-v", strategy="upper", image_size=image_size).mean_tokens() / num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(_SUITES), default="cpu", help="which cases to measure")
    parser.add_argument("--device", default="cpu", help="torch device")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds per table")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/benchmark"), help="folder for the reports")
    parser.add_argument("--peak_of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        _print_peak(Case(**json.loads(args.peak_of)))
        return

    keep_freed_memory()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    device = torch.device(args.device)
    report = {"environment": environment(Accelerator(cpu=device.type == "cpu")), "rounds": args.rounds, "results": {}}
    text = [f"Measured on {report['environment']['device']}, torch {torch.__version__}.\n"]
    if device.type == "cpu":
        report["floor"] = measure_floor(device, args.rounds)
        text += [floor_sentence(report["floor"]), ""]
        print(text[-2], flush=True)
    for title, cases in _SUITES[args.suite]().items():
        cases = _runnable(cases)
        records = measure(cases, device, args.rounds, train=True, with_memory=title != SMALL_R)
        report["results"][title] = records
        section = [f"### {title}\n", table(records), ""]
        if title == SMALL_R:
            section += [break_even(records), ""]
        text += section
        print("\n".join(section), flush=True)
        # After every table, so that an interrupted run keeps what it measured.
        _write(report, text, args.output_dir)
    plot(report["results"], args.output_dir / "benchmark.png")


def _runnable(cases: list[Case]) -> list[Case]:
    """The cases whose scan backend is installed; the others are named."""
    runnable = []
    for case in cases:
        try:
            set_selective_scan_backend(case.backend)
            runnable.append(case)
        except ImportError as error:
            print(f"left out: {case.label}, {error}")
    return runnable


def _write(report: dict, text: list[str], folder: Path) -> None:
    (folder / "benchmark.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "benchmark.md").write_text("\n".join(text))


if __name__ == "__main__":
    main()
