"""Settings of all tests."""

import os

import torch

# Small tensors are faster without threads; tests of threads ask for their own.
torch.set_num_threads(1)

# Before anything imports triton: without a GPU its kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
