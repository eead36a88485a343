"""Backends of the operators, as a parameter of tests and put back after them."""

import pytest
import torch

from modeling_fambav import backends, set_selective_scan_backend


@pytest.fixture(autouse=True)
def restored_settings():
    """Tests may choose a backend and a number of threads."""
    chosen, num_threads = set_selective_scan_backend(None), torch.get_num_threads()
    yield
    backends._chosen = chosen
    torch.set_num_threads(num_threads)


@pytest.fixture(params=["torch", "numba"])
def backend(request):
    set_selective_scan_backend(request.param)
    return request.param
