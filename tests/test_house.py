"""The house: what the tests may see."""
import os

import torch


def test_tests_see_no_gpu():
    """Neither in this process nor in one that it starts, so that `make test` gives the same on a machine with GPUs."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
    assert not torch.cuda.is_available() and torch.cuda.device_count() == 0
