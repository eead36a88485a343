"""Temporary memory: given again to the same thread, to nobody else, and no result of an operator lies in it."""

import threading

import pytest
import torch

from modeling_fambav import workspace
from modeling_fambav.bidirectional_scan import bidirectional_scan
from modeling_fambav.workspace import temporaries, temporary
from support.helpers import gradient_of, random_tensor, scan_inputs


@pytest.fixture(autouse=True)
def fresh_workspace(monkeypatch):
    monkeypatch.setattr(workspace, "_workspace", workspace._Workspace())


def temporary_addresses(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[int]:
    with temporaries():
        tensors = [temporary(shape, dtype, "cpu") for shape in shapes]
        return [tensor.data_ptr() for tensor in tensors]


def test_the_next_use_gets_the_same_memory():
    temporary_addresses((3, 5), (7,))  # how much there will be
    addresses = temporary_addresses((3, 5), (7,))
    assert addresses == temporary_addresses((3, 5), (7,))
    assert addresses[:1] == temporary_addresses((2, 3), dtype=torch.bfloat16)
    assert len(set(addresses)) == 2
    space = workspace._workspace.memory
    assert all(0 <= address - space.data_ptr() < space.numel() for address in addresses)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
def test_shape_and_dtype_are_those_asked_for(dtype):
    for _ in range(2):  # without and with memory of before
        with temporaries():
            first, second = temporary((2, 3), dtype, "cpu"), temporary((4,), dtype, "cpu")
            first.fill_(1)
            second.fill_(2)
            assert first.shape == (2, 3) and first.dtype == second.dtype == dtype
            assert first.eq(1).all() and second.eq(2).all()


def test_outside_and_on_other_devices_tensors_are_new():
    temporary_addresses((64,))
    space = temporary_addresses((64,))
    assert temporary((64,), torch.float32, "cpu").data_ptr() not in space
    with temporaries():
        assert temporary((64,), torch.float32, "meta").device.type == "meta"
    with pytest.raises(ZeroDivisionError), temporaries():
        1 / 0  # noqa: B018
    assert temporary((64,), torch.float32, "cpu").data_ptr() not in space


def test_each_thread_has_its_own():
    temporary_addresses((64,))
    addresses = temporary_addresses((64,))

    def run():
        temporary_addresses((64,))
        addresses.extend(temporary_addresses((64,)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(set(addresses)) == 2


def test_memory_made_in_inference_mode_serves_training():
    with torch.inference_mode():
        temporary_addresses((64,))
        temporary_addresses((64,))
    with temporaries():
        temporary((64,), torch.float32, "cpu").fill_(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_later_call_leaves_the_results_of_an_earlier_one_alone(batch_size, dtype):
    def results(seed: int) -> list[torch.Tensor]:
        scan = scan_inputs(2, batch_size, 9, 64, 16, torch.float32)
        leaves = [
            random_tensor(batch_size, 9, 128, seed=seed, dtype=dtype),
            random_tensor(2, 64, 4, seed=seed + 1),
            random_tensor(2, 64, seed=seed + 2),
            random_tensor(2, 4 + 32, 64, seed=seed + 3),
            random_tensor(2, 64, 4, seed=seed + 4),
            scan["dt_bias"],
            scan["A"],
            scan["D"],
        ]
        leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
        out = bidirectional_scan(*leaves)
        gradients = torch.autograd.grad(out, leaves, gradient_of(out.detach()))
        return [out.detach(), *gradients]

    results(1)
    first = results(1)
    assert workspace._workspace.memory is not None
    before = [tensor.clone() for tensor in first]
    results(11)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(first, before))
