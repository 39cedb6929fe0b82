"""Bytes that a training step gathers and reduces under ZeRO-3, on CPU ranks. The last line of output is a JSON object.

    python benchmarks/zero3_traffic.py --ranks 2 4 --out benchmarks/results/zero3_traffic.json

The base is a random Llama with an untied head, partitioned as a model that is far larger than a GPU's memory would be:
no weight outlives its use (``stage3_max_live_parameters`` and ``stage3_max_reuse_distance`` are 0). What is counted is
what DeepSpeed hands to its communication backend in one micro-batch and optimizer step, after a few that are not
counted: ``gathered`` is the size of the gathered weights, ``gathers`` the number of operations that do it, ``reduced``
the size of the gradients that are summed, all but some bytes for their norm.

- ``arithmetic``: every weight but the token table twice, once for each pass: the tokens of the data are embedded ahead.
  Weights below ``stage3_param_persistence_threshold`` are never partitioned
- ``full`` and ``fast``: the package's steps; ``fast_checkpointed``: with activation checkpointing
- ``two_passes``: the prefix through all layers first, then the rest on top of its cache
- ``hooks_per_module``: as fast, but DeepSpeed gathers each module of a layer by itself, not the layer
- ``..._kept``: both limits are a layer's number of parameters, so that what is used again that soon is kept
"""

import argparse
import json
import os
import socket
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from environment import describe, write_result
from torch import nn
from torch.multiprocessing import spawn
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import softcot_ds.training.engine
from softcot_ds.data.batches import Batch, collate
from softcot_ds.distributed import init_distributed, is_main, rank, shut_down, world_size
from softcot_ds.experiment import Experiment
from softcot_ds.methods.soft_thoughts import SoftCoT, mask_and_positions
from softcot_ds.recipe import load_recipe
from softcot_ds.values import resolve_location

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "word_problems.yaml"
BASE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
GATHERS = ("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "broadcast")
REDUCES = ("reduce", "reduce_scatter", "reduce_scatter_tensor", "all_reduce", "all_reduce_coalesced")
VARIANTS = ("full", "fast", "fast_checkpointed", "two_passes", "hooks_per_module", "hooks_per_module_kept", "fast_kept")


class Traffic:
    """Counts the bytes that go through DeepSpeed's communication backend."""

    def __init__(self) -> None:
        self.reset()
        backend = deepspeed.comm.comm.cdb
        for name in (*GATHERS, *REDUCES):
            if hasattr(backend, name):
                setattr(backend, name, partial(self._call, name, getattr(backend, name)))

    def reset(self) -> None:
        """Start counting anew."""
        self.gathered = self.gathers = self.reduced = 0

    def _call(self, name: str, operation: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        lists = [value for value in (*args, *kwargs.values()) if isinstance(value, list)]
        # Of input and output, the larger is the whole and the other a rank's part.
        size = max(sum(t.nbytes for t in group) for group in [[tensor] for tensor in tensors] + lists)
        if name in GATHERS:
            self.gathered += size
            self.gathers += 1
        else:
            self.reduced += size
        return operation(*args, **kwargs)


def two_passes(model: SoftCoT, batch: Batch) -> torch.Tensor:
    """The step with a whole pass over the prefix, without gradient, before the pass over the rest."""
    embeds, length = model._embeds(batch), batch.prefix_ids.shape[1]
    num_thoughts = embeds.shape[1] - length - batch.suffix_ids.shape[1]
    mask, positions = mask_and_positions(batch.prefix_mask, num_thoughts, batch.suffix_mask, model.num_shared)
    decoder = model.base.get_decoder()
    cache = DynamicCache()
    with torch.no_grad():
        decoder(
            inputs_embeds=embeds[:, :length],
            attention_mask=mask[:, :length],
            position_ids=positions[:, :length],
            past_key_values=cache,
            use_cache=True,
        )
    hidden = decoder(
        inputs_embeds=embeds[:, length:],
        attention_mask=mask,
        position_ids=positions[:, length:],
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    logits = model.base.lm_head(hidden.flatten(0, 1)[batch.predict_at])
    return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")


def measure(variant: str, folder: Path, traffic: Traffic) -> dict[str, int]:
    """Bytes gathered and reduced in one step of a variant."""
    recipe = load_recipe(
        RECIPE,
        [
            f"base.model={folder}",
            f"backbone.deepspeed={folder / ('kept.json' if variant.endswith('_kept') else 'zero3.json')}",
            f"training.step={'full' if variant in ('full', 'two_passes') else 'fast'}",
            f"training.activation_checkpointing={str(variant == 'fast_checkpointed').lower()}",
            f"training.global_batch_size={4 * world_size()}",
            "training.micro_batch_size=4",
            "task.train_problems=128",
            "task.validation_problems=8",
            "task.test_problems=8",
            "thoughts.source=cache",
        ],
    )
    experiment = Experiment(recipe)
    model = softcot_ds.training.engine.build_model(recipe, experiment, None)
    make_layers_leaves = softcot_ds.training.engine.make_layers_leaves
    if variant.startswith("hooks_per_module"):
        softcot_ds.training.engine.make_layers_leaves = lambda model: None
    elif variant == "two_passes":
        model.forward = partial(two_passes, model)
    engine = softcot_ds.training.engine.build_engine(model, recipe, 1)
    softcot_ds.training.engine.make_layers_leaves = make_layers_leaves

    examples = experiment.splits.train
    for step in range(6):
        first = 4 * (step * world_size() + rank())
        batch = collate(examples[first : first + 4], experiment.base_pad_id, model.num_shared, model.number)
        # What the assistant says makes no difference: any states will do.
        batch.thoughts = torch.randn(4, recipe.thoughts.count, experiment.assistant_config.hidden_size)
        traffic.reset()
        loss = engine(batch)
        engine.backward(loss)
        engine.step()
    threshold = recipe.backbone.deepspeed_config()["zero_optimization"]["stage3_param_persistence_threshold"]
    sizes = {
        name: 4 * parameter.ds_numel for name, parameter in model.named_parameters() if parameter.ds_numel > threshold
    }
    del sizes["base.model.embed_tokens.weight"]
    return {
        "gathered": traffic.gathered,
        "gathers": traffic.gathers,
        "reduced": traffic.reduced,
        "arithmetic": 2 * sum(sizes.values()),
        "projection": sum(4 * parameter.ds_numel for parameter in model.projection.parameters()),
    }


def worker(local_rank: int, ranks: int, port: int, folder: Path, variants: list[str]) -> None:
    """One rank: measure each variant; rank 0 writes the results."""
    os.environ.update(
        RANK=str(local_rank),
        LOCAL_RANK=str(local_rank),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    init_distributed(timeout_minutes=5)
    traffic = Traffic()
    results = {variant: measure(variant, folder, traffic) for variant in variants}
    if is_main():
        (folder / "results.json").write_text(json.dumps(results))
    shut_down()


def prepare(folder: Path) -> None:
    """Write the base and the DeepSpeed configurations."""
    tokenizer = AutoTokenizer.from_pretrained(resolve_location("package:pair/base"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(**BASE, vocab_size=768, max_position_embeddings=512, tie_word_embeddings=False)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    for name, kept in (("zero3.json", 0), ("kept.json", layer)):
        zero3["zero_optimization"] |= {"stage3_max_live_parameters": kept, "stage3_max_reuse_distance": kept}
        (folder / name).write_text(json.dumps(zero3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "zero3_traffic", **describe()}
    for ranks in args.ranks:
        with tempfile.TemporaryDirectory() as name, socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            listener.close()
            folder = Path(name)
            prepare(folder)
            spawn(worker, (ranks, port, folder, list(args.variants)), nprocs=ranks)
            result[f"{ranks}_ranks"] = json.loads((folder / "results.json").read_text())
    for ranks in args.ranks:
        for variant, row in result[f"{ranks}_ranks"].items():
            row["gathered_over_arithmetic"] = row["gathered"] / row["arithmetic"]
            print(
                f"{ranks} ranks  {variant:22} gathered {row['gathered']:>12,} in {row['gathers']:>3} "
                f"({row['gathered_over_arithmetic']:.3f} of the arithmetic), reduced {row['reduced']:>9,}"
            )
    write_result(result, args.out)


if __name__ == "__main__":
    main()
