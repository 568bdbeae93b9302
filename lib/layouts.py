"""Names of tensors and settings in published folders of all generations, and our names for them.

What we call "llm.h.3.attn.qkv.weight" has had several names in published files. The tables hold names without
".weight" and ".bias". {layer} stands for a layer's number and {qkv} for q, k and v: three published tensors that are
concatenated in ours.
"""
import re
from collections.abc import Iterable
from itertools import product

from lib.tensor_files import MERGE_ADAPTERS
from model import PhiConfig
from vision import VisionConfig

PUBLISHED_NAMES = {     # our name -> that in the folders we save, after PREFIX, which is transformers'; then all others
    "llm.wte": ("model.embed_tokens", "transformer.embd.wte"),
    "llm.h.{layer}.ln": ("model.layers.{layer}.input_layernorm", "transformer.h.{layer}.ln"),
    "llm.h.{layer}.attn.qkv": ("model.layers.{layer}.self_attn.{qkv}_proj",
                               "model.layers.{layer}.self_attn.query_key_value",    # transformers 4.36, LLaVA-Phi
                               "transformer.h.{layer}.mixer.Wqkv"),
    "llm.h.{layer}.attn.proj": ("model.layers.{layer}.self_attn.dense", "transformer.h.{layer}.mixer.out_proj"),
    "llm.h.{layer}.mlp.fc": ("model.layers.{layer}.mlp.fc1", "transformer.h.{layer}.mlp.fc1"),
    "llm.h.{layer}.mlp.proj": ("model.layers.{layer}.mlp.fc2", "transformer.h.{layer}.mlp.fc2"),
    "llm.ln_f": ("model.final_layernorm", "lm_head.ln"),
    "llm.lm_head": ("lm_head", "lm_head.linear"),
    "vision.cls": ("embeddings.class_embedding",),
    "vision.patch": ("embeddings.patch_embedding",),
    "vision.pos": ("embeddings.position_embedding.weight",),
    "vision.ln_pre": ("pre_layrnorm",),                             # [sic], in every CLIP
    "vision.h.{layer}.ln_1": ("encoder.layers.{layer}.layer_norm1",),
    "vision.h.{layer}.attn.qkv": ("encoder.layers.{layer}.self_attn.{qkv}_proj",),
    "vision.h.{layer}.attn.proj": ("encoder.layers.{layer}.self_attn.out_proj",),
    "vision.h.{layer}.ln_2": ("encoder.layers.{layer}.layer_norm2",),
    "vision.h.{layer}.mlp.fc": ("encoder.layers.{layer}.mlp.fc1",),
    "vision.h.{layer}.mlp.proj": ("encoder.layers.{layer}.mlp.fc2",),
    "vision.ln_post": ("post_layernorm",),                          # not in our model, only copied when it is saved
    "projector.fc": ("linear_1", "0"),
    "projector.proj": ("linear_2", "2"),
}
PREFIX = {"llm": "language_model.", "vision": "vision_tower.vision_model.", "projector": "multi_modal_projector."}

BEGINNINGS = (  # how a published name begins, the part of the model it belongs to, how it begins in PUBLISHED_NAMES
    # LLaVA and transformers have a tower inside one or two vision_tower, CLIP and SigLIP in a vision_model, or bare.
    (r"(model\.)?(vision_tower\.)*(vision_model\.)?(?=(embeddings|encoder|pre_layrnorm|post_layernorm|head)\.)",
     "vision", ""),
    (r"(model\.)?(mm_projector|multi_modal_projector)\.", "projector", ""),    # LLaVA's name, and transformers'
    (r"model\.language_model\.", "llm", "model."),                             # transformers 5, in memory
    (r"(language_model\.)?", "llm", ""),                  # what we save; Phi-2 by itself, so any name begins like this
)
# The rows of Wqkv are (3, head, size), as ours are; those of query_key_value are (head, 3, size). Both matrices have
# the same shape, so only the name tells them apart.
PACKED_BY_HEAD = "query_key_value"

DROPPED = (     # published tensors that are ignored on purpose: a pattern, and the reason that `inspect` prints
    (r".*rotary_emb", "rotary angles are computed in every forward"),
    (r".*position_ids", "they are 0, 1, 2, ..."),
    (r"text_model\.|text_projection|visual_projection|logit_scale|logit_bias",
     "the text tower and contrastive heads, with which the vision tower was trained"),
    (r"(.*\.)?head\.(probe$|attention\.|layernorm\.|mlp\.)",
     "SigLIP's attention-pooling head, which makes one vector of a picture where LLaVA takes all patches"),
)

ONLY_PHI = "only Phi-2 is implemented here as the language model, and CLIP and SigLIP as vision towers"
UNQUANTIZED = "give the folder that it was made from: --bits 8 or 4 quantizes a model while it is loaded"
FOREIGN = (     # part of a tensor's name, the model that it gives away, and what to do
    (r"lora_[AB]\.", "PEFT adapters", MERGE_ADAPTERS),
    (r"\.absmax|\.quant_map|\.quant_state|\.SCB", "a model quantized by bitsandbytes", UNQUANTIZED),
    (r"\.qweight|\.qzeros", "a model quantized by GPTQ or AWQ", UNQUANTIZED),
    (r"\.weight_packed", "a model quantized by compressed-tensors", UNQUANTIZED),
    (r"\.weight_scale", "a model quantized to 8 bits", UNQUANTIZED),
    (r"_vision_tower\.|connector\.", "TinyLLaVA, which leaves out SigLIP's first patch",
     "run it with TinyLLaVA_Factory"),
    (r"image_newline", "LLaVA-NeXT, which cuts a picture into tiles", "give a LLaVA-1.5 style model"),
    (r"mm_projector\.weight", "a LLaVA with a linear projector", "only mlp2x_gelu is implemented here"),
    (r"mm_projector\.4\.", "a LLaVA with a projector of three or more layers", "only mlp2x_gelu is implemented here"),
    (r"mlp\.gate_up_proj", "Phi-3", ONLY_PHI),
    (r"mlp\.gate_proj", "Gemma, or another Llama-style language model", ONLY_PHI),
    (r"layer_scale1\.", "DINOv2", ONLY_PHI),
    (r"embeddings\.patch_embeddings\.", "DINOv2, or another vision tower in the format of transformers' ViT", ONLY_PHI),
    (r"vision_tower\.blocks\.", "EVA-CLIP", ONLY_PHI),
)


OUR_NAMES = {}      # (part, published name without its beginning) -> (our name, piece); for the pieces see `to_ours`
for ours, published in PUBLISHED_NAMES.items():
    for theirs in published:
        pieces = "qkv" if "{qkv}" in theirs else ["by head" if theirs.endswith(PACKED_BY_HEAD) else "whole"]
        for piece, leaf in product(pieces, ("", ".weight", ".bias")):
            OUR_NAMES[ours.split(".")[0], theirs.replace("{qkv}", piece) + leaf] = (ours + leaf, piece)

SAVED_NAMES = {ours: names[0] for ours, names in PUBLISHED_NAMES.items()}
LAYER = re.compile(r"\.(\d+)\.")


def without_layer(name: str) -> tuple[str, str]:
    """"h.3.mlp.fc" -> ("h.{layer}.mlp.fc", "3"). A name outside the layers is unchanged, with an empty number."""
    match = LAYER.search(name)
    return (LAYER.sub(".{layer}.", name, count=1), match[1]) if match else (name, "")


def rename(name: str, names: dict[str, str]) -> str:
    """Our name -> that of another program, from a table of its modules' names; "" if they do not have it."""
    template, layer = without_layer(name)
    module = template.removesuffix(".weight").removesuffix(".bias")
    if module not in names:
        return ""
    return names[module].replace("{layer}", layer) + template.removeprefix(module)


def to_saved(name: str) -> list[str]:
    """Our name -> the names it is saved under: one, or those of q, k and v."""
    saved = PREFIX[name.split(".")[0]] + rename(name, SAVED_NAMES)
    return [saved.replace("{qkv}", letter) for letter in "qkv"] if "{qkv}" in saved else [saved]


def to_ours(name: str) -> tuple[str, str] | None:
    """A tensor's name in any layout -> (our name, piece), or None for an unknown name.

    The piece is "whole"; "q", "k" or "v", a third of the rows each; or "by head", all rows, but packed head by head.
    """
    for beginning, part, standard in BEGINNINGS:
        match = re.match(beginning, name)
        if match:
            break
    template, layer = without_layer(standard + name[match.end():])
    if (part, template) not in OUR_NAMES:
        return None
    ours, piece = OUR_NAMES[part, template]
    return ours.replace("{layer}", layer), piece


def rename_sequential(names: Iterable[str]) -> dict[str, str]:
    """The earliest Phi files are one nn.Sequential: layers.0 is the embedding, the last one the head -> later names."""
    numbers = {name: int(name.split(".")[1]) for name in names if re.match(r"layers\.\d+\.", name)}
    ends = {max(numbers.values(), default=0): "lm_head", 0: "transformer.embd"}
    renamed = {}
    for name, number in numbers.items():
        renamed[name] = name.replace(f"layers.{number}", ends.get(number, f"transformer.h.{number - 1}"), 1)
    return renamed

# ---------------------------------------------------------------------------------------------------
# config.json; read by lib/configs.py

# Our field -> its spellings in config.json over the years, and transformers' default if none is present.
PHI_KEYS = {
    "vocab_size": ("vocab_size", 51200),
    "block_size": ("max_position_embeddings", "n_positions", 2048),
    "n_layer": ("num_hidden_layers", "n_layer", 24),
    "n_head": ("num_attention_heads", "n_head", 32),
    "n_embd": ("hidden_size", "n_embd", 2048),
    "n_inner": ("intermediate_size", "n_inner", None),
    "rope_base": ("rope_theta", 10000.0),
    "eps": ("layer_norm_eps", "layer_norm_epsilon", 1e-5),
    "dropout": ("resid_pdrop", 0.0),
}
ROTARY_KEYS = {"rotary_dim": ("rotary_dim", None), "rotary_factor": ("partial_rotary_factor", 0.5)}
VISION_KEYS = {
    "image_size": ("image_size", 224),
    "patch_size": ("patch_size", 32),
    "n_layer": ("num_hidden_layers", 12),
    "n_head": ("num_attention_heads", 12),
    "n_embd": ("hidden_size", 768),
    "n_inner": ("intermediate_size", 3072),
    "eps": ("layer_norm_eps", 1e-5),
}
SIGLIP_KEYS = VISION_KEYS | {"patch_size": ("patch_size", 16), "eps": ("layer_norm_eps", 1e-6)}
# transformers' name for taking just the patches: CLIP has a class token in front of them, SigLIP (True) does not.
FEATURE_STRATEGY = {False: "default", True: "full"}


def named_as_published(config: PhiConfig | VisionConfig, keys: dict) -> dict:
    """Our fields under the newest of their spellings in config.json."""
    return {spellings[0]: getattr(config, field) for field, spellings in keys.items()}
