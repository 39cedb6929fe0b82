"""Run by test_projection.py on two ranks: the fused embedding reads a table that ZeRO-3 partitions, in place."""

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from softcot_kernels import reference

from softcot_ds.distributed import init_distributed, shut_down
from softcot_ds.methods.softcot import LinearProjection, ThoughtEmbedding


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(50, 24).requires_grad_(False)
        self.projection = LinearProjection(16, 24)

    def forward(self, hidden, ids, slot):
        # Read through its module, in a forward that DeepSpeed hooks, the table is gathered on access.
        embed = ThoughtEmbedding(self.projection, self.embedding)
        return embed(hidden, ids, slot)


torch.manual_seed(0)
init_distributed(5)
model = Model()
table = model.embedding.weight.detach().clone()
weight, bias = (p.detach().clone().requires_grad_() for p in model.projection.parameters())
engine, *_ = deepspeed.initialize(
    model=model,
    optimizer=torch.optim.AdamW(model.projection.parameters(), lr=1e-3),
    config={
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
        "zero_force_ds_cpu_optimizer": False,
    },
    dist_init_required=False,
)
assert model.embedding.weight.shape == (0,), "the table is partitioned"
for _ in range(3):
    hidden, ids, slot = torch.randn(2, 3, 16), torch.randint(0, 50, (2, 7)), torch.tensor([2, 7])
    out = engine(hidden, ids, slot)
    truth = reference.thought_embedding(hidden, weight, bias, ids, table, slot)
    torch.testing.assert_close(out, truth)
    pull = torch.randn_like(out)
    engine.backward((out * pull).sum())
    gradients = torch.autograd.grad((truth * pull).sum(), [weight, bias])
    for parameter, gradient in zip(model.projection.parameters(), gradients, strict=True):
        torch.testing.assert_close(safe_get_full_grad(parameter), gradient)
    engine.step()
    with torch.no_grad():
        for parameter, ours in zip(model.projection.parameters(), (weight, bias), strict=True):
            ours.copy_(safe_get_full_fp32_param(parameter))
print("embedding equal")
shut_down()
