"""config.json and the processor's files of every generation -> our config.

A key that changes what a model computes is read, or refused by its name: ignored, it would give other answers than the
original's, and nothing would show it.
"""
from collections import Counter
from dataclasses import replace
from pathlib import Path

from lib.common import read_json
from lib.layouts import FEATURE_STRATEGY, PHI_KEYS, ROTARY_KEYS, SIGLIP_KEYS, VISION_KEYS, named_as_published
from lib.recipes import IMAGE_MODES
from lib.tensor_files import Pieces
from model import LLaVAConfig, PhiConfig
from vision import CLIP_L_336, SIGLIP_SO400M_384, VisionConfig

# Key -> the values that are implemented. A missing key and null are fine, too.
ONLY = {                        # LLaVA's and transformers' keys, at the top of config.json or inside its vision_config
    "mm_projector_type": ("mlp2x_gelu",), "projector_hidden_act": ("gelu",), "multimodal_projector_bias": (True,),
    "mm_resampler_type": (), "mm_vision_select_feature": ("patch",), "mm_patch_merge_type": ("flat",),
    "mm_use_im_start_end": (False,), "mm_use_im_patch_token": (False,), "use_s2": (False,), "s2": (False,),
    "quantization_config": (), "image_aspect_ratio": ("square", *IMAGE_MODES),
}
TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")
ONLY_LLM = {
    "hidden_act": TANH_GELU, "activation_function": TANH_GELU, "rope_scaling": (), "rope_type": ("default",),
    "qk_layernorm": (False,), "tie_word_embeddings": (False,), "sliding_window": (),
    "attention_dropout": (0,), "attn_pdrop": (0,), "embd_pdrop": (0,),
}
ONLY_TOWER = {"num_channels": (3,), "attention_dropout": (0,), "dropout": (0,)}
ONLY_PROCESSOR = {"do_resize": (True,), "do_rescale": (True,), "rescale_factor": (1 / 255,), "do_normalize": (True,),
                  "resample": (3,)}


def config_of(paths: list[Path], found: dict[str, Pieces], siglip: bool) -> LLaVAConfig:
    """The config of one folder, or of a language model's, a tower's and perhaps a projector's.

    found: the stored tensors by our names. A part that they lack keeps our defaults. siglip: whether they have SigLIP's
    tower.
    """
    parts = {name.split(".")[0] for name in found}
    layers = {tuple(name.split(".")[:3]) for name in found if ".h." in name}        # ("llm", "h", "0"), ...
    n_stored = Counter(part for part, _, _ in layers)
    jsons = {}                                      # file -> its content, in the order of `paths`
    for path in paths:
        file = (path if path.is_dir() else path.parent) / "config.json"
        by_itself = parts == {"projector"} or path in paths[2:]         # a projector needs no config.json
        jsons[file] = {} if by_itself and not file.is_file() else read_json(file)
    llm_file, vision_file = [*jsons][0], [*jsons][:2][-1]
    llm_json, vision_json = jsons[llm_file], jsons[vision_file]

    feature_layer = check_pictures(jsons, siglip)
    llm, vision = PhiConfig(), VisionConfig()
    mode = own_mode = "squash" if siglip else "crop"        # the tower's own, which stage 1 uses
    if "llm" in parts:
        require_only(llm_file, llm_json, {"tie_word_embeddings": (False,)})
        llm = phi_config(subconfig(llm_json, "text_config", llm_file) or llm_json, llm_file)
    if "vision" in parts:
        tower = subconfig(vision_json, "vision_config", vision_file) or vision_json
        tower = subconfig(tower, "vision_tower", vision_file) or tower  # LLaVA-Phi has two configs in vision_config
        if tower is llm_json and "llm" in parts:            # the numbers there are the language model's
            tower = published_tower(found, siglip, n_stored["vision"], vision_file)
        vision = vision_config(tower, siglip, tower.get("vision_feature_layer") or feature_layer, vision_file)
        mode = processor_mode(vision_file.parent, vision) or own_mode
    for part, n_layer, file in (("llm", llm.n_layer, llm_file), ("vision", vision.n_layer, vision_file)):
        # Before a mistyped number can build a model of that many layers.
        ensure(file.parent, n_stored[part] in (0, n_layer),
               f"config.json says {n_layer} {part} layers, the tensors are of {n_stored[part]}")
    for json in jsons.values():
        aspect = json.get("image_aspect_ratio")
        mode = own_mode if aspect == "square" else aspect or mode       # LLaVA's "square" is the tower's processor
    return LLaVAConfig(llm, vision, mode)


def check_pictures(jsons: dict[Path, dict], siglip: bool) -> object:
    """Refuse what LLaVA's keys ask for and is not implemented -> the hidden state to read, the same in all places."""
    only = ONLY | {"vision_feature_select_strategy": (FEATURE_STRATEGY[siglip],)}
    layers = []
    for file, json in jsons.items():
        nested = subconfig(json, "vision_config", file)
        two = [subconfig(nested, name, file) for name in ("vision_tower", "mm_projector")]
        for part in (json, nested, *two):
            require_only(file, part, only)
            layers += [part[key] for key in ("vision_feature_layer", "mm_vision_select_layer")
                       if part.get(key) is not None]
        ensure(file, all(layer == layers[0] for layer in layers),
               f"mm_vision_select_layer or vision_feature_layer is {' and '.join(map(str, layers))[:80]}, and only one "
               "is implemented here")
    return layers[0] if layers else -2


def published_tower(found: dict[str, Pieces], siglip: bool, n_layer: int, path: Path) -> dict:
    """The tower's config where config.json has none: LLaVA with a tuned tower, and Bunny, only name the tower there.

    Bunny leaves out SigLIP's last layer, which is never needed.
    """
    published = SIGLIP_SO400M_384 if siglip else CLIP_L_336
    width, patch = published.n_embd, published.patch_size
    expected = {"vision.patch.weight": (width, 3, patch, patch), "vision.pos": (published.n_positions, width)}
    ensure(path, expected == {name: stored.shape for name in expected for stored in found.get(name, {}).values()},
           "a LLaVA or Bunny model with its tower inside, but without a vision_config: then the tower has to be "
           'CLIP-L/14-336 or SigLIP-so400m/14-384, and this one is neither; add its own config.json as "vision_config"')
    tower = named_as_published(published, VISION_KEYS)
    if siglip and n_layer == published.n_layer - 1:
        tower |= {"num_hidden_layers": n_layer, "vision_feature_layer": -1}
    return tower


def processor_mode(folder: Path, vision: VisionConfig) -> str:
    """How transformers' config of the processor makes images square; "" if it does not say."""
    mode, side = "", vision.image_size
    square = {"height": side, "width": side}
    only = ONLY_PROCESSOR | {"size": (side, {"shortest_edge": side}, square), "crop_size": (side, square),
                             "image_mean": (vision.mean,), "image_std": (vision.std,)}
    for name in ("processor_config.json", "preprocessor_config.json"):
        file = folder / name
        whole = read_json(file) if file.is_file() else {}
        processor = subconfig(whole, "image_processor", file) or whole
        squashed = processor.get("size") == square
        for key in ("image_mean", "image_std"):
            if is_near(processor.get(key), only[key][0]):
                processor = processor | {key: only[key][0]}
        require_only(file, processor, only if squashed else only | {"do_center_crop": (True,)})
        ways = {"pad": processor.get("do_pad"), "squash": squashed, "crop": processor.get("do_center_crop")}
        mode = mode or next((way for way in ways if ways[way]), "")
    return mode


def is_near(value: object, expected: tuple[float, ...]) -> bool:
    """Are these the expected numbers, but for how many digits were written?"""
    return isinstance(value, list) and len(value) == len(expected) and all(
        type(n) in (int, float) and abs(n - e) < 1e-5 for n, e in zip(value, expected))


def config_of_run(config: LLaVAConfig, dropout: float, image_mode: str) -> LLaVAConfig:
    """The config of a training run: that of the weights it starts from, with the run's own settings.

    A negative dropout keeps that of the language model's config.json.
    """
    if dropout >= 0:
        config = replace(config, llm=replace(config.llm, dropout=dropout))
    return replace(config, image_mode=image_mode)

# ---------------------------------------------------------------------------------------------------
# The two parts


def phi_config(config: dict, path: Path) -> PhiConfig:
    config = config | subconfig(config, "rope_parameters", path)        # where transformers 5 has rotary settings
    fields = config_fields(config, PHI_KEYS | ROTARY_KEYS, path)
    heads, head_size = fields["n_head"], fields["n_embd"] // fields["n_head"]
    require_only(path, config, ONLY_LLM | {"num_key_value_heads": (heads,), "n_head_kv": (heads,),
                                           "head_dim": (head_size,)})
    # Phi-1 and Phi-1.5 have Phi-2's architecture at another size. They are refused because their outputs have never
    # been compared with the originals'.
    ensure(path, (fields["n_layer"], fields["n_embd"]) != (24, 2048),
           "24 layers of width 2048 are Phi-1 or Phi-1.5, and only Phi-2 is implemented here")
    fields["n_inner"] = fields["n_inner"] or 4 * fields["n_embd"]
    rotary_factor = fields.pop("rotary_factor")
    rotary_dim = fields.pop("rotary_dim") or int(head_size * rotary_factor)
    ensure(path, rotary_dim % 2 == 0 and 0 < rotary_dim <= head_size,
           f"{rotary_dim} channels of each head would rotate, expected an even number up to {head_size}")
    return PhiConfig(**fields, rotary_dim=rotary_dim)


def vision_config(config: dict, siglip: bool, feature_layer: object, path: Path) -> VisionConfig:
    """The tower's config. Sizes come from config.json; whether it is CLIP or SigLIP is known from its tensors."""
    require_only(path, config, ONLY_TOWER | {"hidden_act": TANH_GELU if siglip else ("quick_gelu",)})
    fields = config_fields(config, SIGLIP_KEYS if siglip else VISION_KEYS, path)
    ensure(path, type(feature_layer) is int and -fields["n_layer"] <= feature_layer < 0,
           f"mm_vision_select_layer, the vision layer to read, is {feature_layer!r}, expected one counted from the end")
    return replace(SIGLIP_SO400M_384 if siglip else CLIP_L_336, **fields, feature_layer=feature_layer)


def config_fields(config: dict, keys: dict, path: Path) -> dict:
    """Our config fields from a config.json of any generation. null counts as a missing key."""
    fields = {}
    for field, (*spellings, default) in keys.items():
        key = next((key for key in spellings if config.get(key) is not None), None)
        value = config[key] if key else default
        types, least = ((int, float), 0) if isinstance(default, float) else ((int,), 1)
        ensure(path, not key or type(value) in types and least <= value < 1e9,
               f"{key} is {repr(value)[:80]}, expected a number")
        fields[field] = value
    width, heads = fields["n_embd"], fields["n_head"]
    ensure(path, width % heads == 0, f"hidden_size {width} is not a multiple of {heads} heads")
    return fields


def subconfig(config: dict, key: str, path: Path) -> dict:
    """A config inside a config, empty if it is not there."""
    value = config.get(key)
    ensure(path, isinstance(value, dict | None), f"{key} is {repr(value)[:80]}, expected an object")
    return value or {}


def require_only(path: Path, config: dict, only: dict[str, tuple]) -> None:
    """Refuse a variant of the model that is not implemented here, rather than compute something else."""
    for key, implemented in only.items():
        value = config.get(key)
        choices = " or ".join(map(repr, implemented)) or "null"
        ensure(path, value is None or value in implemented,
               f"{key} is {repr(value)[:80]}, and only {choices} is implemented here")


def ensure(path: Path, holds: bool, problem: str) -> None:
    if not holds:
        raise ValueError(f"{path}: {problem}")
