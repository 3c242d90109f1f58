"""Run as `python -m tersekv.models.gguf_to_safetensors GGUF FOLDER`.

A process of its own, because reading a GGUF file takes four times the memory of the finished model and draws
bars on standard error that cannot be turned off (transformers 5.23).
"""

import sys
from functools import cache
from pathlib import Path

import gguf
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

# transformers parses the file's vocabulary three times and builds the same table of names for every module.
# Remembering both halves the time; only this process sees the change.
gguf.GGUFReader = cache(gguf.GGUFReader)
gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)

SAMPLE = "The capital of France is Paris, and most people who live there speak French."


def convert(file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    check_tokenizer(len(tokenizer(SAMPLE).input_ids), transformers.__version__)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def check_tokenizer(count: int, version: str) -> None:
    """Raise ValueError if a text becomes one token a character: then a vocabulary was read without its merges.

    transformers 5.17 does so with Gemma 3's, 5.23 does not; the model's perplexity was 12,219 where it is 16.
    """
    if count > len(SAMPLE) / 2:
        raise ValueError(
            f"transformers {version} makes {count} tokens of a sentence of {len(SAMPLE)} characters, so it reads this "
            "file's vocabulary wrong. Install transformers 5.23 or newer."
        )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
