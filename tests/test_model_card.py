"""The card of a saved model: what the hub reads, how the model was trained, and its scores."""
import json

import pytest
from helpers import TINY_MODEL, load_weights_command

from lib.model_card import header, hub_card, read_scores
from lib.recipes import parse, settings
from model import LLaVAConfig
from vision import SIGLIP_SO400M_384

RESULT = {"task": "pope", "split": "all", "metric": "accuracy", "value": 85.04, "interval": [84.1, 85.9], "n": 8910}


def test_published_bases_and_data_are_named():
    run = settings(parse(["--stage", "finetune", "--data", "/home/me/llava_v1_5_mix665k.json", "/home/me/own.json:2"]))
    page = hub_card(LLaVAConfig(), run, [RESULT], folded=True)
    head = page.split("---")[1]
    for line in ("pipeline_tag: image-text-to-text", "- microsoft/phi-2", "- openai/clip-vit-large-patch14-336",
                 "- liuhaotian/LLaVA-Instruct-150K", "license: mit"):
        assert line in head.split("\n"), line
    assert "| lr | 2e-05 |" in page and "/home/me" not in page
    assert "| data | llava_v1_5_mix665k.json, own.json |" in page
    assert "| pope (all) | accuracy | 85.04 | 84.10 to 85.90 | 8910 |" in page
    assert "siglip" in header(LLaVAConfig(vision=SIGLIP_SO400M_384), None)


def test_a_card_claims_nothing_that_is_not_known(tiny_model):
    """A small model of unknown origin: no base, no license, no data, no scores, but its bias is spoken of."""
    page = hub_card(tiny_model.config, None, [], folded=False)
    for word in ("base_model", "license", "datasets", "## Scores", "## How it was trained"):
        assert word not in page, word
    assert "transformers' Llava drops the bias" in page


def test_export_writes_the_card(tmp_path):
    (tmp_path / "eval" / "pope").mkdir(parents=True)
    (tmp_path / "eval" / "pope" / "result.json").write_text(json.dumps(RESULT))
    load_weights_command(["export", "--model", str(TINY_MODEL), "--out", str(tmp_path / "out"),
                          "--scores", str(tmp_path / "eval")])
    page = (tmp_path / "out" / "README.md").read_text()
    assert "85.04" in page and "folded into its weight" in page
    with pytest.raises(ValueError, match="no result.json"):
        read_scores(tmp_path / "out")


def test_the_hub_reads_the_header():
    hub = pytest.importorskip("huggingface_hub")
    run = settings(parse(["--stage", "finetune"]))
    data = hub.ModelCard(hub_card(LLaVAConfig(), run, [RESULT], folded=True)).data
    assert data.pipeline_tag == "image-text-to-text" and data.datasets == ["liuhaotian/LLaVA-Instruct-150K"]
    assert data.base_model == ["microsoft/phi-2", "openai/clip-vit-large-patch14-336"]
