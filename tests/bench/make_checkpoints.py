"""Random checkpoints of the published sizes, in the published layouts: what tests/bench/load.py measures on.

Phi-2 in bf16 as two safetensors shards (5.6 GB), CLIP ViT-L/14-336 whole, in fp32, as pytorch_model.bin (1.7 GB).
Needs a tokenizer beside the weights to be complete: --tokenizer copies one.

$ python tests/bench/make_checkpoints.py --out checkpoints/random
$ python load_weights.py merge --llm checkpoints/random/phi-2 --vision checkpoints/random/clip --out checkpoints/random/base
"""
import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from load_weights import PREFIX, blueprint, clip_json, phi_json, to_saved, write_json, write_tokenizer, read_tokenizer
from model import CONFIGS

EOT = 50256


def random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=generator).mul_(0.02).to(dtype)


def names_and_shapes(part: str) -> dict[str, tuple[int, ...]]:
    """Published names and shapes of one part, q, k and v apart."""
    shapes = {}
    for name, (rows, *rest) in blueprint(CONFIGS["llava-phi"]).items():
        if name.startswith(part):
            pieces = to_saved(name)
            shapes |= {piece.removeprefix(PREFIX[part]): (rows // len(pieces), *rest) for piece in pieces}
    return shapes


def make_phi(out: Path, generator: torch.Generator) -> None:
    out.mkdir(parents=True)
    shapes = names_and_shapes("llm")
    names = sorted(shapes, key=lambda name: "lm_head" in name or "layers.31" in name or "layers.30" in name)
    cut = next(i for i, name in enumerate(names) if "layers.30" in name)
    index = {}
    for i, part in enumerate((names[:cut], names[cut:])):
        shard = f"model-{i + 1:05d}-of-00002.safetensors"
        save_file({name: random(shapes[name], torch.bfloat16, generator) for name in part}, out / shard, {"format": "pt"})
        index |= dict.fromkeys(part, shard)
    write_json(out / "model.safetensors.index.json", {"metadata": {}, "weight_map": index})
    write_json(out / "config.json", phi_json(CONFIGS["llava-phi"].llm, EOT, "bfloat16"))


def make_clip(out: Path, generator: torch.Generator) -> None:
    """The whole of CLIP: the text tower is 124 million parameters that a loader has to walk past."""
    out.mkdir(parents=True)
    tensors = {f"vision_model.{name}": random(shape, torch.float32, generator) for name, shape in names_and_shapes("vision").items()}
    tensors["vision_model.embeddings.position_ids"] = torch.arange(577)[None]
    tensors["text_model.embeddings.token_embedding.weight"] = random((49408, 768), torch.float32, generator)
    for i in range(12):
        for name, shape in (("self_attn.q_proj", (768, 768)), ("self_attn.k_proj", (768, 768)), ("self_attn.v_proj", (768, 768)),
                            ("self_attn.out_proj", (768, 768)), ("mlp.fc1", (3072, 768)), ("mlp.fc2", (768, 3072))):
            tensors[f"text_model.encoder.layers.{i}.{name}.weight"] = random(shape, torch.float32, generator)
    tensors["visual_projection.weight"] = random((768, 1024), torch.float32, generator)
    tensors["logit_scale"] = torch.tensor(2.6592)
    torch.save(tensors, out / "pytorch_model.bin")
    write_json(out / "config.json", {"model_type": "clip", "vision_config": clip_json(CONFIGS["llava-phi"].vision)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/random"), help="gets the folders phi-2 and clip")
    parser.add_argument("--tokenizer", type=Path, help="a folder with Phi-2's tokenizer files, for phi-2; not given: bytes only")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    generator = torch.Generator().manual_seed(args.seed)
    make_phi(args.out / "phi-2", generator)
    if args.tokenizer:
        write_tokenizer(args.out / "phi-2", read_tokenizer(args.tokenizer), image=False)
    make_clip(args.out / "clip", generator)


if __name__ == "__main__":
    main()
