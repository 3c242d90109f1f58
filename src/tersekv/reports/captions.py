"""What exactly a record measured, in one paragraph for each depth."""

from typing import Any

from tersekv.eval.statistics import LEVEL, RESAMPLES

Record = dict[str, Any]
LOST = 1000.0  # perplexity of the dense cache beyond which a model does not predict the text it is measured on


def caption(record: Record) -> str:
    """Of a record of `tersekv eval` or `tersekv bench`: how, on what, with what."""
    versions = ", ".join(f"{name} {text}" for name, text in record["versions"].items())
    where = f"{record['device']}, ops: {record['implementation']}, {versions}"
    made = f"{where}, commit {_short(record['commit'])}, {record['date']}."
    if threads := record.get("settings", {}).get("threads"):
        made = f"{threads} thread{'s' * (threads > 1)} of {made}"
    if "run" not in record:
        return made
    run = record["run"]
    said = [f"{run['model']} ({record['model']['source']}) in {run['dtype']}."]
    said += [text(record) for name, text in DEPTHS.items() if name in run]
    return " ".join([*said, made])


def _logits(record: Record) -> str:
    run, row = record["run"], record["rows"][0]["logits"]
    text = record["data"]["text"]["name"]
    parts = [f"{x['windows']} of {int(n):,} tokens ({x['positions']:,} positions scored)" for n, x in row.items()]
    drawn = "the first of the text" if run["seed"] is None else f"drawn with seed {run['seed']}"
    intervals = ""
    if any(x["windows"] > 1 for x in row.values()):
        intervals = f" Intervals: {100 * LEVEL:.0f} % bootstrap over windows, {RESAMPLES:,} resamples, paired."
    return (
        f"Windows of {text}: {', '.join(parts)}, {drawn}; each token seeing what decoding would show it. Held: bytes "
        "of every tensor of the cache after the last token. KL: KL(dense || packed) of the next-token distribution "
        f"in nats.{intervals}{_lost(row)}"
    )


def _lost(dense: dict[str, Any]) -> str:
    """KL between two guesses at random looks like any other, so a model that was loaded wrong must be told from one."""
    worst = max(x["perplexity"] for x in dense.values())
    if worst <= LOST:
        return ""
    return (
        f" **With the dense cache the model's perplexity is {worst:,.0f}: it does not predict this text, and KL says "
        "nothing. Look for weights that were converted or loaded wrong, or give another text.**"
    )


def _tensors(record: Record) -> str:
    asked = record["run"]["tensors"]
    return (
        f"Tensors: {asked['windows']} window(s) of {asked['tokens']:,} tokens; every packed key and value, every query "
        "that sees one; the dense row is the model's own attention against fp32."
    )


def _growth(record: Record) -> str:
    asked = record["run"]["growth"]
    return (
        f"Growth: {asked['prompts']} prompt(s) of {asked['prompt_tokens']:,} tokens, continued greedily by the dense "
        f"cache for {asked['new_tokens']:,}, and scored on that text."
    )


def _needle(record: Record) -> str:
    asked = record["run"]["needle"]
    return f"Needle: {asked['repeats']} for each length and depth, verbatim question, all tokens of the number right."


def _tasks(record: Record) -> str:
    asked, found = record["run"]["tasks"], record["rows"][-1]["tasks"]
    tasks = ", ".join(
        f"{name} (version {x['version']}, {x['items']:,} items, {100 * x['saw_packed']:.0f} % saw packed tokens)"
        for name, x in found.items()
    )
    return (
        f"Tasks by lm-eval {record['versions'].get('lm-eval', '')}: {tasks}, {asked['shots']} shots, items drawn "
        "without replacement; differences paired by item."
    )


def _speed(record: Record) -> str:
    asked = record["run"]["speed"]
    return (
        f"Speed: {asked['context']:,} tokens read in chunks of {asked['chunk']}, the last {asked['new_tokens']} "
        "decoded by all caches in turn; peak memory of a process for each cache."
    )


DEPTHS = {
    "logits": _logits,
    "tensors": _tensors,
    "growth": _growth,
    "needle": _needle,
    "tasks": _tasks,
    "speed": _speed,
}


def _short(commit: str) -> str:
    """Ten digits, and whether there were changes."""
    name, plus, changes = commit.partition("+")
    return name[:10] + plus + changes
