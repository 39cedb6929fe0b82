"""Embedding modules are recognised as tables by what they do, on every row, or else used as they are."""

import math

import pytest
import torch
from softcot_kernels import reference
from test_step import UNEVEN, P, check, draw_examples, loss_and_gradient, make_batch, true_loss_and_gradient
from torch import nn
from toy_models import WIDTH, make_toy

from softcot_ds.methods.prompt_tuning import _random_token_embeddings
from softcot_ds.methods.soft_thoughts import SoftCoT
from softcot_ds.methods.softcot import LinearProjection
from softcot_ds.models import embedding
from softcot_ds.models.embedding import table_scale, whole_embedding

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


class Table(nn.Embedding):
    """An embedding whose forward is given."""

    def __init__(self, change, dtype=torch.float32, rows=50) -> None:
        generator = torch.Generator().manual_seed(3)
        super().__init__(rows, 24, _weight=torch.randn(rows, 24, generator=generator).to(dtype))
        self.change = change

    def forward(self, ids):
        return self.change(self, ids, super().forward(ids))


def zero_row(table, row):
    with torch.no_grad():
        table.weight[row] = 0
    return table


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1.0, math.sqrt(24), math.sqrt(3584), 0.1, 12.0, -2.0, 1 / 3])
def test_tables_times_a_number_are_recognised_and_the_kernel_gives_their_bits(scale, dtype, monkeypatch):
    monkeypatch.setattr(embedding, "_ROWS", 7)

    def change(table, ids, out):
        return out * torch.tensor(scale).to(out.dtype)  # as transformers' Gemma does it

    table = zero_row(Table(change, dtype), 0)
    found = table_scale(table)
    ids = torch.arange(50)[None]
    kernel = reference.thought_embedding(
        torch.zeros(1, 0, P, dtype=dtype), torch.zeros(24, P), None, ids, table.weight.detach(), embed_scale=found
    )
    assert torch.equal(kernel, table(ids))


OTHER = {
    "norm": lambda table, ids, out: nn.functional.layer_norm(out, (24,)),
    "positions": lambda table, ids, out: out + torch.arange(ids.shape[-1])[:, None],
    "one odd row": lambda table, ids, out: out.where(ids[..., None] != 41, 2 * out),
    "one odd element": lambda table, ids, out: out.where((ids[..., None] != 31) | (torch.arange(24) != 5), out + 1e-6),
    "a scale by row": lambda table, ids, out: out * (1 + ids[..., None]),
    "other ids": lambda table, ids, out: nn.functional.embedding(ids.clamp(max=40), table.weight),
    "another dtype": lambda table, ids, out: out.double(),
    "a wider result": lambda table, ids, out: torch.cat([out, out], dim=-1),
    "noise": lambda table, ids, out: out + torch.randn_like(out),
}


@pytest.mark.parametrize("kind", OTHER)
def test_whatever_else_a_module_does_makes_it_no_table(kind, monkeypatch):
    monkeypatch.setattr(embedding, "_ROWS", 7)
    assert table_scale(Table(OTHER[kind])) is None


def test_a_table_of_zeros_or_without_a_weight_is_left_to_its_module():
    assert table_scale(nn.Identity()) is None
    table = Table(lambda table, ids, out: out)
    nn.init.zeros_(table.weight)
    assert table_scale(table) is None


@pytest.mark.parametrize("kind", ["norm", "one odd row", "a scale by row", "other ids"])
def test_the_step_uses_the_module_where_it_is_no_table(kind):
    model = make_toy("llama")
    table = model.get_input_embeddings()
    forward = table.forward
    table.forward = lambda ids: OTHER[kind](table, ids, forward(ids)) if kind != "norm" else forward(ids).tanh()
    projection = LinearProjection(P, WIDTH)
    examples = draw_examples(UNEVEN, thoughts=3, shared=6)
    assert any(41 in prefix + suffix + target for prefix, _, suffix, target in examples)
    step = SoftCoT(model, projection, shared_ids=examples[0][0][:6])
    assert step.embed is None
    truth = true_loss_and_gradient(model, projection, examples, torch.float32)
    check(loss_and_gradient(step, examples, torch.float32), truth, 1e-6, 1e-5)


def test_families_with_and_without_a_scale_use_the_kernel():
    for family, scale in (("llama", 1.0), ("gemma3_text", math.sqrt(WIDTH)), ("biogpt", math.sqrt(WIDTH))):
        step = SoftCoT(make_toy(family), LinearProjection(P, WIDTH))
        assert step.embed is not None
        assert step.embed._scale == pytest.approx(scale, rel=1e-6)
        examples = draw_examples(UNEVEN, thoughts=3)
        batch = make_batch(examples, torch.float32)
        embeds = step._embeds(batch)
        prefix = batch.prefix_ids.shape[1]
        torch.testing.assert_close(embeds[:, prefix : prefix + 3], step.projection(batch.thoughts))


def test_the_whole_embedding_is_the_module_s_own():
    model = make_toy("gemma3_text")
    ids = torch.tensor([[3, 5, 3]])
    with whole_embedding(model.get_input_embeddings()) as embed:
        assert torch.equal(embed(ids), model.get_input_embeddings()(ids))


def test_free_vectors_start_as_embeddings_of_tokens_as_the_model_sees_them():
    model = make_toy("gemma3_text")
    torch.manual_seed(4)
    vectors = _random_token_embeddings(model, 5)
    torch.manual_seed(4)
    ids = torch.randint(0, 96, (5,))
    torch.testing.assert_close(vectors, model.get_input_embeddings().weight[ids] * math.sqrt(WIDTH))
    assert vectors.dtype == torch.float32
