"""Which of torch's operators need to know values of a tensor, for which the host waits if they are on a GPU."""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_INDEXING = (torch.ops.aten.index.Tensor, torch.ops.aten.index_put.default, torch.ops.aten.index_put_.default)
_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


def tensors_in(values: Any) -> list[Tensor]:
    """Those in any nest of tuples, lists and dictionaries."""
    return [value for value in tree_leaves(values) if isinstance(value, Tensor)]


def reads_values(operator: torch._ops.OpOverload, arguments: Any) -> bool:
    """Whether the host has to know values of a tensor, for its result or for the shape of it.

    Args:
        arguments: of the call, tensors or numbers in any nest.
    """
    if operator in _INDEXING:
        # A mask is a list of places that has to be counted; plain indices are not
        return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in tensors_in(arguments[1]))
    return not _TAGS.isdisjoint(operator.tags)
