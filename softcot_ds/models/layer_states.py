"""What each layer of a model hands on to the next.

B rows, S positions, D width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from softcot_ds.errors import SoftCoTError


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """Raises SoftCoTError where they are not found in it."""
    layers = getattr(model.get_decoder(), "layers", None)
    if not isinstance(layers, nn.ModuleList):
        raise SoftCoTError(
            f"the layers of {type(model).__name__} are not found in it; name another model in base.model"
        )
    return layers


class LayerStates:
    """Listens to the layers of a model, from before DeepSpeed has it."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises SoftCoTError: see ``layers_of``."""
        self._kept: list[torch.Tensor] | None = None
        self._apart = False
        for layer in layers_of(model):
            layer.register_forward_pre_hook(self._before, with_kwargs=True)
            layer.register_forward_hook(self._behind)

    @contextmanager
    def kept(self, apart: bool = False) -> Iterator[list[torch.Tensor]]:
        """The states of the passes inside: (B, S, D) of each layer, of one pass after the other.

        Args:
            apart: no gradient flows from a layer to the one before: each is moved by what comes of its own states.
        """
        self._kept, self._apart = [], apart
        try:
            yield self._kept
        finally:
            self._kept, self._apart = None, False

    def _before(self, _layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        if not self._apart:
            return None
        if args:
            return (args[0].detach(), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": kwargs["hidden_states"].detach()}

    def _behind(self, _layer: nn.Module, _args: Any, output: Any) -> None:
        if self._kept is not None:
            self._kept.append(output if isinstance(output, torch.Tensor) else output[0])
