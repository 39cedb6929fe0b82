"""How fast the thought cache is built and read: prints one JSON line.

    python benchmarks/thought_cache.py
    python benchmarks/thought_cache.py --gsm8k DIR    # the size of a real cache, and what its builder holds

Building is compared with the way of the reference implementation: the whole causal language model with all its hidden
states, in arrival order, padded batches of 32, no disk. Ours is timed with everything: verification, writing, manifest.
The assistant is a random Llama whose parts weigh as in a 1B model (head 21% of the parameters), with a GPU one of Llama
3.2 1B's very shape in bfloat16; lengths are those of GSM8K with the Qwen2.5 tokenizer (instruction 69 tokens, question
log-normal with mean 64, T = 32).

Reading is compared with shuffled batches out of one memory-mapped file that holds the same bytes and nothing else, and
with one file per sample, all through a DataLoader. All lies in the page cache, so it is software that is compared.

- ``build_speedup``: reference seconds / ours, one process of one thread each; ``..._cpu_time`` the same in seconds of
  processor time, which other work on the machine hardly disturbs
- ``build_tokens_per_second``: tokens that the assistant reads, instruction included, padding not
- ``scaling``: seconds of one process / of two, under mpirun (without a GPU)
- ``read_fraction_of_mmap``: ours / plain map, GB/s, once every row has been checked; ``..._first_epoch`` while checking
- ``read_speedup_over_files``: ours / one file per sample, GB/s

``--gsm8k`` runs ``softcot-ds cache`` on GSM8K's training problems with the Qwen2.5 tokenizer, T = 32, for an assistant
of Qwen2.5 1.5B's width, 1536, but one thin layer: what it computes is worthless, but its bytes, files and the builder's
memory are real. DIR holds ``gsm8k/train.jsonl``, ``gsm8k/test.jsonl`` and ``qwen2.5_tokenizer/``.

- ``bytes``, ``files``: of all shards
- ``peak_resident_gib``: the most that the building process held, interpreter, libraries and the 0.5 GB of the
  assistant included; ``..._tenth`` for a tenth of the problems: the difference is what grows with the data
"""

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from environment import describe, write_result
from random_llamas import LLAMA_1B, default_device, make_llama
from torch.utils.data import DataLoader, Dataset
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from softcot_ds.data.prompts import AssistantInput
from softcot_ds.models.assistant import compute_thoughts, read_shared
from softcot_ds.thoughts import manifest as tm
from softcot_ds.thoughts.builder import fill
from softcot_ds.thoughts.manifest import StoreIdentity
from softcot_ds.thoughts.ranks import join_ranks
from softcot_ds.thoughts.reader import input_key
from softcot_ds.thoughts.store import StoreWriter, ThoughtStore

SMALL = {
    "vocab_size": 8192,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": True,
}
DEVICE = default_device()
ON_GPU = DEVICE.type == "cuda"
ASSISTANT = LLAMA_1B if ON_GPU else SMALL
T, P, VOCABULARY, INSTRUCTION = 32, ASSISTANT["hidden_size"], ASSISTANT["vocab_size"], 69
BATCH = 32
TOKENS_PER_BATCH = 16384 if ON_GPU else 2048  # what the caches of a processor like; a GPU wants more, as a recipe says
DTYPE, TOLERANCE = ("bfloat16", 5e-2) if ON_GPU else ("float32", 1e-4)
IDENTITY = StoreIdentity("benchmark", T, P, DTYPE, DTYPE, "sdpa", assistant="random-llama")
READ_IDENTITY = StoreIdentity("benchmark", T, 1536, "bfloat16", "bfloat16", "sdpa", assistant="random-rows")


def make_assistant() -> LlamaForCausalLM:
    return make_llama(ASSISTANT, DEVICE)


def make_inputs(count: int) -> list[AssistantInput]:
    rng = random.Random(0)
    instruction = [rng.randrange(VOCABULARY) for _ in range(INSTRUCTION)]
    inputs = []
    for number in range(count):
        length = min(215, max(20, round(rng.lognormvariate(4.1, 0.32))))
        ids = [*instruction, *(rng.randrange(VOCABULARY) for _ in range(length)), *[0] * T]
        inputs.append(AssistantInput(f"e{number}", ids, list(range(len(ids) - T, len(ids)))))
    return inputs


@torch.no_grad()
def build_reference(assistant: LlamaForCausalLM, inputs: list[AssistantInput]) -> torch.Tensor:
    rows = []
    for start in range(0, len(inputs), BATCH):
        batch = inputs[start : start + BATCH]
        longest = max(len(item.token_ids) for item in batch)
        ids = torch.zeros(len(batch), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, item in enumerate(batch):
            ids[row, longest - len(item.token_ids) :] = torch.tensor(item.token_ids)
            mask[row, longest - len(item.token_ids) :] = 1
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs_of_batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        output = assistant(**{name: x.to(DEVICE) for name, x in inputs_of_batch.items()}, output_hidden_states=True)
        rows.append(output.hidden_states[-1][:, -T:].clone())
    return torch.cat(rows).cpu()


def build_ours(folder: Path, count: int) -> float:
    """Fill a cache with all ranks; returns the seconds from the assistant's loading to the end."""
    ranks, inputs, start = join_ranks(), make_inputs(count), []

    def load():
        assistant = make_assistant()
        while ranks.count("loaded", 1) and ranks.count("loaded") < ranks.size:
            time.sleep(0.01)
        start.append(time.perf_counter())
        prefix = read_shared(assistant, inputs)
        return lambda batch: compute_thoughts(assistant, batch, prefix)

    fill(folder, IDENTITY, inputs, load, ranks, tokens_per_batch=TOKENS_PER_BATCH)
    seconds = time.perf_counter() - start[0]
    ranks.leave()
    return seconds


def build_in_processes(size: int, count: int, folder: Path) -> float:
    """Seconds of a build by ``size`` new processes under mpirun, without their start."""
    mpirun = shutil.which("mpirun", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    command = [mpirun, "-n", str(size), "--oversubscribe", "--bind-to", "none", sys.executable, __file__]
    allow_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--build-into", str(folder), "--rows", str(count)],
        env=os.environ | allow_root,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return max(float(line.split()[1]) for line in run.stdout.splitlines() if line.startswith("seconds "))


def measure_build(count: int, repeats: int, scratch: Path) -> dict[str, float]:
    assistant, inputs = make_assistant(), make_inputs(count)
    reference, reference_cpu, ours, ours_cpu, one, two = [], [], [], [], [], []
    if ON_GPU:  # what a process does once is left out: libraries are loaded, memory is asked for
        build_reference(assistant, inputs[:BATCH])
        build_ours(scratch / "first", min(count, 4 * BATCH))
    for repeat in range(repeats):  # taken in turns, so that whatever else the machine does meets all of them
        start, start_cpu = time.perf_counter(), time.process_time()
        expected = build_reference(assistant, inputs)
        reference.append(time.perf_counter() - start)
        reference_cpu.append(time.process_time() - start_cpu)
        folder, start_cpu = scratch / f"ours{repeat}", time.process_time()
        ours.append(build_ours(folder, count))
        ours_cpu.append(time.process_time() - start_cpu)
        rows = ThoughtStore.open(folder, IDENTITY).read([input_key(item) for item in inputs])
        error = (rows.float() - expected.float()).norm() / expected.float().norm()
        if not error <= TOLERANCE:
            raise RuntimeError(f"both ways differ by {error:.1e}, relative; {TOLERANCE:.0e} is rounding")
        if not ON_GPU:
            one.append(build_in_processes(1, count, scratch / f"one{repeat}"))
            two.append(build_in_processes(2, count, scratch / f"two{repeat}"))
    tokens = sum(len(item.token_ids) for item in inputs)
    result = {
        "build_speedup": statistics.median(reference) / statistics.median(ours),
        "build_rows_per_second": count / statistics.median(ours),
        "build_tokens_per_second": tokens / statistics.median(ours),
    }
    if not ON_GPU:
        result["build_speedup_cpu_time"] = statistics.median(reference_cpu) / statistics.median(ours_cpu)
        result["scaling"] = statistics.median(one) / statistics.median(two)
    return result


class FromCache(Dataset):
    def __init__(self, folder: Path, keys: list[bytes]) -> None:
        self.store, self.keys = ThoughtStore.open(folder), keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return self.store.read([self.keys[index] for index in indices])


class FromMap(Dataset):
    """The plainest reader there can be: one array, one file."""

    def __init__(self, path: Path, rows: int) -> None:
        shape = (rows, T * READ_IDENTITY.width)
        self.rows = np.memmap(path, dtype=np.int16, mode="c", shape=shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        # Three times as fast as indexing a bfloat16 tensor.
        rows = torch.from_numpy(self.rows[indices])
        return rows.view(torch.bfloat16).view(len(indices), *READ_IDENTITY.row_shape)


class FromFiles(Dataset):
    def __init__(self, folder: Path, rows: int) -> None:
        self.paths = [folder / f"{row}.pt" for row in range(rows)]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, indices: list[int]) -> torch.Tensor:
        return torch.stack([torch.load(self.paths[index], weights_only=True) for index in indices])


def epoch_gb_per_second(dataset: Dataset, workers: int, epochs: int, seed: int) -> list[float]:
    """Each epoch's rate, by one loader whose workers live through all epochs."""
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(
        dataset,
        batch_size=BATCH,
        shuffle=True,
        generator=generator,
        num_workers=workers,
        persistent_workers=workers > 0,
        collate_fn=lambda batch: batch,
    )
    rates = []
    for _ in range(epochs):
        start, size = time.perf_counter(), 0
        for batch in loader:
            size += batch.nbytes
        rates.append(size / (time.perf_counter() - start) / 1e9)
    return rates


def measure_read(count: int, repeats: int, workers: int, scratch: Path) -> dict[str, float]:
    rows = torch.randn(count, *READ_IDENTITY.row_shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    keys = [tm.row_key([row], [0]) for row in range(count)]
    (scratch / "cache").mkdir()
    (scratch / "files").mkdir()
    records: list[tm.ShardRecord] = []
    with StoreWriter(scratch / "cache", READ_IDENTITY, on_commit=records.append) as writer:
        writer.append(keys, rows)
    tm.save_manifest(scratch / "cache", tm.Manifest(READ_IDENTITY, tuple(records)))
    rows.view(torch.int16).numpy().tofile(scratch / "plain")
    for number, row in enumerate(rows):
        torch.save(row.clone(), scratch / "files" / f"{number}.pt")
    readers = {
        "cache": lambda: FromCache(scratch / "cache", keys),
        "map": lambda: FromMap(scratch / "plain", count),
        "files": lambda: FromFiles(scratch / "files", count),
    }
    for make in readers.values():
        assert torch.equal(make().__getitems__([5, 2, 7]), rows[[5, 2, 7]])
    epochs: dict[str, list[list[float]]] = {name: [] for name in readers}
    for repeat in range(repeats):
        for name, make in readers.items():
            epochs[name].append(epoch_gb_per_second(make(), workers, 3, repeat))
    first = {name: statistics.median(rates[0] for rates in runs) for name, runs in epochs.items()}
    later = {name: statistics.median(rate for rates in runs for rate in rates[1:]) for name, runs in epochs.items()}
    suffix = f"_{workers}_workers" if workers else ""
    return {
        f"read_fraction_of_mmap{suffix}": later["cache"] / later["map"],
        f"read_fraction_of_mmap{suffix}_first_epoch": first["cache"] / first["map"],
        f"read_speedup_over_files{suffix}": later["cache"] / later["files"],
        f"read_gb_per_second{suffix}": later["cache"],
    }


def measure_gsm8k(data: Path, scratch: Path) -> dict[str, float]:
    tokenizer = AutoTokenizer.from_pretrained(data / "qwen2.5_tokenizer")
    config = LlamaConfig(
        vocab_size=151_936,
        hidden_size=1536,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(scratch / "assistant")
    tokenizer.save_pretrained(scratch / "assistant")
    model = {"model": str(scratch / "assistant"), "dtype": "bfloat16"}
    task = {"name": "gsm8k", "train": str(data / "gsm8k/train.jsonl"), "test": str(data / "gsm8k/test.jsonl")}
    recipe = {
        "name": "gsm8k",
        "task": task | {"validation_problems": 0, "test_problems": 1},
        "assistant": model,
        "base": model,
        "thoughts": {"count": T, "placeholder": "<|fim_pad|>"},
        "cache": {"path": str(scratch / "whole"), "tokens_per_batch": TOKENS_PER_BATCH},
    }
    (scratch / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    tenth = [f"cache.path={scratch / 'tenth'}", "task.train_problems=747"]
    _, peak_tenth = build_by_command(scratch, tenth)
    seconds, peak = build_by_command(scratch, [])
    (manifest,) = (tm.load_manifest(path) for path in (scratch / "whole").iterdir())
    return {
        "rows": manifest.rows,
        "bytes": manifest.bytes,
        "files": len(manifest.shards),
        "seconds": seconds,
        "peak_resident_gib": peak,
        "peak_resident_gib_tenth": peak_tenth,
    }


def build_by_command(scratch: Path, overrides: list[str]) -> tuple[float, float]:
    """Seconds from start to end and peak resident memory, GiB, of one process that builds a cache."""
    command = [sys.executable, "-m", "softcot_ds.cache", str(scratch / "recipe.yaml"), *overrides]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=sys.stderr, env=os.environ | {"OMP_NUM_THREADS": "1"})
    peak_kib = 0
    while process.poll() is None:
        # Not the child's ru_maxrss, which begins with what this process held when it forked.
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                peak_kib = int(line.split()[1])
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, peak_kib / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=256, help="examples to compute in a build")
    parser.add_argument("--read-rows", type=int, default=5000, help="rows of 96 KiB to read; 0 reads none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--gsm8k", type=Path, metavar="DIR", help="measure the cache of GSM8K instead, see above")
    parser.add_argument("--out", type=Path, help="write the result here, JSON")
    parser.add_argument("--build-into", type=Path, help=argparse.SUPPRESS)  # this script as a rank of mpirun
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.build_into:
        print(f"seconds {build_ours(args.build_into, args.rows)}", flush=True)
        return
    result: dict[str, object] = {"benchmark": "thought_cache"}
    sys.stdout, stdout = sys.stderr, sys.stdout  # progress is not the result
    if args.gsm8k:
        result["benchmark"] = "thought_cache_gsm8k"
        with tempfile.TemporaryDirectory() as scratch:
            result |= measure_gsm8k(args.gsm8k.absolute(), Path(scratch))
    else:
        result |= {"rows": args.rows, "read_rows": args.read_rows, "repeats": args.repeats}
        with tempfile.TemporaryDirectory() as scratch:
            result |= measure_build(args.rows, args.repeats, Path(scratch))
        for workers in (0, 2) if args.read_rows else ():
            with tempfile.TemporaryDirectory() as scratch:
                result |= measure_read(args.read_rows, args.repeats, workers, Path(scratch))
    result = {key: round(value, 3) if isinstance(value, float) else value for key, value in result.items()}
    result |= describe()
    sys.stdout = stdout
    write_result(result, args.out)


if __name__ == "__main__":
    main()
