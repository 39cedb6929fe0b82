"""What the machine does at most, so that times of the other benchmarks can be read. The last line is a JSON object.

    python benchmarks/machine.py [--out FILE]

- ``matmul_tflops``: a product in bfloat16 of so many rows with a matrix of Llama 3.1 8B's feed-forward part, 4096 by
  14336, whose weights do not fit in the cache together
- ``copy_gbps``: a copy of 1 GiB within the GPU's memory, bytes read plus bytes written
- ``to_gpu_gbps``: a copy of 256 MiB from page-locked memory
- ``launch_us``: what issuing a smallest operation costs the host

Without a GPU it measures nothing.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from environment import describe, write_result

ROWS = (64, 256, 1024, 4096, 16384)


def gpu_seconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median seconds of a call on the GPU, after three that are not counted."""
    times = []
    for repeat in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        if repeat >= 3:
            times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def matmul_tflops(rows: int) -> float:
    width, inner = 4096, 14336
    states = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
    weights = cycle([torch.randn(inner, width, device="cuda", dtype=torch.bfloat16) for _ in range(4)])
    return 2 * rows * width * inner / gpu_seconds(lambda: torch.nn.functional.linear(states, next(weights))) / 1e12


def copy_gbps() -> float:
    source = torch.randn(2**29, device="cuda", dtype=torch.bfloat16)
    target = torch.empty_like(source)
    return 2 * source.nbytes / gpu_seconds(lambda: target.copy_(source)) / 1e9


def to_gpu_gbps() -> float:
    source = torch.zeros(2**28, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    return source.nbytes / gpu_seconds(lambda: target.copy_(source, non_blocking=True)) / 1e9


def launch_us() -> float:
    state = torch.zeros(1, device="cuda")
    for _ in range(100):
        state.add_(1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(2000):
        state.add_(1)
    issued = time.perf_counter() - start
    torch.cuda.synchronize()
    return issued / 2000 * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the result, indented, to this file")
    args = parser.parse_args()
    result = {"benchmark": "machine", **describe()}
    if torch.cuda.is_available():
        result |= {
            "matmul_tflops": {str(rows): matmul_tflops(rows) for rows in ROWS},
            "copy_gbps": copy_gbps(),
            "to_gpu_gbps": to_gpu_gbps(),
            "launch_us": launch_us(),
        }
    write_result(result, args.out)


if __name__ == "__main__":
    main()
