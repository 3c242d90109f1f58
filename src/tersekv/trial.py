"""`tersekv try`: the same prompt with the dense cache and with packed ones, side by side."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import Cache, PreTrainedModel

from tersekv.errors import InputError, SpecError
from tersekv.eval.logits import Arm, Divergence, arms, forward
from tersekv.hf import PackedCache, attached
from tersekv.models import LoadedModel
from tersekv.prompt import prompt_ids
from tersekv.reports.cells import shown
from tersekv.spec import Spec, parse
from tersekv.terminal import Stages, bytes_text


@dataclass
class Row:
    """One cache: what it generated, what it held at the end, and how far it is from the dense cache."""

    spec: str
    text: str
    tokens: int
    held: int
    dense: int
    dense16: int
    ratio: float
    ratio16: float
    prefill_seconds: float
    tokens_per_second: float
    kl: float = 0.0
    top1: float = 1.0


@dataclass
class Trial:
    """What `tersekv try` shows; `as_dict` is its JSON."""

    model: str
    source: str
    dtype: str
    prompt_tokens: int
    rows: list[Row]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __rich__(self) -> Group:
        said = [(shown(row.spec), Text(row.text.strip() or "(nothing)")) for row in self.rows]
        texts = [Panel(text, title=title, title_align="left") for title, text in said]
        return Group(*texts, self._table())

    def _table(self) -> Table:
        title = f"{self.model} ({self.source}), {self.dtype}, prompt of {self.prompt_tokens:,} tokens"
        caption = (
            "held: every tensor of the cache after the last token, sinks, recent tokens, tables and padding included; "
            "ratio: to the dense cache of this run; vs bf16: to a dense cache in bf16. "
            "KL and top-1: next-token distribution against the dense cache, teacher-forced on the dense text. "
            "tokens/s: in an attached model, the dense cache too."
        )
        table = Table(title=title, caption=caption, box=SIMPLE_HEAD)
        table.add_column("cache", overflow="fold")
        for name in ("tokens", "held", "ratio", "vs bf16", "KL", "top-1", "tokens/s"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self.rows:
            cells = (
                shown(row.spec),
                f"{row.tokens:,}",
                bytes_text(row.held),
                f"{row.ratio:.2f}",
                f"{row.ratio16:.2f}",
                f"{max(row.kl, 0):.4f}",
                f"{100 * row.top1:.0f} %",
                f"{row.tokens_per_second:.1f}",
            )
            table.add_row(*cells)
        return table


def split_words(words: Sequence[str]) -> tuple[list[Spec], str | None]:
    """The specs among the words of the command line, and the prompt if the last one is none but plain text.

    Raises SpecError for a word that is neither: text with spaces and without "=" and ":" is taken for a prompt.
    """
    specs, prompt = [], None
    for number, word in enumerate(words):
        try:
            specs.append(parse(word))
        except SpecError as error:
            if number < len(words) - 1 or " " not in word or "=" in word or ":" in word:
                raise SpecError(f"{error} (A prompt that could be a spec goes with --prompt.)") from None
            prompt = word
    return specs or [parse("terse4")], prompt


def run(loaded: LoadedModel, specs: list[Spec], prompt: str | None, new_tokens: int, stages: Stages) -> Trial:
    """Generate greedily with every cache, then score each packed one on the dense text."""
    model, tokenizer = loaded.model, loaded.tokenizer
    ids = prompt_ids(tokenizer, prompt).to(model.device)
    if ids.shape[1] == 0 or new_tokens < 1:
        raise InputError(
            "The prompt is empty or no new tokens are asked for. Give text and --max-new-tokens 1 or more."
        )
    dense, *packed = arms(model, specs)
    row, _, words, logits = _generate(loaded, dense, ids, new_tokens, stages)
    rows = [row]
    for arm in packed:
        row, fork, _, _ = _generate(loaded, arm, ids, new_tokens, stages)
        scores = _score(model, Arm(arm.spec, fork.cache), fork.first, words, logits)
        row.kl, row.top1 = scores["kl_mean"], scores["top1"]
        rows.append(row)
    dtype = str(model.dtype).removeprefix("torch.")
    return Trial(loaded.name, loaded.source, dtype, ids.shape[1], rows)


def _generate(
    loaded: LoadedModel, arm: Arm, ids: Tensor, count: int, stages: Stages
) -> tuple[Row, "_Fork", list[int], Tensor]:
    """The arm's row, its state after the prefill, and its greedy tokens with the logits they were chosen from."""
    model, name = loaded.model, "dense" if arm.spec is None else str(arm.spec)
    with attached(model):  # the dense cache, too: layers are faster then, whatever the cache
        stages(f"{name}: prefill of {ids.shape[1]:,} tokens")
        first, prefill = _timed(model, ids, arm.cache)
        fork = _Fork(_scored(arm.cache), first)
        tokens, logits, seconds = _greedy(model, arm.cache, first, count, lambda s: stages(f"{name}: decode", s))
    text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
    speed = (len(tokens) - 1) / seconds if seconds else 0.0
    row = Row(name, text, arm.cache.get_seq_length(), **arm.bytes(), prefill_seconds=prefill, tokens_per_second=speed)
    return row, fork, tokens, logits


@dataclass
class _Fork:
    """A cache as it was after the prefill, and the logits of the next token."""

    cache: Cache
    first: Tensor


def _scored(cache: Cache) -> Cache:
    """A copy that shows each token of a chunk what decoding would, where the policy has such a prefill."""
    if not isinstance(cache, PackedCache):
        return cache
    return cache.copy("packed" if "packed" in cache.spec.policy.prefills else None)


@torch.inference_mode()
def _score(model: PreTrainedModel, arm: Arm, first: Tensor, tokens: list[int], logits: Tensor) -> dict[str, float]:
    """Divergence from the dense logits on the dense tokens, each of which sees what decoding would show it."""
    divergence, ids = Divergence(), torch.tensor([tokens], device=model.device)
    said = [first]
    if len(tokens) > 1:
        alone = isinstance(arm.cache, PackedCache) and arm.cache.spec.prefill != "packed"
        said += [forward(model, part, arm).float() for part in ids[:, :-1].split(1 if alone else len(tokens), 1)]
    divergence.add(logits, torch.cat(said), ids[0])
    return divergence.summary()


@torch.inference_mode()
def _timed(model: PreTrainedModel, ids: Tensor, cache: Cache) -> tuple[Tensor, float]:
    """Logits of the last token (1, vocab) and the seconds that the forward pass took."""
    began = perf_counter()
    logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].float()
    logits.sum().item()  # waits for an accelerator
    return logits, perf_counter() - began


def _greedy(
    model: PreTrainedModel, cache: Cache, logits: Tensor, count: int, progress: Any
) -> tuple[list[int], Tensor, float]:
    """Greedy continuation: token ids, the logits (n, vocab) each was chosen from, and seconds spent decoding."""
    ends = model.generation_config.eos_token_id
    stop = set(ends if isinstance(ends, list) else [ends])
    tokens, scores, seconds = [int(logits.argmax())], [logits], 0.0
    while len(tokens) < count and tokens[-1] not in stop:
        logits, spent = _timed(model, torch.tensor([[tokens[-1]]], device=model.device), cache)
        tokens.append(int(logits.argmax()))
        scores.append(logits)
        seconds += spent
        progress(len(tokens) / count)
    return tokens, torch.cat(scores), seconds
