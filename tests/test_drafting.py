"""Drafts change how many passes an output takes: not the output, nor the distribution that it is drawn from."""

import copy
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from adapters import make_adapter
from evaluations import make_recipe, records
from test_decoding import LENGTHS, STOP, VOCAB, alone, begun_alike, draw, make_model
from toy_models import make_toy

from softcot_ds.data.prompts import BasePrompt
from softcot_ds.errors import SoftCoTError
from softcot_ds.evaluation.report import table
from softcot_ds.evaluation.run import evaluate
from softcot_ds.models.decoding import Sampling, decode
from softcot_ds.models.drafting import check_drafting
from softcot_ds.models.sampling import Chooser


def drafting(model, count):
    return SimpleNamespace(model=model, count=count)


def nearly(model, noise):
    """A model that says the same mostly."""
    other = copy.deepcopy(model)
    torch.manual_seed(2)
    for weight in other.parameters():
        weight += noise * weight.std() * torch.randn_like(weight)
    return other


@pytest.fixture(scope="module")
def model():
    return make_model(dtype=torch.float32)


@pytest.mark.parametrize(
    ("family", "thoughts"),
    [
        ("mistral", 3),
        pytest.param("llama", 3, marks=pytest.mark.slow),
        pytest.param("llama", 0, marks=pytest.mark.slow),
    ],
)
def test_outputs_are_those_of_each_prompt_alone(family, thoughts):
    """Rows accept different numbers of tokens, end, and make room for others."""
    model = make_model(family, torch.float32)
    prompts, vectors = draw(LENGTHS if thoughts else LENGTHS[:3], thoughts, dtype=torch.float32)
    given = vectors if thoughts else [None] * len(prompts)
    expected = [alone(model, *each, [STOP], 12) for each in zip(prompts, given, strict=True)]
    accepted = set()
    near, other = nearly(model, 0.1), make_model("qwen2", torch.float32)
    for helper, count, batch_size in ((near, 4, 1), (near, 4, 2), (near, 1, None), (near, 5, 4), (other, 3, 4)):
        outputs = decode(
            model, prompts, vectors, [STOP], Sampling(12), batch_size=batch_size, drafter=drafting(helper, count)
        )
        assert outputs == expected, (count, batch_size)
        for output in outputs:
            tokens = len(output.token_ids) + (not output.cut)
            assert output.accepted <= min(tokens, output.drafted)
            assert output.passes <= tokens <= output.passes + output.accepted
        accepted |= {output.accepted for output in outputs}
    assert len(accepted) > 2


def test_a_draft_of_the_model_itself_is_always_accepted(model):
    prompts, _ = draw(LENGTHS[:3], 0)
    outputs = decode(model, begun_alike(prompts, 7), None, [], Sampling(12), drafter=drafting(model, 4))
    # The first token comes of reading the prompt, then five of a pass, of which the model says one itself.
    assert {(output.passes, output.drafted, output.accepted) for output in outputs} == {(4, 8, 8)}


def test_an_output_ends_where_the_context_does():
    """That of the model that drafts may be shorter: it has nothing to say then, and other rows go on."""
    base, helper = make_model(max_position_embeddings=16), make_model(max_position_embeddings=14)
    helper.load_state_dict(base.state_dict())
    prompts, thoughts = draw([(7, 2), (4, 0), (5, 0), (0, 0)], 3)
    read = []
    helper.model.layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: read.append(int(kwargs["position_ids"].max())), with_kwargs=True
    )
    for batch_size in (1, 3):
        plain = decode(base, prompts, thoughts, [], Sampling(99), batch_size=batch_size)
        assert [len(output.token_ids) for output in plain] == [4, 9, 8, 13]
        drafted = decode(base, prompts, thoughts, [], Sampling(99), batch_size=batch_size, drafter=drafting(helper, 3))
        assert drafted == plain
        assert any(output.drafted for output in drafted)
    assert max(read) == 13


@pytest.mark.parametrize("rows", [VOCAB - 8, VOCAB + 8])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_vocabularies_may_be_padded_differently(model, rows, temperature):
    helper = make_model(vocab_size=rows, dtype=torch.float32)
    prompts, thoughts = draw(LENGTHS, 3, dtype=torch.float32)
    asked = model, prompts, thoughts, [STOP], Sampling(12, temperature)
    outputs = decode(*asked, seeds=range(6), drafter=drafting(helper, 3))
    assert sum(output.accepted for output in outputs) > 0
    if not temperature:
        assert outputs == decode(*asked)


def test_what_is_sampled_is_the_same_in_any_company(model):
    prompts, thoughts = draw(LENGTHS[:4], 3, dtype=torch.float32)
    sampling, helper = Sampling(8, temperature=1.2, top_p=0.9), drafting(nearly(model, 0.1), 3)
    seeds = [[10 * prompt + sample for sample in range(2)] for prompt in range(len(prompts))]
    expected = [
        decode(model, [prompt], vectors[None], [STOP], sampling, seeds=own, samples=2, batch_size=1, drafter=helper)
        for prompt, vectors, own in zip(prompts, thoughts, seeds, strict=True)
    ]
    given = {"seeds": [seed for own in seeds for seed in own], "samples": 2, "drafter": helper}
    for batch_size in (2, 5):
        outputs = decode(model, prompts, thoughts, [STOP], sampling, batch_size=batch_size, **given)
        assert outputs == [output for own in expected for output in own]
    assert len({tuple(output.token_ids) for output in outputs}) == 8


SAMPLES, TOKENS, TINY = 2000, 4, 5


def chances(model, prompt, sampling):
    """The probability of each output, by a pass of its own over everything before each token."""
    found = {}

    def go_on(tokens, chance):
        if len(tokens) == sampling.max_new_tokens or tokens[-1:] == (STOP,):
            found[tokens] = chance
            return
        logits = model(torch.tensor([[*prompt.prefix_ids, *tokens]])).logits[0, -1].double()
        of_token = (logits / sampling.temperature).softmax(-1)
        order = of_token.argsort(descending=True)
        kept = order[: int((of_token[order].cumsum(0) < sampling.top_p).sum()) + 1]
        for token in kept.tolist():
            go_on((*tokens, token), chance * float(of_token[token] / of_token[kept].sum()))

    go_on((), 1.0)
    return found


def p_value(counts, expected):
    """Of Pearson's chi-square; outputs of which few are expected are taken together."""
    total = sum(counts.values())
    assert set(counts) <= set(expected)
    large = [key for key, chance in expected.items() if chance * total >= 5]
    pairs = [(counts[key], expected[key] * total) for key in large]
    rest = total - sum(count for count, _ in pairs), total - sum(mean for _, mean in pairs)
    pairs += [rest] if rest[1] > 1e-6 else []
    statistic = sum((count - mean) ** 2 / mean for count, mean in pairs)
    return float(torch.special.gammaincc(torch.tensor((len(pairs) - 1) / 2), torch.tensor(statistic / 2)))


BREAKS = {
    "nothing": None,
    "every draft is accepted": lambda patch: patch.setattr(
        Chooser, "_agreed", lambda self, chances, drafts, *_: torch.ones(drafts.tokens_RN.shape, dtype=torch.bool)
    ),
    "what is refused is drawn again": lambda patch: patch.setattr(
        Chooser,
        "_own",
        lambda self, chances, drafts, accepted, *rest, own=Chooser._own: own(
            self, chances, SimpleNamespace(counts=accepted), accepted, *rest
        ),
    ),
    "one number for both": lambda patch: patch.setattr(
        Chooser, "_uniform", lambda self, what, *rest, uniform=Chooser._uniform: uniform(self, 0, *rest)
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "top_p"), [("nothing", 0.8), *((what, 1.0) for what in BREAKS)])
def test_what_is_sampled_has_the_distribution_of_the_model_alone(what, top_p, monkeypatch):
    base, helper = make_model(vocab_size=TINY, dtype=torch.float32), make_model(vocab_size=TINY, dtype=torch.float32)
    torch.manual_seed(3)
    helper.lm_head.weight += 0.3 * torch.randn_like(helper.lm_head.weight)
    prompt, sampling = BasePrompt([3, 4, 3], []), Sampling(TOKENS, temperature=1.5, top_p=top_p)
    expected = chances(base, prompt, sampling)
    assert sum(expected.values()) == pytest.approx(1)
    if BREAKS[what]:
        BREAKS[what](monkeypatch)
    outputs = decode(
        base, [prompt], None, [STOP], sampling, seeds=range(SAMPLES), samples=SAMPLES, drafter=drafting(helper, 2)
    )
    share = sum(output.accepted for output in outputs) / sum(output.drafted for output in outputs)
    assert what != "nothing" or 0.3 < share < 0.9
    counts = Counter((*output.token_ids, *([] if output.cut else [STOP])) for output in outputs)
    found = p_value(counts, expected) if set(counts) <= set(expected) else 0.0
    assert found > 0.01 if what == "nothing" else found < 1e-6


@pytest.mark.parametrize("family", ["bamba", pytest.param("rwkv", marks=pytest.mark.slow)])
def test_a_model_that_cannot_take_tokens_back_is_refused(family, model):
    other = make_toy(family)
    prompts, thoughts = draw(LENGTHS, 3, dtype=torch.float32)
    with pytest.raises(SoftCoTError, match=r"cannot take back drafts that are not accepted.*evaluation\.draft=0"):
        decode(model, prompts, thoughts, [STOP], Sampling(4), drafter=drafting(other, 2))


def vocabularies(*known):
    return tuple(SimpleNamespace(get_vocab=lambda ids=ids: ids) for ids in known)


@pytest.mark.parametrize(
    ("known", "others", "said"),
    [
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "b": 1, "d": 3}, None),
        ({"a": 0, "b": 1, "c": 2}, {"a": 0, "c": 1, "b": 2}, r"differ in 2 of the 3 .*: 1 is 'b' to one and 'c'"),
    ],
)
def test_tokens_that_are_not_the_same_are_refused(known, others, said, model, tmp_path):
    recipe = make_recipe(tmp_path, "evaluation.draft=3")
    given = recipe, vocabularies(known, others), (model.config, model.config)
    if said is None:
        check_drafting(*given)
    else:
        with pytest.raises(SoftCoTError, match=f"evaluation.draft=3: .*{said}"):
            check_drafting(*given)


def test_a_model_of_recurrent_states_is_refused_before_it_is_loaded(model, tmp_path):
    configs = make_toy("bamba").config, model.config
    with pytest.raises(SoftCoTError, match=r"\(bamba\) keeps something else than keys and values"):
        check_drafting(make_recipe(tmp_path, "evaluation.strategy=speculative"), vocabularies({}, {}), configs)


@pytest.mark.slow
@pytest.mark.parametrize("assistant", ["assistant", "base"])
def test_a_hundred_prompts_of_the_embedded_pair_are_answered_as_without_drafts(assistant, tmp_path):
    """With its own assistant, which says something else, and with the base in its place."""
    asked = ["task.test_problems=50", "evaluation.conditions=[learned,none]", "evaluation.loss=false"]
    asked += ["evaluation.max_new_tokens=40", "evaluation.batch_size=16", f"assistant.model=package:pair/{assistant}"]
    asked.append(f"evaluation.outputs={tmp_path}/outputs")
    plain = make_recipe(tmp_path / "plain", *asked)
    drafted = make_recipe(tmp_path / "drafted", *asked, "evaluation.strategy=speculative")
    adapter, found = make_adapter(tmp_path / "adapter", plain), []
    for recipe in (plain, drafted):
        report = evaluate(recipe, adapter)
        found.append([[record["output"] for record in records(recipe, name)] for name in ("learned", "none")])
    assert found[0] == found[1]
    assert len({output for outputs in found[0] for output in outputs}) > 50
    shown = [line.split() for line in table(report).split("tokens of a pass")[1].splitlines()[1:]]
    assert [cells[:2] for cells in shown] == [
        [name, f"{condition['drafts']['tokens_per_pass']:.2f}"] for name, condition in report["conditions"].items()
    ]
    drafts = report["conditions"]["none"]["drafts"]
    assert drafts["tokens"] == 4
    assert (drafts["accepted"] > 0.8) is (drafts["tokens_per_pass"] > 3) is (assistant == "base")
    asked = [json.loads(path.read_text()) for path in tmp_path.glob("outputs/*/settings.json")]
    assert sum("sampling" in settings for settings in asked) == 4, "kept apart: rounding may differ"
