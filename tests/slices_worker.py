"""Run by test_slices.py: four ranks as two nodes of two, each of which holds models in slices.

Arguments: a folder, where results.json is left; a recipe; overrides.
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import get_args
from unittest import mock

import torch
from toy_models import make_config, make_toy

from softcot_ds.backbone_config import Partition
from softcot_ds.distributed import DataRanks, barrier, device, from_all_ranks, init_distributed, is_main, say, shut_down
from softcot_ds.evaluation.run import evaluate
from softcot_ds.models import loading, toy
from softcot_ds.models.backbone import load_frozen, settled
from softcot_ds.models.partition import data_ranks, held_bytes, plain_config, whole_shape
from softcot_ds.models.quantized import FewBits
from softcot_ds.models.slices import slice_of, why_not_sliced
from softcot_ds.progress import Progress
from softcot_ds.recipe import ModelConfig, load_recipe
from softcot_ds.training.loop import train

NODE = 2
folder, recipe, *overrides = sys.argv[1:]
FIT = {
    "llama": {"tie_word_embeddings": True, "vocab_size": 97},  # a number that ranks do not divide
    "qwen2": {"tie_word_embeddings": False},  # biases
    "qwen3": {"num_key_value_heads": 2},  # norms of queries and keys; fewer of these
    "qwen3_moe": {},
    "phi3": {},  # queries, keys and values in one weight
}
UNFIT = {
    "opt": {},
    "llama": {"num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": 8},
    "qwen3": {"num_key_value_heads": 1},
    "mistral": {"intermediate_size": 47},
    "gpt_oss": {},
    "hrm_text": {},
}


def said(model: torch.nn.Module, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits without gradient, and a gradient with respect to the embeddings."""
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    loss = model(inputs_embeds=embeds, use_cache=False).logits.logsumexp(dim=-1).sum()
    return logits, torch.autograd.grad(loss, [embeds])[0]


def toys(ranks: DataRanks) -> dict[str, list[float]]:
    """Of each model that fits: errors of logits and gradient, the share that this rank holds, sums over its group."""
    found = {}
    all_reduce = torch.distributed.all_reduce
    for name, settings in FIT.items():
        whole = toy.make_toy(toy.toy_config(make_config(name), NODE, **settings))
        if is_main():
            whole.save_pretrained(f"{folder}/{name}")
        barrier()
        attention = whole.config._attn_implementation
        model = load_frozen(
            ModelConfig(model=f"{folder}/{name}", dtype="float32", attention=attention), "tensor", device()
        )
        ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(ranks.number))
        with mock.patch.object(torch.distributed, "all_reduce", wraps=all_reduce) as sums:
            sliced = said(model, ids)
        errors = [float((a - b).norm() / b.norm()) for a, b in zip(sliced, said(whole, ids), strict=True)]
        parameters = dict(model.named_parameters())
        assert {n: whole_shape(p) for n, p in parameters.items()} == {n: p.shape for n, p in whole.named_parameters()}
        held = sum(map(held_bytes, parameters.values())) / sum(map(held_bytes, whole.parameters()))
        found[name] = [*errors, held, sums.call_count]
    return found


def in_8_bits(ranks: DataRanks) -> dict[str, object]:
    """Errors in slices against the whole, both in 8 bits; the share held; what is other on ranks without a mark."""
    config = toy.toy_config(make_config("qwen2"), 4, intermediate_size=256)
    if is_main():
        toy.make_toy(config).save_pretrained(f"{folder}/wide")
    barrier()
    chosen = ModelConfig(model=f"{folder}/wide", dtype="float32")
    model, whole = (load_frozen(chosen, partition, device(), bits=8) for partition in ("tensor", "none"))
    ids = torch.randint(0, 96, (2, 9), generator=torch.Generator().manual_seed(ranks.number))
    errors = [float((a - b).norm() / b.norm()) for a, b in zip(said(model, ids), said(whole, ids), strict=True)]
    parameters = dict(model.named_parameters())
    held = sum(map(held_bytes, parameters.values())) / sum(map(held_bytes, whole.parameters()))
    sums = from_all_ranks({name: int(slice_of(p).view(torch.uint8).sum()) for name, p in parameters.items()})
    split = {name for name in parameters if len({found[name] for found in sums}) > 1}
    narrow = toy.toy_config(make_config("qwen2"), NODE)
    return {
        "errors": errors,
        "held": held,
        "split": len(split),
        "unmarked": [name for name in split if not getattr(parameters[name], "ds_optim_param", False)],
        "narrow": why_not_sliced(narrow, NODE, FewBits(8, narrow.vocab_size)),
        "wide": why_not_sliced(config, NODE, FewBits(8, config.vocab_size)),
    }


def load_in_lines(name: str) -> int:
    """Load a toy in each way, with a line for each weight. How many it has."""
    config = ModelConfig(model=f"{folder}/{name}", dtype="float32")
    with mock.patch.object(loading, "Progress", partial(Progress, every_seconds=0)):
        for partition in get_args(Partition):
            say(f"loading by {partition}")
            model = load_frozen(config, partition, device(), plain_config("float32"))
    return len([*model.parameters()])


def work() -> None:
    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % NODE)
    init_distributed(5)
    ranks = data_ranks("tensor", None)
    results = {
        "ranks": from_all_ranks([ranks.number, ranks.count, ranks.alike, ranks.is_first]),
        "toys": from_all_ranks(toys(ranks)),
        "in_8_bits": from_all_ranks(in_8_bits(ranks)),
        "weights": load_in_lines("qwen3"),
        "unfit": {},
    }
    for name, settings in UNFIT.items():
        config = make_config(name)
        config.update(settings)
        results["unfit"][name] = why_not_sliced(config, NODE)
    if is_main():
        make_toy("opt").save_pretrained(f"{folder}/opt")
    barrier()
    opt = [*overrides, f"base.model={folder}/opt", "backbone.partition=tensor"]
    results["settled"] = settled(load_recipe(recipe, opt)).backbone.partition
    for partition in ("none", "tensor"):
        chosen = load_recipe(recipe, [*overrides, f"name={partition}", f"backbone.partition={partition}"])
        train(chosen)
        evaluate(chosen, chosen.run_dir / f"checkpoints/step-{chosen.training.steps}")
    if is_main():
        Path(folder, "results.json").write_text(json.dumps(results))
    shut_down()


work()
