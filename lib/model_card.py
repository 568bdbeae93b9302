"""The README.md of a saved model, which is its card on the Hugging Face hub."""
import re
from pathlib import Path

from lib.common import model_fingerprint, read_json, visible_name
from model import LLaVAConfig, PhiConfig
from vision import CLIP_L_336, SIGLIP_SO400M_384

# Data files as their authors published them -> the data set on the hub.
DATASETS = {"blip_laion_cc_sbu_558k.json": "liuhaotian/LLaVA-Pretrain",
            "llava_v1_5_mix665k.json": "liuhaotian/LLaVA-Instruct-150K"}
SHOWN = ("stage", "recipe", "train", "lr", "epochs", "max_steps", "global_batch", "image_mode", "lora_r", "dropout",
         "seed")

CARD = """\
{header}
# {name}

A vision tower ({tower}), a two-layer projector and Phi-2, in the layout of transformers'
`LlavaForConditionalGeneration`.
{training}{scores}
## Use

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(".", dtype="bfloat16")    # never float16, it overflows
processor = AutoProcessor.from_pretrained(".")      # with the chat template
```

    vllm serve . --model-impl transformers --max-model-len {positions} --limit-mm-per-prompt '{{"image": 1}}' \\
        --override-generation-config '{{"temperature": 0}}'
    python sample.py --model . --image x.jpg        # in the project that trained it

{bias} In that project `load_weights.py export --to gguf` writes files for llama.cpp and Ollama.
`sha256sum -c SHA256SUMS` says whether the weights are as they were written. To publish this folder:
`hf upload NAME/MODEL .`
"""
FOLDED = """\
The bias of the language model's head is folded into its weight, exactly, because transformers' Llava has no bias."""
NOT_FOLDED = """\
transformers' Llava drops the bias of the language model's head, and the answers change: first write a folder for it
with `load_weights.py export`, which folds the bias into the head's weight."""


def hub_card(config: LLaVAConfig, settings: dict | None, scores: list[dict], folded: bool) -> str:
    """settings: those of the run that trained the model, if it is known. scores: contents of eval.py's result.json."""
    siglip = not config.vision.class_token
    return CARD.format(
        header=header(config, settings), name="Mipha" if siglip else "LLaVA-Phi", tower="SigLIP" if siglip else "CLIP",
        training=training_section(settings), scores=scores_section(scores), positions=config.llm.block_size,
        bias=FOLDED if folded else NOT_FOLDED)


def header(config: LLaVAConfig, settings: dict | None) -> str:
    """What the hub reads: YAML between dashes. Bases and data are named where their sizes or file names tell them."""
    bases = []
    if (config.llm.n_embd, config.llm.n_layer) == (PhiConfig.n_embd, PhiConfig.n_layer):
        bases.append("microsoft/phi-2")
    for tower, base in ((CLIP_L_336, "openai/clip-vit-large-patch14-336"),
                        (SIGLIP_SO400M_384, "google/siglip-so400m-patch14-384")):
        if (config.vision.n_embd, config.vision.image_size) == (tower.n_embd, tower.image_size):
            bases.append(base)
    known = [DATASETS[name] for name in data_names(settings or {}) if name in DATASETS]
    # "license" is that of the weights a run started from. Data has its own.
    lines = ["library_name: transformers", "pipeline_tag: image-text-to-text", "language: en"]
    if len(bases) == 2:
        lines += ["license: mit" if config.vision.class_token else "license: apache-2.0",
                  "base_model:", *(f"- {base}" for base in bases)]
    if known:
        lines += ["datasets:", *(f"- {name}" for name in known)]
    return "\n".join(["---", *lines, "---"])


def data_names(settings: dict) -> list[str]:
    """The names of the data files, without weights: where they lay is nobody else's business."""
    data = settings.get("data", [])
    paths = data if isinstance(data, list) else [data]          # a config.json from elsewhere may have anything here
    return [re.sub(r":[-+.\deE]+$", "", visible_name(Path(str(path)).name)) for path in paths]


def training_section(settings: dict | None) -> str:
    if settings is None:
        return ""
    # These values leave a setting alone: no limit, no adapters, the dropout of the language model's own config.json.
    unused = {"max_steps": 0, "lora_r": 0, "dropout": -1}
    shown = [name for name in SHOWN if name in settings and settings[name] != unused.get(name)]
    rows = [f"| {name} | {visible_name(str(settings[name]))} |" for name in shown]
    data = f"| data | {', '.join(data_names(settings)) or 'unknown'} |"
    return "\n".join(["\n## How it was trained\n", "| | |", "|---|---|", data, *rows, ""])


def scores_section(scores: list[dict]) -> str:
    if not scores:
        return ""
    rows = []
    for result in scores:
        low, high = result["interval"]
        rows.append(f"| {result['task']} ({result['split']}) | {result['metric']} | {result['value']:.2f} | "
                    f"{low:.2f} to {high:.2f} | {result['scored']} |")
    return "\n".join(["\n## Scores\n", "| benchmark | metric | value | 95 % interval | questions |",
                      "|---|---|---|---|---|", *rows, ""])


def read_scores(folder: Path, model: Path) -> list[dict]:
    """The results that eval.py wrote under a folder, by name. ValueError if there are none, or not of this model."""
    found, fingerprint = {}, model_fingerprint(model)
    paths = sorted(folder.rglob("result.json"))
    problem = "" if paths else "found no result.json, expected a folder of eval.py's, such as out/eval"
    for path in paths:
        result = read_json(path)
        if result.get("value") is None:         # answers that only a server or a judge can score
            continue
        task, settings = f"{result.get('task')} ({result.get('split')})", result.get("settings")
        if not isinstance(settings, dict) or settings.get("model") != fingerprint or "scored" not in result:
            problem = (f"{path} was not scored with --model {model}, or by an older eval.py: do it with "
                       f"python eval.py --model {model}")
        elif task in found:
            problem = f"two results of {task}, one in {path}: give a folder with one of them"
        found[task] = result
    if problem:
        raise ValueError(f"--scores {folder}: {problem}")
    return list(found.values())
