"""Run by test_training_steps.py on two ranks: several trainings in one process, some of them disturbed.

Arguments: a recipe; then for each training its name, which is that of its fault too, and overrides.
"""

import json
import os
import signal
import sys
import time
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator, iter_params
from deepspeed.utils import z3_leaf_module

from softcot_ds import command, distributed
from softcot_ds import train as train_command
from softcot_ds.distributed import is_main, rank
from softcot_ds.methods.soft_thoughts import SoftThoughts
from softcot_ds.training import loop, validation
from softcot_ds.training.validation import Validator

ACCUMULATION = 2
forward, samples, save = SoftThoughts.forward, Validator._samples, loop.save_checkpoint
look = Validator._thought_statistics
StopRequest, Record, shut_down = loop.StopRequest, loop.Record, distributed.shut_down
fetch, decode = PartitionedParameterCoordinator.fetch_sub_module, validation.decode
fault, passes, began_to_wait = "", 0, 0.0
ahead: list[list[Any]] = []
"""Weights that were there or on their way when they were asked for, and those that were not: of each pass, of a look at
the thoughts, and of all that decode the samples of one validation."""


def counted_fetch(coordinator: PartitionedParameterCoordinator, module: torch.nn.Module, forward: bool) -> None:
    for weight in iter_params(module, recurse=z3_leaf_module(module)):
        if not weight.ds_persist:
            ahead[-1][1 + (weight.ds_status == ZeroParamStatus.NOT_AVAILABLE)] += 1
    fetch(coordinator, module, forward)


def counted_look(validator: Validator) -> dict[str, float]:
    ahead.append(["look", 0, 0])
    return look(validator)


def counted_decode(*arguments: Any) -> Any:
    ahead.append(["decode", 0, 0])
    return decode(*arguments)


def disturbed_forward(model: SoftThoughts, batch: object, **how: bool) -> torch.Tensor:
    global passes, began_to_wait
    ahead.append(["train" if model.training else "validate", 0, 0])
    loss = forward(model, batch, **how)
    if not model.training:
        return loss
    step, last_micro_batch = passes // ACCUMULATION + 1, passes % ACCUMULATION == ACCUMULATION - 1
    passes += 1
    if fault.startswith("nan") and step in (2, 4, 5, 6) and rank() == 1 and last_micro_batch:
        loss.register_hook(lambda gradient: gradient * float("nan"))
    elif fault.startswith("inf") and step == 3 and rank() == 0 and not last_micro_batch:
        loss = loss + (float("inf") - loss.detach())  # its gradient is finite
    elif fault.startswith("stop") and step == 2 and rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    elif fault == "hang" and step == 4:
        began_to_wait = time.monotonic()
        time.sleep(15 * rank())
    return loss


def disturbed_samples(validator: Validator, *nearest) -> str:
    if fault == "crash":
        raise RuntimeError("no samples today")
    return samples(validator, *nearest)


def late_request() -> StopRequest:
    if fault == "stop" and rank() == 1:
        time.sleep(0.5)
        print(f"rank 1 listens from {time.monotonic()}", flush=True)
    return StopRequest()


def visible_record(*arguments: Any) -> Record:
    """What a run writes first, and what others look for to know that it has begun."""
    if fault == "stop" and is_main():
        print(f"the run begins at {time.monotonic()}", flush=True)
    return Record(*arguments)


def slow_save(engine: Any, recipe: Any, adapter: Any, *rest: Any) -> Any:
    if fault == "hang" and adapter.step == 2 and is_main():
        time.sleep(7)  # longer than a step may take
    return save(engine, recipe, adapter, *rest)


def report(message: str) -> None:
    if is_main():
        print(f"{fault} ended after step {passes // ACCUMULATION}: {message}", flush=True)


PartitionedParameterCoordinator.fetch_sub_module, validation.decode = counted_fetch, counted_decode
SoftThoughts.forward, Validator._samples = disturbed_forward, disturbed_samples
Validator._thought_statistics = counted_look
loop.StopRequest, loop.Record, loop.save_checkpoint = late_request, visible_record, slow_save
# The ranks stay together from one training to the next, and only one of them speaks.
distributed.shut_down, command._report = lambda *_: None, report
recipe, *trainings = sys.argv[1:]
for name, overrides in zip(trainings[::2], trainings[1::2], strict=True):
    fault, passes, ahead = name, 0, [["start", 0, 0]]
    try:
        code = train_command.main([recipe, f"name={name}", *overrides.split()])
    except RuntimeError as error:
        report(str(error))
        code = 1
    print(f"{name}: rank {rank()} exits with {code}; ahead: {json.dumps(ahead)}", flush=True)
    if name == "hang":
        print(f"rank {rank()} waited {time.monotonic() - began_to_wait:.1f} s", flush=True)
        shut_down(0, midway=True)
shut_down()
