"""What all tests share: the checkout on the path, slow campaigns only when asked for, one thread per process."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")       # tiny models: more threads only get in each other's way


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long campaign, run by `make slow`")


def pytest_collection_modifyitems(config, items):
    if "slow" not in config.getoption("-m"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long campaign: make slow"))
