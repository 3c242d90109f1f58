"""What `tersekv try` asks a model when nobody says: a question about this project's own documents."""

from importlib.resources import files
from pathlib import Path
from typing import Any

from torch import Tensor

PROMPT_TOKENS = 2000
QUESTION = "These are the documents of a software project.\n\n{text}\n\nIn one paragraph: what does tersekv do?"


def project_text() -> str:
    """README and docs of this project, from the installed package or from the checkout around it."""
    packaged = files("tersekv") / "_docs"
    folder = Path(str(packaged)) if packaged.is_dir() else Path(__file__).parents[2] / "docs"
    readme = folder / "README.md" if packaged.is_dir() else folder.parent / "README.md"
    pages = [readme, *sorted(page for page in folder.glob("*.md") if page != readme)]
    return "\n\n".join(page.read_text(encoding="utf-8") for page in pages if page.is_file())


def prompt_ids(tokenizer: Any, prompt: str | None) -> Tensor:
    """Token ids (1, t) of the prompt in the model's chat form, or of the project's documents cut to 2,000 tokens."""
    if prompt is None:
        ids = tokenizer(project_text(), add_special_tokens=False).input_ids[: PROMPT_TOKENS - 40]
        prompt = QUESTION.format(text=tokenizer.decode(ids))
    if getattr(tokenizer, "chat_template", None):
        turn = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    return tokenizer(prompt, return_tensors="pt").input_ids
