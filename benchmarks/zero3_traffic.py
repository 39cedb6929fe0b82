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

``gathered_ahead`` counts at the hooks by which the fast step asks DeepSpeed for weights, in steps whose order it knows,
with the package's limits. The bases are Llama 3.1 8B, 70B and 405B, their widths and vocabulary divided by 128 and all
else as it is: as many layers, as large against the head and the parts of a layer as theirs.

- ``forward``, ``backward``: of the elements that are asked for in a pass and not kept whole all the time, the fraction
  that were gathered, or on their way, before their hook asked. What activation checkpointing would compute again counts
  as backward
- ``first``: the fraction of the forward pass's elements that are asked for before a layer has run, by projection and
  the first layer. They too are on their way before their hook asks, but since the step's first hook at the earliest:
  DeepSpeed gathers nothing before a step begins, and there is next to no computation to hide behind
- ``most_layers``: elements gathered at a time at most, in layers; ``expected_layers``: the package's bound of it
- ``gathered_ahead_before``: the same with the limits that once were in ds_configs/zero3.json, made smaller alike

``partitions`` holds what is moved by ``backbone.partition``, always on 4 ranks, two on each of two nodes:

- ``frozen_bytes_between_nodes``, ``frozen_bytes_within_nodes``: size of the frozen weights gathered in one micro-batch
  and optimizer step, by operations over ranks of both nodes, and of one
- ``trained_bytes_between_nodes``: the same of the projection, with its gradient
- ``loaded_bytes_between_nodes``: what has moved between nodes until the base was loaded
- ``equals_zero3``: losses and trained weights of all steps are those of ``zero3``, bit for bit
- ``activations_bytes_within_nodes``: what the ranks of a node sum and gather of activations, which hold ``tensor``'s
  slices. They take the micro-batches of both together, and each has half of their loss
"""

import argparse
import hashlib
import json
import os
import socket
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.runtime.zero.muon.original_muon  # an engine imports it, and with it PyTorch's compiler
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import safe_get_full_fp32_param, z3_leaf_module
from environment import describe, write_result
from torch import nn
from torch.multiprocessing import start_processes
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

import softcot_ds.training.engine
from softcot_ds.data.batches import Batch, collate
from softcot_ds.distributed import barrier, from_all_ranks, init_distributed, is_main, shut_down, world_size
from softcot_ds.experiment import Experiment
from softcot_ds.methods.soft_thoughts import SoftThoughts, mask_and_positions
from softcot_ds.models.backbone import cache_name
from softcot_ds.models.partition import data_ranks, gathers_of, is_partitioned
from softcot_ds.recipe import Recipe, load_recipe
from softcot_ds.training.memory import expected_memory
from softcot_ds.values import resolve_location

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "word_problems.yaml"
BASE = {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6}
GATHERS = ("all_gather", "all_gather_into_tensor", "all_gather_coalesced", "broadcast")
REDUCES = ("reduce", "reduce_scatter", "reduce_scatter_tensor", "all_reduce", "all_reduce_coalesced")
REDUCED = 128
"""What widths of the models for ``gathered_ahead`` are divided by: numbers of elements by its square."""
SIZES = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 4},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 8},
    "405b": {"hidden_size": 16384, "intermediate_size": 53248, "num_hidden_layers": 126, "num_attention_heads": 16},
}
"""Of Llama 3.1, but for heads: as wide as the one of keys and values, as wide as theirs all together."""
FORMER = {
    "stage3_prefetch_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 1_000_000_000,
    "stage3_max_reuse_distance": 1_000_000_000,
}
LIMITS: dict[str, dict[str, int]] = {"gathered_ahead": {}, "gathered_ahead_before": FORMER}
RANKS_OF_A_NODE = 2
PARTITIONS = ("zero3", "node", "tensor")
VARIANTS = ("full", "fast", "fast_checkpointed", "two_passes", "hooks_per_module", "hooks_per_module_kept", "fast_kept")


class Traffic:
    """Counts the bytes that go through DeepSpeed's communication backend."""

    def __init__(self) -> None:
        self.reset()
        backend = deepspeed.comm.comm.cdb
        for name in (*GATHERS, *REDUCES):
            if hasattr(backend, name):
                setattr(backend, name, partial(self._call, name, getattr(backend, name)))
        for module, name in ((dist, "all_reduce"), (funcol, "all_reduce"), (funcol, "all_gather_tensor")):
            setattr(module, name, partial(self._call_of_slices, getattr(module, name)))

    def reset(self) -> None:
        """Start counting anew."""
        self.gathered = self.gathers = self.reduced = 0
        self.between_nodes = self.trained = self.activations = 0

    def _call_of_slices(self, operation: Any, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """Of operations that do not come from DeepSpeed, those of a part of the ranks move activations."""
        found = operation(tensor, *args, **kwargs)
        groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup | tuple)]
        of_mesh = groups and isinstance(groups[0], tuple)  # DTensor's: a mesh, and which of its dimensions
        if of_mesh or (groups and dist.get_world_size(groups[0]) < world_size()):
            self.activations += (tensor if found is None else found).nbytes
        return found

    def tell_apart(self, model: SoftThoughts) -> None:
        """Count from now on how much of what is gathered is trained: weights may be gathered several at once."""
        trained = {*model.projection.parameters()}
        split = [parameter for parameter in model.parameters() if is_partitioned(parameter)]
        for parameter in split:
            for name in ("all_gather", "all_gather_coalesced"):
                setattr(parameter, name, partial(self._gather, trained, parameter, getattr(parameter, name)))

    def _gather(self, trained: set[nn.Parameter], parameter: nn.Parameter, gather: Any, *args: Any, **rest: Any) -> Any:
        weights = [*args[0]] if args else [parameter]
        away = [p for p in weights if p in trained and p.ds_status == ZeroParamStatus.NOT_AVAILABLE]
        self.trained += sum(world_size() * weight.ds_tensor.nbytes for weight in away)
        return gather(weights, *args[1:], **rest)

    def _call(self, name: str, operation: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        lists = [value for value in (*args, *kwargs.values()) if isinstance(value, list)]
        # Of input and output, the larger is the whole and the other a rank's part.
        size = max(sum(t.nbytes for t in group) for group in [[tensor] for tensor in tensors] + lists)
        groups = [value for value in (*args, *kwargs.values()) if isinstance(value, dist.ProcessGroup)]
        ranks = dist.get_process_group_ranks(*groups) if groups else range(world_size())
        if name in GATHERS:
            self.between_nodes += size if len({rank // RANKS_OF_A_NODE for rank in ranks}) > 1 else 0
            self.gathered += size
            self.gathers += 1
        else:
            self.reduced += size
        return operation(*args, **kwargs)


class Ahead:
    """Counts what DeepSpeed has gathered, or begun to, before a module asks for it; while it lives."""

    def __init__(self, model: SoftThoughts) -> None:
        self._frozen = [*model.base.parameters()]
        self._fetch = PartitionedParameterCoordinator.fetch_sub_module
        PartitionedParameterCoordinator.fetch_sub_module = lambda *args, **kwargs: self._count(*args, **kwargs)
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.asked: dict[str, int] = {"forward": 0, "backward": 0}
        self.ahead: dict[str, int] = {"forward": 0, "backward": 0}
        self.first = self.most = 0
        self._layer_has_run = False

    def remove(self) -> None:
        """Give DeepSpeed its own method back."""
        PartitionedParameterCoordinator.fetch_sub_module = self._fetch

    def _count(self, coordinator: Any, module: nn.Module, forward: bool) -> None:
        direction = "forward" if forward and torch._C._current_graph_task_id() == -1 else "backward"
        parameters = set(iter_params(module, recurse=z3_leaf_module(module)))
        new = [p for p in parameters if not p.ds_persist and not p.ds_active_sub_modules]  # not at work already
        asked = sum(parameter.ds_numel for parameter in new)
        if not self._layer_has_run:
            self.first += asked
            self._layer_has_run = z3_leaf_module(module)
        self.asked[direction] += asked
        self.ahead[direction] += sum(p.ds_numel for p in new if p.ds_status != ZeroParamStatus.NOT_AVAILABLE)
        self._fetch(coordinator, module, forward)
        there = [p for p in self._frozen if not p.ds_persist and p.ds_status != ZeroParamStatus.NOT_AVAILABLE]
        self.most = max(self.most, sum(parameter.ds_numel for parameter in there))


def gathered_ahead(config: Path) -> dict[str, float]:
    """What of a base's weights is gathered before it is asked for."""
    recipe = traffic_recipe(config.parent, config, "training.step=fast")
    experiment = Experiment(recipe)
    model = softcot_ds.training.engine.build_model(recipe, experiment, None)
    engine = softcot_ds.training.engine.build_engine(model, recipe)
    ahead = Ahead(model)
    train(engine, model, experiment, recipe, ahead.reset)
    ahead.remove()
    layer = max(gathers_of(model.base, engine.zero_param_persistence_threshold()).sums)
    return {
        **{direction: ahead.ahead[direction] / asked for direction, asked in ahead.asked.items()},
        "first": ahead.first / ahead.asked["forward"],
        "most_layers": ahead.most / layer,
        "expected_layers": expected_memory(engine).gathered / 4 / layer,
    }


def two_passes(model: SoftThoughts, batch: Batch) -> torch.Tensor:
    """The step with a whole pass over the prefix, without gradient, before the pass over the rest."""
    embeds, length = model._embeds(batch, model._given(batch)), batch.prefix_ids.shape[1]
    num_thoughts = embeds.shape[1] - length - batch.suffix_ids.shape[1]
    mask, positions = mask_and_positions(batch.prefix_mask, num_thoughts, batch.suffix_mask, model.num_shared)
    decoder = model.base.get_decoder()
    given = {cache_name(decoder.forward): DynamicCache(), "use_cache": True}
    with torch.no_grad():
        decoder(
            inputs_embeds=embeds[:, :length],
            attention_mask=mask[:, :length],
            position_ids=positions[:, :length],
            **given,
        )
    hidden = decoder(
        inputs_embeds=embeds[:, length:],
        attention_mask=mask,
        position_ids=positions[:, length:],
        **given,
    ).last_hidden_state
    logits = model.base.lm_head(hidden.flatten(0, 1)[batch.predict_at])
    return nn.functional.cross_entropy(logits, batch.targets, reduction="sum")


def traffic_recipe(base: Path, deepspeed_config: Path, *overrides: str) -> Recipe:
    """The recipe of the embedded pair, with another base."""
    return load_recipe(
        RECIPE,
        [
            f"base.model={base}",
            f"backbone.deepspeed={deepspeed_config}",
            f"training.global_batch_size={4 * world_size()}",
            "training.micro_batch_size=4",
            "task.train_problems=128",
            "task.validation_problems=8",
            "task.test_problems=8",
            "thoughts.source=cache",
            *overrides,
        ],
    )


def train(
    engine: Any, model: SoftThoughts, experiment: Experiment, recipe: Recipe, reset: Callable[[], None]
) -> list[float]:
    """Some steps, each after a call of ``reset``: what is counted is the last one. Returns this rank's losses."""
    examples, losses = experiment.splits.train, []
    ranks = data_ranks(recipe.backbone.partition, None)
    size = 4 * ranks.alike
    for step in range(6):
        first = size * (step * ranks.count + ranks.number)
        batch = collate(examples[first : first + size], experiment.base_pad_id, model.num_shared, model.number)
        # What the assistant says makes no difference: any states will do.
        random = [torch.Generator().manual_seed(start) for start in range(first, first + size, 4)]
        states = (4, recipe.thoughts.count, experiment.assistant_config.hidden_size)
        batch.thoughts = torch.cat([torch.randn(states, generator=generator) for generator in random])
        reset()
        loss = engine(batch) / ranks.alike
        engine.backward(loss)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def measure(variant: str, folder: Path, traffic: Traffic) -> dict[str, int]:
    """Bytes gathered and reduced in one step of a variant."""
    recipe = traffic_recipe(
        folder,
        folder / ("kept.json" if variant.endswith("_kept") else "zero3.json"),
        f"training.step={'full' if variant in ('full', 'two_passes') else 'fast'}",
        f"training.activation_checkpointing={str(variant == 'fast_checkpointed').lower()}",
    )
    experiment = Experiment(recipe)
    model = softcot_ds.training.engine.build_model(recipe, experiment, None)
    make_layers_leaves = softcot_ds.training.engine.make_layers_leaves
    if variant.startswith("hooks_per_module"):
        softcot_ds.training.engine.make_layers_leaves = lambda model: None
    elif variant == "two_passes":
        model.forward = partial(two_passes, model)
    engine = softcot_ds.training.engine.build_engine(model, recipe)
    softcot_ds.training.engine.make_layers_leaves = make_layers_leaves

    train(engine, model, experiment, recipe, traffic.reset)
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


def measure_partition(partition: str, folder: Path, traffic: Traffic) -> dict[str, Any]:
    """Bytes that one step moves, frozen weights apart from trained ones, and what the steps come to."""
    config = ROOT / "ds_configs/replicated.json" if partition == "tensor" else folder / "zero3.json"
    recipe = traffic_recipe(folder, config, "training.step=fast", f"backbone.partition={partition}")
    experiment = Experiment(recipe)
    traffic.reset()
    model = softcot_ds.training.engine.build_model(recipe, experiment, None)
    loaded = traffic.between_nodes
    engine = softcot_ds.training.engine.build_engine(model, recipe)
    traffic.tell_apart(model)
    losses = from_all_ranks(train(engine, model, experiment, recipe, traffic.reset))
    if partition == "tensor":  # the projection is whole, and its parts are gathered once the optimizer has moved them
        traffic.trained = sum(flat.nbytes for flat in engine.optimizer.bit16_groups_flat)
    moved = {
        "frozen_bytes_between_nodes": traffic.between_nodes - traffic.trained,
        "frozen_bytes_within_nodes": traffic.gathered - traffic.between_nodes,
        "trained_bytes_between_nodes": traffic.trained + traffic.reduced,
        "loaded_bytes_between_nodes": loaded,
        "activations_bytes_within_nodes": traffic.activations,
    }
    weights = [safe_get_full_fp32_param(parameter) for parameter in model.projection.parameters()]
    trained = hashlib.sha256(b"".join(weight.numpy().tobytes() for weight in weights)).hexdigest()
    return {**moved, "losses": losses, "trained": trained}


def worker(
    rank: int, ranks: int, port: int, folder: Path, variants: list[str], sizes: list[str], partitions: list[str]
) -> None:
    """One rank: measure each variant, size and partition; rank 0 writes the results."""
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank % RANKS_OF_A_NODE),
        WORLD_SIZE=str(ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )
    torch.set_num_threads(1)
    init_distributed(timeout_minutes=5)
    if is_main():
        prepare(folder, sizes)
    barrier()
    ahead = {name: {size: gathered_ahead(folder / size / f"{name}.json") for size in sizes} for name in LIMITS}
    traffic = Traffic()
    results = {variant: measure(variant, folder, traffic) for variant in variants}
    found = {partition: measure_partition(partition, folder, traffic) for partition in partitions}
    for row in found.values():
        row["equals_zero3"] = all(row[key] == found["zero3"][key] for key in ("losses", "trained"))
    if is_main():
        (folder / "results.json").write_text(json.dumps({"variants": results, "partitions": found, **ahead}))
    shut_down()


def prepare(folder: Path, sizes: Sequence[str]) -> None:
    """Write the bases and the DeepSpeed configurations."""
    zero3 = json.loads((ROOT / "ds_configs" / "zero3.json").read_text())
    model = write_base(folder, **BASE, vocab_size=768)
    layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    for name, kept in (("zero3.json", 0), ("kept.json", layer)):
        limits = dict.fromkeys(FORMER, kept) | {"stage3_prefetch_bucket_size": FORMER["stage3_prefetch_bucket_size"]}
        write_json(folder / name, zero3 | {"zero_optimization": zero3["zero_optimization"] | limits})
    for size in sizes:
        widths = {key: value // REDUCED if key.endswith("_size") else value for key, value in SIZES[size].items()}
        write_base(folder / size, **widths, num_key_value_heads=1, vocab_size=128_256 // REDUCED)
        for name, limits in LIMITS.items():
            zero = zero3["zero_optimization"] | {key: value // REDUCED**2 for key, value in limits.items()}
            zero["stage3_param_persistence_threshold"] //= REDUCED  # it is of norms and biases
            write_json(folder / size / f"{name}.json", zero3 | {"zero_optimization": zero})


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_base(folder: Path, **sizes: int) -> LlamaForCausalLM:
    """A random Llama with an untied head and the tokenizer of the embedded pair."""
    AutoTokenizer.from_pretrained(resolve_location("package:pair/base")).save_pretrained(folder)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, max_position_embeddings=512, tie_word_embeddings=False))
    model.save_pretrained(folder)
    return model


def measure_on(ranks: int, *measured: Sequence[str]) -> dict[str, Any]:
    """What so many ranks find; ``measured`` are variants, sizes and partitions."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        listener.close()
        folder = Path(name)
        # Imports take longer than the work: ranks are forked from a process that has computed nothing yet.
        start_processes(worker, (ranks, port, folder, *map(list, measured)), nprocs=ranks, start_method="fork")
        return json.loads((folder / "results.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--sizes", nargs="*", choices=SIZES, default=list(SIZES), help="on the first number of ranks")
    parser.add_argument(
        "--partitions", nargs="*", choices=PARTITIONS, default=PARTITIONS, help="zero3 first; on 4 ranks"
    )
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    result: dict[str, Any] = {}
    for ranks in args.ranks:
        found = measure_on(ranks, args.variants, args.sizes if ranks == args.ranks[0] else [], [])
        result[f"{ranks}_ranks"] = found["variants"]
        result |= {name: found[name] for name in LIMITS if found[name]}
    if args.partitions:
        result["partitions"] = measure_on(2 * RANKS_OF_A_NODE, [], [], args.partitions)["partitions"]
    for ranks in args.ranks:
        for variant, row in result[f"{ranks}_ranks"].items():
            row["gathered_over_arithmetic"] = row["gathered"] / row["arithmetic"]
            print(
                f"{ranks} ranks  {variant:22} gathered {row['gathered']:>12,} in {row['gathers']:>3} "
                f"({row['gathered_over_arithmetic']:.3f} of the arithmetic), reduced {row['reduced']:>9,}"
            )
    for name in LIMITS:
        for size, row in result.get(name, {}).items():
            print(
                f"{name:22} {size:4} forward {row['forward']:.1%}, backward {row['backward']:.1%}; at most "
                f"{row['most_layers']:.2f} layers are gathered, {row['expected_layers']:.2f} were expected"
            )
    for partition, row in result.get("partitions", {}).items():
        print(
            f"{partition:22} frozen weights: {row['frozen_bytes_between_nodes']:,} bytes between nodes, "
            f"{row['frozen_bytes_within_nodes']:,} within; equals zero3: {row['equals_zero3']}"
        )
    write_result({"benchmark": "zero3_traffic", **describe(), **result}, args.out)


if __name__ == "__main__":
    main()
