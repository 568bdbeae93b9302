"""Shared by all tests: the tiny model and its inputs, no GPU except in test_cuda.py, one thread per process."""
import json
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")       # tiny models: more threads only get in each other's way

import helpers
import pytest
import torch
from helpers import GOLDEN, TINY_MODEL
from safetensors.torch import load_file
from zoo import write_zoo_images

from data import load_tokenizer
from load_weights import load_model

torch.cuda.is_available()       # C++ counts the GPUs once: before they are hidden, or test_cuda.py would find none


def pytest_collection_modifyitems(config, items):
    for mark in ("slow", "fuzz"):
        if mark in config.getoption("-m"):
            continue
        for item in items:
            if mark in item.keywords:
                item.add_marker(pytest.mark.skip(reason=f"a long campaign: make {mark}"))


@pytest.fixture(scope="module", autouse=True)
def hide_gpus(request):
    """Tests run on the CPU, with any number of processes, whatever the machine has. Only test_cuda.py is about the GPU.

    The variable hides GPUs from programs that a test starts. In this process CUDA may be initialized already and would
    not read it again.
    """
    if request.module.__name__ == "test_cuda":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        patch.setattr(torch.cuda, "is_available", lambda: False)
        patch.setattr(torch.cuda, "device_count", lambda: 0)
        yield


@pytest.fixture(scope="session")
def golden():
    """The original code's inputs and outputs on tiny random weights."""
    return load_file(GOLDEN / "forward.safetensors")


@pytest.fixture(scope="session")
def tiny_model():
    """The model that the goldens were computed with, in fp32. Tests that change it work on a deepcopy."""
    return load_model(TINY_MODEL)


@pytest.fixture(scope="session")
def tiny_tokenizer():
    return load_tokenizer(TINY_MODEL)


@pytest.fixture(scope="session")
def photo():
    return GOLDEN / "images" / "photo.jpg"


@pytest.fixture(scope="session")
def chat_json(tmp_path_factory):
    """24 conversations of one to three turns about the goldens' pictures; every fourth has no picture."""
    path = tmp_path_factory.mktemp("data") / "chat.json"
    path.write_text(json.dumps(helpers.conversations()))
    return path


@pytest.fixture(scope="session")
def zoo_images(tmp_path_factory):
    """A folder with every kind of good and bad image file."""
    folder = tmp_path_factory.mktemp("images")
    write_zoo_images(folder)
    return folder


@pytest.fixture(scope="session")
def run_script():
    """run_script("sample.py", "--model", ..., processes=2) -> CompletedProcess: a script in a process of its own."""
    return helpers.run_script
