"""What the benchmark measures: models and shapes of input, in suites of cases that are compared with each other."""

import dataclasses
import statistics
from dataclasses import dataclass
from typing import Any

from fambav_training.paper.tables import TABLE_1_TOKENS
from modeling_fambav import FambaVConfig

WIDTHS = {"ti": 192, "s": 384}
SMALL_R = "Ti geometry, upper, few tokens removed per layer"  # the table that asks when fusion begins to pay
_WINDOW = 128  # tokens of two to five rows of patches, at the image sizes that it is measured for
_ON_GPU = {"batch_size": 128, "dtype": "bfloat16"}
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
        fusion_window: how many places apart tokens are compared at most; all are if None.
        backend: scan backend; chosen by device if None.
        compile_mode: mode of torch.compile, or None for eager.
        is_recorded: whether its passes are CUDA graphs, recorded once and replayed.
    """

    family: str
    size: str = "ti"
    strategy: str = "none"
    image_size: int = 224
    batch_size: int = 8
    dtype: str = "float32"
    fusion_tokens: int | None = None
    fusion_window: int | None = None
    backend: str | None = None
    compile_mode: str | None = None
    is_recorded: bool = False

    @property
    def label(self) -> str:
        name = f"{'Famba-V' if self.family == 'famba-v' else 'DeiT'}-{self.size.capitalize()}"
        extras = [
            f"r={self.fusion_tokens}" if self.fusion_tokens else None,
            f"window={self.fusion_window}" if self.fusion_window else None,
            self.backend,
            self.compile_mode,
            "recorded" if self.is_recorded else None,
        ]
        return " ".join([name, *([self.strategy] if self.family == "famba-v" else []), *filter(None, extras)])

    def config(self) -> FambaVConfig:
        """Configuration of a famba-v case."""
        num_tokens = (self.image_size // 16) ** 2 + 1
        tokens = self.fusion_tokens or max(1, round(_PAPER_TOKENS[self.strategy] * num_tokens / 197))
        return FambaVConfig(
            image_size=self.image_size,
            hidden_size=WIDTHS[self.size],
            num_labels=100,
            # Otherwise the first loss sets it, and a compiled training step is compiled again for the second
            problem_type="single_label_classification",
            fusion_strategy=self.strategy,
            fusion_tokens=tokens,
            fusion_window=self.fusion_window,
        )

    def mean_tokens(self) -> float:
        """Tokens per layer, on average."""
        if self.family == "deit":
            return (self.image_size // 16) ** 2 + 1
        return statistics.mean(self.config().sequence_lengths)


def cpu_suite() -> dict[str, list[Case]]:
    """Vim-Ti and Vim-S geometry against DeiT: every strategy, bfloat16, batch sizes, image sizes, and small r."""
    strategies = ("none", "all", "interleaved", "lower", "upper")
    suite = {
        f"{size.capitalize()} geometry, 224 px, batch 8": [
            Case("deit", size),
            *(Case("famba-v", size, strategy) for strategy in strategies),
        ]
        for size in WIDTHS
    }
    suite["Ti geometry, 224 px, batch 8, bf16"] = _trio(dtype="bfloat16")
    for batch_size in (1, 32):
        suite[f"Ti geometry, 224 px, batch {batch_size}"] = _trio(batch_size=batch_size)
    for image_size in (384, 512, 768, 1024):
        suite[f"Ti geometry, {image_size} px, batch 1"] = [
            *_trio(image_size=image_size, batch_size=1),
            Case("famba-v", strategy="upper", image_size=image_size, batch_size=1, fusion_window=_WINDOW),
        ]
    suite[SMALL_R] = [
        Case("famba-v"),
        *(Case("famba-v", strategy="upper", fusion_tokens=r) for r in range(1, 10)),
    ]
    return suite


def gpu_suite() -> dict[str, list[Case]]:
    """bf16: our kernels against mamba-ssm's and DeiT at batch 128, launched singly and recorded, and image sizes."""
    main = [Case("deit", **_ON_GPU)]
    for strategy in ("none", "all", "interleaved", "lower", "upper"):
        main += [Case("famba-v", strategy=strategy, backend="triton", **_ON_GPU)]
    recorded = [dataclasses.replace(case, is_recorded=True) for case in main]
    for strategy in ("none", "upper"):
        main += [Case("famba-v", strategy=strategy, backend="mamba-ssm", **_ON_GPU)]
    suite = {
        "Ti geometry, 224 px, batch 128, bf16": main,
        "Ti geometry, 224 px, batch 128, bf16, recorded": recorded,
    }
    for image_size, batch_size in ((384, 32), (512, 16), (768, 8), (1024, 4)):
        suite[f"Ti geometry, {image_size} px, batch {batch_size}, bf16, recorded"] = _trio(
            image_size=image_size, batch_size=batch_size, dtype="bfloat16", is_recorded=True
        )
    return suite


def compiled_suite() -> dict[str, list[Case]]:
    """bf16 at batch 128: a table per strategy and mode of torch.compile, beside the same model uncompiled."""
    suite = {}
    for mode in ("default", "reduce-overhead"):
        for strategy in ("none", "upper"):
            eager = Case("famba-v", strategy=strategy, backend="triton", **_ON_GPU)
            title = f"Ti geometry, {strategy}, {mode}, batch 128, bf16"
            suite[title] = [eager, dataclasses.replace(eager, compile_mode=mode)]
    return suite


def quick_suite() -> dict[str, list[Case]]:
    """A minute's worth: the comparison that matters most."""
    return {"Ti geometry, 224 px, batch 8": _trio()}


def _trio(**shape: Any) -> list[Case]:
    return [Case("deit", **shape), Case("famba-v", **shape), Case("famba-v", strategy="upper", **shape)]


SUITES = {"cpu": cpu_suite, "gpu": lambda: {**gpu_suite(), **compiled_suite()}, "quick": quick_suite}
