"""lm-eval's tasks by name, with their items from the hub or, with --data, from local files."""

import json
from functools import lru_cache
from hashlib import file_digest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tersekv.errors import InputError, did_you_mean

SPLITS = ("test", "validation", "training", "fewshot")
ENDINGS = ("jsonl", "jsonl.gz", "json", "json.gz")


def load_task(name: str, shots: int, data: Path | None) -> tuple[Any, dict[str, Any]]:
    """The task, and what its items are: files with hashes, or the hub's name. Raises InputError if they are not had."""
    manager = _manager()
    entry = manager.task_index.get(name)
    cfg: dict[str, Any] = (entry.cfg if entry else None) or {}
    if entry is None or entry.yaml_path is None or "dataset_path" not in cfg:
        raise InputError(f'lm-eval has no task of one file named "{name}". {did_you_mean(name, manager.all_subtasks)}')
    config: dict[str, Any] = {"include": str(entry.yaml_path), "task": name, "num_fewshot": shots}
    if shots:
        # lm-eval draws them anew for each item, from a generator that goes on from item to item: after a kill they
        # would be others. The same ones for all items are also read once for all of them.
        config["fewshot_config"] = (cfg.get("fewshot_config") or {}) | {"sampler": "first_n"}
    about: dict[str, Any] = {"hub": cfg["dataset_path"], "config": cfg.get("dataset_name")}
    if data is not None:
        local, about = _local(name, cfg, shots, data)
        config |= local
    with TemporaryDirectory() as folder:
        file = Path(folder) / f"{name}.yaml"
        file.write_text(json.dumps(config))  # JSON is YAML
        try:
            task = manager.load([str(file)])["tasks"][name]
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"The items of {name} cannot be read: {error} {_advice(name, cfg)}") from error
    return task, about | {"version": task.VERSION}


@lru_cache
def _manager() -> Any:
    """lm-eval's list of tasks, which it reads from thousands of files."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError('The section [tasks] needs lm-eval: pip install "tersekv[eval]".') from error
    return TaskManager()


def _local(name: str, cfg: dict[str, Any], shots: int, data: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What to change in a task's configuration so that it reads NAME.SPLIT.jsonl[.gz] in `data`, and their hashes."""
    splits = {kind: cfg.get(f"{kind}_split") for kind in SPLITS}
    files = {split: path for split in splits.values() if split and (path := _file(data, name, split))}
    scored = splits["test"] or splits["validation"]
    wanted = [scored, *([splits["fewshot"] or splits["training"]] if shots else [])]
    for split in wanted:
        if split not in files:
            raise InputError(f"{data} has no {name}.{split}.jsonl or .jsonl.gz. {_advice(name, cfg)}")
    config = {f"{kind}_split": split if split in files else None for kind, split in splits.items()}
    paths = {"data_files": {split: str(path) for split, path in files.items()}}
    about = {}
    for split, path in files.items():
        with path.open("rb") as file:
            about[split] = {"name": path.name, "sha256": file_digest(file, "sha256").hexdigest()}
    return config | {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": paths}, about


def _file(data: Path, name: str, split: str) -> Path | None:
    return next((path for end in ENDINGS if (path := data / f"{name}.{split}.{end}").is_file()), None)


def _advice(name: str, cfg: dict[str, Any]) -> str:
    split = cfg.get("test_split") or cfg.get("validation_split")
    return (
        f"It is {cfg['dataset_path']} {cfg.get('dataset_name') or ''} on the hub: run where the hub can be reached, or "
        f"save its rows, one JSON object a line, as {name}.{split}.jsonl in a folder and give --data FOLDER."
    )
