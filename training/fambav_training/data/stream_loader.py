"""Batches of a stream, of which nobody knows how many there are."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderStateMixin
from accelerate.state import GradientState
from torch import Tensor
from torch.utils.data import DataLoader

from fambav_training.machine.transfer import to_device


class StreamLoader(DataLoaderStateMixin):
    """Whole batches of a stream on the device of this process.

    Streams of several processes are seldom of one length. All of them end an epoch together, at the first one that has
    no whole batch left, and accelerate is told of the last batch, so that it ends the optimizer step with it.
    """

    def __init__(self, loader: DataLoader, accelerator: Accelerator):
        """`loader` gives pixels and labels; some may be smaller, since each worker ends with a part of one."""
        self._loader, self._accelerator = loader, accelerator
        self.gradient_state = GradientState()
        self._drop_last = True  # nothing is left over, to accelerate

    @property
    def dataset(self) -> torch.utils.data.IterableDataset:
        return self._loader.dataset

    def set_epoch(self, epoch: int) -> None:
        """Shuffle anew."""
        self.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self.begin()
        try:
            batches = self._whole_batches()
            batch = next(batches, None)
            goes_on = self._all_have(batch)
            while goes_on:
                following = next(batches, None)
                goes_on = self._all_have(following)
                self.end_of_dataloader = not goes_on
                yield tuple(to_device(tensor, self._accelerator.device) for tensor in batch)
                batch = following
        finally:
            self.end()

    def _whole_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        size, rest = self._loader.batch_size, None
        for batch in self._loader:
            if rest is not None:
                batch = tuple(torch.cat(pair) for pair in zip(rest, batch))
            whole = len(batch[1]) // size * size
            yield from zip(*(tensor[:whole].split(size) for tensor in batch)) if whole else ()
            rest = tuple(tensor[whole:] for tensor in batch) if whole < len(batch[1]) else None

    def _all_have(self, batch: tuple[Tensor, Tensor] | None) -> bool:
        if self._accelerator.num_processes == 1:
            return batch is not None
        has_batch = torch.tensor([batch is not None], device=self._accelerator.device)
        return bool(self._accelerator.gather(has_batch).all())
