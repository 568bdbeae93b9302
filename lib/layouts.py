"""Names of tensors and settings in published folders of all generations, and our names for them.

What we call "llm.h.3.attn.qkv.weight" has had several names in published files. The tables hold names without
".weight" and ".bias". {layer} stands for a layer's number and {qkv} for q, k and v: three published tensors that are
concatenated in ours.
"""
import re
from collections.abc import Iterable

from lib.tensor_files import MERGE_ADAPTERS
from model import PhiConfig
from vision import VisionConfig

SAVED = {       # our name -> its name in the folders we save, after PREFIX; these are transformers' names
    "llm.wte": "model.embed_tokens",
    "llm.h.{layer}.ln": "model.layers.{layer}.input_layernorm",
    "llm.h.{layer}.attn.qkv": "model.layers.{layer}.self_attn.{qkv}_proj",
    "llm.h.{layer}.attn.proj": "model.layers.{layer}.self_attn.dense",
    "llm.h.{layer}.mlp.fc": "model.layers.{layer}.mlp.fc1",
    "llm.h.{layer}.mlp.proj": "model.layers.{layer}.mlp.fc2",
    "llm.ln_f": "model.final_layernorm",
    "llm.lm_head": "lm_head",
    "vision.cls": "embeddings.class_embedding",
    "vision.patch": "embeddings.patch_embedding",
    "vision.pos": "embeddings.position_embedding.weight",
    "vision.ln_pre": "pre_layrnorm",                                # [sic], in every CLIP
    "vision.h.{layer}.ln_1": "encoder.layers.{layer}.layer_norm1",
    "vision.h.{layer}.attn.qkv": "encoder.layers.{layer}.self_attn.{qkv}_proj",
    "vision.h.{layer}.attn.proj": "encoder.layers.{layer}.self_attn.out_proj",
    "vision.h.{layer}.ln_2": "encoder.layers.{layer}.layer_norm2",
    "vision.h.{layer}.mlp.fc": "encoder.layers.{layer}.mlp.fc1",
    "vision.h.{layer}.mlp.proj": "encoder.layers.{layer}.mlp.fc2",
    "vision.ln_post": "post_layernorm",                             # not in our model, only copied when it is saved
    "projector.fc": "linear_1",
    "projector.proj": "linear_2",
}
PREFIX = {"llm": "language_model.", "vision": "vision_tower.vision_model.", "projector": "multi_modal_projector."}

BEGINNINGS = (  # prefix of a published name, the part of the model it belongs to, the prefix in SAVED or OTHER
    ("model.vision_tower.vision_tower.vision_model.", "vision", ""),        # LLaVA
    ("model.vision_tower.vision_model.", "vision", ""),                     # LLaVA-Phi, Mipha
    ("model.vision_tower.vision_tower.", "vision", ""),
    ("model.vision_tower.", "vision", ""),                                  # transformers 5, in memory
    ("vision_tower.vision_tower.vision_model.", "vision", ""),
    ("vision_tower.vision_model.", "vision", ""),                           # what we save
    ("vision_tower.", "vision", ""),                                        # transformers 5, saved
    ("vision_model.", "vision", ""),                                        # CLIP, SigLIP
    ("embeddings.", "vision", "embeddings."),                               # a vision tower without a prefix
    ("encoder.", "vision", "encoder."),
    ("pre_layrnorm.", "vision", "pre_layrnorm."),
    ("post_layernorm.", "vision", "post_layernorm."),
    ("head.", "vision", "head."),
    ("model.mm_projector.", "projector", ""),                               # LLaVA, LLaVA-Phi, Mipha
    ("mm_projector.", "projector", ""),
    ("model.multi_modal_projector.", "projector", ""),                      # transformers 5, in memory
    ("multi_modal_projector.", "projector", ""),                            # what we save
    ("model.language_model.", "llm", "model."),                             # transformers 5, in memory
    ("language_model.", "llm", ""),                                         # what we save
    ("model.", "llm", "model."),                                            # Phi-2
    ("lm_head.", "llm", "lm_head."),
    ("transformer.", "llm", "transformer."),                                # Phi-2 as Microsoft first released it
)
OTHER = {       # other published names -> ours
    "model.layers.{layer}.self_attn.query_key_value": "llm.h.{layer}.attn.qkv",     # transformers 4.36, LLaVA-Phi
    "transformer.embd.wte": "llm.wte",
    "transformer.h.{layer}.ln": "llm.h.{layer}.ln",
    "transformer.h.{layer}.mixer.Wqkv": "llm.h.{layer}.attn.qkv",
    "transformer.h.{layer}.mixer.out_proj": "llm.h.{layer}.attn.proj",
    "transformer.h.{layer}.mlp.fc1": "llm.h.{layer}.mlp.fc",
    "transformer.h.{layer}.mlp.fc2": "llm.h.{layer}.mlp.proj",
    "lm_head.ln": "llm.ln_f",
    "lm_head.linear": "llm.lm_head",
    "0": "projector.fc",
    "2": "projector.proj",
}
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
FOREIGN = (     # part of a tensor's name -> the model that it gives away, and what to do
    ("lora_A.", "PEFT adapters", MERGE_ADAPTERS),
    ("lora_B.", "PEFT adapters", MERGE_ADAPTERS),
    (".absmax", "a model quantized by bitsandbytes", UNQUANTIZED),
    (".quant_map", "a model quantized by bitsandbytes", UNQUANTIZED),
    (".quant_state", "a model quantized by bitsandbytes", UNQUANTIZED),
    (".SCB", "a model quantized by bitsandbytes", UNQUANTIZED),
    (".qweight", "a model quantized by GPTQ or AWQ", UNQUANTIZED),
    (".qzeros", "a model quantized by GPTQ or AWQ", UNQUANTIZED),
    (".weight_packed", "a model quantized by compressed-tensors", UNQUANTIZED),
    (".weight_scale", "a model quantized to 8 bits", UNQUANTIZED),
    ("_vision_tower.", "TinyLLaVA, which leaves out SigLIP's first patch", "run it with TinyLLaVA_Factory"),
    ("connector.", "TinyLLaVA, which leaves out SigLIP's first patch", "run it with TinyLLaVA_Factory"),
    ("image_newline", "LLaVA-NeXT, which cuts a picture into tiles", "give a LLaVA-1.5 style model"),
    ("mm_projector.weight", "a LLaVA with a linear projector", "only mlp2x_gelu is implemented here"),
    ("mm_projector.4.", "a LLaVA with a projector of three or more layers", "only mlp2x_gelu is implemented here"),
    ("mlp.gate_up_proj", "Phi-3", ONLY_PHI),
    ("mlp.gate_proj", "Gemma, or another Llama-style language model", ONLY_PHI),
    ("layer_scale1.", "DINOv2", ONLY_PHI),
    ("embeddings.patch_embeddings.", "DINOv2, or another vision tower in the format of transformers' ViT", ONLY_PHI),
    ("vision_tower.blocks.", "EVA-CLIP", ONLY_PHI),
)


def known_names() -> dict[tuple[str, str], tuple[str, str]]:
    """(part, published name) -> (our name, piece), from the tables. For the pieces see `to_ours`."""
    names = {}
    for ours, theirs in SAVED.items():
        part = ours.split(".")[0]
        if "{qkv}" in theirs:
            for letter in "qkv":
                names[part, theirs.replace("{qkv}", letter)] = (ours, letter)
        else:
            names[part, theirs] = (ours, "whole")
    for theirs, ours in OTHER.items():
        part = ours.split(".")[0]
        names[part, theirs] = (ours, "by head" if theirs.endswith(PACKED_BY_HEAD) else "whole")
    return names


KNOWN_NAMES = known_names()
LAYER = re.compile(r"\.(\d+)\.")


def without_layer(name: str) -> tuple[str, str]:
    """"h.3.mlp.fc" -> ("h.{layer}.mlp.fc", "3"). A name outside the layers is unchanged, with an empty number."""
    match = LAYER.search(name)
    if match is None:
        return name, ""
    return LAYER.sub(".{layer}.", name, count=1), match[1]


def to_saved(name: str) -> list[str]:
    """Our name -> the names it is saved under: one, or those of q, k and v."""
    template, layer = without_layer(name)
    leaf = ""
    if template not in SAVED:
        template, _, leaf = template.rpartition(".")
        leaf = "." + leaf
    saved = PREFIX[name.split(".")[0]] + SAVED[template].replace("{layer}", layer) + leaf
    if "{qkv}" in saved:
        return [saved.replace("{qkv}", letter) for letter in "qkv"]
    return [saved]


def to_ours(name: str) -> tuple[str, str] | None:
    """A tensor's name in any layout -> (our name, piece), or None for an unknown name.

    The piece is "whole"; "q", "k" or "v", a third of the rows each; or "by head", all rows, but packed head by head.
    """
    for beginning, part, standard in BEGINNINGS:
        if name.startswith(beginning):
            break
    else:
        return None
    template, layer = without_layer(standard + name.removeprefix(beginning))
    leaf = ""
    if (part, template) not in KNOWN_NAMES:
        template, _, leaf = template.rpartition(".")
        leaf = "." + leaf
    if (part, template) not in KNOWN_NAMES:
        return None
    ours, piece = KNOWN_NAMES[part, template]
    return ours.replace("{layer}", layer) + leaf, piece


def rename_sequential(names: Iterable[str]) -> dict[str, str]:
    """The earliest Phi files are one nn.Sequential: layers.0 is the embedding, the last one the head -> later names."""
    numbers = {}
    for name in names:
        match = re.match(r"layers\.(\d+)\.", name)
        if match:
            numbers[name] = int(match[1])
    last = max(numbers.values(), default=0)
    renamed = {}
    for name, number in numbers.items():
        rest = name.removeprefix(f"layers.{number}.")
        if number == 0:
            renamed[name] = f"transformer.embd.{rest}"
        elif number == last:
            renamed[name] = f"lm_head.{rest}"
        else:
            renamed[name] = f"transformer.h.{number - 1}.{rest}"
    return renamed

# ---------------------------------------------------------------------------------------------------
# config.json; read by lib/configs.py

# Our field -> its spellings in config.json over the years, and transformers' default if none is present.
PHI_KEYS = {
    "vocab_size": (("vocab_size",), 51200),
    "block_size": (("max_position_embeddings", "n_positions"), 2048),
    "n_layer": (("num_hidden_layers", "n_layer"), 24),
    "n_head": (("num_attention_heads", "n_head"), 32),
    "n_embd": (("hidden_size", "n_embd"), 2048),
    "n_inner": (("intermediate_size", "n_inner"), None),
    "rope_base": (("rope_theta",), 10000.0),
    "eps": (("layer_norm_eps", "layer_norm_epsilon"), 1e-5),
    "dropout": (("resid_pdrop",), 0.0),
}
ROTARY_KEYS = {"rotary_dim": (("rotary_dim",), None), "rotary_factor": (("partial_rotary_factor",), 0.5)}
VISION_KEYS = {
    "image_size": (("image_size",), 224),
    "patch_size": (("patch_size",), 32),
    "n_layer": (("num_hidden_layers",), 12),
    "n_head": (("num_attention_heads",), 12),
    "n_embd": (("hidden_size",), 768),
    "n_inner": (("intermediate_size",), 3072),
    "eps": (("layer_norm_eps",), 1e-5),
}
SIGLIP_KEYS = VISION_KEYS | {"patch_size": (("patch_size",), 16), "eps": (("layer_norm_eps",), 1e-6)}


def feature_strategy(siglip: bool) -> str:
    """transformers' name for taking just the patches: CLIP has a class token in front of them, SigLIP does not."""
    return "full" if siglip else "default"


def named_as_published(config: PhiConfig | VisionConfig, keys: dict) -> dict:
    """Our fields under the newest of their spellings in config.json."""
    return {spellings[0]: getattr(config, field) for field, (spellings, default) in keys.items()}
