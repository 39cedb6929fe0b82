"""Lines that tell how far a model is loaded."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils.logging import set_tqdm_hook

from softcot_ds.distributed import is_main
from softcot_ds.progress import Progress

_BAR = "Loading weights"
"""What transformers calls its own bar, which is switched off."""


class LoadingLines:
    """Tells on rank 0 how many of a model's weights are there; nothing of a model that is loaded in a moment."""

    def __init__(self, model: str) -> None:
        self._model = model
        # Asked now, and not through ``say``: while weights are read, the first rank of each group takes itself for 0.
        self._speaks = is_main()
        self._progress = Progress(0, "weight", speaks=False)
        self._all = self._there = 0

    def expect(self, weights: int) -> None:
        """So many are to be loaded, from now on."""
        self.close()
        self._all, self._there = weights, 0
        self._progress = Progress(weights, "weight", name=f"{self._model}:", speaks=self._speaks)

    def add(self, weights: int) -> None:
        """So many more are there."""
        self._there += weights
        if self._there < self._all:
            self._progress.show(self._there)

    def close(self) -> None:
        """The model is there, or is not loaded."""
        self._progress.close()

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Where transformers fills a model without DeepSpeed, count what it would show with its bar."""
        before = set_tqdm_hook(self._replace_bar)
        try:
            yield
        finally:
            set_tqdm_hook(before)

    def _replace_bar(self, bar: Callable[..., Any], arguments: tuple[Any, ...], settings: dict[str, Any]) -> Any:
        return self._each(*arguments) if settings.get("desc") == _BAR else bar(*arguments, **settings)

    def _each(self, weights: Any) -> Iterator[Any]:
        self.expect(len(weights))
        for weight in weights:
            yield weight
            self.add(1)
