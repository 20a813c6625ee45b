"""What every test shares: one thread, fixed seeds, and the real data where it is present."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent

LONGEST = (
    "laws/test_ranks.py", "test_recipes.py", "laws/test_resume.py", "test_compiled.py", "test_footprint.py",
    "laws/test_engine.py", "laws/test_families.py", "test_pipeline.py", "test_config_names.py", "test_vllm_server.py",
)  # fmt: skip
"""Files that take longest come first: of several workers the one that ends last decides."""

# No hub: read when its libraries are imported, so no fixture can say it.
os.environ["HF_HUB_OFFLINE"] = "1"

# One thread: on shared cores more are slower, and sums stay in one order. `set_num_interop_threads` may only be
# called once in a process, so neither is a fixture.
torch.set_num_threads(1)
torch.set_num_interop_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first; the others, and the tests of a file, as they were."""
    place = {ROOT / "tests" / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Every test draws the same numbers, alone or in any order."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test keeps in the cache goes with it."""
    monkeypatch.setenv("WHET_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets: the folder `WHET_SHARED_DATA`, else `../shared/data` beside the checkout; skips where absent."""
    folder = Path(os.environ.get("WHET_SHARED_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"real data not found at {folder}; set WHET_SHARED_DATA to the folder that has gsm8k/, aime/ ...")
    return folder
