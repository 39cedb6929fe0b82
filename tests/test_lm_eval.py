"""An adapter in lm-evaluation-harness: the same text as our own door gives, and as transformers does by hand.

Most of it wants the harness, which is optional and not installed by ``make test``: pip install -e '.[lm-eval]'.
"""

import json
import os
import re
from collections import Counter
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from adapters import make_adapter
from launch import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import softcot_ds
from softcot_ds import lm_eval as door
from softcot_ds.files import read_yaml
from softcot_ds.lm_eval import main
from softcot_ds.recipe import load_recipe
from softcot_ds.tasks import make_task
from softcot_ds.values import resolve_location

_is_there = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm_eval is not installed: pip install -e '.[lm-eval]'"
)


def needs_harness(test):
    """The harness starts processes of its own: git, to name a commit."""
    return _is_there(pytest.mark.distributed(test))


SMALL = "task.train_problems=8 task.validation_problems=4 task.test_problems=12 evaluation.max_new_tokens=40".split()
ZEROSHOT = "Q: {{question}}\nA: Let's think step by step."  # as gsm8k_cot_zeroshot has it
LAST_NUMBER = {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"}
GENERATED = {
    "output_type": "generate_until",
    "generation_kwargs": {"until": ["Q:", "</s>", "<|im_end|>"], "do_sample": False},
    "filter_list": [{"name": "flexible-extract", "filter": [LAST_NUMBER, {"function": "take_first"}]}],
    "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
}
OPTIONS = {
    "output_type": "multiple_choice",
    "doc_to_choice": ["answer 1", "answer 12", "answer 30"],
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}


def write_task(folder: Path, name: str, records: list[dict], wording: str, kind: dict, target="{{answer}}") -> None:
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test"}
    text = yaml.safe_dump({"task": name, **source, "doc_to_text": wording, "doc_to_target": target, **kind})
    (folder / f"{name}.yaml").write_text(text)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An adapter of the embedded pair, and three tasks: its own words, others, and options."""
    folder = tmp_path_factory.mktemp("harness")
    recipe = load_recipe(ROOT / "recipes/word_problems.yaml", SMALL)
    make_adapter(folder / "adapter", recipe)
    problems = make_task(recipe.task).read("test")
    records = [{"question": problem.question, "answer": problem.answer} for problem in problems]
    write_task(folder, "own_words", records, "{{question}}", GENERATED)
    write_task(folder, "zeroshot", records, ZEROSHOT, GENERATED)
    write_task(folder, "options", records[:3], ZEROSHOT, OPTIONS, target="1")
    return folder


def harness(
    adapter: Path, tasks: str, out: Path, *arguments: str, include: Path | None = None
) -> dict[str, list[dict]]:
    """By task, what the harness has logged of each record, in their order."""
    places = ["--include_path", str(include)] if include else []
    logged = ["--log_samples", "--output_path", str(out)]
    assert main([str(adapter), *arguments, "--tasks", *tasks.split(), *places, *logged]) == 0
    found = {}
    for task in tasks.split():
        (path,) = out.glob(f"**/samples_{task}_*.jsonl")
        found[task] = sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    return found


def texts_of(samples: list[dict]) -> list[str]:
    return [sample["resps"][0][0] for sample in samples]


def by_hand(adapter, question: str, left: str, right: str) -> tuple[torch.nn.Module, torch.Tensor]:
    """The base of transformers, and (1, S, D) a prompt whose thoughts stand between two texts."""
    folder = resolve_location(adapter.recipe.base.model)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    both = (tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids for text in (left, right))
    before, after = (base.get_input_embeddings()(ids) for ids in both)
    return base, torch.cat([before, adapter.thoughts([question]), after], dim=1)


def cut(text: str) -> str:
    for end in GENERATED["generation_kwargs"]["until"]:
        text = text.partition(end)[0]
    return text


@needs_harness
@pytest.mark.slow
@torch.no_grad()
def test_the_harness_logs_what_our_own_door_says_and_what_transformers_says_by_hand(folder, tmp_path):
    tasks = "own_words zeroshot options"
    chat = ["--apply_chat_template", "--question", "question"]
    found = harness(folder / "adapter", tasks, tmp_path / "out", *chat, include=folder)
    adapter = softcot_ds.load(folder / "adapter")
    questions = [sample["doc"]["question"] for sample in found["own_words"]]
    assert len(questions) == 12
    assert texts_of(found["own_words"]) == adapter.answer(questions)
    assert len(set(texts_of(found["own_words"]))) > 6
    for sample in found["zeroshot"][:3]:
        question = sample["doc"]["question"]
        left = f"<|bos|><|user|>Q: {question}\nplan :\n"
        base, embeds = by_hand(adapter, question, left, "\nA: Let's think step by step.<|assistant|>")
        stops, mask = adapter.experiment.base_prompts.stop_ids, torch.ones(embeds.shape[:2], dtype=torch.int64)
        lengths = {"max_new_tokens": 40, "eos_token_id": stops, "pad_token_id": stops[0]}
        (made,) = base.generate(inputs_embeds=embeds, attention_mask=mask, do_sample=False, **lengths).tolist()
        ids = made[:-1] if made[-1] in stops else made
        assert texts_of([sample]) == [cut(adapter.experiment.base_tokenizer.decode(ids))]
    for sample in found["options"]:
        question = sample["doc"]["question"]
        left = f"<|bos|><|user|>Q: {question}\nplan :\n"
        base, embeds = by_hand(adapter, question, left, "\nA: Let's think step by step.<|assistant|>")
        for option, ((likelihood, is_greedy),) in zip(OPTIONS["doc_to_choice"], sample["resps"], strict=True):
            ids = adapter.experiment.base_tokenizer(option, add_special_tokens=False).input_ids
            whole = torch.cat([embeds, base.get_input_embeddings().weight[ids][None]], dim=1)
            logits = base(inputs_embeds=whole).logits[0, -len(ids) - 1 : -1].double()
            # Logged as texts.
            told = logits.log_softmax(-1)[range(len(ids)), ids].sum().item()
            assert float(likelihood) == pytest.approx(told, abs=1e-4)
            assert is_greedy == str(logits.argmax(-1).tolist() == ids)


@needs_harness
@pytest.mark.slow
def test_without_thoughts_its_verdicts_are_ours(folder, tmp_path):
    """The base alone solves some of these problems, and not all."""
    found = harness(folder / "adapter", "own_words", tmp_path, "--no-thoughts", "--apply_chat_template", include=folder)
    adapter = softcot_ds.load(folder / "adapter")
    task = adapter.experiment.task
    questions = [sample["doc"]["question"] for sample in found["own_words"]]
    answers = adapter.answer(questions, with_thoughts=False)
    assert texts_of(found["own_words"]) == answers
    verdicts = [sample["exact_match"] for sample in found["own_words"]]
    truth = [sample["doc"]["answer"] for sample in found["own_words"]]
    assert verdicts == [float(task.extract(text) == right) for text, right in zip(answers, truth, strict=True)]
    assert 0 < sum(verdicts) < len(verdicts)


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks zeroshot", "is the question of zeroshot is not known; they have question, answer: name one with --q"),
        ("--tasks zeroshot --question body", r"'{{body}}' of zeroshot: 'body' is undefined; its records have question"),
        ("--tasks zeroshot --question answer", r"the question '\d+' does not stand in the prompt"),
        ("--tasks zeroshot --question question --gen_kwargs top_k=3", "generation setting top_k=3: known are until"),
        ("--tasks no_such_task", "lm_eval: ValueError: Tasks not found: "),
        ("--question question", "lm_eval: ValueError: No tasks specified"),
    ],
)
def test_what_it_cannot_do_is_said_in_a_line(folder, arguments, message, capsys):
    assert main([str(folder / "adapter"), *arguments.split(), "--include_path", str(folder)]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert "Traceback" not in error


@needs_harness
@pytest.mark.slow
def test_what_is_known_of_tasks_is_what_stands_in_their_prompts():
    import lm_eval.tasks

    found = Counter()
    for path in [*Path(lm_eval.tasks.__file__).parent.glob("**/*.yaml"), *door.TASKS.glob("*.yaml")]:
        text = path.read_text()
        name = re.search(r"""^["']?task["']?: *["']?(\w+)""", text, re.MULTILINE)
        for pattern, question in door.QUESTIONS.items():
            if name and fnmatchcase(name[1], pattern) and "doc_to_text" in text:
                stands = re.sub(" if [a-z]+ is defined", "", text).replace("\\n", "\n")
                assert question in stands, path
                found[pattern] += 1
    assert found.keys() == door.QUESTIONS.keys()
    assert found["gsm8k*"] >= 5
    assert found["bbh_cot_*"] >= 2 * 27


def test_the_task_of_strategy_qa_has_our_words():
    task = read_yaml(door.TASKS / "strategyqa_cot.yaml")
    (message,) = read_yaml(ROOT / "softcot_ds/tasks/strategy_qa.yaml")["base_without_thoughts"]
    assert task["doc_to_text"] == message["content"].replace("{question}", "{{question}}")


def test_what_to_install_is_said(monkeypatch, folder, capsys):
    monkeypatch.setattr(door, "LM", object)
    monkeypatch.setattr(door, "_why_missing", "No module named 'lm_eval'", raising=False)
    assert main([str(folder / "adapter"), "--tasks", "gsm8k"]) == 2
    assert "No module named 'lm_eval'. Install it: pip install 'softcot-ds[lm-eval]'" in capsys.readouterr().err


def test_an_adapter_is_to_be_named(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        main(["--tasks"])
    assert "required: adapter" in capsys.readouterr().err
    assert main(["no/such", "--tasks", "gsm8k"]) == 2
    assert "no/such" in capsys.readouterr().err


def test_whatever_is_not_ours_is_the_harnesss(monkeypatch):
    given = []
    monkeypatch.setattr(door, "evaluate", lambda *arguments, **settings: given.append((arguments, settings)))
    line = "--local_rank=0 runs/demo a.b=1 c=2 --question body --tasks x y --limit 4 --seed -1 -b 2 --no-thoughts"
    assert main(line.split()) == 0
    rest = "--tasks x y --limit 4 --seed -1 -b 2".split()
    assert given == [(("runs/demo", ["a.b=1", "c=2"], rest), {"question": "body", "thoughts": False})]


@needs_harness
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_real_model_says_the_same_in_the_harness(shared_data, tmp_path):
    named = os.environ.get("SOFTCOT_REAL_MODELS")
    if not named:
        pytest.skip("SOFTCOT_REAL_MODELS names no folder with a real model in it, such as SmolLM2-135M-Instruct")
    model = next(path.parent for path in sorted(Path(named).glob("**/config.json")))
    here = shared_data / "strategyqa"
    data = f"task.train={here}/eladsegal_train.json task.test={here}/eladsegal_dev.json"
    models = f"assistant.model={model} base.model={model} base.dtype=float32 evaluation.max_new_tokens=24"
    recipe = load_recipe(ROOT / "recipes/smollm2.yaml", [*data.split(), *models.split()])
    make_adapter(tmp_path / "adapter", recipe)
    records = json.loads((shared_data / "strategyqa/eladsegal_dev.json").read_text())[:2]
    ours = read_yaml(door.TASKS / "strategyqa_cot.yaml")
    limited = ours | {"generation_kwargs": ours["generation_kwargs"] | {"max_gen_toks": 24}}
    kind = {key: limited[key] for key in ("output_type", "generation_kwargs", "filter_list", "metric_list")}
    write_task(tmp_path, "strategyqa_cot_here", records, ours["doc_to_text"], kind, ours["doc_to_target"])
    lines = (shared_data / "gsm8k/test.jsonl").read_text().splitlines()[:2]
    write_task(tmp_path, "gsm8k_here", list(map(json.loads, lines)), ZEROSHOT, GENERATED)
    arguments = ["--apply_chat_template", "--question", "question"]
    found = harness(tmp_path / "adapter", "strategyqa_cot_here gsm8k_here", tmp_path, *arguments, include=tmp_path)
    adapter = softcot_ds.load(tmp_path / "adapter")
    questions = [sample["doc"]["question"] for sample in found["strategyqa_cot_here"]]
    assert texts_of(found["strategyqa_cot_here"]) == adapter.answer(questions)
    for sample in found["gsm8k_here"]:
        question, text = sample["doc"]["question"], sample["arguments"]["gen_args_0"]["arg_0"]
        left, _, right = text.partition(question)
        assert right == "\nA: Let's think step by step.<|im_end|>\n<|im_start|>assistant\n"
        base, embeds = by_hand(
            adapter, question, f"{left}{question}\n\nSome hints that may help, and may be wrong: ", right
        )
        made = base.generate(inputs_embeds=embeds, max_new_tokens=24, do_sample=False)[0].tolist()
        assert texts_of([sample]) == [cut(adapter.experiment.base_tokenizer.decode(made))]
