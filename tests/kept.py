"""What a forward pass has kept for its backward pass."""

import gc
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Kept(TorchDispatchMode):
    """Sees every tensor that an operation gives within the context, and tells afterwards which are still held."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None) -> Any:
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                self._seen[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        return result

    def bytes(self, model: nn.Module) -> int:
        """Of all that is held, without what the model's parameters hold at this moment."""
        gc.collect()  # what only waits for that is not held
        held = [t for p in model.parameters() for t in (p, getattr(p, "ds_tensor", None)) if t is not None]
        own = {tensor.untyped_storage()._cdata for tensor in held}
        return sum(n for key, (storage, n) in self._seen.items() if not storage.expired() and key not in own)
