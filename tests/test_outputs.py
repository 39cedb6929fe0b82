"""What has been decoded is used again as long as nothing that decides it has changed."""

import json
import shutil

import pytest
from adapters import make_adapter
from evaluations import EVERY, edit, make_recipe, recipe_in, records, write_questions
from safetensors.torch import load_file, save_file

from softcot_ds.evaluation import decoder as decoder_module
from softcot_ds.evaluation import jobs
from softcot_ds.evaluation.run import evaluate
from softcot_ds.models.scoring import Scorer

THOUGHTS = {"learned", "shuffled", "mean"}
DECODED = {*EVERY}
WORDS = {"assistant"}
LOSSES = {f"{condition} loss" for condition in EVERY}


def both(names):
    """What is decoded, and the losses under the conditions among that."""
    return names | {f"{name} loss" for name in names & DECODED}


def scaled(path):
    save_file({name: value * 2 for name, value in load_file(path).items()}, path)


@pytest.mark.parametrize(
    ("anew", "overrides", "change"),
    [
        pytest.param(set(), [], None, id="all moved"),
        pytest.param(set(), ["name=other"], lambda f: (f / "demo").rename(f / "other"), id="all moved and renamed"),
        pytest.param(set(), ["evaluation.partition=zero3", "evaluation.top_p=0.5"], None, id="what decides nothing"),
        pytest.param(set(), ["training.learning_rate=1", "thoughts.source=cache"], None, id="other work"),
        pytest.param(LOSSES, [], lambda f: write_questions(f / "test.jsonl", answer=2), id="references"),
        pytest.param(set(), [], lambda f: edit(f / "base/chat_template.jinja", "{{", "{# #}{{"), id="a comment"),
        pytest.param(
            both(THOUGHTS), [], lambda f: scaled(f / "adapter/projection.safetensors"), id="adapter retrained"
        ),
        pytest.param(both(THOUGHTS | WORDS), ["assistant.attention=eager"], None, id="assistant's attention"),
        pytest.param(
            both({"static"}), [], lambda f: scaled(f / "static/projection.safetensors"), id="static retrained"
        ),
        pytest.param(both({"placeholder"}), ["evaluation.placeholder=<|end|>"], None, id="placeholder"),
        pytest.param(both({"shuffled"}), ["seed=1"], None, id="greedily a seed only shuffles"),
        pytest.param(WORDS, ["evaluation.text_max_tokens=5"], None, id="words of other lengths, the same here"),
        pytest.param(
            both(THOUGHTS | WORDS | {"text"}),
            [],
            lambda f: edit(f / "assistant/chat_template.jinja", "{{", "{{ 'plan' }}{{"),
            id="assistant's template",
        ),
        pytest.param(
            both(DECODED),
            [],
            lambda f: edit(f / "base/chat_template.jinja", "{{", "{{ 'plan' }}{{"),
            id="base's template",
        ),
        pytest.param(
            DECODED,
            [],
            lambda f: edit(f / "base/generation_config.json", '"eos_token_id": 2', '"eos_token_id": [2, 9]'),
            id="one more token that ends an answer",
        ),
        pytest.param(both(DECODED), ["base.dtype=bfloat16"], None, id="dtype"),
        pytest.param(both(DECODED), ["base.attention=eager"], None, id="attention"),
        pytest.param(DECODED, ["evaluation.max_new_tokens=9"], None, id="length"),
        pytest.param(both(DECODED | WORDS), ["evaluation.batch_size=4"], None, id="batch size"),
        pytest.param(DECODED | WORDS | {"text loss"}, ["evaluation.temperature=1"], None, id="temperature"),
        pytest.param(both(DECODED | WORDS), ["task.test_problems=6"], None, id="fewer questions"),
        pytest.param(
            both(DECODED | WORDS), [], lambda f: write_questions(f / "test.jsonl", first="kim"), id="one other question"
        ),
    ],
)
def test_what_decides_an_output_is_compared_by_content(
    first_evaluation, tmp_path, scribe, capsys, anew, overrides, change
):
    folder = shutil.copytree(first_evaluation, tmp_path / "copy")
    if change is not None:
        change(folder)
    recipe = recipe_in(folder, *overrides)
    report = evaluate(recipe, folder / "adapter")
    lines = capsys.readouterr().out.splitlines()
    whole = ("1 of 1 batches were done before", "2 of 2 batches were done before")  # outputs, and losses
    reused = {line.partition(":")[0] for line in lines if line.endswith(whole)}
    assert both(DECODED | WORDS) - reused == anew
    assert scribe.num_prompts == len(anew & (DECODED | WORDS)) * report["num_problems"]
    assert sum(map(len, scribe.scored)) == len(anew & LOSSES) * report["num_problems"]
    # The report is of the references as they are now, and the first one is still there.
    references = {json.loads(line)["answer"].split()[-1] for line in (folder / "test.jsonl").read_text().splitlines()}
    newest = max(recipe.run_dir.glob("evaluation/*/zero.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    assert {json.loads(line)["reference"] for line in newest.read_text().splitlines()} <= references
    for path in first_evaluation.glob("demo/evaluation/*/*.jsonl"):
        kept = recipe.run_dir / path.relative_to(first_evaluation / "demo")
        assert kept.read_bytes() == path.read_bytes()


def test_outputs_of_another_version_are_not_used_again(first_evaluation, tmp_path, scribe, monkeypatch):
    folder = shutil.copytree(first_evaluation, tmp_path / "copy")
    monkeypatch.setattr(jobs, "__version__", "99")
    evaluate(recipe_in(folder), folder / "adapter")
    assert scribe.num_prompts == len(DECODED | WORDS) * 7
    assert sum(map(len, scribe.scored)) == len(DECODED) * 7


@pytest.mark.slow
def test_interrupted_evaluation_goes_on_where_it_was(tmp_path, monkeypatch):
    recipe = make_recipe(tmp_path, "evaluation.conditions=[learned]", "evaluation.batch_size=3")
    adapter = make_adapter(tmp_path / "adapter", recipe)
    evaluate(recipe, adapter)
    whole = records(recipe, "learned")
    parts = list(recipe.run_dir.glob("outputs/*/*.batches"))
    assert len(parts) == 3, "what is decoded, losses, and the tokens nearest to thoughts"
    for part in parts:
        lines = part.read_text().splitlines(keepends=True)
        part.write_text("".join(lines[:2]) + lines[2][:80])  # killed while it wrote its third batch
    decoded, scored = [], []
    decode, losses = decoder_module.decode, Scorer.scores
    monkeypatch.setattr(
        decoder_module, "decode", lambda model, prompts, *rest: decoded.append(prompts) or decode(model, prompts, *rest)
    )
    monkeypatch.setattr(
        Scorer, "scores", lambda self, prompts, *rest: scored.append(prompts) or losses(self, prompts, *rest)
    )
    evaluate(recipe, adapter)
    assert records(recipe, "learned") == whole
    for done, portion in ((decoded, 6), (scored, 3)):
        assert sum(map(len, done)) == 24 - 2 * portion, "what is finished is not done again"
