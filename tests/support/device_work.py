"""What a program asks of a GPU, seen without one: operators, launches of kernels, and what the host has to know."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from modeling_fambav import causal_conv1d_triton, selective_scan_triton, token_fusion_triton
from support.values_read import reads_values, tensors_in

_META = torch.device("meta")


class DeviceWork(TorchDispatchMode):
    """Notes what is asked of the device `"meta"`, whose tensors have no data, while Triton's kernels are not run.

    Our operators are looked into: what they do on a GPU happens here to tensors of that device.

    Attributes:
        operators: names of torch's operators and of launched kernels, in their order.
        host: what had to do with tensors of the host or with values of a tensor, which a CUDA graph does not record.
    """

    def __init__(self, monkeypatch: Any):
        super().__init__()
        self.operators: list[str] = []
        self.host: list[str] = []
        for module in (causal_conv1d_triton, selective_scan_triton, token_fusion_triton):
            monkeypatch.setattr(module, "launch", self._launch)

    def _launch(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        name = kernel.fn.__name__
        self.operators.append(name)
        if any(tensor.device != _META for tensor in tensors_in(arguments)):
            self.host.append(name)

    def __torch_dispatch__(
        self, function: torch._ops.OpOverload, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function.namespace == "fambav":
            with self:
                return function.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA), *args, **kwargs)
        self.operators.append(str(function))
        on_host = [tensor for tensor in tensors_in((args, kwargs)) if tensor.device != _META]
        if on_host or kwargs.get("device", _META) != _META or reads_values(function, (*args, kwargs)):
            self.host.append(str(function))
        return function(*args, **kwargs)
