"""A real vLLM server beside a real model here: ``make test-vllm MODELS=DIR`` starts it and runs this.

Both compute in float32. In bfloat16 two tokens in a hundred are so close that rounding decides, and most outputs of 40
tokens differ somewhere.
"""

import os
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from evaluations import records
from launch import ROOT
from safetensors.torch import load_file, save_file

import softcot_ds
from softcot_ds.data.prompts import BasePrompt
from softcot_ds.evaluation import jobs
from softcot_ds.evaluation.run import evaluate
from softcot_ds.models.backbone import load_frozen
from softcot_ds.models.sampling import Sampling
from softcot_ds.recipe import load_recipe

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NAMES = ("Tom", "Ann", "Leo", "Eva", "Max", "Mia", "Ben", "Ida")
STORY = (
    "{0} has {1} coins and {2} stamps. {3} gives {0} {4} more coins for {5} of the stamps. How many {6} has {0} now?"
)
EVERY = ["learned", "shuffled", "mean", "zero", "empty", "placeholder", "none", "text", "static"]


def stories(count: int) -> list[str]:
    return [
        STORY.format(NAMES[i % 8], 3 * i + 4, 2 * i + 9, NAMES[(i + 3) % 8], i + 2, i + 1, ("coins", "stamps")[i % 2])
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def url() -> str:
    named = os.environ.get("SOFTCOT_VLLM_SERVER")
    if not named:
        pytest.skip("SOFTCOT_VLLM_SERVER names no vLLM server with the model of SOFTCOT_REAL_MODELS: make test-vllm")
    return named


@pytest.fixture(scope="module")
def settings(url, tmp_path_factory) -> list[str]:
    """Of a recipe, in whose folder there are adapters; thoughts are about as long as token embeddings."""
    model = min(path.parent for path in Path(os.environ["SOFTCOT_REAL_MODELS"]).glob("**/config.json"))
    folder = tmp_path_factory.mktemp("vllm")
    lines = [f'{{"question": "{story}", "answer": "so\\n#### {i}"}}\n' for i, story in enumerate(stories(12))]
    (folder / "test.jsonl").write_text("".join(lines))
    (folder / "train.jsonl").write_text("".join(lines).replace("has", "had"))
    settings = [
        f"base.model={model}",
        "base.dtype=float32",
        f"assistant.model={model}",
        f"output_dir={folder}",
        "projection.condition=none",
    ]
    settings += [f"task.train={folder}/train.jsonl", f"task.test={folder}/test.jsonl", "task.train_problems=null"]
    settings += [
        "task.test_problems=null",
        "task.validation_problems=0",
        "projection.init_scale=0.1",
        f"cache.path={folder}/cache",
    ]
    settings += ["evaluation.decode=true", "evaluation.loss=false", f"evaluation.static_adapter={folder}/static"]
    for name, method in {"adapter": "softcot", "static": "prompt_tuning"}.items():
        make_adapter(folder / name, recipe(settings, f"method={method}"))
        weights = load_file(folder / name / "projection.safetensors")
        save_file({key: value / 10 for key, value in weights.items()}, folder / name / "projection.safetensors")
    return settings


def recipe(settings, *overrides):
    return load_recipe(ROOT / "recipes/smollm2_gsm8k.yaml", [*settings, *overrides])


def folder_of(settings) -> Path:
    return Path(recipe(settings).output_dir)


@torch.no_grad()
def logits(model, prompt: BasePrompt, thoughts_TD, written: list[int]) -> torch.Tensor:
    """After what was written behind a prompt: one pass of transformers over all of it, float32."""
    embed = model.get_input_embeddings()
    left, right = (
        embed(torch.tensor(ids, dtype=torch.long)) for ids in (prompt.prefix_ids, prompt.suffix_ids + written)
    )
    middle = [] if thoughts_TD is None else [thoughts_TD.to(left)]
    return model(inputs_embeds=torch.cat([left, *middle, right])[None]).logits[0, -1].float()


def test_greedy_outputs_are_those_of_transformers_but_for_near_ties(url, settings):
    folder = folder_of(settings)
    own = softcot_ds.load(folder / "adapter", "evaluation.max_new_tokens=24")
    served = softcot_ds.load(folder / "adapter", "evaluation.max_new_tokens=24", f"evaluation.server={url}")
    rough = load_frozen(own.recipe.base.model_copy(update={"dtype": "bfloat16"}), "none", torch.device("cpu"))
    same, total, ties = 0, 0, []
    for with_thoughts in (True, False):
        questions = [own.question(story, with_thoughts) for story in stories(12)]
        thoughts = own._thoughts(questions) if with_thoughts else [None] * 12
        pairs = zip(questions, thoughts, own.outputs(questions), served.outputs(questions), strict=True)
        for question, thoughts_TD, mine, theirs in pairs:
            total += 1
            if mine == theirs:
                same += 1
                continue
            ends = own.experiment.base_prompts.stop_ids[:1]
            a, b = ([*one.token_ids, *([] if one.cut else ends)] for one in (mine, theirs))
            place = next(i for i, (one, other) in enumerate(zip(a, b, strict=False)) if one != other)
            read = question.prompt, thoughts_TD, a[:place]
            true, rounded = logits(own.base, *read), logits(rough, *read)
            gap = float(true.max() - min(true[a[place]], true[b[place]]))
            rounding = float((rounded - true).abs().max())
            ties.append((place, gap, rounding))
            print(f"first difference at {place}: logits {gap:.4f} apart, and bfloat16 changes one by {rounding:.4f}")
    print(f"{same} of {total} greedy outputs are the same")
    assert same > 0.8 * total
    assert all(gap <= rounding for _, gap, rounding in ties), "a difference that is no near tie"


def test_prompts_that_differ_in_thoughts_alone_are_told_apart(url, settings):
    """Thoughts stand in the first block of the server's cache, which knows prompts by tokens (vLLM issue 56655)."""
    adapter = softcot_ds.load(folder_of(settings) / "adapter", f"evaluation.server={url}")
    chat, embed = adapter.experiment.base_prompts.chat, adapter.base.get_input_embeddings()
    story = f". Keep it in mind. {' '.join(stories(6))} Forget the coins. What is the secret word?<|im_end|>\n"
    left = chat.encode("<|im_start|>user\nThe secret word is:")
    right = chat.encode(f"{story}<|im_start|>assistant\nThe secret word is", continued=True)
    prompt, found = BasePrompt(left, right), {}
    for word in (" banana", " river", " banana", " guitar"):
        thoughts_TD = embed(torch.tensor(chat.encode(word, continued=True) * 2)).detach()
        (output,) = adapter.server.decode([prompt], thoughts_TD[None], [2], Sampling(4), 1)
        for place, token in enumerate(output.token_ids):
            after = logits(adapter.base, prompt, thoughts_TD, list(output.token_ids[:place]))
            assert after.max() - after[token] <= 0.05
        assert found.setdefault(word, output) == output
    assert len({tuple(output.token_ids) for output in found.values()}) == 3


def test_every_condition_is_asked_and_accuracy_is_told(url, settings):
    asked = recipe(settings, "name=every", f"evaluation.server={url}", f"evaluation.conditions=[{','.join(EVERY)}]")
    report = evaluate(asked, folder_of(settings) / "adapter")
    assert [*report["conditions"]] == EVERY
    for name in EVERY:
        rows = records(asked, name)
        assert len(rows) == 12
        assert all(row["output"].strip() for row in rows) or name == "placeholder"


@pytest.mark.parametrize(
    "drawn", [[], ["evaluation.temperature=0.7", "evaluation.samples=2"]], ids=["greedy", "sampled"]
)
def test_an_evaluation_that_was_interrupted_ends_as_one_that_was_not(url, settings, monkeypatch, drawn):
    """One request at a time: in other company bfloat16 rounds otherwise."""
    common = [f"evaluation.server={url}", "evaluation.batch_size=1", "evaluation.max_new_tokens=16", *drawn]
    common += ["evaluation.conditions=[learned,none]"]
    whole, broken = (recipe(settings, f"name={name}-{bool(drawn)}", *common) for name in ("whole", "broken"))
    adapter = folder_of(settings) / "adapter"
    evaluate(whole, adapter)
    write, done = jobs.Job.write, []

    def write_some(job, *rest):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(job.key)
        write(job, *rest)

    monkeypatch.setattr(jobs.Job, "write", write_some)
    with pytest.raises(KeyboardInterrupt):
        evaluate(broken, adapter)
    monkeypatch.setattr(jobs.Job, "write", write)
    evaluate(broken, adapter)
    for name in ("learned", "none"):
        assert records(broken, name) == records(whole, name)
