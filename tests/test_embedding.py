"""A compact table holds what a model's embedding module makes of tokens, whatever that is, to the last bit."""

import math

import pytest
import torch
from softcot_kernels.reference import thought_embedding
from test_step import UNEVEN, P, check, draw_examples, loss_and_gradient, make_batch, true_loss_and_gradient
from torch import nn
from toy_models import WIDTH, make_toy

from softcot_ds.errors import SoftCoTError
from softcot_ds.methods.prompt_tuning import StaticThoughts, random_token_embeddings
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models import embedding
from softcot_ds.models.embedding import CompactTable, whole_embedding

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
TOKENS = [0, 3, 4, 11, 17, 31, 40, 41, 48, 49]


class Table(nn.Embedding):
    """An embedding whose forward is given."""

    def __init__(self, change, dtype=torch.float32, rows=50) -> None:
        generator = torch.Generator().manual_seed(3)
        super().__init__(rows, 24, _weight=torch.randn(rows, 24, generator=generator).to(dtype))
        self.change = change

    def forward(self, ids):
        return self.change(self, ids, super().forward(ids))


def check_table(embedding, tokens=TOKENS):
    """The table gives the module's bits, by itself and through the kernel, wherever a token stands."""
    table = CompactTable.of(embedding, [*reversed(tokens), *tokens])
    assert table.rows_KD.shape == (len(tokens), 24)
    ids = torch.tensor([tokens, [tokens[-1]] * len(tokens), tokens[::-1]])
    with torch.no_grad():
        truth = embedding(ids)
    numbers = table.number(ids)
    assert torch.equal(table(numbers), truth)
    no_thoughts = torch.zeros(3, 0, P, dtype=truth.dtype)
    assert torch.equal(thought_embedding(no_thoughts, torch.zeros(24, P), None, numbers, table.rows_KD), truth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, math.sqrt(24), 0.1, -2.0])
def test_a_compact_table_has_the_bits_of_a_module_that_scales(scale, dtype, monkeypatch):
    monkeypatch.setattr(embedding, "_ROWS", 3)
    # as transformers' Gemma does it
    check_table(Table(lambda table, ids, out: out * torch.tensor(scale).to(out.dtype), dtype))


BY_TOKEN = {
    "norm": lambda table, ids, out: nn.functional.layer_norm(out, (24,)),
    "one odd row": lambda table, ids, out: out.where(ids[..., None] != 41, 2 * out),
    "a scale by row": lambda table, ids, out: out * (1 + ids[..., None]),
    "other ids": lambda table, ids, out: nn.functional.embedding(ids.clamp(max=40), table.weight),
    "another dtype": lambda table, ids, out: out.double(),
    "zeros": lambda table, ids, out: 0 * out,
}
BY_PLACE = {
    "positions": lambda table, ids, out: out + torch.arange(ids.shape[-1])[:, None],
    "what stands before": lambda table, ids, out: out + out.roll(1, dims=-2),
    "one odd bit": lambda table, ids, out: out.where((ids[..., None] != 31) | (ids.shape[-1] > 1), out * (1 + 1e-7)),
    "noise": lambda table, ids, out: out + 1e-6 * torch.randn_like(out),
}


@pytest.mark.parametrize("kind", BY_TOKEN)
def test_a_compact_table_has_what_a_module_makes_of_each_token(kind, monkeypatch):
    monkeypatch.setattr(embedding, "_ROWS", 3)
    check_table(Table(BY_TOKEN[kind]))


@pytest.mark.parametrize("kind", BY_PLACE)
def test_there_is_no_table_where_a_token_s_embedding_depends_on_its_place(kind, monkeypatch):
    monkeypatch.setattr(embedding, "_ROWS", 7)
    assert CompactTable.of(Table(BY_PLACE[kind]), TOKENS) is None


@pytest.mark.parametrize("outside", [5, 1000, -1])
def test_a_token_that_the_table_was_made_without_is_named(outside):
    table = CompactTable.of(Table(lambda table, ids, out: out), TOKENS)
    with pytest.raises(SoftCoTError, match=f"token {outside} is not among the 10 whose embeddings are held"):
        table.number(torch.tensor([[3, 4], [outside, 3]]))


def tokens_of(examples):
    """All that their batches hold; padding is token 0."""
    return {0, *(token for prefix, _, suffix, target in examples for token in prefix + suffix + target)}


@pytest.mark.parametrize("kind", ["norm", "one odd row", "a scale by row", "other ids", "the last bits by place"])
def test_the_step_takes_what_the_module_gives_with_a_table_and_without(kind):
    model = make_toy("llama")
    module = model.get_input_embeddings()
    forward = module.forward
    module.forward = {
        "norm": lambda ids: forward(ids).tanh(),
        "the last bits by place": lambda ids: forward(ids) * (1 + 1e-7 * (ids.ndim == 2 and ids.shape[1] > 1)),
    }.get(kind, lambda ids: BY_TOKEN[kind](module, ids, forward(ids)))
    projection = LinearProjection(P, WIDTH)
    examples = draw_examples(UNEVEN, thoughts=3, shared=6)
    assert 41 in tokens_of(examples)
    step = SoftThoughts(model, projection, shared_ids=examples[0][0][:6], tokens=tokens_of(examples))
    assert (step.table is None) == (step.embed is None) == (kind == "the last bits by place")
    truth = true_loss_and_gradient(model, projection, examples, torch.float32)
    check(loss_and_gradient(step, examples, torch.float32), truth, 1e-6, 1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "biogpt"])
def test_tokens_and_thoughts_stand_side_by_side_with_the_kernel_and_without(family):
    model = make_toy(family)
    examples = draw_examples(UNEVEN, thoughts=3)
    for projection in (LinearProjection(P, WIDTH), StaticThoughts(torch.randn(3, WIDTH))):
        step = SoftThoughts(model, projection, step="full", tokens=tokens_of(examples))
        assert len(step.table.rows_KD) < step.base.config.vocab_size
        batch, ids = make_batch(examples, torch.float32, number=step.number), make_batch(examples, torch.float32)
        prefix, thoughts, rest = step._embeds(batch, batch.thoughts).split(
            [batch.prefix_ids.shape[1], 3, batch.suffix_ids.shape[1]], 1
        )
        assert torch.equal(prefix, model.get_input_embeddings()(ids.prefix_ids))
        assert torch.equal(rest, model.get_input_embeddings()(ids.suffix_ids))
        torch.testing.assert_close(thoughts, step.projection(batch.thoughts, len(thoughts)))


def test_the_whole_embedding_is_the_module_s_own():
    model = make_toy("gemma3_text")
    ids = torch.tensor([[3, 5, 3]])
    with whole_embedding(model.get_input_embeddings()) as embed:
        assert torch.equal(embed(ids), model.get_input_embeddings()(ids))


def test_free_vectors_start_as_embeddings_of_tokens_as_the_model_sees_them():
    model = make_toy("gemma3_text")
    torch.manual_seed(4)
    vectors = random_token_embeddings(model, 5)
    torch.manual_seed(4)
    ids = torch.randint(0, 96, (5,))
    torch.testing.assert_close(vectors, model.get_input_embeddings().weight[ids] * math.sqrt(WIDTH))
    assert vectors.dtype == torch.float32
