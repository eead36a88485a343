"""A step reads no value of a tensor that lies on the device, so that the program never waits for the device.

On a CPU every tensor is on the host. What is looked for are the calls that read a value, whatever the device, and
the operators inside of torch's own functions and of the backward pass that do. Crops
are left out: kornia reads where they are, but draws that on the host. Before 0.9 it reads which images it flips and
erases, too.
"""

from importlib.metadata import version

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import store_teacher_views
from fambav_training.data import crops
from fambav_training.machine.transfer import LateValues
from fambav_training.run.optimization import WeightAverage
from fambav_training.run.trainer import Trainer
from support.training_runs import train_here
from support.values_read import reads_values

_READING = ("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__")


class _ReadsOfOperators(TorchDispatchMode):
    """Notes every operator that reads a value, unless `calls` notes nothing now."""

    def __init__(self, calls: "_Reads"):
        super().__init__()
        self._calls = calls

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if reads_values(function, (*args, kwargs)) and not self._calls.is_allowed:
            self._calls.names.append(str(function))
        return function(*args, **kwargs)


class _Reads(TorchFunctionMode):
    """Notes every call that reads a value, but for those inside functions that may."""

    def __init__(self):
        super().__init__()
        self.names, self.is_allowed = [], False

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        name = getattr(function, "__name__", "")
        if name in _READING and not self.is_allowed:
            self.names.append(name)
        return function(*arguments, **(keywords or {}))


@pytest.fixture
def reads(monkeypatch) -> _Reads:
    """What the steps of a run read, apart from losses that are a step old and the count of weight averages."""
    mode = _Reads()

    def watched(train_batch):
        def step(self, *arguments):
            with mode, _ReadsOfOperators(mode):
                return train_batch(self, *arguments)

        return step

    def allowed(function):
        def call(*arguments):
            mode.is_allowed = True
            try:
                return function(*arguments)
            finally:
                mode.is_allowed = False

        return call

    monkeypatch.setattr(Trainer, "_train_batch", watched(Trainer._train_batch))
    monkeypatch.setattr(LateValues, "read", allowed(LateValues.read))
    # Its counter is on the host on every device, see WeightAverage
    monkeypatch.setattr(WeightAverage, "update_parameters", allowed(WeightAverage.update_parameters))
    return mode


@pytest.mark.parametrize("read", [Tensor.item, Tensor.tolist, Tensor.cpu, bool, int, float], ids=lambda f: f.__name__)
def test_reading_is_noticed(read):
    with _Reads() as reads:
        read(torch.ones(()))
    assert len(reads.names) == 1


@pytest.mark.parametrize(
    "read", [lambda x: x[x > 0], lambda x: torch.nn.functional.one_hot(x.long()), lambda x: torch.allclose(x, x)]
)
def test_reading_inside_of_torch_is_noticed(read):
    reads = _Reads()
    with _ReadsOfOperators(reads):
        read(torch.ones(3))
    assert reads.names


@pytest.mark.parametrize(
    "changes",
    [
        {"fusion_strategy": "none"},
        {"fusion_strategy": "upper", "mixed_precision": "bf16"},
        {"horizontal_flip_prob": 0.5},
        {"mixup_alpha": 0.8},
        {"random_erasing_prob": 0.25},
    ],
    ids=str,
)
def test_a_step_reads_nothing(reads, tmp_path, changes):
    if changes.keys() & {"horizontal_flip_prob", "random_erasing_prob"} and version("kornia").startswith("0.8."):
        pytest.skip("kornia before 0.9 reads which images it changes")
    train_here(tmp_path, max_train_steps=3, **changes)
    assert reads.names == []


def test_a_step_on_stored_views_reads_nothing(reads, tmp_path, monkeypatch):
    """With images on a GPU, where crops are gathered, and with Muon."""
    train_here(tmp_path / "teacher", max_train_steps=1)
    words = ["--dataset_name", "digits", "--image_size", "8", "--views", "2", "--random_crop_padding", "2"]
    views = tmp_path / "views"
    store_teacher_views.store(store_teacher_views.parse([str(tmp_path / "teacher"), str(views), *words]))
    monkeypatch.setattr(crops, "_copy_crops", crops._gather_crops)
    reads.names.clear()
    flags = {"teacher_views": views, "distillation_weight": 0.5, "distillation_loss": "standardized"}
    train_here(tmp_path / "student", max_train_steps=3, optimizer="muon", **flags)
    assert reads.names == []
