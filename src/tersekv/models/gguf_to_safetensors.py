"""Run as `python -m tersekv.models.gguf_to_safetensors GGUF FOLDER`.

A process of its own, because reading a GGUF file takes four times the memory of the finished model and draws
bars on standard error that cannot be turned off (transformers 5.23).
"""

import sys
from functools import cache
from pathlib import Path

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, modeling_gguf_pytorch_utils

# transformers parses the file's vocabulary three times and builds the same table of names for every module.
# Remembering both halves the time; only this process sees the change.
gguf.GGUFReader = cache(gguf.GGUFReader)
gguf.get_tensor_name_map = cache(gguf.get_tensor_name_map)

# A file holds 1 more than a Gemma norm's weights. transformers 5.17 takes that off for Gemma 2 alone, and Gemma 3 then
# predicts nothing (perplexity 12,219 where it is 16).
PROCESSORS = modeling_gguf_pytorch_utils.TENSOR_PROCESSORS
PROCESSORS.setdefault("gemma3", PROCESSORS["gemma2"])


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
