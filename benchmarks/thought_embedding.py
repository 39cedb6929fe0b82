"""The fused thought embedding against eager PyTorch and torch.compile, and against a device copy.

    python benchmarks/thought_embedding.py [--pairs PAIR ...] [--seconds N] [--out FILE]

Prints a table, then one JSON object as the last line, which --out keeps in a file as it grows. GPU times are replays of
a captured graph over inputs that do not fit in the cache together, so launch overhead and warm caches stay out of them.
Without a GPU it checks the results at a tiny size, times them, and claims nothing.

Shapes: B batch, S base-model tokens, T thoughts, P assistant width, D base width, V vocabulary.
"""

import argparse
import importlib
import statistics
import time
from pathlib import Path

import torch
from environment import Budget, describe, keep, write_result
from softcot_kernels import reference, thought_embedding

kernels = importlib.import_module("softcot_kernels.thought_embedding")  # the package exports a function of that name

PAIRS = {  # assistant and base widths, base vocabulary
    "1B-to-8B": {"P": 2048, "D": 4096, "V": 128256},
    "1.5B-to-7B": {"P": 1536, "D": 3584, "V": 152064},
    "1B-to-70B": {"P": 2048, "D": 8192, "V": 128256},
}
BATCH = {"B": 8, "S": 512, "T": 32}
TINY = {"tiny": {"P": 64, "D": 128, "V": 500, "B": 2, "S": 16, "T": 4}}
COPY_MIB = 1024
ROTATIONS = 8  # input sets per graph: 8 weights of 1B-to-8B are 128 MiB, more than any L2 cache holds
REPLAYS = 40


def fused(hidden, weight, bias, token_ids, table, slot):
    return thought_embedding(hidden, weight, bias, token_ids, table, slot, check_ids=False)


PROVIDERS = {
    "fused": fused,
    "eager": reference.thought_embedding,
    "compiled": torch.compile(reference.thought_embedding, dynamic=False),
}


def make_inputs(B, S, T, P, D, V, slots, table, seed):
    device, dtype = table.device, table.dtype
    generator = torch.Generator(device).manual_seed(seed)
    options = {"device": device, "generator": generator}
    weight = (torch.randn(D, P, **options) / P**0.5).to(dtype)
    return {
        "hidden": torch.randn(B, T, P, **options).to(dtype),
        "weight": weight.requires_grad_(),
        "bias": torch.randn(D, **options).to(dtype).requires_grad_(),
        "token_ids": torch.randint(V, (B, S), **options),
        "table": table,
        "slot": torch.randint(S + 1, (B,), **options) if slots else None,
    }


def moved_bytes(B, S, T, P, D, V, itemsize, backward):
    """The least that must cross device memory (kernels/README.md)."""
    forward = itemsize * (B * S * D + B * (S + T) * D + D * P + D + B * T * P) + 8 * B * S
    return forward + itemsize * (B * T * D + B * T * P + D * P + D) * backward


def make_calls(provider, sets, backward):
    """One call per input set."""
    if not backward:
        return [
            lambda inputs=inputs: provider(**{k: x if x is None else x.detach() for k, x in inputs.items()})
            for inputs in sets
        ]
    grad = torch.randn_like(provider(**sets[0]))

    def both(inputs):
        return torch.autograd.grad(provider(**inputs), [inputs["weight"], inputs["bias"]], grad)

    return [lambda inputs=inputs: both(inputs) for inputs in sets]


def time_on_gpu(calls):
    """Milliseconds per call: median, 20th and 80th percentile over replays of a graph that holds every call once."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            for call in calls:
                call()  # compiles, tunes and warms up
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times = []
    for replay in range(REPLAYS + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if replay >= 5:
            times.append(start.elapsed_time(end) / len(calls))
    return percentiles(times)


def time_on_cpu(calls):
    times = []
    for repeat in range(10):
        for call in calls:
            start = time.perf_counter()
            call()
            if repeat:
                times.append((time.perf_counter() - start) * 1e3)
    return percentiles(times)


def percentiles(times):
    cuts = statistics.quantiles(times, n=10, method="inclusive")
    return {"ms_p50": cuts[4], "ms_p20": cuts[1], "ms_p80": cuts[7]}


def copy_gbps(mib):
    """Bytes read plus bytes written per second by a device copy of `mib` MiB, over rotating buffers.

    The faster of two: in a captured graph `copy_` is no kernel, and may be slower than one that moves as many bytes.
    """
    sources = [torch.empty(mib * 2**19, dtype=torch.bfloat16, device="cuda").normal_() for _ in range(4)]
    pairs = [(source, torch.empty_like(source)) for source in sources]
    copy = [lambda a=a, b=b: b.copy_(a) for a, b in pairs]
    kernel = [lambda a=a, b=b: torch.neg(a, out=b) for a, b in pairs]
    ms = min(time_on_gpu(calls)["ms_p50"] for calls in (copy, kernel))
    return 2 * mib * 2**20 / ms / 1e6


def call_ms(call):
    """Milliseconds per call as Python issues it, launch overhead included."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(100):
        call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 10


def largest_difference(inputs):
    """Of the fused result from eager's, relative to the largest element."""
    got, expected = fused(**inputs).float(), reference.thought_embedding(**inputs).float()
    return ((got - expected).abs().max() / expected.abs().max()).item()


def measure(pair, sizes, slots, device, dtype):
    torch.compiler.reset()  # else the limit on recompilations would turn "compiled" into eager
    table = torch.randn(sizes["V"], sizes["D"], device=device, dtype=dtype)
    on_gpu = device == "cuda"
    sets = [make_inputs(**sizes, slots=slots, table=table, seed=seed) for seed in range(ROTATIONS if on_gpu else 1)]
    difference = largest_difference(sets[0])
    for backward in (False, True):
        moved = moved_bytes(**sizes, itemsize=dtype.itemsize, backward=backward)
        for name, provider in PROVIDERS.items():
            row = {
                "op": "thought_embedding",
                "provider": name,
                "pair": pair,
                "layout": "slots" if slots else "thoughts-first",
                "pass": "forward+backward" if backward else "forward",
                "shape": sizes,
                "dtype": str(dtype).removeprefix("torch."),
                "difference_from_eager": difference if name == "fused" else None,
            }
            calls = make_calls(provider, sets, backward)
            if on_gpu:
                row |= time_on_gpu(calls)
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                calls[0]()
                row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
                row["call_ms"] = call_ms(calls[0])
                row["gbps"] = moved / row["ms_p50"] / 1e6
                if name == "fused":
                    row["configuration"] = str(kernels._FORWARD[dtype.itemsize].best_config)
            else:
                row |= time_on_cpu(calls)
            yield row
            print(f"{pair:12} {row['layout']:15} {row['pass']:17} {name:9} {row['ms_p50']:9.4f} ms", flush=True)


def judge(rows, copies):
    """The numbers that decide, at 1B-to-8B, forward: by GPU time, and as Python calls it, launches included."""
    verdict = {"wanted": {"share_of_copy_bandwidth": 0.85, "times_eager": 2.5, "times_compiled": 1.3}}
    for layout in ("thoughts-first", "slots"):
        chosen = ("1B-to-8B", layout, "forward")
        by_provider = {row["provider"]: row for row in rows if (row["pair"], row["layout"], row["pass"]) == chosen}
        if by_provider.keys() < PROVIDERS.keys():
            continue  # not measured, or not yet
        gpu_ms = {name: row["ms_p50"] for name, row in by_provider.items()}
        python_ms = {name: row["call_ms"] for name, row in by_provider.items()}
        verdict[layout] = {
            "share_of_copy_bandwidth": by_provider["fused"]["gbps"] / copies["large"],
            "share_of_copy_bandwidth_at_this_size": by_provider["fused"]["gbps"] / copies["same_size"],
            "times_eager": gpu_ms["eager"] / gpu_ms["fused"],
            "times_compiled": gpu_ms["compiled"] / gpu_ms["fused"],
            "times_eager_with_launches": python_ms["eager"] / python_ms["fused"],
            "times_compiled_with_launches": python_ms["compiled"] / python_ms["fused"],
        }
    return verdict


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=list(PAIRS))
    parser.add_argument("--seconds", type=float, help="begin nothing more after so many")
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    arguments = parser.parse_args()
    budget = Budget(arguments.seconds)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    result = {"benchmark": "thought_embedding", **describe(), "copy_gbps": None, "verdict": None, "rows": []}
    if device == "cuda":
        size_mib = moved_bytes(**PAIRS["1B-to-8B"], **BATCH, itemsize=2, backward=False) // 2**21
        copies = {"large": copy_gbps(COPY_MIB), "same_size": copy_gbps(size_mib)}
        result["copy_gbps"] = copies
        print(f"device copy: {copies['large']:.0f} GB/s at {COPY_MIB} MiB, {copies['same_size']:.0f} at {size_mib} MiB")
    else:
        print("No GPU is visible: a tiny shape on the CPU, where the op is eager PyTorch. These times claim nothing.")

    shapes = {pair: PAIRS[pair] | BATCH for pair in arguments.pairs} if device == "cuda" else TINY
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for pair, sizes in shapes.items():
        for slots in (True, False):  # with slots first: so the training step calls it
            if budget.is_used_up():
                continue
            for row in measure(pair, sizes, slots, device, dtype):
                result["rows"].append(row)
                if device == "cuda":
                    result["verdict"] = judge(result["rows"], copies)
                keep(result, arguments.out)
    write_result(result, arguments.out)


if __name__ == "__main__":
    main()
