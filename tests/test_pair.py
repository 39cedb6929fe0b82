"""The embedded pair: its problems, its tokenizer, and what the two shipped models can do."""

import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import softcot_ds.pair
from softcot_ds.pair.pretrain import IGNORED, PRETRAININGS, batches, build_tokenizer, drop_words, render
from softcot_ds.pair.world import (
    ASSISTANT_INSTRUCTION,
    ITEMS,
    NAMES,
    OPERATIONS,
    PLAN_MARKER,
    WordProblem,
    assistant_document,
    base_document,
    draw_problem,
    generate,
    split_of,
)

PAIR = Path(softcot_ds.pair.__file__).parent
SPLITS = ("train", "validation", "test")
OPERATION_OF_VERB = {verb: op.name for op in OPERATIONS for verb in (*op.common, *op.rare)}
RARE_VERBS = {verb for op in OPERATIONS for verb in op.rare}


@pytest.fixture(scope="module", params=["assistant", "base"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(PAIR / "base")


@pytest.fixture(scope="module")
def built():
    return build_tokenizer()


def read(question: str) -> tuple[int, tuple[tuple[str, int], ...]]:
    """Start number, and operation and number of each event, from the text alone."""
    start, *sentences = question.split(" how many ")[0].rstrip(" .").split(" . ")
    events = []
    for sentence in sentences:
        *_, verb, object_ = sentence.split()
        events.append((OPERATION_OF_VERB[verb], 2 if object_ == "them" else int(object_)))
    return int(start.split()[2]), tuple(events)


def counts_of(start: int, events: tuple[tuple[str, int], ...]) -> list[int]:
    counts = [start]
    for operation, number in events:
        before = counts[-1]
        after = {
            "add": before + number,
            "take": before - number,
            "skip": before,
            "double": before * 2,
            "halve": before // 2,
        }
        counts.append(after[operation])
    return counts


@pytest.mark.slow
def test_splits_share_no_problem():
    problems = [[p for seed in range(3) for p in generate(split, 800, seed)] for split in SPLITS]
    signatures = [{p.signature for p in part} for part in problems]
    questions = [{p.question for p in part} for part in problems]
    for parts in (signatures, questions):
        assert not parts[0] & parts[1]
        assert not parts[0] & parts[2]
        assert not parts[1] & parts[2]


@pytest.mark.parametrize("split", SPLITS)
def test_generate_is_deterministic_and_free_of_duplicates(split):
    problems = generate(split, 250, seed=3)  # the first that this seed draws again is among them, in each split
    assert len({p.signature for p in problems}) == 250
    assert generate(split, 50, seed=3) == problems[:50]
    assert generate(split, 50, seed=4) != problems[:50]


def test_generate_names_an_unknown_split():
    with pytest.raises(ValueError, match="'dev'; it must be train, validation or test"):
        generate("dev", 1, 0)


@pytest.mark.parametrize("split", SPLITS)
def test_answer_plan_and_reasoning_follow_from_the_text(split):
    for problem in generate(split, 200, seed=0):
        start, events = read(problem.question)
        operations, counts = [operation for operation, _ in events], counts_of(start, events)
        assert (start, events) == problem.signature
        assert problem.answer == counts[-1]
        assert all(0 < count < 100 for count in counts)
        assert problem.plan.split() == ["do", *operations, "."]
        assert problem.num_rare == sum(verb in RARE_VERBS for verb in problem.question.split())

        *steps, answer = re.split(r" (?=second|third|answer)", problem.reasoning)
        assert answer == f"answer {counts[-1]}"
        rows = zip(steps, ["first", "second", "third"][: len(steps)], operations, counts[:-1], counts[1:], strict=True)
        for step, ordinal, operation, before, after in rows:
            if operation == "skip":
                assert re.fullmatch(rf"{ordinal} skip \d+", step)
                continue
            calculation, result = step.split(" = ")
            assert calculation.startswith(f"{ordinal} {before} ")
            # eval also shows that no half was rounded
            assert eval(calculation.removeprefix(ordinal).strip().replace("x", "*")) == int(result) == after


def test_verbs_have_one_operation_and_one_kind():
    verbs = [verb for op in OPERATIONS for verb in (*op.common, *op.rare)]
    assert len(verbs) == len(set(verbs))


def test_no_rare_verb_is_ever_solved_for_the_base():
    rng = random.Random(0)
    documents = [base_document(rng) for _ in range(3000)]
    solved = [d for d in documents if d.user and d.reply]
    assert len(solved) > 1500
    assert not any(RARE_VERBS & set(d.user.split()) for d in solved)
    stories = [d for d in documents if d.reply is None]
    assert {word for d in stories for word in d.user.split()} >= RARE_VERBS


def test_the_assistant_never_sees_a_calculation():
    rng = random.Random(0)
    for document in (assistant_document(rng) for _ in range(500)):
        assert not re.search(r"[=+*/]|answer|\d", document.reply)


def test_documents_are_of_the_train_split():
    """Checked where the text alone is enough to know: documents without made-up verbs."""
    rng = random.Random(0)
    stories = [assistant_document(rng).user.split("\n")[1] for _ in range(1000)]
    stories += [d.user for d in (base_document(rng) for _ in range(2000)) if d.user and PLAN_MARKER not in d.user]
    assert len(stories) > 1500
    assert {split_of(read(story)) for story in stories} == {"train"}


@pytest.mark.slow
def test_shipped_tokenizer_is_the_one_the_script_builds(name, tokenizer, built):
    shipped = AutoTokenizer.from_pretrained(PAIR / name)
    text = " ".join(OPERATION_OF_VERB)
    assert shipped.get_vocab() == built.get_vocab() == tokenizer.get_vocab()
    assert shipped(text)["input_ids"] == built(text)["input_ids"]


def test_tokenizer_keeps_every_text_and_gives_a_word_one_token(tokenizer):
    for word in (*OPERATION_OF_VERB, *NAMES, *ITEMS):
        assert len(tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    problems = generate("test", 200, 0)
    for text in [t for p in problems for t in (p.question, p.plan, p.reasoning)] + ["Zoë owns 1,234 €\n\tand -5.50"]:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    assert tokenizer.tokenize(" 23") == ["Ġ2", "3"]


def test_chat_template_writes_what_the_models_were_trained_on(tokenizer):
    rng = random.Random(0)
    for document in (draw(rng) for draw in (assistant_document, base_document) for _ in range(100)):
        if document.user and document.reply:
            messages = [{"role": "user", "content": document.user}, {"role": "assistant", "content": document.reply}]
            full = tokenizer.apply_chat_template(messages, tokenize=False)
            prompt = tokenizer.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
            assert full == render(document) == prompt + document.reply + tokenizer.eos_token


def test_word_dropout_hides_the_plan_and_keeps_its_labels(tokenizer):
    thought = tokenizer.convert_tokens_to_ids("<|thought|>")
    header = tokenizer.convert_tokens_to_ids("<|assistant|>")
    assert drop_words([1, 2, 3, 4], 2, 1.0, thought, random.Random(0)) == [1, 2, thought, thought]
    inputs, labels = next(batches(PRETRAININGS["assistant"], tokenizer))
    assert (inputs == thought).any()
    assert not (labels == thought).any()
    for row, label in zip(inputs, labels, strict=True):
        start = row.tolist().index(header)
        prompt = row[1 : start + 1]
        assert torch.equal(prompt, label[:start])
        assert tokenizer.decode(label[start : start + 1]) == "do"
        hidden = (row == thought).nonzero().flatten()
        assert (hidden > start).all()
        assert (label[hidden] != IGNORED).all()


def test_folder_loads_like_any_other_model(name):
    model, info = AutoModelForCausalLM.from_pretrained(PAIR / name, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(PAIR / name)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.model_type == "llama"
    assert model.config.max_position_embeddings == 512
    assert model.config.vocab_size == len(tokenizer)
    assert "attn_implementation" not in (PAIR / name / "config.json").read_text()
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    low, high = {"assistant": (0.5e6, 0.8e6), "base": (1.7e6, 2.3e6)}[name]
    assert low < model.num_parameters() < high
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_both_folders_are_at_most_ten_megabytes():
    files = [path for name in PRETRAININGS for path in (PAIR / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 10_000_000
    assert not [path.name for path in files if path.suffix in (".bin", ".pt", ".pkl")]


@torch.inference_mode()
def replies(name: str, prompts: list[str]) -> list[str]:
    """Greedy replies to user messages."""
    tokenizer = AutoTokenizer.from_pretrained(PAIR / name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(PAIR / name, dtype=torch.float32).eval()
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True)
        for p in prompts
    ]
    inputs = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=48)
    return tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def share_right(name: str, prompts: list[str], expected: list[str]) -> float:
    return sum(reply == want for reply, want in zip(replies(name, prompts), expected, strict=True)) / len(prompts)


def draw_validation(count: int, rare_rate: float) -> list[WordProblem]:
    rng = random.Random(5)
    return [draw_problem(rng, "validation", rare_rate) for _ in range(count)]


# Thresholds leave room below what was measured (in brackets) for other CPUs and the chance of 80 problems.


@pytest.mark.slow
def test_base_solves_problems_with_common_verbs():
    problems = draw_validation(80, rare_rate=0.0)
    assert share_right("base", [p.question for p in problems], [p.reasoning for p in problems]) >= 0.8  # 0.90


@pytest.mark.slow
def test_base_needs_a_plan_for_rare_verbs():
    problems = draw_validation(80, rare_rate=1.0)
    reasoning = [p.reasoning for p in problems]
    assert share_right("base", [p.question for p in problems], reasoning) <= 0.35  # 0.19
    planned = [f"{p.question}\n{PLAN_MARKER}\n{p.plan}" for p in problems]
    assert share_right("base", planned, reasoning) >= 0.65  # 0.81


@pytest.mark.slow
def test_assistant_writes_the_plan():
    problems = draw_validation(80, rare_rate=0.5)
    prompts = [f"{ASSISTANT_INSTRUCTION}\n{p.question}" for p in problems]
    assert share_right("assistant", prompts, [p.plan for p in problems]) >= 0.95  # 1.00
