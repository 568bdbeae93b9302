"""What strangers have: good records over the goldens' pictures, bad records and pictures, other models' folders."""
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from helpers import GOLDEN, ROOT, TINY_MIPHA, TINY_MODEL, TINY_PHI, pattern, rewrite, talk, without
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from data import IMAGE, Dataset, ImageConfig
from vision import CLIP_L_336

TINY_IMAGES = ImageConfig.of(CLIP_L_336, "pad")._replace(size=28, n_patches=4)


def write_data(folder: Path, n: int = 40, **change) -> Path:
    """n records over the golden pictures, every fifth of text only. change: number -> record in its place."""
    rng, names = random.Random(1), sorted(p.name for p in (GOLDEN / "images").iterdir())
    records = [talk(f"{IMAGE}\nwhat é {i}?" if i % 5 else f"tell {i}", "word " * rng.randint(1, 40), id=f"r{i}",
                    **({"image": names[i % len(names)]} if i % 5 else {})) for i in range(n)]
    for i, record in change.items():
        records[int(i[1:])] = record
    path = folder / "data.json"
    path.write_text(json.dumps(records, indent=1, ensure_ascii=False), encoding="utf-8", errors="surrogatepass")
    return path


def open_dataset(path: Path, tok: Tokenizer, images: Path = GOLDEN / "images", block_size: int = 128,
                 **more) -> Dataset:
    return Dataset(path, images, tok, "v0", TINY_IMAGES, block_size, **more)


def write_zoo_images(folder: Path) -> None:
    good = io.BytesIO()
    pattern(300, 200).save(good, "JPEG")
    (folder / "good.jpg").write_bytes(good.getvalue())
    (folder / "truncated.jpg").write_bytes(good.getvalue()[:-2000])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<!DOCTYPE html><title>404</title>")
    (folder / "program.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    (folder / "folder.jpg").mkdir()
    Image.new("1", (14000, 14000)).save(folder / "bomb.png")            # twice what Pillow opens without a word
    Image.new("L", (1, 2000)).save(folder / "thin.png")
    Image.new("L", (1_000_000, 1)).save(folder / "strip.png")
    pattern(50, 40).save(folder / "gif.jpg", format="GIF")
    pattern(50, 40).convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.arange(2000, dtype=np.uint16).reshape(40, 50) * 30).save(folder / "deep.png")
    pattern(50, 40).convert("RGBA").quantize(16).save(folder / "palette.png", transparency=0)
    (folder / "link.jpg").symlink_to(ROOT / "LICENSE")
    (folder / "inside.jpg").symlink_to(folder / "good.jpg")
    for path in (GOLDEN / "images").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())


LONE = json.loads('"\\ud800"')
BAD_RECORDS = {
    "not a conversation": [1, "x", None, [], {"id": "a"}, {"conversations": "x"}, {"conversations": [1]},
                           {"conversations": [{"from": "human"}]},
                           {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
                           {"conversations": [{"from": "human", "value": 3}, {"from": "gpt", "value": "x"}]}],
    "no answer": [talk(), talk("a question"), talk("a", "b", "c"), {"conversations": [{"from": "gpt", "value": "hi"}]},
                  {"conversations": [{"from": "system", "value": "a"}, {"from": "human", "value": "b"}]}],
    "wrong speaker": [{"conversations": [{"from": "human", "value": "a"}, {"from": "human", "value": "b"}]},
                      {"conversations": [{"from": "human", "value": "a"}, {"from": "system", "value": "b"}]},
                      {"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}]},
                      {"conversations": [{"value": "a"}, {"value": "b"}]}],
    "broken unicode": [talk("a" + LONE, "b"), talk("a", LONE), talk("a", "b", "c" + LONE, "d")],
}


def zoo(images: Path) -> dict[str, tuple[str, dict | list]]:
    """Name -> (what the check calls it, record)."""
    pictures = {
        "image unreadable": ["truncated.jpg", "empty.jpg", "page.jpg", "program.jpg", "folder.jpg", "bomb.png"],
        "image too large": ["strip.png"], "image missing": ["absent.jpg"], "image name": ["", ["a.jpg", 3]],
        "image places": [["a.jpg", "b.jpg"]],
        "image outside the folder": ["/etc/passwd", "../../x.jpg", "a/../../b.jpg", "C:\\x.jpg", "a\0b", "link.jpg"],
        "image is an address": ["http://127.0.0.1/x.jpg", "file:///etc/passwd", "data:image/png;base64,xx"]}
    found = {f"image {name!r}": (kind, talk(f"{IMAGE}\nq", "a", id=f"zoo {name}", image=name))
             for kind, names in pictures.items() for name in names}
    found["endless question"] = ("nothing to learn", talk("why " * 400, "because", id="zoo endless"))
    for kind, records in BAD_RECORDS.items():
        for i, record in enumerate(records):
            if isinstance(record, dict):
                found[f"{kind} {i}"] = (kind, {"id": f"zoo {kind} {i}", **record})
    return found

# ---------------------------------------------------------------------------------------------------
# Model folders, in small: the names of tensors and files are those of the public ones

LFS_POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d7a' * 16}\nsize 5000000000\n"
PROJECTOR = "model.mm_projector."


def without_tower(out: Path, source: Path = TINY_MODEL, config: dict = {}) -> Path:
    """LLaVA's released form: language model and projector, the tower only named in a flat config.json."""
    flat = {"mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_hidden_size": 32, "mm_vision_select_layer": -2,
            "mm_projector_type": "mlp2x_gelu", "mm_vision_select_feature": "patch", "use_mm_proj": True, **config}
    return rewrite(source, out, lambda tensors: {name: x for name, x in tensors.items() if "vision_tower" not in name},
                   lambda json: without(json, "vision_config") | flat)


def projector_file(out: Path, source: Path = TINY_MODEL) -> Path:
    """What LLaVA's stage 1 writes."""
    out.mkdir()
    tensors = model_tensors(source)
    torch.save({name: x for name, x in tensors.items() if name.startswith(PROJECTOR)}, out / "mm_projector.bin")
    (out / "config.json").write_text(json.dumps({"image_aspect_ratio": "square", "mm_projector_type": "mlp2x_gelu"}))
    return out / "mm_projector.bin"


def model_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def tower_inside(out: Path, source: Path = TINY_MODEL) -> Path:
    """LLaVA with a tuned tower, and Bunny: as without_tower, but the tower's tensors are there."""
    def nest(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        old, new = "model.vision_tower.", "model.vision_tower.vision_tower."
        return {name.replace(old, new): x for name, x in tensors.items()}

    return rewrite(source, out, nest, lambda json: without(json, "vision_config") | {"use_mm_proj": True})


def tinyllava(out: Path) -> Path:
    def rename(name: str) -> str:
        if PROJECTOR in name:
            return name.replace(PROJECTOR, "connector._connector.")
        if "vision_tower" in name:
            return name.replace("model.vision_tower.", "vision_tower._vision_tower.")
        return "language_model." + name

    return rewrite(TINY_MIPHA, out, lambda tensors: {rename(name): x for name, x in tensors.items()},
                   lambda json: {"model_type": "tinyllava", "connector_type": "mlp2x_gelu", "text_config": json})


def with_tensors(*names: str) -> Callable[[Path], Path]:
    """A Phi folder with more tensors."""
    return lambda out: rewrite(TINY_PHI, out, lambda tensors: tensors | {name: torch.ones(2) for name in names})


def with_files(**files: str) -> Callable[[Path], Path]:
    """A folder of these files, "__" for "/" and "_dot_" for "." in their names."""
    def make(out: Path) -> Path:
        for name, content in files.items():
            path = out / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content)
        return out
    return make


def hub_cache(out: Path) -> Path:
    """models--microsoft--phi-2, with links from snapshots/ to blobs/."""
    snapshot = out / "snapshots" / "ef382358ec9e382308935a992d908de099b64c23"
    for folder in (snapshot, out / "refs", out / "blobs"):
        folder.mkdir(parents=True)
    (out / "refs" / "main").write_text(snapshot.name)
    for i, path in enumerate(TINY_PHI.iterdir()):
        (out / "blobs" / str(i)).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(out / "blobs" / str(i))
    return out


def broken_link(out: Path) -> Path:
    """A snapshot that was copied without the blobs it links to."""
    out.mkdir()
    (out / "model.safetensors").symlink_to("../../blobs/4d7a2146")
    return out


def adapters(out: Path) -> Path:
    out.mkdir()
    save_file({"base_model.model.model.layers.0.mlp.fc1.lora_A.weight": torch.ones(2, 2)},
              out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "microsoft/phi-2"}')
    return out


LAYER = "model.layers.0.mlp.fc1"
FOREIGN_FOLDERS = {         # name -> (a function that makes such a folder, what is said about it, and what to do)
    "LLaVA without its tower": (without_tower, "a LLaVA model without its tower", "merge --llm .* --vision"),
    "LLaVA's projector": (lambda out: projector_file(out).parent, "a projector by itself", "--projector"),
    "a tower inside": (tower_inside, "a LLaVA or Bunny model with its tower inside", "vision_config"),
    "TinyLLaVA": (tinyllava, "TinyLLaVA", "TinyLLaVA_Factory"),
    "PEFT": (adapters, "PEFT adapters", "merge_and_unload"),
    "PEFT under a model's name": (with_tensors(f"base_model.model.{LAYER}.lora_A.weight"), "PEFT adapters",
                                  "merge_and_unload"),
    "LLaVA's LoRA": (with_files(non_lora_trainables_dot_bin="", adapter_config_dot_json="{}", config_dot_json="{}"),
                     "PEFT adapters as LLaVA", "merge_lora_weights.py"),
    "bitsandbytes, 4 bits": (with_tensors(f"{LAYER}.weight.absmax", f"{LAYER}.weight.quant_map",
                                          f"{LAYER}.weight.quant_state.bitsandbytes__nf4"),
                             "by bitsandbytes", "--bits"),
    "bitsandbytes, 8 bits": (with_tensors(f"{LAYER}.SCB"), "quantized by bitsandbytes", "--bits"),
    "GPTQ": (with_tensors(f"{LAYER}.qweight"), "quantized by GPTQ", "--bits"),
    "compressed-tensors": (with_tensors(f"{LAYER}.weight_scale"), "quantized to 8 bits", "--bits"),
    "LLaVA-NeXT": (with_tensors("model.image_newline"), "LLaVA-NeXT", "LLaVA-1.5"),
    "a linear projector": (with_tensors("model.mm_projector.weight"), "linear projector", "mlp2x_gelu"),
    "EVA-CLIP": (with_tensors("model.vision_tower.vision_tower.blocks.0.norm1.weight"), "EVA-CLIP", "CLIP and SigLIP"),
    "git-lfs": (with_files(model_dot_safetensors=LFS_POINTER, config_dot_json="{}"), "git-lfs pointer", "git lfs pull"),
    "git-lfs, .bin": (with_files(pytorch_model_dot_bin=LFS_POINTER), "git-lfs pointer", "git lfs pull"),
    "the hub's cache": (hub_cache, "the hub's cache", "snapshots/ef382358"),
    "a link to a blob": (broken_link, "a link to a file that is not there", "blobs"),
    "a folder of caches": (lambda out: hub_cache(out / "models--microsoft--phi-2").parent, "the hub's cache",
                           "models--microsoft--phi-2/snapshots/ef38"),
    "a folder of models": (with_files(phi__config_dot_json="{}"), "a folder of folders", "such as .*phi"),
    "DeepSpeed": (with_files(global_step100__x="", latest=""), "DeepSpeed", "zero_to_fp32.py"),
    "llama.cpp": (with_files(phi_dot_gguf=""), "llama.cpp", "model.safetensors"),
    "no index": (with_files(**{"model-00001-of-00002_dot_safetensors": ""}), "without their index", "index.json"),
    "nothing": (with_files(x=""), "holds no model.safetensors", "pytorch_model.bin"),
}
