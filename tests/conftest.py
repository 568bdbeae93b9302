"""What all tests share: the checkout on the path, long campaigns only when asked for, one thread per process."""
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("OMP_NUM_THREADS", "1")       # tiny models: more threads only get in each other's way


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a long campaign, run by `make slow`")
    config.addinivalue_line("markers", "fuzz: files and requests mutated by the thousand, run by `make fuzz`")


def pytest_collection_modifyitems(config, items):
    for mark in ("slow", "fuzz"):
        if mark in config.getoption("-m"):
            continue
        for item in items:
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"a long campaign: make {mark}"))
