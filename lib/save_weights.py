"""The one format in which models are saved: a folder that transformers' LlavaForConditionalGeneration and vLLM read too."""
import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from data import EOT, IMAGE, eot_id, load_tokenizer
from lib.common import read_json, remove, replacing, sync_folder, write_whole
from lib.folders import PHI, Folder, Pieces, blueprint, check_tensors, in_order, read_folders, read_kind, read_tensor
from lib.layouts import PHI_KEYS, SIGLIP_KEYS, VISION_KEYS, feature_strategy, is_siglip, named_as_published, to_saved
from model import LLaVAConfig, PhiConfig
from vision import VisionConfig

# Shards are built in memory, one at a time, so they are smaller than the 5 GB that are usual.
SHARD_BYTES = 1_500_000_000
ALONE = {       # how saved names begin where one part is written by itself: as Phi, CLIP and LLaVA call them
    "llm": {"language_model.": ""},
    "vision": {"vision_tower.": ""},
    "projector": {"multi_modal_projector.linear_1.": "model.mm_projector.0.",
                  "multi_modal_projector.linear_2.": "model.mm_projector.2."},
}
Lazy = Tensor | Callable[[], Tensor]        # a tensor, or what loads it when its turn has come


def plan_shards(nbytes: dict[str, int]) -> list[list[str]]:
    """Tensors' sizes in bytes -> their names in groups of at most SHARD_BYTES, or of one tensor that is larger."""
    shards, room = [], 0
    for name, size in nbytes.items():
        if size > room:
            shards.append([])
            room = SHARD_BYTES
        shards[-1].append(name)
        room -= size
    return shards


def saved_pieces(part: str, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """One of our tensors as it is saved, q, k and v apart: views of it under their names."""
    names = to_saved(name)
    pieces = {}
    for saved, piece in zip(names, tensor.chunk(len(names)), strict=True):
        for old, new in ALONE.get(part, {}).items():
            if saved.startswith(old):
                saved = new + saved.removeprefix(old)
        pieces[saved] = piece
    return pieces


def write_tensors(part: str, folder: Path, dtypes: dict[str, torch.dtype], tensors: Mapping[str, Lazy],
                  found: dict[str, Pieces], config: LLaVAConfig, file: str = "model") -> None:
    """Write the tensors of `dtypes` (our name -> what to save it in) as safetensors, in shards where they are large.

    They come from `tensors`, else from where they are `found`. `file` is the files' name without its ending.
    """
    shapes = blueprint(config)
    shards = plan_shards({name: shapes[name].numel() * dtype.itemsize for name, dtype in dtypes.items()})
    weight_map, total = {}, 0
    for number, names in enumerate(shards, 1):
        shard = {}
        for name in names:
            tensor = tensors[name] if name in tensors else read_tensor(name, found[name], config)
            if callable(tensor):
                tensor = tensor()
            assert tensor.shape == shapes[name], f"{name}: {tuple(tensor.shape)} is not {tuple(shapes[name])}"
            tensor = tensor.detach().to("cpu", dtypes[name]).contiguous()
            shard |= saved_pieces(part, name, tensor)
            total += tensor.nbytes
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        path = folder / f"{file}{suffix}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})               # transformers refuses files without "format"
        # safetensors makes a file that only its owner may read. Give it the rights of any new file: the folder's own,
        # which the umask has shaped, without those to enter it.
        path.chmod(folder.stat().st_mode & 0o666)
        weight_map |= dict.fromkeys(shard, path.name)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder / f"{file}.safetensors.index.json", index)


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


CHECKSUMS = "SHA256SUMS"        # the usual name and form: `sha256sum -c SHA256SUMS` reads it too


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_checksums(folder: Path) -> None:
    """Note what the files with the tensors are, so that `inspect` can tell later whether a bit has changed.

    The files are read back for it. The text files are left out: people edit a config.json, and may.
    """
    lines = [f"{sha256(path)}  {path.name}\n" for path in sorted(folder.glob("*.safetensors"))]
    (folder / CHECKSUMS).write_text("".join(lines))


def verify_checksums(folder: Path) -> int | None:
    """Read a saved folder's tensor files again -> how many are as they were written; None: it has no checksums.

    ValueError names every file that is not.
    """
    if not (folder / CHECKSUMS).is_file():
        return None
    changed, intact = [], 0
    for line in (folder / CHECKSUMS).read_text(errors="replace").splitlines():
        match = re.fullmatch(r"([0-9a-f]{64}) [ *]([^/\\\0]+)", line)
        if match is None:
            raise ValueError(f"{folder / CHECKSUMS}: {line[:80]!r} is not a checksum and the name of a file here")
        checksum, name = match.groups()
        if not (folder / name).is_file():
            changed.append(f"{name} is not there")
        elif sha256(folder / name) != checksum:
            changed.append(f"{name} is not what was written")
        else:
            intact += 1
    if changed:
        raise ValueError(f"{folder}: {', '.join(changed)}, by the checksums in {CHECKSUMS}: "
                         "a damaged disk or an incomplete copy; copy or export it again")
    return intact


@contextmanager
def replacing_model(out: Path) -> Iterator[Path]:
    """A temporary folder for a model. On success it becomes `out`, or its files move into it.

    The latter happens where a training run, or an older saved model, is already; its other files stay. ValueError
    where `out` holds anything else.
    """
    out = out.resolve()                 # the folder itself, where `out` is a link
    if not out.exists() or not any(out.iterdir()):
        with replacing(out) as made:
            made.mkdir()
            yield made
        return
    config = read_json(out / "config.json") if (out / "config.json").is_file() else {}
    settings = {"training": config["training"]} if "training" in config else {}
    if not settings and not any((out / name).exists() for name in ("load_hf.py", "mm_projector.safetensors")):
        raise ValueError(f"{out}: holds files that are not a saved model's; give --out a new folder")
    made = out / ".writing_model"
    with replacing(made) as part:
        part.mkdir()
        yield part
        if (part / "config.json").exists():
            write_json(part / "config.json", read_json(part / "config.json") | settings)
    move_into(out, made, settings)


def move_into(out: Path, made: Path, settings: dict) -> None:
    """Replace the model in `out` by the one in `made`. A crash in between leaves no mixture of both that would load:
    config.json says nothing of a model until the new one comes, as the last file.
    """
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


def saved_dtypes(names: list[str], tensors: Mapping[str, Lazy], found: dict[str, Pieces],
                 dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """Our name -> what to save it in: the given dtype, else the tensor's own."""
    dtypes = {}
    for name in names:
        own = tensors[name] if name in tensors else in_order(found[name])[0]
        dtypes[name] = dtype or own.dtype
    return dtypes


def save_model(out: Path, tensors: Mapping[str, Lazy], config: LLaVAConfig, sources: Iterable[Path],
               dtype: torch.dtype | None = None) -> None:
    """Write a model folder that is complete by itself, in the one format we save.

    tensors: those of our parameters that changed; everything else (other parameters, the vision layers behind the one
    that is read, the tokenizer) is taken from `sources`, the folders that the model came from.
    dtype None: each tensor's own; functions need one. In a training folder config.json keeps the trainer's settings
    under its key "training". Nothing is at `out` before all of it is there.
    """
    save("", out, tensors, config, read_folders(sources), dtype)


def save_phi(out: Path, tensors: Mapping[str, Lazy], config: LLaVAConfig, source: Path) -> None:
    """The same for a plain Phi-2 folder, as transformers' PhiForCausalLM and `merge --llm` take it."""
    save("llm", out, tensors, config, [read_kind(source, PHI)], None)


def save(part: str, out: Path, tensors: Mapping[str, Lazy], config: LLaVAConfig, sources: list[Folder],
         dtype: torch.dtype | None) -> None:
    """The whole model (part ""), or one part as a folder of its own."""
    names = [name for name in blueprint(config) if name.startswith(part)]
    found = check_tensors(sources, [name for name in names if name not in tensors], config)
    assert tensors.keys() <= set(names), f"not in the model: {tensors.keys() - set(names)}"
    dtypes = saved_dtypes(names, tensors, found, dtype)
    tokenizer = load_tokenizer(sources[0].path)
    # <image> gets the first id after the tokenizer's own. Phi-2's table has 900 rows that no token uses.
    if not part and image_token_id(tokenizer) >= config.llm.vocab_size:
        rows = config.llm.vocab_size
        raise ValueError(f"{sources[0].path}: all {rows} embedding rows are taken, none is left for <image>")
    with replacing_model(out) as made:
        write_tensors(part, made, dtypes, tensors, found, config)
        write_texts(part, made, config, tokenizer, dtypes[names[0]])
        write_checksums(made)


SAVED_MODEL = Path(__file__).parent.parent / "saved_model"         # files that go into every saved folder as they are


def image_token_id(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1


def image_processor(config: LLaVAConfig) -> dict:
    """What transformers needs to make the pixels that data.load_image and VisionTower make."""
    size = config.vision.image_size
    processor = {
        "image_processor_type": "LlavaImageProcessor", "processor_class": "LlavaProcessor", "do_convert_rgb": True,
        "do_pad": config.image_mode == "pad",
        "do_resize": True, "size": {"shortest_edge": size}, "resample": 3,
        "do_center_crop": True, "crop_size": {"height": size, "width": size},
        "do_rescale": True, "rescale_factor": 1 / 255,
        "do_normalize": True, "image_mean": list(config.vision.mean), "image_std": list(config.vision.std),
    }
    if config.image_mode == "squash":
        processor |= {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size},
                      "do_center_crop": False}
    return processor


def phi_json(config: PhiConfig, eot: int, dtype: str) -> dict:
    """config.json of a PhiForCausalLM, with the rotary numbers where transformers 4 looks and where 5 does."""
    factor = config.rotary_dim / (config.n_embd // config.n_head)
    rope = {"rope_theta": config.rope_base, "partial_rotary_factor": factor}
    return {
        "architectures": ["PhiForCausalLM"], "model_type": "phi", "hidden_act": "gelu_new",
        **named_as_published(config, PHI_KEYS),
        "num_key_value_heads": config.n_head, "qk_layernorm": False, "tie_word_embeddings": False, "embd_pdrop": 0.0,
        "attention_dropout": 0.0, **rope, "rope_scaling": None, "rope_parameters": {"rope_type": "default", **rope},
        "bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot, "torch_dtype": dtype,
    }


def clip_json(config: VisionConfig) -> dict:
    """config.json of a CLIPVisionModel."""
    return {
        "architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
        **named_as_published(config, VISION_KEYS),
        "num_channels": 3, "attention_dropout": 0.0, "projection_dim": config.n_embd * 3 // 4,
    }


def siglip_json(config: VisionConfig) -> dict:
    """config.json of a SiglipVisionModel."""
    return {
        "architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model", "hidden_act": "gelu_pytorch_tanh",
        **named_as_published(config, SIGLIP_KEYS),
        "num_channels": 3, "attention_dropout": 0.0, "vision_use_head": True,
    }


def write_tokenizer(folder: Path, tokenizer: Tokenizer, image: bool) -> None:
    """tokenizer.json and the files around it that transformers 4 and 5 read, with a token for the picture or without.

    Only transformers needs that token. `load_tokenizer` takes it out again: here "<image>" in a text is text.
    """
    tokenizer = Tokenizer.from_str(tokenizer.to_str())      # a copy, the caller's own stays as it is
    roles = {"bos_token": EOT, "eos_token": EOT, "pad_token": EOT, "unk_token": EOT}
    special, image_role = {}, {}
    if image:
        tokenizer.add_special_tokens([AddedToken(IMAGE, special=True, normalized=False)])
        special = {"additional_special_tokens": [IMAGE]}                # transformers 4
        image_role = {"extra_special_tokens": {"image_token": IMAGE}}   # transformers 5
    tokenizer.save(str(folder / "tokenizer.json"))
    added = sorted(tokenizer.get_added_tokens_decoder().items())
    decoder = {}
    for id, token in added:
        decoder[str(id)] = {"content": token.content, "single_word": token.single_word, "lstrip": token.lstrip,
                            "rstrip": token.rstrip, "normalized": token.normalized, "special": token.special}
    write_json(folder / "added_tokens.json", {token.content: id for id, token in added})
    write_json(folder / "special_tokens_map.json", roles | special)
    write_json(folder / "tokenizer_config.json", {
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 2048, "padding_side": "left",
        "model_input_names": ["input_ids", "attention_mask"], "clean_up_tokenization_spaces": False,
        **roles, **image_role, "added_tokens_decoder": decoder,
    })


def write_texts(part: str, folder: Path, config: LLaVAConfig, tokenizer: Tokenizer, dtype: torch.dtype) -> None:
    """All of a saved folder but its tensors: of the whole model (part ""), or of a plain Phi, CLIP or SigLIP.

    dtype: the first tensor's, for config.json. It never says fp16, which this model must not be computed in.
    """
    name = str(torch.float32 if dtype == torch.float16 else dtype).removeprefix("torch.")
    siglip = is_siglip(config.vision)
    tower = siglip_json(config.vision) if siglip else clip_json(config.vision)
    if part == "vision":
        own_mode = replace(config, image_mode="squash" if siglip else "crop")
        own_type = "SiglipImageProcessor" if siglip else "CLIPImageProcessor"
        # transformers has no use for the layer; llama.cpp's converter would otherwise leave out one too many.
        tower["vision_feature_layer"] = config.vision.feature_layer
        write_json(folder / "config.json", tower | {"torch_dtype": name})
        write_json(folder / "preprocessor_config.json", image_processor(own_mode) | {"image_processor_type": own_type})
        return
    write_tokenizer(folder, tokenizer, image=not part)
    eot = eot_id(tokenizer)
    special_ids = {"bos_token_id": eot, "eos_token_id": eot, "pad_token_id": eot}
    write_json(folder / "generation_config.json", special_ids)
    text = phi_json(config.llm, eot, name)
    if part == "llm":
        write_json(folder / "config.json", text)
        return
    write_json(folder / "config.json", {
        "architectures": ["LlavaForConditionalGeneration"], "model_type": "llava",
        "image_token_index": image_token_id(tokenizer), "image_seq_length": config.vision.n_patches,
        "image_aspect_ratio": config.image_mode,                        # LLaVA's key, which we read
        "vision_feature_layer": config.vision.feature_layer,
        "vision_feature_select_strategy": feature_strategy(siglip),
        "projector_hidden_act": "gelu", "multimodal_projector_bias": True, "tie_word_embeddings": False,
        **special_ids, "torch_dtype": name, "text_config": text, "vision_config": tower,
    })
    write_json(folder / "preprocessor_config.json", image_processor(config))
    write_json(folder / "processor_config.json", {
        "processor_class": "LlavaProcessor", "image_token": IMAGE, "patch_size": config.vision.patch_size,
        "num_additional_image_tokens": config.vision.n_positions - config.vision.n_patches,
        "vision_feature_select_strategy": feature_strategy(siglip),
    })
    for file in ("chat_template.jinja", "load_hf.py", "README.md"):
        shutil.copyfile(SAVED_MODEL / file, folder / file)
