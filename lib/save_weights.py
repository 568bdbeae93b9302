"""The one format that models are saved in, which transformers' LlavaForConditionalGeneration and vLLM read too."""
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from data import EOT, IMAGE, eot_id
from lib.common import read_json, remove, replacing, sha256, sync_folder, warn_once, write_whole
from lib.configs import subconfig
from lib.folders import Weights, check_tensors, meta_model, read_tensor, saved_shapes
from lib.head_bias import HEAD_BIAS, fold_head_bias
from lib.layouts import FEATURE_STRATEGY, PHI_KEYS, VISION_KEYS, named_as_published, to_saved
from lib.model_card import hub_card
from model import LLaVAConfig, PhiConfig
from vision import VisionConfig

# Shards are built in memory, one at a time, so they are smaller than the usual 5 GB.
SHARD_BYTES = 1_500_000_000
CHECKSUMS = "SHA256SUMS"        # the usual name and format: `sha256sum -c SHA256SUMS` reads it too
SAVED_MODEL = Path(__file__).parent.parent / "saved_model"         # files that are copied into every saved folder
# Where a part is written by itself, its saved names begin differently: as in Phi, CLIP, SigLIP and LLaVA.
ALONE = {"llm": {"language_model.": ""}, "vision": {"vision_tower.": ""},
         "projector": {"multi_modal_projector.linear_1.": "model.mm_projector.0.",
                       "multi_modal_projector.linear_2.": "model.mm_projector.2."}}
Lazy = Tensor | Callable[[], Tensor]        # a tensor, or the function that loads it


class ToSave(NamedTuple):
    """Everything that goes into a saved folder; tensors by our names, in file order."""
    config: LLaVAConfig
    tokenizer: Tokenizer
    tensors: dict[str, Lazy]
    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype]          # that each tensor is saved in

    def load(self, name: str) -> Tensor:
        tensor = self.tensors[name]
        return tensor() if callable(tensor) else tensor.detach()

    def dtype_name(self, part: str = "") -> str:
        """The first tensor's dtype, for config.json. Never fp16, in which this model would overflow."""
        first = next(self.dtypes[name] for name in self.tensors if name.startswith(part))
        return str(torch.float32 if first == torch.float16 else first).removeprefix("torch.")


def save_model(out: Path, changed: Mapping[str, Lazy], config: LLaVAConfig, source: Weights,
               dtype: torch.dtype | None = None, fold: bool = False, settings: dict | None = None,
               scores: list[dict] = []) -> None:
    """Write a self-contained model folder; without a tower, one for transformers' PhiForCausalLM and `merge --llm`.

    changed: parameters that differ from those in `source`, the weights that the model was made from. Everything else
    (other parameters, the vision layers after the one that is read, the tokenizer) is copied from there.
    dtype: None keeps each tensor's own, and is not possible for functions. fold: see lib/head_bias.py. settings and
    scores: for the model's card. In a training folder, config.json keeps the run's settings under "training".
    """
    model = collect(changed, config, source, dtype)
    if "vision" not in source.parts:
        with replacing_model(out) as made:
            write_phi(made, model)
        return
    if fold:
        model = model._replace(tensors=model.tensors | fold_head_bias(model.load, model.dtypes))
    if lacks_image_row(model.tokenizer, config.llm):
        model = with_image_row(model)
    with replacing_model(out) as made:
        write_tensors(made, model)
        write_model_texts(made, model)
        card = hub_card(config, settings or run_settings(out), scores, folded=not model.load(HEAD_BIAS).any())
        (made / "README.md").write_text(card, encoding="utf-8")


def run_settings(folder: Path) -> dict | None:
    """The settings of the run that trained the model in a folder, if it says so."""
    file = folder / "config.json"
    return subconfig(read_json(file), "training", file) or None if file.is_file() else None


def save_parts(out: Path, model: ToSave) -> None:
    """Write a plain Phi folder, a tower's, and LLaVA's mm_projector, for programs that take one of them."""
    with replacing_model(out) as made:
        write_phi(made / "phi-2", model)
        shutil.copyfile(SAVED_MODEL / "chat_template.jinja", made / "phi-2" / "chat_template.jinja")
        write_tower(made / ("clip" if model.config.vision.class_token else "siglip"), model)
        write_tensors(made, model, "projector")


def check_before_training(config: LLaVAConfig, source: Weights) -> None:
    """Refuse before the first step all that a save would refuse after the last: ValueError or OSError.

    Saving needs the tokenizer, and tensors of the tower that are not in the model. Both stay at hand even if the folder
    moves: the tokenizer in memory, the tensors in files that are open.
    """
    collect(dict(meta_model(config, "vision" in source.parts).named_parameters()), config, source, None)


def collect(changed: Mapping[str, Lazy], config: LLaVAConfig, source: Weights, dtype: torch.dtype | None) -> ToSave:
    """The `changed` tensors, and from `source` all others that a saved folder has."""
    lacks_image_row(source.tokenizer, config.llm)
    shapes = saved_shapes(meta_model(config))
    parts = "" if "vision" in source.parts else "llm."          # all of them, or one
    names = [name for name in shapes if name.startswith(parts)]
    assert changed.keys() <= set(names), f"not in the model: {changed.keys() - set(names)}"
    check_tensors(source, shapes, [name for name in names if name not in changed])
    tensors = {name: changed.get(name, partial(read_tensor, source, name)) for name in names}
    dtypes = {name: dtype or (changed[name].dtype if name in changed else source.dtype(name)) for name in names}
    return ToSave(config, source.tokenizer, tensors, shapes, dtypes)


def lacks_image_row(tokenizer: Tokenizer, config: PhiConfig) -> bool:
    """Is every row of the embedding taken, as after transformers' resize_token_embeddings? Phi-2 has 900 to spare.

    <image> gets the first id after the tokenizer's own. ValueError if even those do not have a row each.
    """
    tokens = image_token_id(tokenizer)
    if tokens > config.vocab_size:
        raise ValueError(f"the tokenizer has {tokens:,} tokens and the embedding {config.vocab_size:,} rows: they "
                         "belong to different models")
    return tokens == config.vocab_size


def with_image_row(model: ToSave) -> ToSave:
    """Give <image> a row, the mean of all others, in the embedding and the head.

    Its logit is then the mean of all logits. So it is never the largest, and as a sample it is rarer than 1 in the
    number of tokens.
    """
    def extended(name: str) -> Tensor:
        tensor = model.load(name)
        mean = tensor.mean(0, keepdim=True, dtype=torch.float32)
        return torch.cat([tensor, mean.to(tensor.dtype)])

    names = ("llm.wte.weight", "llm.lm_head.weight", "llm.lm_head.bias")
    rows = model.config.llm.vocab_size + 1
    return model._replace(
        config=replace(model.config, llm=replace(model.config.llm, vocab_size=rows)),
        tensors=model.tensors | {name: partial(extended, name) for name in names},
        shapes=model.shapes | {name: (rows, *model.shapes[name][1:]) for name in names},
    )

# ---------------------------------------------------------------------------------------------------
# Tensors


def write_tensors(folder: Path, model: ToSave, part: str = "") -> None:
    """Write a model's tensors, or those of one part, as safetensors, sharded if they are large."""
    file = "mm_projector" if part == "projector" else "model"           # LLaVA's name for it
    sizes = {name: prod(model.shapes[name]) * model.dtypes[name].itemsize
             for name in model.tensors if name.startswith(part)}
    shards = plan_shards(sizes)
    weight_map = {}
    for number, names in enumerate(shards, 1):
        shard = {}
        for name in names:
            tensor = model.load(name)
            assert tensor.shape == model.shapes[name], f"{name}: {tuple(tensor.shape)} is not {model.shapes[name]}"
            shard |= saved_pieces(name, tensor.to("cpu", model.dtypes[name]).contiguous(), part)
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"{file}{suffix}.safetensors"
        write_safetensors(path, shard)
        weight_map |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        write_json(folder / f"{file}.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file(tensors, path, metadata={"format": "pt"})             # transformers refuses files without "format"
    except SafetensorError as e:                                        # a full disk, for example
        raise OSError(f"{path}: {e}") from None
    # safetensors creates a file that only its owner may read. Give it the permissions of any new file: those of the
    # folder, which follow the umask, without the execute bits.
    try:
        path.chmod(path.parent.stat().st_mode & 0o666)
    except OSError as e:                                                # SMB and FUSE may have none to change
        warn_once(f"{path} keeps the permissions that it was created with ({e})")


def plan_shards(nbytes: dict[str, int]) -> list[list[str]]:
    """Sizes of tensors in bytes -> their names, in shards of at most SHARD_BYTES, or of one larger tensor."""
    shards, room = [], 0
    for name, size in nbytes.items():
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def saved_pieces(name: str, tensor: Tensor, alone: str = "") -> dict[str, Tensor]:
    """One of our tensors as it is saved, with q, k and v split: views of it under their saved names.

    alone: the part that is written by itself.
    """
    names = to_saved(name)
    for old, new in ALONE.get(alone, {}).items():
        names = [saved.replace(old, new) for saved in names]
    return dict(zip(names, tensor.chunk(len(names)), strict=True))


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

# ---------------------------------------------------------------------------------------------------
# The folder


@contextmanager
def replacing_model(out: Path) -> Iterator[Path]:
    """A temporary folder for a model. On success it becomes `out`, or its files are moved there.

    They are moved if `out` already holds a training run or an older saved model, whose other files stay. ValueError if
    `out` holds anything else.
    """
    out = out.resolve()                 # the folder itself, where `out` is a link
    is_new = not out.exists() or not any(out.iterdir())
    training = run_settings(out)
    if not (is_new or training or (out / CHECKSUMS).exists()):
        raise ValueError(f"{out}: holds files that are not a saved model's; give --out a new folder")
    settings = {"training": training} if training else {}
    made = out if is_new else out / ".writing_model"
    with replacing(made) as part:
        part.mkdir()
        yield part
        for folder in [part, *filter(Path.is_dir, part.iterdir())]:
            write_checksums(folder)
        if settings and (part / "config.json").exists():
            write_json(part / "config.json", read_json(part / "config.json") | settings)
    if is_new:
        return
    # A crash from here on cannot leave a mixture of both models that would load: config.json does not describe a model
    # until the new one arrives, as the last file.
    if (made / "config.json").exists():
        write_whole(out / "config.json", json.dumps(settings))
        for path in out.glob("model*.safetensors*"):
            path.unlink()
    for path in sorted(made.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            remove(out / path.name)
        path.replace(out / path.name)
    remove(made)
    sync_folder(out)


def write_checksums(folder: Path) -> None:
    """Write the checksums of a folder's tensor files, so that `inspect` can later detect a changed bit.

    Text files are left out, since people may edit a config.json.
    """
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".safetensors", ".gguf")]
    lines = [f"{sha256(path)}  {path.name}\n" for path in files]
    (folder / CHECKSUMS).write_text("".join(lines))


def verify_checksums(folder: Path) -> tuple[int, str]:
    """Read a saved folder's tensor files again -> the number of intact ones, and which are damaged or missing, or "".

    (0, "") if the folder has no checksums.
    """
    sums, problems, intact = folder / CHECKSUMS, [], 0
    for line in sums.read_text(errors="replace").splitlines() if sums.is_file() else []:
        digest, name = line[:64], line[66:]
        if (folder / name).parent != folder or not (folder / name).is_file():
            problems.append(f"{(name or line)[:80]!r} names no file here")
        elif sha256(folder / name) != digest:
            problems.append(f"{name} is not what was written")
        else:
            intact += 1
    if problems:
        return intact, (f"{folder}: {', '.join(problems[:8])}, by the checksums in {CHECKSUMS}: a damaged disk or an "
                        "incomplete copy; copy or export it again")
    return intact, ""

# ---------------------------------------------------------------------------------------------------
# The text files around the tensors, for transformers and vLLM


def image_token_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def image_processor(config: LLaVAConfig) -> dict:
    """Settings with which transformers computes the same pixels as data.load_image and VisionTower."""
    size, squash = config.vision.image_size, config.image_mode == "squash"
    square = {"height": size, "width": size}
    return {
        "image_processor_type": "SiglipImageProcessor" if squash else "LlavaImageProcessor",
        "processor_class": "LlavaProcessor", "do_convert_rgb": True, "do_pad": config.image_mode == "pad",
        "do_resize": True, "size": square if squash else {"shortest_edge": size}, "resample": 3,
        "do_center_crop": not squash, "crop_size": square,
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(config.vision.mean), "image_std": list(config.vision.std),
    }


def special_ids(eot: int) -> dict:
    return dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), eot)


def phi_json(config: PhiConfig, eot: int, dtype: str) -> dict:
    """config.json of a PhiForCausalLM, with the rotary settings where transformers 4 and 5 look for them."""
    factor = config.rotary_dim / (config.n_embd // config.n_head)
    rope = {"rope_theta": config.rope_base, "partial_rotary_factor": factor}
    return {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_act": "gelu_new",
        **named_as_published(config, PHI_KEYS),
        "num_key_value_heads": config.n_head, "qk_layernorm": False, "tie_word_embeddings": False, "embd_pdrop": 0.0,
        "attention_dropout": 0.0, **rope, "rope_scaling": None, "rope_parameters": {"rope_type": "default", **rope},
        **special_ids(eot), "torch_dtype": dtype,
    }


def tower_json(config: VisionConfig) -> dict:
    """config.json of a CLIPVisionModel or a SiglipVisionModel."""
    if config.class_token:
        own = {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
               "projection_dim": config.n_embd * 3 // 4}
    else:
        own = {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model",
               "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False}
    return own | named_as_published(config, VISION_KEYS) | {"num_channels": 3, "attention_dropout": 0.0}


def write_tokenizer(folder: Path, tokenizer: Tokenizer, image: bool) -> None:
    """tokenizer.json and the files around it that transformers 4 and 5 read, with or without an <image> token.

    Only transformers needs that token. `load_tokenizer` removes it again: here, "<image>" in a text is text.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())      # a copy, to leave the caller's unchanged
    roles = dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), EOT)
    special, image_role = {}, {}
    if image:
        tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
        special = {"additional_special_tokens": [IMAGE]}                # transformers 4
        image_role = {"extra_special_tokens": {"image_token": IMAGE}}   # transformers 5
    tokenizer.save(str(folder / "tokenizer.json"))
    added = json.loads(tokenizer.to_str())["added_tokens"]
    write_json(folder / "added_tokens.json", {token["content"]: token["id"] for token in added})
    decoder = {str(token.pop("id")): token for token in added}
    write_json(folder / "special_tokens_map.json", roles | special)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False,
        **roles, **image_role, "added_tokens_decoder": decoder,
    })


def write_phi(folder: Path, model: ToSave) -> None:
    """The language model as a plain Phi-2 folder."""
    folder.mkdir(exist_ok=True)
    write_tensors(folder, model, "llm")
    write_tokenizer(folder, model.tokenizer, image=False)
    eot = eot_id(model.tokenizer)
    write_json(folder / "generation_config.json", special_ids(eot))
    write_json(folder / "config.json", phi_json(model.config.llm, eot, model.dtype_name("llm")))


def write_tower(folder: Path, model: ToSave) -> None:
    """The tower as a plain CLIP or SigLIP folder."""
    folder.mkdir()
    vision = model.config.vision
    write_tensors(folder, model, "vision")
    # transformers ignores vision_feature_layer; without it, llama.cpp's converter drops one layer too many.
    write_json(folder / "config.json", tower_json(vision) | {"vision_feature_layer": vision.feature_layer,
                                                             "torch_dtype": model.dtype_name("vision")})
    # Not the published tower's own way, but the one that tower and projector were trained with.
    write_json(folder / "preprocessor_config.json", image_processor(model.config))


def write_model_texts(folder: Path, model: ToSave) -> None:
    """Every file of a whole model's folder except its tensors."""
    config, vision, eot = model.config, model.config.vision, eot_id(model.tokenizer)
    write_tokenizer(folder, model.tokenizer, image=True)
    strategy = FEATURE_STRATEGY[not vision.class_token]
    write_json(folder / "generation_config.json", special_ids(eot))
    write_json(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": image_token_id(model.tokenizer), "image_seq_length": vision.n_patches,
        "image_aspect_ratio": config.image_mode,                        # LLaVA's key, which we read
        "vision_feature_layer": vision.feature_layer, "vision_feature_select_strategy": strategy,
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": False,
        **special_ids(eot), "torch_dtype": model.dtype_name(),
        "text_config": phi_json(config.llm, eot, model.dtype_name()), "vision_config": tower_json(vision),
    })
    write_json(folder / "preprocessor_config.json", image_processor(config))
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": vision.patch_size,
        "num_additional_image_tokens": vision.n_positions - vision.n_patches,
        "vision_feature_select_strategy": strategy,
    })
    shutil.copyfile(SAVED_MODEL / "chat_template.jinja", folder / "chat_template.jinja")
