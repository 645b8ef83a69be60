"""Ways in which data leave torch, which no operation shows: a trace cannot follow them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_LEAVING = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor.storage,
    Tensor.__repr__,
    Tensor.__format__,
    Tensor.__reduce_ex__,
    Tensor.__deepcopy__,
}
# They copy numbers into a new tensor, which is a constant to the trace.
_ENTERING = {torch.tensor, torch.as_tensor, torch.asarray}


class Reads(TorchFunctionMode):
    """Calls `refuse` with the reason where a network's code reads data past torch's operations."""

    def __init__(self, refuse: Callable[[str], object]):
        super().__init__()
        self.refuse = refuse

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _LEAVING or (func in _ENTERING and _has_tensor((args, kwargs))):
            self.refuse(f"the network reads data by {getattr(func, '__name__', func)}")
        return func(*args, **kwargs)


def _has_tensor(tree: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree))
