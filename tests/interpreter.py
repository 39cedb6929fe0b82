"""Triton's interpreter, for kernels where there is no GPU: where they run, and what that of Triton 3.9 lacks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter

INTERPRETED = triton.knobs.runtime.interpret
"""Whether this is the process that test_interpreter.py starts."""
DEVICE = torch.device("cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu")
"""Where kernels run in this process, or where there is nothing that runs them."""


def runs_triton(test: Callable) -> Callable:
    """Marks a test that wants a GPU or the interpreter."""
    nothing = DEVICE.type == "cpu" and not INTERPRETED
    return pytest.mark.gpu(pytest.mark.skipif(nothing, reason="no GPU; see test_interpreter.py")(test))


def complete() -> None:
    """Give the interpreter what liger-kernel's norm and SwiGLU want of it: in this process, for good. It must have been
    started with TRITON_INTERPRET=1."""
    from liger_kernel.ops import rms_norm

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        # Compiled kernels get a number as a scalar that has a type, interpreted ones as it is.
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # libdevice's is a name without a body
