"""Random checkpoints of the published sizes, in the published layouts: what tests/bench/load.py measures on.

Phi-2 in bf16 as two safetensors shards (5.6 GB), CLIP ViT-L/14-336 whole, in fp32, as pytorch_model.bin (1.7 GB).
A folder is only complete with a tokenizer: --tokenizer copies one.

    python tests/bench/make_checkpoints.py --out checkpoints/random --tokenizer checkpoints/phi-2

tests/bench/load.py says how to go on.
"""
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data import load_tokenizer
from lib.common import Parser, run_command
from lib.folders import meta_model, saved_shapes
from lib.layouts import PREFIX, to_saved
from lib.save_weights import phi_json, tower_json, write_json, write_tokenizer
from model import LLaVAConfig

EOT = 50256


def random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)


def names_and_shapes(part: str, config: LLaVAConfig) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of one part, q, k and v apart."""
    shapes = {}
    for name, (rows, *rest) in saved_shapes(meta_model(config)).items():
        if name.startswith(part):
            pieces = to_saved(name)
            for piece in pieces:
                shapes[piece.removeprefix(PREFIX[part])] = (rows // len(pieces), *rest)
    return shapes


def make_phi(out: Path, config: LLaVAConfig, generator: torch.Generator) -> None:
    """Two shards, the last two layers and the head in the second, as in the published folder."""
    out.mkdir(parents=True)
    shapes = names_and_shapes("llm", config)
    last_layers = [f".layers.{config.llm.n_layer - i}." for i in (1, 2)]
    second = [name for name in shapes if "lm_head" in name or any(layer in name for layer in last_layers)]
    first = [name for name in shapes if name not in second]
    index = {}
    for number, names in enumerate((first, second), 1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        tensors = {name: random(shapes[name], torch.bfloat16, generator) for name in names}
        save_file(tensors, out / shard, {"format": "pt"})
        index |= dict.fromkeys(names, shard)
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    write_json(out / "config.json", phi_json(config.llm, EOT, "bfloat16"))


def make_clip(out: Path, config: LLaVAConfig, generator: torch.Generator) -> None:
    """The whole of CLIP: the text tower is 124 million parameters that a loader has to walk past."""
    out.mkdir(parents=True)
    tensors = {}
    for name, shape in names_and_shapes("vision", config).items():
        tensors[f"vision_model.{name}"] = random(shape, torch.float32, generator)
    tensors["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    tensors["text_model.embeddings.token_embedding.weight"] = random((49408, 768), torch.float32, generator)
    layer = {"self_attn.q_proj": (768, 768), "self_attn.k_proj": (768, 768), "self_attn.v_proj": (768, 768),
             "self_attn.out_proj": (768, 768), "mlp.fc1": (3072, 768), "mlp.fc2": (768, 3072)}
    for i in range(12):
        for name, shape in layer.items():
            tensors[f"text_model.encoder.layers.{i}.{name}.weight"] = random(shape, torch.float32, generator)
    tensors["visual_projection.weight"] = random((768, 1024), torch.float32, generator)
    tensors["logit_scale"] = torch.tensor(2.6592)
    torch.save(tensors, out / "pytorch_model.bin")
    write_json(out / "config.json", {"model_type": "clip", "vision_config": tower_json(config.vision)})


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/random"), help="gets the folders phi-2 and clip")
    parser.add_argument("--tokenizer", type=Path,
                        help="a folder with Phi-2's tokenizer files, to go with the weights; not given: weights only")
    parser.add_argument("--layers", type=int, default=32, help="of the language model; fewer make a smaller file")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights")
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    config = LLaVAConfig(llm=replace(LLaVAConfig().llm, n_layer=args.layers))
    make_phi(args.out / "phi-2", config, generator)
    if args.tokenizer:
        write_tokenizer(args.out / "phi-2", load_tokenizer(args.tokenizer), image=False)
    make_clip(args.out / "clip", config, generator)


if __name__ == "__main__":
    sys.exit(run_command(main))
