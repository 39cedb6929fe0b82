"""Run by test_train.py on two ranks: several trainings in one process, some of them disturbed.

Arguments: a recipe; then for each training its name, which is that of its fault too, and overrides.
"""

import os
import signal
import sys
import time

import torch

from softcot_ds.distributed import is_main, rank, shut_down
from softcot_ds.errors import SoftCoTError
from softcot_ds.recipe import load_recipe
from softcot_ds.step import SoftCoT
from softcot_ds.train import train
from softcot_ds.validation import Validator

ACCUMULATION = 2
forward, samples = SoftCoT.forward, Validator._samples
fault, passes, began_to_wait = "", 0, 0.0


def disturbed_forward(model: SoftCoT, batch: object) -> torch.Tensor:
    global passes, began_to_wait
    loss = forward(model, batch)
    if not model.training:
        return loss
    step, last_micro_batch = passes // ACCUMULATION + 1, passes % ACCUMULATION == ACCUMULATION - 1
    passes += 1
    if fault.startswith("nan") and step in (2, 4, 5, 6) and rank() == 1 and last_micro_batch:
        loss.register_hook(lambda gradient: gradient * float("nan"))
    elif fault.startswith("inf") and step == 3 and rank() == 0 and not last_micro_batch:
        loss = loss + (float("inf") - loss.detach())  # its gradient is finite
    elif fault == "stop" and step == 2 and rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    elif fault == "hang" and step == 3:
        began_to_wait = time.monotonic()
        time.sleep(15 * rank())
    return loss


def disturbed_samples(validator: Validator) -> str:
    if fault == "crash":
        raise RuntimeError("no samples today")
    return samples(validator)


SoftCoT.forward, Validator._samples = disturbed_forward, disturbed_samples
recipe, *trainings = (argument for argument in sys.argv[1:] if not argument.startswith("--local_rank"))
for name, overrides in zip(trainings[::2], trainings[1::2], strict=True):
    fault, passes = name, 0
    try:
        train(load_recipe(recipe, [f"name={name}", *overrides.split()]))
    except (SoftCoTError, RuntimeError) as error:
        if is_main():
            print(f"{name} ended after step {passes // ACCUMULATION}: {error}", flush=True)
        if name == "hang":
            print(f"rank {rank()} waited {time.monotonic() - began_to_wait:.1f} s", flush=True)
            shut_down(0, midway=True)
shut_down()
