"""transformers' Llava has no bias in its language model's head, Phi-2 has one: this loads the folder and puts it back.

>>> from load_hf import load
>>> model = load()          # keywords go to from_pretrained
"""
import json
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoModelForImageTextToText


def load(folder=Path(__file__).resolve().parent, **kwargs):
    model = AutoModelForImageTextToText.from_pretrained(folder, **kwargs)
    name, index = "language_model.lm_head.bias", Path(folder) / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(Path(folder) / shard, "pt") as file:
        head = model.get_output_embeddings()
        head.bias = torch.nn.Parameter(file.get_tensor(name).to(head.weight), requires_grad=False)
    return model
