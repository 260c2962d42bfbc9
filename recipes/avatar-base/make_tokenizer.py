"""Makes the CLIPTokenizer of the embedded base: byte-level BPE, merges learnt from the captions of the corpus.

python make_tokenizer.py DATA WORK

Written in both layouts, tokenizer.json and vocab.json + merges.txt, so that older transformers read it too.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import world
from tokenizers import Tokenizer, trainers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer

LENGTH = 32  # tokens per prompt, start and end included
MERGES = 700


def caption_lines(data: Path) -> list[str]:
    """20,000 captions, some with names, so that letter pairs of unknown words are merged too."""
    colours = world.colour_names(data)
    rng = random.Random(0)
    lines = [line for name in ("corpus", "named") for line in world.load(data, name)[1]]
    return [
        world.describe(
            world.attributes(line, colours),
            rng,
            world.made_up_name(line["identity"]) if line["set"] == "named" else None,
        )
        for line in rng.sample(lines, 20_000)
    ]


def main() -> None:
    """Learn the merges and save the tokenizer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    args = parser.parse_args()
    clip = CLIPTokenizer().backend_tokenizer
    learner = Tokenizer(BPE(end_of_word_suffix="</w>"))
    learner.normalizer, learner.pre_tokenizer = clip.normalizer, clip.pre_tokenizer
    alphabet = sorted(ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=512 + MERGES, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator(caption_lines(args.data), trainer)
    merges = [tuple(m) for m in json.loads(learner.to_str())["model"]["merges"]][:MERGES]
    tokens = [*alphabet, *(f"{c}</w>" for c in alphabet), *("".join(m) for m in merges)]
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    folder = args.work / "tokenizer"
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    print(f"{len(vocabulary)} tokens")


if __name__ == "__main__":
    main()
