"""The card of a saved model: what the hub reads, how the model was trained, and its scores."""
import json
from pathlib import Path

import pytest
from helpers import TINY_MODEL, load_weights_command

from lib.common import model_fingerprint
from lib.model_card import header, hub_card, read_scores
from lib.recipes import parse, settings
from model import LLaVAConfig
from vision import SIGLIP_SO400M_384

RESULT = {"task": "pope", "split": "all", "metric": "accuracy", "value": 85.04, "interval": [84.1, 85.9], "n": 9000,
          "scored": 8910, "settings": {"model": model_fingerprint(TINY_MODEL)}}


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


def test_settings_from_elsewhere_are_shown_as_text(tiny_model):
    """config.json of a model from elsewhere can have anything under "training"."""
    for data in (["a:-1", "b.json:1e9", 3], "x.json:0.5", None, {"a": 1}):
        page = hub_card(tiny_model.config, {"data": data, "stage": "finetune\n## Scores"}, [], folded=True)
        assert "| stage | finetune\\n## Scores |" in page and "\n## Scores" not in page
    assert "| data | a, b.json |" in hub_card(tiny_model.config, {"data": ["a:-1", "/x/b.json:1e9"]}, [], folded=True)


def write_result(folder: Path, **change) -> None:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(RESULT | change))


def test_export_writes_the_card(tmp_path):
    write_result(tmp_path / "eval" / "pope")
    write_result(tmp_path / "eval" / "vqav2", task="vqav2", value=None, interval=None)      # a server scores that
    load_weights_command(["export", "--model", str(TINY_MODEL), "--out", str(tmp_path / "out"),
                          "--scores", str(tmp_path / "eval")])
    page = (tmp_path / "out" / "README.md").read_text()
    assert "85.04" in page and "folded into its weight" in page and "vqav2" not in page


@pytest.mark.parametrize("folders, words", [
    ({}, "no result.json"),
    ({"a": {}, "b": {"value": 3.0}}, "two results of pope .all., one in .*b"),
    ({"a": {"settings": {"model": "0" * 16}}},
     "was not scored with --model .*tiny-llava-phi, .*: do it with python eval"),
    ({"a": {"settings": {"scored": "x.jsonl"}}}, "was not scored with"),
    ({"a": {"settings": 3}}, "was not scored with"),
])
def test_scores_of_another_model_and_doubled_ones_are_refused(folders, words, tmp_path):
    for name, change in folders.items():
        write_result(tmp_path / name, **change)
    with pytest.raises(ValueError, match=f"--scores .*{words}"):
        read_scores(tmp_path, TINY_MODEL)


def test_a_result_without_the_number_of_scored_questions_is_refused_in_words(tmp_path):
    """eval.py has not always written it."""
    (tmp_path / "result.json").write_text(json.dumps({name: RESULT[name] for name in RESULT if name != "scored"}))
    with pytest.raises(ValueError, match="by an older eval.py: do it with python eval.py"):
        read_scores(tmp_path, TINY_MODEL)


def test_the_hub_reads_the_header():
    hub = pytest.importorskip("huggingface_hub")
    run = settings(parse(["--stage", "finetune"]))
    data = hub.ModelCard(hub_card(LLaVAConfig(), run, [RESULT], folded=True)).data
    assert data.pipeline_tag == "image-text-to-text" and data.datasets == ["liuhaotian/LLaVA-Instruct-150K"]
    assert data.base_model == ["microsoft/phi-2", "openai/clip-vit-large-patch14-336"]
