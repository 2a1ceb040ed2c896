"""A small GPT-2 with random weights: `python recipes/small/make_gpt2.py TOKENIZER_DIR OUT`.

TOKENIZER_DIR holds GPT-2's vocab.json and merges.txt (of openai-community/gpt2, for example).
"""

import sys
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2TokenizerFast


def main(tokenizer_dir: Path, out: Path) -> None:
    for name in ("vocab.json", "merges.txt"):
        if not (tokenizer_dir / name).is_file():
            sys.exit(f"error: {tokenizer_dir} has no {name}; expected GPT-2's tokenizer there")
    if out.exists():
        sys.exit(f"error: {out} is there already; name another directory")
    torch.manual_seed(0)
    tokenizer = GPT2TokenizerFast.from_pretrained(tokenizer_dir)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=128, n_layer=4, n_head=4, n_positions=256)
    GPT2LMHeadModel(config).save_pretrained(out)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
