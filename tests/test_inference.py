"""The Python door: what it gives is what the commands print, and what transformers makes of the same tokens by hand."""

import io
import shutil
import sys

import pytest
import torch
from adapters import make_adapter
from launch import ROOT
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import softcot_ds
from softcot_ds.errors import SoftCoTError
from softcot_ds.files import read_yaml
from softcot_ds.generate import main as generate_main
from softcot_ds.models import assistant as assistant_module
from softcot_ds.models import backbone
from softcot_ds.models.partition import is_partitioned
from softcot_ds.recipe import load_recipe
from softcot_ds.values import resolve_location

COUNT = 4
QUESTIONS = [
    "tom has 23 coins . how many coins now ?",
    "ann has 4 coins and finds 12 more . how many coins does ann have now ?",
    "leo has 9 coins .",
]
DECODE = ["evaluation.batch_size=2", "evaluation.max_new_tokens=12"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    for name in ("assistant", "base"):
        shutil.copytree(resolve_location(f"package:pair/{name}"), folder / name)
    models = [f"{name}.model={folder}/{name}" for name in ("assistant", "base")]
    settings = ["task.train_problems=8", "task.validation_problems=4", "task.test_problems=3", *models, *DECODE]
    for name in ("word_problems", "word_problems_static"):
        make_adapter(folder / name, load_recipe(ROOT / f"recipes/{name}.yaml", settings))
    return folder


@pytest.fixture(scope="module")
def adapter(folder):
    return softcot_ds.load(folder / "word_problems")


@pytest.fixture
def loaded(monkeypatch):
    """Names of the models that are loaded."""
    loaded = []
    load = backbone.load_frozen
    for module in (assistant_module, backbone):
        monkeypatch.setattr(
            module, "load_frozen", lambda config, *rest: loaded.append(config.model) or load(config, *rest)
        )
    return loaded


@pytest.mark.parametrize("arguments", [[], ["--no-thoughts"]])
@pytest.mark.parametrize("name", ["word_problems", pytest.param("word_problems_static", marks=pytest.mark.slow)])
def test_answers_are_those_of_the_command(folder, name, arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(QUESTIONS) + "\n"))
    assert generate_main([str(folder / name), *arguments]) == 0
    printed = capsys.readouterr().out.splitlines()
    answers = softcot_ds.load(folder / name).answer(QUESTIONS, with_thoughts=not arguments)
    assert answers == printed
    assert len(set(answers)) > 1


def rendered(tokenizer, folder, section, question, thoughts):
    """The prompt as the tokenizer's own template writes it."""
    messages = read_yaml(folder / "word_problems/prompts.yaml")[section]
    for field, text in {"{question}": question, "{count}": str(COUNT), "{thoughts}": thoughts}.items():
        messages = [{**message, "content": message["content"].replace(field, text)} for message in messages]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_thoughts_are_the_projection_of_the_assistants_states(folder, adapter):
    tokenizer = AutoTokenizer.from_pretrained(folder / "assistant")
    assistant = AutoModelForCausalLM.from_pretrained(folder / "assistant", dtype=torch.float64)
    weights = load_file(folder / "word_problems/projection.safetensors")
    thoughts = adapter.thoughts(QUESTIONS)
    assert thoughts.dtype == torch.float32
    assert thoughts.shape == (len(QUESTIONS), COUNT, weights["weight"].shape[0])
    assert not thoughts.requires_grad
    for question, found in zip(QUESTIONS, thoughts, strict=True):
        text = rendered(tokenizer, folder, "assistant", question, "<|thought|>" * COUNT)
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        here = ids[0] == tokenizer.convert_tokens_to_ids("<|thought|>")
        assert here.sum() == COUNT
        with torch.no_grad():
            states = assistant(ids, output_hidden_states=True).hidden_states[-1][0, here]
        truth = states @ weights["weight"].double().T + weights["bias"].double()
        assert (found - truth).norm() < 1e-5 * truth.norm()


def test_prompt_embeddings_are_what_the_base_answers(folder, adapter):
    tokenizer = AutoTokenizer.from_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    prompts, answers = adapter.prompt_embeddings(QUESTIONS), adapter.answer(QUESTIONS)
    stops = adapter.experiment.base_prompts.stop_ids
    thoughts_BTD = adapter.thoughts(QUESTIONS)
    for question, prompt, thoughts, answer in zip(QUESTIONS, prompts, thoughts_BTD, answers, strict=True):
        before, after = rendered(tokenizer, folder, "base", question, "{thoughts}").split("{thoughts}")
        parts = prompt.token_ids[~prompt.is_thought]
        assert tokenizer.decode(parts) == tokenizer.decode(
            tokenizer(before, add_special_tokens=False).input_ids + tokenizer(after, add_special_tokens=False).input_ids
        )
        assert torch.equal(prompt.embeddings[~prompt.is_thought], base.get_input_embeddings().weight[parts])
        assert torch.equal(prompt.embeddings[prompt.is_thought], thoughts)
        assert prompt.embeddings.dtype == torch.float32
        written = base.generate(
            inputs_embeds=prompt.embeddings[None],
            attention_mask=torch.ones(1, len(prompt.embeddings), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=stops,
            pad_token_id=stops[0],
        )[0].tolist()
        end = next((place for place, token in enumerate(written) if token in stops), None)
        assert tokenizer.decode(written[:end]) == answer


@torch.no_grad()
def test_scores_are_the_probabilities_of_what_follows_the_prompt(folder, adapter):
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    tokenizer, prompts = AutoTokenizer.from_pretrained(folder / "base"), adapter.prompt_embeddings(QUESTIONS)
    likeliest = tokenizer(adapter.answer(QUESTIONS[:1])[0], add_special_tokens=False).input_ids[:5]
    other = tokenizer("answer 23", add_special_tokens=False).input_ids
    texts = [(0, other), (0, likeliest), (2, other), (0, likeliest[:2])]
    asked = [adapter.question(question) for question in QUESTIONS]
    for (index, text), score in zip(texts, adapter.scores(asked, texts), strict=True):
        embeds = torch.cat([prompts[index].embeddings, base.get_input_embeddings().weight[text]])
        logits = base(inputs_embeds=embeds[None]).logits[0, -len(text) - 1 : -1].double()
        # Of logits in float32, some of them 20.
        assert score.loss == pytest.approx(-logits.log_softmax(-1)[range(len(text)), text].sum().item(), abs=1e-5)
        assert score.is_likeliest == (logits.argmax(-1).tolist() == text)
    assert [score.is_likeliest for score in adapter.scores(asked, texts)] == [False, True, False, True]
    with pytest.raises(SoftCoTError, match=r"has 1\d\d\d tokens, and the base has room for 508"):
        adapter.scores(asked, [(0, other * 250)])
    assert adapter.answer(QUESTIONS[:1])[0].split()[:4] == tokenizer.decode(likeliest).split()[:4], (
        "it decodes as before"
    )


def test_a_model_is_loaded_when_it_is_needed(folder, loaded, tmp_path):
    names = [str(folder / name) for name in ("assistant", "base")]
    adapter = softcot_ds.load(folder / "word_problems")
    adapter.thoughts(QUESTIONS[:1])
    assert loaded == names[:1]
    adapter.answer(QUESTIONS[:1])
    adapter.answer(QUESTIONS)
    assert loaded == names
    loaded.clear()
    static = softcot_ds.load(folder / "word_problems_static")
    thoughts = static.thoughts(QUESTIONS)
    assert torch.equal(thoughts, load_file(static.folder / "projection.safetensors")["weight"].expand(3, -1, -1))
    static.answer(QUESTIONS)
    assert loaded == names[1:]


@pytest.mark.parametrize(("partition", "split"), [("null", False), ("none", False), ("zero3", True)])
def test_a_process_that_is_alone_holds_the_base_whole_unless_evaluation_says_otherwise(folder, partition, split):
    linear = torch.nn.functional.linear
    adapter = softcot_ds.load(folder / "word_problems", f"evaluation.partition={partition}")
    assert adapter.recipe.backbone.partition == "zero3"
    assert is_partitioned(*adapter.base.parameters()) == split
    assert torch.nn.functional.linear is linear, "DeepSpeed would leave its own in the process"


def test_no_questions_have_no_answers(adapter):
    assert adapter.answer([]) == []
    assert adapter.thoughts([]).shape == (0, COUNT, adapter.thoughts(QUESTIONS[:1]).shape[-1])
    assert adapter.prompt_embeddings([]) == []


@pytest.mark.parametrize(
    ("question", "message"), [("", "the question is empty"), ("coins " * 2000, "leaves no room in the base's 512")]
)
@pytest.mark.parametrize("method", ["answer", "thoughts", "prompt_embeddings"])
def test_a_question_that_cannot_be_answered_is_said_before_a_model_is_loaded(folder, loaded, method, question, message):
    adapter = softcot_ds.load(folder / "word_problems")
    with pytest.raises(SoftCoTError, match=message):
        getattr(adapter, method)([QUESTIONS[0], question])
    assert loaded == []


def test_what_is_no_adapter_is_refused_and_overrides_win(folder, tmp_path):
    with pytest.raises(SoftCoTError, match="no complete checkpoint: it has no file COMPLETE"):
        softcot_ds.load(folder)
    with pytest.raises(SoftCoTError, match=r"trained with the base .* holds other weights"):
        softcot_ds.load(folder / "word_problems", f"base.model={folder}/assistant")
    short = softcot_ds.load(folder / "word_problems", "evaluation.max_new_tokens=2")
    whole = softcot_ds.load(folder / "word_problems").answer(QUESTIONS)
    assert all(text.startswith(cut) and text != cut for cut, text in zip(short.answer(QUESTIONS), whole, strict=True))
