"""Where a run is: what it has done, and the step whose loss is not known yet."""

from dataclasses import dataclass

from torch import Tensor

from fambav_training.machine.transfer import LateValues


@dataclass
class Position:
    """How far a run is. `batch` counts those of the epoch that began last, which is number `epoch`, from 0.

    Processor seconds are those of the cores that this process used: unlike the seconds that passed, they hardly change
    when other work shares the machine. Memory is what was in use at the start of training and at its peak, the largest
    over all processes that the run was resumed by.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    train_seconds: float = 0.0
    processor_seconds: float = 0.0
    images: int = 0
    nonfinite_steps: int = 0
    start_memory_bytes: int = 0
    peak_memory_bytes: int = 0


@dataclass
class Step:
    """An optimizer step whose loss is not known yet.

    Attributes:
        values: its mean loss and, of several processes, the signal to stop by.
        position, num_batches: where the run and accelerate's count of batches were before it.
        pixels, labels: its last batch.
    """

    values: LateValues
    position: Position
    num_batches: int
    pixels: Tensor
    labels: Tensor
