"""What several test files share."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """A folder of third-party data that the project does not ship: beside the checkout, or named by an environment
    variable. Tests that want it are skipped where it is missing."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("SOFTCOT_SHARED_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data folder {folder}; name one in SOFTCOT_SHARED_DATA")
    return folder
