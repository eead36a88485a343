"""A case made ready to run: the model, a batch, and the calls that are timed."""

import time
from collections.abc import Callable

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from fambav_training.benchmark.cases import WIDTHS, Case
from fambav_training.machine.cuda_graphs import record_inference, record_passes
from modeling_fambav import FambaVForImageClassification, set_selective_scan_backend
from modeling_fambav.selective_scan import selective_scan

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def create_model(case: Case) -> nn.Module:
    """A classifier of 100 classes with random weights."""
    if case.family == "famba-v":
        return FambaVForImageClassification(case.config())
    width = WIDTHS[case.size]
    return ViTForImageClassification(
        ViTConfig(
            image_size=case.image_size,
            hidden_size=width,
            num_hidden_layers=12,
            num_attention_heads=width // 64,
            intermediate_size=4 * width,
            num_labels=100,
            problem_type="single_label_classification",  # as in `Case.config`
        )
    )


class Workload:
    """A case made ready: a model, a batch, and the two things that are timed."""

    def __init__(self, case: Case, device: torch.device):
        torch.manual_seed(0)
        self.case, self.device = case, device
        model = create_model(case).to(device)
        self.optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        self.model = torch.compile(model, mode=case.compile_mode) if case.compile_mode else model
        self.pixel_values = torch.randn(case.batch_size, 3, case.image_size, case.image_size, device=device)
        self.labels = torch.randint(0, 100, (case.batch_size,), device=device)
        if case.is_recorded:
            set_selective_scan_backend(case.backend)
            dtype, size = _DTYPES[case.dtype], (case.image_size, case.image_size)
            graph, _ = record_inference(model, self.pixel_values, dtype)
            self.forward = graph.replay
            self._logits = record_passes(model, case.batch_size, size, dtype)

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
        if self.case.is_recorded:
            loss = nn.functional.cross_entropy(self._logits(self.pixel_values).float(), self.labels)
        else:
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


class CoreOperations:
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
