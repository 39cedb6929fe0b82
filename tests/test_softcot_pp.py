"""SoftCoT++ against float64 computations written here: its step, its contrastive loss, what the assistant reads.

The truth takes one chain of one question at a time, with all of its prefix: see test_step.py.
"""

import copy
import hashlib
from math import exp, log

import pytest
import torch
from test_step import D, P, draw_examples, make_batch, make_model, make_projection, true_embeddings

from softcot_ds.data.prompts import AssistantInput
from softcot_ds.methods.initial import InitialEmbeddings, Thinker
from softcot_ds.methods.softcot import SoftCoT
from softcot_ds.methods.softcot_pp import SoftCoTPlusPlus
from softcot_ds.models.assistant import compute_thoughts
from softcot_ds.training.validation import _mean_cosine

T = 3
LENGTHS = [(9, 3, 5), (0, 2, 4), (1, 0, 1), (12, 0, 7)]


def draw_chains(lengths, chains: int, shared: int = 4):
    """As ``draw_examples``, with states (chains, T, P): alike, so that they are not told apart from the beginning."""
    generator = torch.Generator().manual_seed(3)
    return [
        (prefix, states + 0.3 * torch.randn(chains, T, P, generator=generator), suffix, target)
        for prefix, states, suffix, target in draw_examples(lengths, T, shared=shared)
    ]


def true_contrast(thoughts: list[torch.Tensor], seeds: str) -> torch.Tensor:
    """Of one question, float64: the mean over its chains of how badly each finds its own copy."""
    size = thoughts[0].numel()
    digest = hashlib.shake_256(seeds.encode()).digest(-(-size * len(thoughts) // 8))
    bits = [byte >> place & 1 for byte in digest for place in range(7, -1, -1)]

    def cosine(one, other):
        return (one * other).sum() / (one.square().sum().sqrt() * other.square().sum().sqrt())

    total = 0.0
    for number, own in enumerate(thoughts):
        kept = torch.tensor(bits[number * size : (number + 1) * size]).double().view(own.shape)
        similar = [20 * (cosine(own, 2 * own * kept) if other is own else cosine(own, other)) for other in thoughts]
        total = total - (similar[number].exp() / torch.stack(similar).exp().sum()).log()
    return total / len(thoughts)


def truth(model, examples, weight: float, draw: str):
    """Both losses in float64, and the gradient of their sum: over all questions, as means over tokens and questions."""
    model, projection = copy.deepcopy(model).double(), make_projection().double()
    tokens = sum(len(target) for *_, target in examples)
    language, contrast = 0.0, 0.0
    for number, (prefix, chains, suffix, target) in enumerate(examples):
        thoughts = []
        for states in chains.double():
            embeds = true_embeddings(model, projection.weight, projection.bias, prefix, states, suffix + target)
            log_p = model(inputs_embeds=embeds[None], use_cache=False).logits[0].log_softmax(dim=-1)
            first = len(embeds) - len(target)
            language = language - sum(log_p[first + i - 1, token] for i, token in enumerate(target)) / tokens
            thoughts.append(embeds[len(prefix) : len(prefix) + T])
        contrast = contrast + weight * true_contrast(thoughts, f"{draw}/{number}") / len(examples)
    (language + contrast).backward()
    gradient = torch.cat([projection.weight.grad.flatten(), projection.bias.grad])
    return language.item(), contrast.item(), gradient


def taken(step, examples, dtype, draw: str | None, parts: int = 1):
    """The same by the step, in micro-batches."""
    tokens = sum(len(target) for *_, target in examples)
    found = torch.zeros(2, dtype=torch.float64)
    step.projection.zero_grad()
    for part in range(parts):
        some = range(part, len(examples), parts)
        batch = make_batch([examples[i] for i in some], dtype, 0, step.num_shared, step.number)
        batch.kept = None if draw is None else step.dropout([f"{draw}/{i}" for i in some], batch)
        sums = step(batch) / torch.tensor([tokens, len(examples)])
        sums.sum().backward()
        found += sums.detach()
    gradient = torch.cat([step.projection.weight.grad.flatten(), step.projection.bias.grad])
    return (*found.tolist(), gradient)


@pytest.mark.parametrize("chains", [1, 3])
@pytest.mark.parametrize(("family", "kind"), [("gemma3", "fast"), ("llama", "fast"), ("llama", "full")])
def test_losses_and_gradient_are_those_of_each_chain_alone(family, chains, kind):
    model, weight, draw, examples = make_model(family), 0.7, "5/12", draw_chains(LENGTHS, chains)
    right = truth(model, examples, weight, draw)
    for checkpointing in (False, True):
        step = SoftCoTPlusPlus(
            copy.deepcopy(model).double(),
            make_projection().double(),
            None,
            kind,
            checkpointing,
            examples[0][0][:4] if kind == "fast" else (),
            chains=chains,
            contrastive=weight,
        )
        for parts in (1, len(examples)):
            found = taken(step, examples, torch.float64, draw, parts)
            torch.testing.assert_close(found[:2], right[:2], rtol=1e-10, atol=1e-12)
            assert (found[2] - right[2]).norm() <= 1e-9 * right[2].norm()
    assert (right[1] > 0.5) == (chains > 1)


def test_one_chain_without_contrast_is_softcot_to_the_bit():
    model = make_model("llama")
    examples = draw_chains(LENGTHS, 1)
    plain = [(prefix, states[0], *rest) for prefix, states, *rest in examples]
    shared = examples[0][0][:4]
    one = SoftCoT(copy.deepcopy(model), make_projection(), shared_ids=shared)
    loss = one(make_batch(plain, torch.float32, 0, 4, one.number)) / 17
    loss.backward()
    step = SoftCoTPlusPlus(copy.deepcopy(model), make_projection(), shared_ids=shared, chains=1, contrastive=0)
    batch = make_batch(examples, torch.float32, 0, 4, step.number)
    assert step.dropout(["a"] * 4, batch) is None
    losses = step(batch) / 17
    losses.sum().backward()
    assert losses.tolist() == [loss.item(), 0]
    for name, parameter in one.projection.named_parameters():
        assert torch.equal(parameter.grad, step.projection.get_parameter(name).grad)


def test_the_prefix_runs_once_for_all_chains_and_each_token_has_the_mean_of_theirs():
    model, examples = make_model("llama"), draw_chains(LENGTHS, 3)
    step = SoftCoTPlusPlus(copy.deepcopy(model), make_projection(), shared_ids=examples[0][0][:4], chains=3)
    rows = []
    step.base.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, __, given: rows.append(tuple(given["hidden_states"].shape[:2])), with_kwargs=True
    )
    batch = make_batch(examples, torch.float32, 0, 4, step.number)
    losses = step(batch, per_token=True)
    # What all begin with, the prefixes of four questions, and their twelve suffixes with thoughts.
    assert rows == [(1, 4), (4, 12), (12, T + 8)]
    alone = []
    for chain in range(3):
        one = SoftCoT(copy.deepcopy(model), make_projection(), shared_ids=examples[0][0][:4])
        of_chain = [(prefix, states[chain], *rest) for prefix, states, *rest in examples]
        alone.append(one(make_batch(of_chain, torch.float32, 0, 4, one.number), per_token=True))
    torch.testing.assert_close(losses, torch.stack(alone).mean(dim=0), rtol=1e-5, atol=0)


def test_contrast_is_least_where_chains_are_at_right_angles():
    """By hand: a copy that has lost half of equal coordinates has the cosine sqrt(1/2) to its whole, and others have 1
    where all chains are the same, 0 at right angles."""
    from softcot_ds.methods.softcot_pp import contrastive_loss

    kept = torch.tensor([True, False]).repeat(2, 2, 1, 4)  # (questions, chains, T, D)
    same = torch.ones(2, 2, 1, 8, dtype=torch.float64)
    apart = same.clone()
    apart[:, 0, :, :4], apart[:, 1, :, 4:] = 0, 0
    share = 20 * 0.5**0.5
    for thoughts, others in ((same, 20.0), (apart, 0.0)):
        right = 2 * -log(exp(share) / (exp(share) + exp(others)))
        assert contrastive_loss(thoughts, kept).item() == pytest.approx(right, rel=1e-9)
        assert contrastive_loss(1e-3 * thoughts, kept).item() == pytest.approx(right, rel=1e-9)


INPUTS = [AssistantInput("a", [4, 5, 9, 9, 3, 3], [4, 5]), AssistantInput("b", [4, 5, 8, 3, 3], [3, 4])]


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3"])
def test_tokens_at_placeholders_give_the_states_of_prompts_with_these_tokens(family):
    model = make_model(family)
    found = Thinker.of(model, INPUTS, InitialEmbeddings(3, token_ids=(7, 3, 11)))(INPUTS)
    assert found.shape == (2, 3, 2, D)
    for chain, token in enumerate((7, 3, 11)):
        inputs = [
            AssistantInput(
                "", [token if i in item.positions else id for i, id in enumerate(item.token_ids)], item.positions
            )
            for item in INPUTS
        ]
        torch.testing.assert_close(found[:, chain], compute_thoughts(model, inputs), rtol=1e-4, atol=1e-5)
    plain = compute_thoughts(model, INPUTS)
    assert not torch.allclose(found[:, 0], plain, atol=0.1)  # nothing is left behind, and what is read matters


def test_vectors_stand_at_placeholders_as_they_are_and_those_of_a_seed_are_as_long_as_tokens():
    model = make_model("llama")
    table = model.get_input_embeddings().weight
    rows = torch.randn(2, D)
    of_file, drawn = InitialEmbeddings(2, rows_KP=rows), InitialEmbeddings(64, seed=4)
    assert torch.equal(of_file.of(model), rows)
    sized = drawn.of(model)
    assert sized.square().mean().sqrt().item() == pytest.approx(table.square().mean().sqrt().item(), rel=0.1)
    assert torch.equal(sized, InitialEmbeddings(64, seed=4).of(model))
    found = Thinker.of(model, INPUTS, of_file)(INPUTS)
    for number, item in enumerate(INPUTS):
        for chain, row in enumerate(rows):
            embeds = table[torch.tensor(item.token_ids)].clone()
            embeds[item.positions] = row
            states = model.model(inputs_embeds=embeds[None]).last_hidden_state[0, item.positions]
            torch.testing.assert_close(found[number, chain], states, rtol=1e-4, atol=1e-5)
    digests = {each.identity for each in (of_file, drawn, InitialEmbeddings(2, rows_KP=rows + 1))}
    assert len(digests | {InitialEmbeddings(2, token_ids=(3, 4)).identity, InitialEmbeddings(2, seed=5).identity}) == 5


def test_chains_are_as_alike_as_the_mean_cosine_of_two_of_them():
    chains = torch.randn(4, 3, 10)
    pairs = [(0, 1), (0, 2), (1, 2)]
    cosines = [torch.cosine_similarity(question[i], question[j], dim=0) for question in chains for i, j in pairs]
    assert _mean_cosine(chains) == pytest.approx(torch.stack(cosines).mean().item(), abs=1e-6)
