"""One launch that writes the base model's input embeddings: token rows gathered, thought rows projected.

    out[b] = table[ids[b, :slot_b]] * scale ; hidden[b] @ weight.T + bias ; table[ids[b, slot_b:]] * scale

Copying rows is bound by memory and projecting thoughts by arithmetic, so one grid does both at once: README.md beside
this package counts the work, and `_forward_kernel` divides it. Backward reads the thought rows of the gradient in
place. No kernel uses atomics and every output element has one writer, so a configuration always gives the same bits.

Shapes: B batch, S base-model tokens, T thoughts, P assistant width, D base width, V vocabulary; M = B*T thought rows.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from softcot_kernels import reference

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
# Arguments that change with every batch and vectorise nothing: a kernel compiled for one length serves all.
_LENGTHS = [
    "B", "S", "T", "ids_stride_b", "ids_stride_s", "slot_stride", "multiprocessors", "TOKENS_LOG2", "THOUGHTS_LOG2"
]  # fmt: skip


@triton.jit
def _round(x, dtype: tl.constexpr):
    """Cast to nearest even, as hardware does; the interpreter of Triton 3.9 truncates to bfloat16."""
    if _INTERPRETED and dtype == tl.bfloat16 and x.dtype != tl.bfloat16:
        bits = x.to(tl.float32).to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = bits.to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if _INTERPRETED:  # a bfloat16 dot is garbage in the interpreter of Triton 3.9
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def _slots(slot_ptr, slot_stride, b, mask):
    """Where the thoughts of batch rows `b` begin, int32: rows of the output are numbered within 31 bits."""
    slot = tl.zeros_like(b)
    if slot_ptr is not None:
        slot += tl.load(slot_ptr + b.to(tl.int64) * slot_stride, mask=mask, other=0).to(tl.int32)
    return slot


@triton.jit(do_not_specialize=_LENGTHS)
def _forward_kernel(
    hidden_ptr,  # (B, T, P)
    weight_ptr,  # (D, P)
    bias_ptr,  # (D,) or None
    ids_ptr,  # (B, S) int
    table_ptr,  # (V, D)
    slot_ptr,  # (B,) int or None
    out_ptr,  # (B, S+T, D) contiguous
    B, S, T, P, D,
    hidden_stride_b, hidden_stride_t, hidden_stride_p,
    weight_stride_d, weight_stride_p,
    bias_stride,
    ids_stride_b, ids_stride_s,
    table_stride_v, table_stride_d,
    slot_stride,
    scale,  # already rounded to table's dtype
    multiprocessors,
    TOKENS_LOG2, THOUGHTS_LOG2,  # only to choose a configuration by size class
    SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    COPY_ROWS: tl.constexpr,
    COPY_D: tl.constexpr,
    COPY_STAGES: tl.constexpr,
    PER_SM: tl.constexpr,
):  # fmt: skip
    dot_dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    out_dtype: tl.constexpr = table_ptr.dtype.element_ty
    program, programs = tl.program_id(0), tl.num_programs(0)

    # Work: `tiles` of the projection and `chunks` of the copy. The first `workers` programs, one per multiprocessor
    # unless the projection dominates, take the tiles, while the programs beside them copy. A worker then copies what
    # is left of its fair share. A tile's price, in chunks, is what its neighbours copy meanwhile if a multiprocessor
    # does OPS_PER_BYTE operations in the time of one byte.
    tiles_m = tl.cdiv(B * T, BLOCK_M)
    tiles = tiles_m * tl.cdiv(D, BLOCK_D)
    chunks_d = tl.cdiv(D, COPY_D)
    chunks = tl.cdiv(B * S, COPY_ROWS) * chunks_d
    OPS_PER_BYTE: tl.constexpr = 8 if dot_dtype == tl.float32 else 128
    CHUNK_OPS: tl.constexpr = OPS_PER_BYTE * COPY_ROWS * COPY_D * (out_dtype.primitive_bitwidth // 8) * PER_SM
    tile_price = 1 + P // max(1, CHUNK_OPS // (BLOCK_M * BLOCK_D))
    share = tl.cdiv(tiles * tile_price + chunks, programs)
    workers = tl.minimum(tl.maximum(multiprocessors, tl.cdiv(tiles * tile_price, share)), tl.minimum(tiles, programs))
    worker_chunks = tl.maximum(0, share - tl.cdiv(tiles, tl.maximum(workers, 1)) * tile_price)
    if workers == programs:
        worker_chunks = tl.cdiv(chunks, programs)
    copier_chunks = tl.cdiv(tl.maximum(chunks - workers * worker_chunks, 0), tl.maximum(programs - workers, 1))

    if program < workers:
        # Hoisted out of this loop, the row arithmetic would keep registers from the product.
        for tile in tl.range(program, tiles, workers, disable_licm=True):
            m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
            d = (tile // tiles_m) * BLOCK_D + tl.arange(0, BLOCK_D)
            m_inside, d_inside = m < B * T, d < D
            b, t = m // T, m % T
            hidden_rows = hidden_ptr + b.to(tl.int64) * hidden_stride_b + t.to(tl.int64) * hidden_stride_t
            weight_rows = weight_ptr + d.to(tl.int64) * weight_stride_d
            acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
            for p_start in range(0, P, BLOCK_P):
                p = p_start + tl.arange(0, BLOCK_P)
                p_inside = p < P
                p = p.to(tl.int64)
                h = tl.load(
                    hidden_rows[:, None] + p[None, :] * hidden_stride_p,
                    mask=m_inside[:, None] & p_inside[None, :],
                    other=0.0,
                )
                w = tl.load(
                    weight_rows[None, :] + p[:, None] * weight_stride_p,
                    mask=d_inside[None, :] & p_inside[:, None],
                    other=0.0,
                )
                acc = _dot(h, _round(w, dot_dtype), acc, PRECISION)
            if bias_ptr is not None:
                acc += tl.load(bias_ptr + d.to(tl.int64) * bias_stride, mask=d_inside, other=0.0).to(tl.float32)[
                    None, :
                ]
            out_row = m + b * S + _slots(slot_ptr, slot_stride, b, m_inside)
            out_rows = out_ptr + out_row.to(tl.int64) * D
            inside = m_inside[:, None] & d_inside[None, :]
            tl.store(out_rows[:, None] + d[None, :], _round(acc, out_dtype), mask=inside)
        first = program * worker_chunks
        last = tl.minimum(first + worker_chunks, chunks)
    else:
        first = workers * worker_chunks + (program - workers) * copier_chunks
        last = tl.minimum(first + copier_chunks, chunks)

    for chunk in tl.range(first, last, num_stages=COPY_STAGES):
        row = (chunk // chunks_d) * COPY_ROWS + tl.arange(0, COPY_ROWS)
        d = (chunk % chunks_d) * COPY_D + tl.arange(0, COPY_D)
        row_inside = row < B * S
        inside = row_inside[:, None] & (d < D)[None, :]
        b, s = row // S, row % S
        id_offset = b.to(tl.int64) * ids_stride_b + s.to(tl.int64) * ids_stride_s
        token = tl.load(ids_ptr + id_offset, mask=row_inside, other=0)
        table_rows = table_ptr + token.to(tl.int64) * table_stride_v
        # Each row is wanted once, the weight by every block of thoughts: let the rows leave the cache first.
        values = tl.load(
            table_rows[:, None] + d.to(tl.int64)[None, :] * table_stride_d, mask=inside, eviction_policy="evict_first"
        )
        if SCALED:
            values = _round(values.to(tl.float32) * scale, out_dtype)
        # as many batch rows have put their thoughts before this token
        passed = b + (s >= _slots(slot_ptr, slot_stride, b, row_inside)).to(tl.int32)
        out_rows = out_ptr + (row + passed * T).to(tl.int64) * D
        tl.store(out_rows[:, None] + d[None, :], values, mask=inside)


@triton.jit(do_not_specialize=_LENGTHS)
def _weight_grad_kernel(
    grad_ptr,  # (B, S+T, D)
    hidden_ptr,  # (B, T, P)
    slot_ptr,  # (B,) int or None
    weight_grad_ptr,  # (D, P) contiguous
    bias_grad_ptr,  # (D,) contiguous, or None
    B, T, P, D,
    grad_stride_b, grad_stride_s, grad_stride_d,
    hidden_stride_b, hidden_stride_t, hidden_stride_p,
    slot_stride,
    THOUGHTS_LOG2,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Each program owns a tile of the weight's gradient; a last column of programs sums the bias's."""
    dot_dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    tiles_p = tl.cdiv(P, BLOCK_P)
    columns = tiles_p
    if bias_grad_ptr is not None:
        columns += 1
    tile_d, tile_p = tl.program_id(0) // columns, tl.program_id(0) % columns
    d = tile_d * BLOCK_D + tl.arange(0, BLOCK_D)
    d_inside = d < D
    grad_columns = grad_ptr + d.to(tl.int64) * grad_stride_d

    if tile_p < tiles_p:
        p = tile_p * BLOCK_P + tl.arange(0, BLOCK_P)
        p_inside = p < P
        hidden_columns = hidden_ptr + p.to(tl.int64) * hidden_stride_p
        acc = tl.zeros((BLOCK_D, BLOCK_P), tl.float32)
        for m_start in range(0, B * T, BLOCK_M):
            m = m_start + tl.arange(0, BLOCK_M)
            m_inside = m < B * T
            b, t = m // T, m % T
            position = t + _slots(slot_ptr, slot_stride, b, m_inside)
            grad_rows = b.to(tl.int64) * grad_stride_b + position.to(tl.int64) * grad_stride_s
            hidden_rows = b.to(tl.int64) * hidden_stride_b + t.to(tl.int64) * hidden_stride_t
            g = tl.load(
                grad_rows[:, None] + grad_columns[None, :], mask=m_inside[:, None] & d_inside[None, :], other=0.0
            )
            h = tl.load(
                hidden_rows[:, None] + hidden_columns[None, :], mask=m_inside[:, None] & p_inside[None, :], other=0.0
            )
            acc = _dot(tl.trans(_round(g, dot_dtype)), h, acc, PRECISION)
        rows = weight_grad_ptr + d.to(tl.int64) * P
        acc = _round(acc, weight_grad_ptr.dtype.element_ty)
        tl.store(rows[:, None] + p[None, :], acc, mask=d_inside[:, None] & p_inside[None, :])
    elif bias_grad_ptr is not None:
        total = tl.zeros((BLOCK_D,), tl.float32)
        for m_start in range(0, B * T, BLOCK_M):
            m = m_start + tl.arange(0, BLOCK_M)
            m_inside = m < B * T
            b = m // T
            position = m % T + _slots(slot_ptr, slot_stride, b, m_inside)
            grad_rows = b.to(tl.int64) * grad_stride_b + position.to(tl.int64) * grad_stride_s
            g = tl.load(
                grad_rows[:, None] + grad_columns[None, :], mask=m_inside[:, None] & d_inside[None, :], other=0.0
            )
            total += tl.sum(g.to(tl.float32), axis=0)
        tl.store(bias_grad_ptr + d, _round(total, bias_grad_ptr.dtype.element_ty), mask=d_inside)


@triton.jit(do_not_specialize=_LENGTHS)
def _hidden_grad_kernel(
    grad_ptr,  # (B, S+T, D)
    weight_ptr,  # (D, P)
    slot_ptr,  # (B,) int or None
    hidden_grad_ptr,  # (B, T, P) contiguous
    B, T, P, D,
    grad_stride_b, grad_stride_s, grad_stride_d,
    weight_stride_d, weight_stride_p,
    slot_stride,
    THOUGHTS_LOG2,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    dot_dtype: tl.constexpr = hidden_grad_ptr.dtype.element_ty
    tiles_m = tl.cdiv(B * T, BLOCK_M)
    m = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    p = (tl.program_id(0) // tiles_m) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_inside, p_inside = m < B * T, p < P
    b = m // T
    position = m % T + _slots(slot_ptr, slot_stride, b, m_inside)
    grad_rows = grad_ptr + b.to(tl.int64) * grad_stride_b + position.to(tl.int64) * grad_stride_s
    weight_columns = weight_ptr + p.to(tl.int64) * weight_stride_p
    acc = tl.zeros((BLOCK_M, BLOCK_P), tl.float32)
    for d_start in range(0, D, BLOCK_D):
        d = d_start + tl.arange(0, BLOCK_D)
        d_inside = d < D
        d = d.to(tl.int64)
        g = tl.load(
            grad_rows[:, None] + d[None, :] * grad_stride_d, mask=m_inside[:, None] & d_inside[None, :], other=0.0
        )
        w = tl.load(
            weight_columns[None, :] + d[:, None] * weight_stride_d,
            mask=p_inside[None, :] & d_inside[:, None],
            other=0.0,
        )
        acc = _dot(_round(g, dot_dtype), _round(w, dot_dtype), acc, PRECISION)
    rows = hidden_grad_ptr + m.to(tl.int64) * P
    tl.store(rows[:, None] + p[None, :], _round(acc, dot_dtype), mask=m_inside[:, None] & p_inside[None, :])


def _config(M, D, P, num_warps, num_stages=3, **copy):
    return triton.Config({"BLOCK_M": M, "BLOCK_D": D, "BLOCK_P": P, **copy}, num_warps, num_stages)


def _copy(rows, per_sm, stages=1):
    return {"COPY_ROWS": rows, "COPY_D": 512, "COPY_STAGES": stages, "PER_SM": per_sm}


def _tuned(kernel, configs, key):
    """`kernel` timed once per size class and device, the choice kept on disk. The interpreter takes small blocks."""
    if triton.knobs.runtime.interpret:
        small = {name: 16 for name in configs[0].kwargs}
        configs = [triton.Config(small | {"COPY_STAGES": 1, "PER_SM": 2} if "PER_SM" in small else small)]
    return triton.autotune(configs, key, cache_results=True)(kernel)


# By bytes per element of `hidden`, whose dtype the products run in. By registers and shared memory, PER_SM programs fit
# on a multiprocessor of an H100 at once, but for the 6: that entry trades a persistent grid for one that the hardware
# balances. The last 16-bit entry of the forward pass is for a few thoughts, as in generation.
_FORWARD = {
    2: _tuned(
        _forward_kernel,
        [
            _config(128, 128, 64, 8, **_copy(16, per_sm=2)),
            _config(128, 128, 64, 8, **_copy(16, per_sm=6)),
            _config(64, 128, 64, 8, **_copy(16, per_sm=3)),
            _config(64, 128, 64, 8, **_copy(16, per_sm=2, stages=3)),
            _config(64, 128, 64, 8, 4, **_copy(16, per_sm=2)),
            _config(128, 64, 64, 4, **_copy(8, per_sm=3)),
            _config(64, 64, 64, 4, **_copy(8, per_sm=4)),
            _config(16, 64, 128, 4, **_copy(8, per_sm=4)),
        ],
        ["P", "D", "TOKENS_LOG2", "THOUGHTS_LOG2"],
    ),
    4: _tuned(
        _forward_kernel,
        [
            _config(64, 64, 32, 8, **_copy(8, per_sm=2)),
            _config(32, 32, 32, 4, **_copy(4, per_sm=4)),
        ],
        ["P", "D", "TOKENS_LOG2", "THOUGHTS_LOG2"],
    ),
}
_WEIGHT_GRAD = {
    2: _tuned(
        _weight_grad_kernel,
        [_config(64, 128, 128, 8), _config(64, 128, 64, 4), _config(64, 64, 64, 4), _config(16, 64, 128, 4)],
        ["P", "D", "THOUGHTS_LOG2"],
    ),
    4: _tuned(_weight_grad_kernel, [_config(32, 64, 64, 8), _config(32, 32, 32, 4)], ["P", "D", "THOUGHTS_LOG2"]),
}
_HIDDEN_GRAD = {
    2: _tuned(
        _hidden_grad_kernel,
        [_config(128, 64, 128, 8), _config(64, 64, 128, 8), _config(64, 64, 64, 4), _config(16, 128, 64, 4)],
        ["P", "D", "THOUGHTS_LOG2"],
    ),
    4: _tuned(_hidden_grad_kernel, [_config(64, 32, 64, 8), _config(32, 32, 32, 4)], ["P", "D", "THOUGHTS_LOG2"]),
}


def _uses_triton(tensor):
    return tensor.is_cuda or triton.knobs.runtime.interpret


@lru_cache
def _multiprocessors(device):
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _options():
    # Asked for by name because the default changes in Triton 3.10; fused multiply-adds round once instead of twice.
    return {
        "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
        "enable_fp_fusion": True,
    }


def _strides(tensor, dims):
    return (0,) * dims if tensor is None else tensor.stride()


def _cdiv(n, size):  # triton.cdiv costs the host microseconds
    return -(-n // size)


def _log2(n):
    return max(n - 1, 0).bit_length()


@torch.library.custom_op("softcot_kernels::thought_embedding", mutates_args=())
def _thought_embedding(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    table: torch.Tensor,
    slot: torch.Tensor | None,
    embed_scale: float,
    check_ids: bool,
) -> torch.Tensor:
    if check_ids:
        _check_range("token_ids", token_ids, table.shape[0] - 1, "use the tokenizer of the model that owns the table")
        if slot is not None:
            _check_range("slot", slot, token_ids.shape[1], "thoughts stand before, between or after the S tokens")
    if not _uses_triton(table):
        return reference.thought_embedding(hidden, weight, bias, token_ids, table, slot, embed_scale)
    (B, T, P), S, D = hidden.shape, token_ids.shape[1], table.shape[1]
    out = table.new_empty(B, S + T, D)
    if out.numel() == 0:
        return out
    multiprocessors = _multiprocessors(out.device)

    def grid(meta):
        tiles = _cdiv(B * T, meta["BLOCK_M"]) * _cdiv(D, meta["BLOCK_D"])
        chunks = _cdiv(B * S, meta["COPY_ROWS"]) * _cdiv(D, meta["COPY_D"])
        return (min(multiprocessors * meta["PER_SM"], tiles + chunks),)

    with torch.cuda.device_of(out):
        _FORWARD[hidden.itemsize][grid](
            hidden, weight, bias, token_ids, table, slot, out,
            B, S, T, P, D,
            *hidden.stride(), *weight.stride(), *_strides(bias, 1), *token_ids.stride(), *table.stride(),
            *_strides(slot, 1),
            reference.round_scale(embed_scale, table.dtype), multiprocessors, _log2(B * S), _log2(B * T),
            SCALED=embed_scale != 1.0,
            **_options(),
        )  # fmt: skip
    return out


@_thought_embedding.register_fake
def _(hidden, weight, bias, token_ids, table, slot, embed_scale, check_ids):
    return table.new_empty(hidden.shape[0], token_ids.shape[1] + hidden.shape[1], table.shape[1])


@torch.library.custom_op("softcot_kernels::thought_embedding_weight_grads", mutates_args=())
def _weight_grads(
    grad: torch.Tensor,
    hidden: torch.Tensor,
    slot: torch.Tensor | None,
    weight_dtype: torch.dtype,
    bias_dtype: torch.dtype | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    if not _uses_triton(grad):
        return reference.weight_grads(grad, hidden, slot, weight_dtype, bias_dtype)
    (B, T, P), D = hidden.shape, grad.shape[2]
    weight_grad = grad.new_empty(D, P, dtype=weight_dtype)
    bias_grad = None if bias_dtype is None else grad.new_empty(D, dtype=bias_dtype)

    def grid(meta):
        columns = _cdiv(P, meta["BLOCK_P"]) + (bias_grad is not None)
        return (_cdiv(D, meta["BLOCK_D"]) * columns,)

    if D and (P or bias_grad is not None):
        with torch.cuda.device_of(grad):
            _WEIGHT_GRAD[hidden.itemsize][grid](
                grad, hidden, slot, weight_grad, bias_grad,
                B, T, P, D,
                *grad.stride(), *hidden.stride(), *_strides(slot, 1), _log2(B * T),
                **_options(),
            )  # fmt: skip
    return weight_grad, grad.new_empty(0) if bias_grad is None else bias_grad


@_weight_grads.register_fake
def _(grad, hidden, slot, weight_dtype, bias_dtype):
    D = grad.shape[2]
    bias_grad = grad.new_empty(0) if bias_dtype is None else grad.new_empty(D, dtype=bias_dtype)
    return grad.new_empty(D, hidden.shape[2], dtype=weight_dtype), bias_grad


@torch.library.custom_op("softcot_kernels::thought_embedding_hidden_grad", mutates_args=())
def _hidden_grad(
    grad: torch.Tensor, weight: torch.Tensor, slot: torch.Tensor | None, T: int, hidden_dtype: torch.dtype
) -> torch.Tensor:
    if not _uses_triton(grad):
        return reference.hidden_grad(grad, weight, slot, T, hidden_dtype)
    B, (D, P) = grad.shape[0], weight.shape
    hidden_grad = grad.new_empty(B, T, P, dtype=hidden_dtype)

    def grid(meta):
        return (_cdiv(B * T, meta["BLOCK_M"]) * _cdiv(P, meta["BLOCK_P"]),)

    if hidden_grad.numel():
        with torch.cuda.device_of(grad):
            _HIDDEN_GRAD[hidden_grad.itemsize][grid](
                grad, weight, slot, hidden_grad,
                B, T, P, D,
                *grad.stride(), *weight.stride(), *_strides(slot, 1), _log2(B * T),
                **_options(),
            )  # fmt: skip
    return hidden_grad


@_hidden_grad.register_fake
def _(grad, weight, slot, T, hidden_dtype):
    return grad.new_empty(grad.shape[0], T, weight.shape[1], dtype=hidden_dtype)


def _setup_context(ctx, inputs, output):
    hidden, weight, bias, _, _, slot, _, _ = inputs
    # The weight itself and not a copy: under ZeRO-3 it is partitioned between the passes and gathered for backward.
    ctx.save_for_backward(hidden, weight if ctx.needs_input_grad[0] else None, slot)
    ctx.weight_dtype, ctx.bias_dtype = weight.dtype, None if bias is None else bias.dtype


def _backward(ctx, grad):
    hidden, weight, slot = ctx.saved_tensors
    hidden_grad = weight_grad = bias_grad = None
    if ctx.needs_input_grad[0]:
        hidden_grad = _hidden_grad(grad, weight, slot, hidden.shape[1], hidden.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        weight_grad, bias_grad = _weight_grads(grad, hidden, slot, ctx.weight_dtype, ctx.bias_dtype)
    return hidden_grad, weight_grad, None if ctx.bias_dtype is None else bias_grad, None, None, None, None, None


_thought_embedding.register_autograd(_backward, setup_context=_setup_context)


def thought_embedding(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    token_ids: torch.Tensor,
    table: torch.Tensor,
    slot: torch.Tensor | None = None,
    *,
    embed_scale: float = 1.0,
    check_ids: bool = True,
) -> torch.Tensor:
    """Input embeddings of the base model: `tokens[:slot] ; projected thoughts ; tokens[slot:]` for each row.

    Products run in hidden's dtype (weight is cast on the way in), sums in float32, and the result is rounded once, to
    table's dtype. On a CPU this is `softcot_kernels.reference`. Any input may be non-contiguous.

    Under ZeRO-3, read `weight` and `table` from their modules inside a forward that DeepSpeed hooks: there the access
    gathers them; elsewhere they have shape (0,).

    Args:
        hidden: (B, T, P) assistant hidden states; bf16, fp16 or fp32.
        weight: (D, P) projection; bf16, fp16 or fp32.
        bias: (D,) or None; bf16, fp16 or fp32, added in float32.
        token_ids: (B, S) int64 or int32. Padding ids are ids like any other.
        table: (V, D) embedding table, frozen; bf16, fp16 or fp32.
        slot: (B,) int64 or int32, each in 0..S: how many tokens precede the thoughts. None puts thoughts first.
        embed_scale: multiplies token rows as Gemma does: the scale is rounded to table's dtype, then the product.
            Thoughts are never scaled; the projection learns their size.
        check_ids: refuse ids outside 0..V-1 and slots outside 0..S. On a GPU the check waits for the device, so a
            loop that checked its ids beforehand turns it off; then a bad id reads foreign memory.

    Returns:
        (B, S + T, D), contiguous, in table's dtype; differentiable in hidden, weight and bias. Gradients are summed in
        float32 and returned in the dtype of what they belong to.

    Raises:
        ValueError: shapes, dtypes or devices that do not go together, or a table that wants a gradient.
        IndexError: an id or a slot out of range.

    Source: SoftCoT, arXiv:2502.12134.
    """
    _check_arguments(hidden, weight, bias, token_ids, table, slot)
    return _thought_embedding(hidden, weight, bias, token_ids, table, slot, float(embed_scale), check_ids)


def _check_arguments(hidden, weight, bias, token_ids, table, slot):
    tensors = {"hidden": hidden, "weight": weight, "bias": bias, "token_ids": token_ids, "table": table, "slot": slot}
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    dims = {"hidden": 3, "weight": 2, "bias": 1, "token_ids": 2, "table": 2, "slot": 1}
    for name, tensor in tensors.items():
        if tensor.dim() != dims[name]:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but needs {dims[name]} dimensions; if that is (0,), ZeRO-3 "
                "has partitioned it: read it inside the forward of a module that DeepSpeed hooks"
            )
        if tensor.device != table.device:
            raise ValueError(f"{name} is on {tensor.device} and table on {table.device}; move one of them")
        if name in ("token_ids", "slot"):
            if tensor.dtype not in (torch.int64, torch.int32):
                raise ValueError(f"{name} is {tensor.dtype}; make it torch.int64")
        elif not tensor.is_floating_point():
            raise ValueError(f"{name} is {tensor.dtype}; make it torch.bfloat16, torch.float16 or torch.float32")
        elif tensor.dtype not in (torch.bfloat16, torch.float16, torch.float32) and _uses_triton(tensor):
            raise ValueError(f"{name} is {tensor.dtype}, which the kernel does not compute; cast it or use the CPU")
    (B, T, P), S, (D, weight_P) = hidden.shape, token_ids.shape[1], weight.shape
    if weight_P != P or table.shape[1] != D:
        raise ValueError(
            f"weight is {tuple(weight.shape)}, hidden has width {P} and table width {table.shape[1]}; "
            f"the projection must be Linear({P}, {table.shape[1]})"
        )
    if bias is not None and bias.shape[0] != D:
        raise ValueError(f"bias has {bias.shape[0]} elements and weight {D} rows; they belong to different projections")
    if token_ids.shape[0] != B or (slot is not None and slot.shape[0] != B):
        slots = "none" if slot is None else slot.shape[0]
        raise ValueError(f"batch sizes differ: hidden {B}, token_ids {token_ids.shape[0]}, slot {slots}")
    if B * (S + T) >= 2**31:
        raise ValueError(f"the output would have {B * (S + T)} rows, and the limit is 2**31 - 1; split the batch")
    if table.requires_grad and torch.is_grad_enabled():
        raise ValueError("table requires a gradient and would get none; freeze it with table.requires_grad_(False)")


def _check_range(name, values, last, advice):
    if values.numel() == 0:
        return
    low, high = torch.stack(values.aminmax()).tolist()  # one wait for the device
    if low < 0 or high > last:
        raise IndexError(f"{name} holds {low if low < 0 else high}, outside 0..{last}; {advice}")
