"""SoftCoT-DS: distributed training of soft chain-of-thought (arXiv:2502.12134) with DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from softcot_ds.inference import Adapter

__version__ = "0.1.0"


def load(adapter: str | Path, *overrides: str) -> Adapter:
    """Open an adapter, to ask it questions.

    Args:
        adapter: an adapter directory; the directory or the recipe of a run, whose newest checkpoint is meant; or
            ``owner/name`` on the hub (``owner/name@revision``), which is downloaded once. A folder of that name wins.
        overrides: values that win over the recipe's, as on the command line: ``"evaluation.max_new_tokens=64"``.

    Raises:
        SoftCoTError: the adapter is incomplete, or of other models; the recipe is wrong; it cannot be downloaded.
    """
    from softcot_ds.inference import Adapter  # brings torch and transformers, which take seconds
    from softcot_ds.run_dir import recipe_and_adapter

    return Adapter(*recipe_and_adapter(str(adapter), list(overrides)))
