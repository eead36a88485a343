"""Settings of all tests, made before torch and triton are imported."""

import os

# OpenMP threads that wait without spinning: on a busy machine spinning ones take the cores from those that work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

# Small tensors are faster without threads; tests of threads ask for their own.
torch.set_num_threads(1)

# Without a GPU triton's kernels are interpreted.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
