"""Peak memory of a process that reads a context with one cache, on the processor or of the device: one process each."""

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tersekv.errors import TersekvError

DENSE = "dense"
CHUNK = 512  # tokens at a time, so that the cache and not the activations is what grows
STEPS = 4
STATUS = Path("/proc/self/status")
UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


def peaks(
    model: str,
    dtype: str,
    specs: list[str],
    tokens: int,
    threads: int,
    stages: Callable[[str], Any],
    device: str = "cpu",
) -> list[dict[str, Any]]:
    rows = []
    for spec in [DENSE, *specs]:
        stages(f"{spec}: peak memory at {tokens:,} tokens")
        command = [sys.executable, "-m", "tersekv.bench.peak", model, dtype, spec, str(tokens), str(threads), device]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise TersekvError(f"Measuring the memory of {spec} failed: {done.stderr.strip().splitlines()[-1]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    return rows


def measure(model: str, dtype: str, spec: str, tokens: int, threads: int, device: str) -> dict[str, Any]:
    """Of this process, or on the device: bytes before the first token, the peak from there on, and the cache's own."""
    import torch
    from transformers import DynamicCache

    import tersekv
    from tersekv.eval.logits import arms
    from tersekv.models import load
    from tersekv.spec import parse

    torch.set_num_threads(threads)
    loaded = load(model, dtype, device=device).model
    dense, *packed = arms(loaded, [] if spec == DENSE else [parse(spec)])
    arm = packed[0] if packed else dense
    with torch.inference_mode(), tersekv.attached(loaded):
        ids = torch.arange(tokens, device=device)[None] % loaded.config.vocab_size
        loaded(input_ids=ids[:, :1], past_key_values=DynamicCache(config=loaded.config))  # libraries load their parts
        before = since_now(device)
        for chunk in [*ids.split(CHUNK, 1), *[ids[:, :1]] * STEPS]:
            loaded(input_ids=chunk, past_key_values=arm.cache, logits_to_keep=1)
    about = {"name": spec, "dtype": dtype, "tokens": tokens + STEPS, "loaded": before, "peak": peak(device)}
    return about | {"held": arm.bytes()["held"]}


def since_now(device: str = "cpu") -> int:
    """Bytes in use now. Where it can be done the peak starts anew here: loading the model must not hide the cache."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    if not STATUS.is_file():
        return peak()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak(device: str = "cpu") -> int:
    """Bytes in use at most so far."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if STATUS.is_file() else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * UNIT


def _status(field: str) -> int:
    return next(int(line.split()[1]) * 1024 for line in STATUS.read_text().splitlines() if line.startswith(field))


if __name__ == "__main__":
    name, number_type, cache, count, cores, place = sys.argv[1:]
    print(json.dumps(measure(name, number_type, cache, int(count), int(cores), place)))
