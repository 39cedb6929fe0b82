"""Conditions: what stands for the thoughts under each, and what the base reads then."""

import shutil
from typing import get_args

import pytest
import torch
from adapters import make_adapter
from evaluations import WITHOUT_STATIC, make_recipe, recipe_in, records
from safetensors.torch import load_file

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.conditions import CONDITIONS, Conditions
from softcot_ds.evaluation.report import table
from softcot_ds.evaluation.run import evaluate
from softcot_ds.evaluation_config import Condition
from softcot_ds.experiment import Experiment
from softcot_ds.inference import Adapter
from softcot_ds.thoughts import reader as thought_reader


def test_conditions_are_what_they_say(tmp_path):
    recipe = make_recipe(tmp_path, WITHOUT_STATIC)
    adapter = make_adapter(tmp_path / "adapter", recipe)
    opened = Adapter(recipe, adapter)
    experiment = opened.experiment
    examples = experiment.splits.test
    inputs = Conditions(opened, examples)
    everything = list(range(len(examples)))
    learned = inputs.of("learned").thoughts(everything)

    weights = load_file(adapter / "projection.safetensors")
    truth = inputs._hidden.double() @ weights["weight"].double().T + weights["bias"].double()
    assert torch.allclose(learned.double(), truth, rtol=1e-5, atol=1e-6)

    shuffled = inputs.of("shuffled").thoughts(everything)
    owner = [int((learned - thoughts).abs().sum(dim=(1, 2)).argmin()) for thoughts in shuffled]
    assert sorted(owner) == everything, "each question's thoughts are used once"
    assert all(index != own for index, own in enumerate(owner)), "nobody keeps their own"

    mean = inputs.of("mean").thoughts(everything)
    assert torch.allclose(mean.double(), truth.mean(dim=0).expand_as(mean).double(), rtol=1e-5, atol=1e-6)
    assert not inputs.of("zero").thoughts(everything).any()

    placeholder = inputs.of("placeholder")
    assert placeholder.thoughts is None
    pad = experiment.base_tokenizer.pad_token_id  # it has no unknown token
    assert [[*prompt.prefix_ids, *prompt.suffix_ids] for prompt in placeholder.prompts] == [
        [*prompt.prefix_ids, *[pad] * 4, *prompt.suffix_ids] for prompt in inputs.of("zero").prompts
    ]

    none = inputs.of("none")
    assert none.thoughts is None
    assert "plan" not in experiment.base_tokenizer.decode(none.prompts[0].prefix_ids + none.prompts[0].suffix_ids)

    inputs.words = [f"word {index}" for index in everything]
    text = inputs.of("text")
    assert text.thoughts is None
    assert "plan :\nword 3" in experiment.base_tokenizer.decode(text.prompts[3].prefix_ids)
    assert set(CONDITIONS) == set(get_args(Condition))


def test_each_condition_reads_its_own_prompt(tmp_path, scribe):
    recipe = make_recipe(tmp_path, WITHOUT_STATIC)
    evaluate(recipe, make_adapter(tmp_path / "adapter", recipe))
    experiment = Experiment(recipe)
    wording = experiment.base_prompts.prompts

    def rendered(messages, question, thoughts=""):
        (message,) = messages
        content = message["content"].replace("{question}", question).replace("{thoughts}", thoughts)
        return experiment.base_tokenizer.apply_chat_template(
            [{"role": message["role"], "content": content}], tokenize=False, add_generation_prompt=True
        )

    for condition in recipe.evaluation.conditions:
        for record, example in zip(records(recipe, condition), experiment.splits.test, strict=True):
            question = example.problem.question
            if condition == "none":
                assert record["prompt"] == rendered(wording.base_without_thoughts, question)
            elif condition == "text":
                asked = BasePrompt(experiment.assistant_prompts.words_prompt(question), [])
                assert record["prompt"] == rendered(wording.base, question, f"0.000 0 {scribe.ending(asked)[0]}")
            elif condition == "placeholder":
                assert record["prompt"] == rendered(wording.base, question, "<|pad|>" * 4)
            else:
                assert record["prompt"] == rendered(wording.base, question, "[4 thoughts]")
    assert {len(records(recipe, condition)) for condition in recipe.evaluation.conditions} == {24}


@pytest.mark.slow
def test_static_prompt_is_a_condition_of_its_own(tmp_path):
    static = make_recipe(tmp_path, "method=prompt_tuning", "name=static")
    static_adapter = make_adapter(tmp_path / "static-adapter", static)
    recipe = make_recipe(
        tmp_path, f"evaluation.static_adapter={static_adapter}", "evaluation.conditions=[learned,static]"
    )
    adapter = make_adapter(tmp_path / "adapter", recipe)
    report = evaluate(recipe, adapter)
    assert set(report["conditions"]) == {"learned", "static"}
    # The static adapter, evaluated as itself, says the same.
    alone = make_recipe(tmp_path, "method=prompt_tuning", "name=static", "evaluation.conditions=[learned]")
    evaluate(alone, static_adapter)
    assert [r["output"] for r in records(alone, "learned")] == [r["output"] for r in records(recipe, "static")]

    wrong = make_recipe(tmp_path, f"evaluation.static_adapter={adapter}", "evaluation.conditions=[static]")
    with pytest.raises(SoftCoTError, match="is of method=softcot, whose thoughts differ by question"):
        evaluate(wrong, adapter)


def test_an_adapter_makes_other_numbers_of_thoughts_than_it_was_trained_with(tmp_path, scribe):
    """As if it had been trained with so many. The assistant is asked for so many, and the report says both."""
    adapter = make_adapter(tmp_path / "adapter", make_recipe(tmp_path))
    told = evaluate(make_recipe(tmp_path, "evaluation.thoughts=2", "name=fewer"), adapter)
    assert (told["num_thoughts"], told["trained_num_thoughts"]) == (2, 4)
    assert "2 thoughts (trained with 4)" in table(told)
    of_two = make_recipe(tmp_path, "thoughts.count=2", "name=of-two")
    straight = evaluate(of_two, make_adapter(tmp_path / "of-two-adapter", of_two))
    assert (straight["num_thoughts"], straight["trained_num_thoughts"]) == (2, 2)
    fewer = make_recipe(tmp_path, "name=fewer")
    for condition in of_two.evaluation.conditions:
        assert records(fewer, condition) == records(of_two, condition)
        assert condition == "none" or "[2 thoughts]" in records(fewer, condition)[0]["prompt"]

    static = make_recipe(tmp_path, "method=prompt_tuning", "name=static", "evaluation.thoughts=2")
    with pytest.raises(SoftCoTError, match="and method=prompt_tuning makes just as many, not 2"):
        evaluate(static, make_adapter(tmp_path / "static-adapter", static))


def test_free_vectors_are_decoded_once_for_learned_shuffled_and_mean(first_evaluation, tmp_path, scribe):
    folder = shutil.copytree(first_evaluation, tmp_path / "copy")
    (folder / "assistant/model.safetensors").unlink()  # which they do not need
    recipe = recipe_in(folder, "method=prompt_tuning", "name=s", "evaluation.conditions=[learned,shuffled,mean]")
    report = evaluate(recipe, folder / "static")
    assert scribe.num_prompts == sum(map(len, scribe.scored)) == report["num_problems"]
    learned = [
        {key: value for key, value in row.items() if key != "nearest_tokens"} for row in records(recipe, "learned")
    ]
    assert records(recipe, "shuffled") == records(recipe, "mean") == learned


def test_states_that_are_computed_for_want_of_a_cache_are_as_precise_as_its_own(tmp_path):
    for dtype in ("bfloat16", "float32"):
        recipe = make_recipe(tmp_path, "thoughts.source=cache", f"cache.path={tmp_path}/none", f"cache.dtype={dtype}")
        experiment = Experiment(recipe)
        states = thought_reader.read_all_thoughts(experiment, experiment.splits.test)
        assert str(states.dtype) == f"torch.{thought_reader.states_dtype(recipe)}" == f"torch.{dtype}"
