"""What Triton 3.9's interpreter lacks of a compiler, as far as liger-kernel's norm and SwiGLU want it."""

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def complete() -> None:
    """In this process, for good. It must have been started with TRITON_INTERPRET=1."""
    from liger_kernel.ops import rms_norm

    convert = interpreter._implicit_cvt

    def with_floats(argument: Any) -> Any:
        if not isinstance(argument, float):
            return convert(argument)
        # Compiled kernels get a number as a scalar that has a type, interpreted ones as it is.
        return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)

    interpreter._implicit_cvt = with_floats
    rms_norm.rsqrt = lambda x: tl.rsqrt(x)  # libdevice's is a name without a body
