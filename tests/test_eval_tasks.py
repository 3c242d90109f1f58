"""lm-eval over our caches: the same scores as lm-eval's own model on the dense cache, and items from local files."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tersekv import InputError, parse
from tersekv.eval.subject import Subject
from tersekv.eval.tasks import Tasks
from tersekv.models import LoadedModel

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from tersekv.eval import harness
from tersekv.eval.harness import PackedLM
from tersekv.eval.items import load_task
from tersekv.eval.logits import read

WORDS = [f"w{n}" for n in range(90)]
SPECS = {
    "dense": None,
    "none:dtype=fp32 recent=0 prefill=packed": parse("none:dtype=fp32 recent=0 prefill=packed"),
    "rotated:bits=2 recent=0 prefill=packed": parse("rotated:bits=2 recent=0 prefill=packed"),
}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    vocabulary = {word: number for number, word in enumerate(["<unk>", "</s>", *WORDS])}
    words = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    model = make_model("llama")
    model.name_or_path = "tiny"
    return LoadedModel(model, tokenizer, "tiny", "random weights", "none")


def sentence(draw: torch.Generator, length: int) -> str:
    return " ".join(WORDS[int(n)] for n in torch.randint(0, len(WORDS), (length,), generator=draw))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Items like HellaSwag's, most of them long enough to reach a page."""
    folder = tmp_path_factory.mktemp("data")
    write_items(folder / "hellaswag.validation.jsonl", 14)
    return folder


def write_items(path: Path, count: int) -> None:
    draw = torch.Generator().manual_seed(count)
    with path.open("w") as file:
        for number in range(count):
            text = sentence(draw, 20 + 20 * number)
            item = {"ctx_a": text, "ctx_b": "w1", "ctx": f"{text} w1", "activity_label": "w2", "label": str(number % 4)}
            item |= {"ind": number, "endings": [sentence(draw, 4 + n) for n in range(4)]}
            file.write(json.dumps(item | {"source_id": "x", "split": "val", "split_type": "y"}) + "\n")


def test_the_dense_arm_scores_as_lm_evals_own_model_does(loaded: LoadedModel, data: Path) -> None:
    depth, subject = Tasks(["hellaswag"], items_each=10, rows=4), Subject(loaded, SPECS, 0, data=data)
    items = depth.items(subject)
    assert len(items) == len(set(items)) == 10
    found = depth.measure(subject, items, lambda share: None)
    numbers = [int(item.partition("/")[2]) for item in items]
    task, _ = load_task("hellaswag", 0, data)
    own: Any = HFLM
    lm = own(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4)
    asked: Any = {"tasks": {"hellaswag": task}, "groups": {}, "group_map": {}}
    said: Any = evaluate(lm, asked, samples={"hellaswag": numbers}, bootstrap_iters=0)
    theirs = {f"hellaswag/{x['doc_id']}": (x["acc"], x["acc_norm"]) for x in said["samples"]["hellaswag"]}
    dense, exact, packed = (
        {item: (values[spec]["acc"], values[spec]["acc_norm"]) for item, values in found.items()} for spec in SPECS
    )
    assert dense == theirs == exact
    row = depth.summary({i: x[list(SPECS)[2]] for i, x in found.items()}, {i: x["dense"] for i, x in found.items()}, 0)
    score = row["hellaswag"]["metrics"]["acc"]
    assert score["difference"] == pytest.approx(sum(packed[i][0] - dense[i][0] for i in items) / 10)
    assert score["score_by_item"] == [packed[i][0] for i in items]
    lengths = [20 + 20 * n + 10 for n in numbers]
    assert row["hellaswag"]["saw_packed"] == pytest.approx(sum(n > 68 for n in lengths) / 10, abs=0.11)
    assert not any(values["dense"]["saw_packed"] for values in found.values())


def test_what_requests_share_is_read_once_and_scores_stay(
    loaded: LoadedModel, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With examples, and with a router, which allows only short passes: scores are those of a whole text at once."""
    write_items(tmp_path / "hellaswag.train.jsonl", 3)
    (tmp_path / "hellaswag.validation.jsonl").symlink_to(data / "hellaswag.validation.jsonl")
    task, _ = load_task("hellaswag", 2, tmp_path)
    asked: Any = {"tasks": {"hellaswag": task}, "groups": {}, "group_map": {}}
    own: Any = HFLM
    theirs = own(pretrained=loaded.model, tokenizer=loaded.tokenizer, batch_size=4)
    shown = []
    monkeypatch.setattr(
        harness,
        "read",
        lambda model, ids, *more, **named: shown.append(ids.numel()) or read(model, ids, *more, **named),
    )
    scores = []
    for lm in (theirs, PackedLM(loaded, None, 4), PackedLM(loaded, parse("none:dtype=fp32 prefill=packed"), 4)):
        said: Any = evaluate(lm, asked, samples={"hellaswag": [1, 5, 9]}, bootstrap_iters=0)
        scores.append([x["filtered_resps"] for x in said["samples"]["hellaswag"]])
    for ours in scores[1:]:
        for item, wanted in zip(ours, scores[0], strict=True):
            assert [greedy for _, greedy in item] == [greedy for _, greedy in wanted]
            assert [score for score, _ in item] == pytest.approx([score for score, _ in wanted], rel=1e-4)
    examples = 20 + 40  # words of the two examples' contexts, at least
    assert 0 < sum(shown) / 2 < 3 * 4 * examples, "the examples alone, read for each ending, would be more"


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, x, n) for n, x in enumerate(arguments)]


def test_scores_and_texts_of_a_batch_of_many_lengths(loaded: LoadedModel) -> None:
    draw = torch.Generator().manual_seed(2)
    texts = [sentence(draw, length) for length in (10, 90, 150, 300)]
    own, exact, two = (PackedLM(loaded, spec, 4) for spec in SPECS.values())
    asked = [(text, f" {sentence(draw, 5)}") for text in texts]
    scores = [[score for score, _ in lm.loglikelihood(requests("loglikelihood", asked))] for lm in (own, exact, two)]
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)
    assert scores[2][0] == pytest.approx(scores[0][0], rel=1e-4), "ten words never reach a page"
    assert abs(scores[2][3] - scores[0][3]) > 1e-3
    wanted = {"until": ["</s>"], "max_gen_toks": 20, "do_sample": False}
    said = [lm.generate_until(requests("generate_until", [(text, wanted) for text in texts])) for lm in (own, exact)]
    assert said[0] == said[1]


@pytest.mark.parametrize(
    ("name", "shots", "said"),
    [
        ("hellaswg", 0, 'no task of one file named "hellaswg". Did you mean "hellaswag"'),
        ("hellaswag", 2, r"no hellaswag.train.jsonl or .jsonl.gz. It is Rowan/hellaswag"),
        ("arc_easy", 0, r"no arc_easy.test.jsonl .* allenai/ai2_arc ARC-Easy on the hub.*give --data FOLDER"),
        ("gsm8k", 0, r"no gsm8k.test.jsonl"),
        ("lambada_openai", 0, r"no lambada_openai.test.jsonl"),
    ],
)
def test_missing_items_say_how_to_get_them(data: Path, name: str, shots: int, said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_task(name, shots, data)
