"""Run as `python -m tersekv.models.gguf_to_safetensors GGUF FOLDER`.

A process of its own, because reading a GGUF file takes four times the memory of the finished model and draws
bars on standard error that cannot be turned off (transformers 5.23).
"""

import sys
from functools import cache
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

# transformers parses the file's vocabulary three times and builds the same table of names for every module.
# Remembering both halves the time; only this process sees the change.
gguf.GGUFReader = cache(gguf.GGUFReader)
gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)


def convert(file: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
