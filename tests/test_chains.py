"""Several sets of thoughts for a question, from the recipe to the report: settings, cache, files, evaluation."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapters import make_adapter
from evaluations import RECIPE, make_recipe, records
from safetensors.torch import load_file, save_file

from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.report import table
from softcot_ds.evaluation.run import evaluate
from softcot_ds.experiment import Experiment
from softcot_ds.inference import Adapter
from softcot_ds.methods.initial import initial_embeddings
from softcot_ds.models.assistant import compute_thoughts
from softcot_ds.models.decoding import Output
from softcot_ds.recipe import load_recipe
from softcot_ds.run_dir import load_for_evaluation
from softcot_ds.thoughts.reader import ThoughtReader, cache_identity
from softcot_ds.training.start import Start

P, D = 128, 192
TWO = ["method=softcot_pp", "chains.count=2"]
TOKENS = [*TWO, "chains.initial=tokens", "chains.tokens=['<|thought|>','?']"]
"""Tokens 5 and 36 of the embedded assistant."""


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["chains.count=2"], r"chains: a section of method=softcot_pp, and method is softcot; leave it out"),
        ([*TWO, "chains.initial=tokens"], r"chains.tokens: 0 tokens for chains.count=2; name one for each chain"),
        ([*TWO, "chains.tokens=[a,b]"], r"chains.tokens: named, and chains.initial is random"),
        ([*TOKENS, "chains.tokens=['?','?']"], r"chains.tokens: '\?' twice: two chains would have the same thoughts"),
        (
            [*TWO, "chains.initial=learned"],
            r"chains.initial: learned is not implemented: .* set it to tokens or random",
        ),
        ([*TWO, "chains.count=0", "chains.seed=x"], r"2 mistakes"),
    ],
)
def test_what_chains_cannot_be_is_said_with_the_recipe(overrides, message):
    with pytest.raises(SoftCoTError, match=message):
        load_recipe(RECIPE, overrides)


def test_ten_chains_of_a_seed_are_what_the_method_has_by_itself():
    recipe = load_recipe(RECIPE, ["method=softcot_pp"])
    assert (recipe.chains.count, recipe.chains.initial, recipe.chains.contrastive, recipe.answers) == (
        10,
        "random",
        1,
        10,
    )
    assert load_recipe(RECIPE).chains is None


def test_a_text_that_is_no_token_is_refused_before_work_starts():
    with pytest.raises(SoftCoTError, match=r"chains.tokens 'tom has' is 2 tokens for the tokenizer of "):
        Experiment(load_recipe(RECIPE, [*TOKENS, "chains.tokens=['?','tom has']"]))


def test_caches_of_other_initial_embeddings_are_others():
    found = [
        cache_identity(load_recipe(RECIPE, overrides))
        for overrides in (
            [],
            TOKENS,
            [*TOKENS, "chains.tokens=['?','<|thought|>']"],
            TWO,
            [*TWO, "chains.seed=1"],
            [*TWO, "chains.count=3"],
            [*TWO, "seed=1"],  # of the run: its states are the same
        )
    ]
    assert len({identity.digest for identity in found}) == len(found) - 1
    assert found[3] == found[-1]
    assert found[0].row_shape == (4, P)
    assert found[1].row_shape == (2, 4, P)
    assert "-T4-K2-" in found[1].folder_name
    assert "initial_embeddings" not in found[0].to_json()  # those that are there stay what they are
    assert found[1].difference(found[2]) == ["initial_embeddings is 'tokens 5 36', wanted 'tokens 36 5'"]


@pytest.fixture
def of_reference(tmp_path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A file as SoftCoT++'s own code writes it."""
    torch.manual_seed(2)
    weights = {"weight": torch.randn(D, P), "bias": torch.randn(D), "embedding": torch.randn(3, P)}
    path = tmp_path / "projection.bin"
    torch.save({name: value.bfloat16() for name, value in weights.items()}, path)
    return path, {name: value.bfloat16().float() for name, value in weights.items()}


def test_a_file_of_softcot_pp_gives_weights_and_initial_embeddings_and_the_adapter_keeps_both(tmp_path, of_reference):
    path, weights = of_reference
    three = ["method=softcot_pp", "chains.count=3", f"projection.init_from={path}"]
    recipe = make_recipe(tmp_path, *three, "chains.initial=file")
    experiment = Experiment(recipe)
    assert torch.equal(experiment.initial.rows_KP, weights["embedding"])
    started = Start.anew(experiment, ThoughtReader(None), experiment.splits.train).weights
    assert started.keys() == {"weight", "bias"}
    assert all(torch.equal(started[name], weights[name]) for name in started)

    folder = make_adapter(tmp_path / "adapter", recipe)
    save_file(weights, folder / "projection.safetensors")
    path.unlink()
    adapter = Adapter(load_for_evaluation(str(folder), []), folder)
    assert torch.equal(adapter.experiment.initial.rows_KP, weights["embedding"])
    assert torch.equal(adapter.projection.weight, weights["weight"])


def test_a_file_of_softcot_pp_is_not_taken_for_what_it_is_not(tmp_path, of_reference):
    path, weights = of_reference
    given = f"projection.init_from={path}"
    for others in ([], TOKENS):
        experiment = Experiment(make_recipe(tmp_path, given, *others))
        with pytest.raises(
            SoftCoTError, match=r"is of SoftCoT\+\+.* chains.initial=file and chains.count=3 to use both"
        ):
            Start.anew(experiment, ThoughtReader(None), experiment.splits.train)
    of_file = [*TWO, "chains.initial=file"]
    with pytest.raises(SoftCoTError, match=r"has the shape \(3, 128\), and chains.count=2 .* wants \(2, 128\)"):
        initial_embeddings(make_recipe(tmp_path, given, *of_file))
    with pytest.raises(SoftCoTError, match=r"projection\.init_from names no file"):
        initial_embeddings(make_recipe(tmp_path, *of_file))
    torch.save({"weight": weights["weight"], "bias": weights["bias"]}, path)
    with pytest.raises(SoftCoTError, match="holds a projection and no tensor 'embedding'"):
        initial_embeddings(make_recipe(tmp_path, given, *of_file))


def test_an_adapter_is_not_read_with_other_initial_embeddings(tmp_path):
    folder = make_adapter(tmp_path / "adapter", make_recipe(tmp_path, *TOKENS))
    with pytest.raises(
        SoftCoTError, match=r"trained with 'tokens 5 36' initial embeddings, and the recipe has '2 random"
    ):
        Adapter(make_recipe(tmp_path, *TWO), folder)


@pytest.mark.slow
def test_each_chain_answers_alone_under_every_condition_and_their_majority_counts(tmp_path, scribe):
    overrides = [*TOKENS, "evaluation.samples=2", "evaluation.temperature=0.7", "name=chains"]
    recipe = make_recipe(tmp_path, *overrides)
    adapter = make_adapter(tmp_path / "adapter", recipe)
    opened = Adapter(recipe, adapter)
    examples = opened.experiment.splits.test
    weights = {name: value.double() for name, value in load_file(adapter / "projection.safetensors").items()}
    told = []  # by chain, what the scribe reads of each problem's thoughts
    for token in (5, 36):
        asked = [example.assistant for example in examples]
        for item in asked:
            item.token_ids[-4:] = [token] * 4
        states = compute_thoughts(opened.assistant, asked).double()
        told.append((states @ weights["weight"].T + weights["bias"]).sum(dim=(1, 2)))
    report = evaluate(recipe, adapter)

    def seen(condition):
        """(problems, answers) what the scribe was told."""
        outputs = [[sample["output"] for sample in row["samples"]] for row in records(recipe, condition)]
        return torch.tensor([[float(output.split()[0]) for output in of_problem] for of_problem in outputs]).double()

    in_turn = torch.stack(told * 2, dim=1)
    torch.testing.assert_close(seen("learned"), in_turn, rtol=0, atol=2e-3)
    owner = [int((in_turn - row).abs().sum(dim=1).argmin()) for row in seen("shuffled")]
    assert sorted(owner) == list(range(24))
    assert all(index != own for index, own in enumerate(owner))
    torch.testing.assert_close(seen("shuffled"), in_turn[owner], rtol=0, atol=2e-3)
    torch.testing.assert_close(seen("mean"), in_turn.mean(dim=0).expand(24, -1), rtol=0, atol=2e-3)
    assert not seen("zero").any()
    assert (report["chains"], report["samples"]) == (2, 4)
    assert "2 of each of 2 chains at temperature 0.7" in table(report)
    # The scribe's loss of a solution is what it was told and what is the same in all chains.
    solutions = [sum(example.prefix_ids) + len(example.target_ids) for example in examples]
    found = torch.tensor([row["loss"] for row in records(recipe, "learned")]).double()
    torch.testing.assert_close(found - torch.tensor(solutions), torch.stack(told).mean(dim=0), rtol=0, atol=1e-3)

    voted = ["evaluation.strategy=self_consistency", "evaluation.conditions=[learned,none]"]
    greedy = make_recipe(tmp_path, *TOKENS, "name=greedy", *voted)
    scribe.batches.clear()
    report = evaluate(greedy, adapter)
    assert (report["samples"], report["votes"]) == (2, True)
    assert scribe.num_prompts == 24 * 3  # two chains, and once without thoughts
    assert all(len(row["samples"]) == 2 for row in records(greedy, "none"))


def test_an_adapter_gives_each_chains_thoughts_and_the_answer_that_most_chains_have(tmp_path):
    recipe = make_recipe(tmp_path, *TOKENS)
    adapter = Adapter(recipe, make_adapter(tmp_path / "adapter", recipe))
    asked = ["tom has 8 pens . how many pens now ?", "lily has 2 pens . first lily buys 3 . how many pens now ?"]
    thoughts = adapter.thoughts(asked)
    assert thoughts.shape == (2, 2, 4, D)
    for question, chains in zip(asked, thoughts, strict=True):
        item = adapter.question(question).assistant
        for token, found in zip((5, 36), chains, strict=True):
            states = compute_thoughts(
                adapter.assistant, [replace(item, token_ids=[*item.token_ids[:-4], *[token] * 4])]
            )
            torch.testing.assert_close(found, adapter.projection(states)[0], rtol=1e-4, atol=1e-5)
    embedded = adapter.prompt_embeddings(asked)
    assert len(embedded) == 4
    for prompt, row in zip(embedded, thoughts.flatten(0, 1), strict=True):
        assert torch.equal(prompt.embeddings[prompt.is_thought], row)
    assert embedded[0].token_ids.tolist() == embedded[1].token_ids.tolist() != embedded[2].token_ids.tolist()

    def written(*texts):
        return [Output(adapter.experiment.base_tokenizer.encode(text), cut=False) for text in texts]

    for texts, chosen in (
        (["answer 7", "answer 8", "so", "x answer 8"], 1),
        (["so", "answer 8", "answer 7"], 1),
        (["so", "it"], 0),
    ):
        outputs = written(*texts)
        assert adapter._agreed(outputs) is outputs[chosen]
