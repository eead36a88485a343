"""How much is measured on a GPU, and how little in a rehearsal of it on a CPU."""

from dataclasses import dataclass, field
from typing import Any

from fambav_training.benchmark.cases import Case, compiled_suite, gpu_suite


@dataclass(frozen=True)
class Plan:
    """Sizes of all steps.

    Attributes:
        device: torch device.
        accuracy_shape: batch, tokens and channels of the kernels that are compared with float64.
        speed_shapes: those of the kernels that are timed.
        suite: models that are timed, by the title of their table.
        compiled: the same for models that torch compiles, which takes them minutes.
        rounds: interleaved rounds of a timing.
        seconds: how long a timing in a round takes at least, of kernels and models.
        model: fields of `FambaVConfig` of the models that are trained, beside fusion.
        epochs, batch_size, learning_rate: of their training.
    """

    device: str
    accuracy_shape: tuple[int, int, int]
    speed_shapes: list[tuple[int, int, int]]
    suite: dict[str, list[Case]]
    compiled: dict[str, list[Case]]
    rounds: int
    seconds: float
    model: dict[str, Any] = field(default_factory=dict)
    epochs: int = 30
    batch_size: int = 128
    learning_rate: float = 1e-3


def full_plan() -> Plan:
    """Vim-Ti: at 224 px and batch 128 for time, on images of 32 px for accuracy."""
    return Plan(
        device="cuda",
        accuracy_shape=(3, 197, 384),
        # Tokens without fusion, on average with upper fusion, and of 512 px
        speed_shapes=[(128, 197, 384), (128, 126, 384), (16, 1025, 384)],
        suite=gpu_suite(),
        compiled=compiled_suite(),
        rounds=5,
        seconds=0.2,
        model={"hidden_size": 192, "num_hidden_layers": 24, "patch_size": 4},
    )


def rehearsal() -> Plan:
    """The same steps in seconds on a CPU: their numbers say nothing."""
    shape = {"image_size": 32, "batch_size": 2}
    small = [Case("deit", **shape), Case("famba-v", **shape), Case("famba-v", strategy="upper", **shape)]
    return Plan(
        device="cpu",
        accuracy_shape=(2, 17, 32),
        speed_shapes=[(2, 17, 32)],
        suite={"rehearsal": small},
        # Compiled for a CPU they would take minutes too
        compiled={"rehearsal, not compiled": small[1:]},
        rounds=1,
        seconds=0.0,
        model={"hidden_size": 32, "num_hidden_layers": 6, "patch_size": 4, "state_size": 4},
        epochs=2,
        batch_size=32,
    )
