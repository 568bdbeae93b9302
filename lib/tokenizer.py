"""Phi-2's tokenizer from the files of all eras; data.load_tokenizer is what everybody else uses."""
import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lib.common import read_json
from lib.records import IMAGE

EOT = "<|endoftext|>"               # Phi-2: the end of an answer, and the only special token
PHI_RUNS = [" " * n for n in range(2, 32)] + ["\t" * n for n in range(2, 10)]        # tokens that GPT-2 does not have


def read_tokenizer(folder: Path) -> Tokenizer:
    """From tokenizer.json, without the <image> token that our export adds for transformers."""
    content = read_json(folder / "tokenizer.json")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != IMAGE]
    return Tokenizer.from_str(json.dumps(content))


def build_tokenizer(folder: Path) -> Tokenizer:
    """From GPT-2's older file formats, the only ones that the released LLaVA-Phi and Mipha ship."""
    tok = Tokenizer(models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.add_special_tokens([EOT])
    added = [(i, text) for text, i in added_tokens(folder).items() if text not in (EOT, IMAGE)]
    for i, text in sorted(added):
        tok.add_tokens([AddedToken(text, normalized=True, special=False)])      # takes the next free id
        if tok.token_to_id(text) != i:
            raise ValueError(f"{text!r} is said to have the id {i}, but the next free id is {tok.token_to_id(text)}: "
                             "vocab.json belongs to another tokenizer")
    return tok


def added_tokens(folder: Path) -> dict[str, int]:
    """The tokens beyond vocab.json and their ids, which newer folders have in tokenizer_config.json only."""
    older, newer = [read_json(path) if path.exists() else {}
                    for path in (folder / "added_tokens.json", folder / "tokenizer_config.json")]
    return {token["content"]: int(i) for i, token in newer.get("added_tokens_decoder", {}).items()} | older
