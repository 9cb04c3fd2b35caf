"""The product of block-affine adaptation: x times W + delta W, delta W_ab = (W_ab + I) B_a on r x r blocks.

The update is as large as W and depends on it, so it is made when it is needed, some rows at a time, in
forward and again in backward, and never kept.

Making delta W takes r multiplications for each entry of W, the product with it as many as there are tokens.
The other order, (W_ab + I)(B_a x_b), has no delta W but tokens / r times as many numbers in between, and its
gradients cost more for more than r tokens. Backward recomputes delta W for dL/dx, and sums
dL/dB_a = sum over b of (W_ab + I)^T G_ab over slices of rows, G = (dL/dy)^T x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor


def bat_delta(weight: Tensor, block: Tensor, *, with_weight: bool = False) -> Tensor:
    """Return delta W, or W + delta W, of the bat form.

    Args:
        weight: W (k r, n), the r-row slices that the blocks belong to.
        block: B (k, r, r), of the dtype that the result is to have.
        with_weight: Whether to add W.
    """
    k, r, _ = block.shape
    # The r rows of a slice, each cut into n / r pieces, are n matrix rows of length r without a copy.
    rows = weight.to(block.dtype).reshape(k, -1, r)
    delta = torch.baddbmm(rows, rows, block) if with_weight else torch.bmm(rows, block)
    delta.view(k, r, -1, r).add_(block.unsqueeze(2))  # I B_a, for every column block
    return delta.view(k * r, -1)


class _BatLinear(torch.autograd.Function):
    """x (tokens, n) times delta W^T or (W + delta W)^T, in the dtype of x, without keeping either."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        block: Tensor,
        read: Callable[[], Tensor] | None,
        transposed: bool,
        with_weight: bool,
        rows: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, block)
        ctx.read, ctx.transposed, ctx.with_weight, ctx.rows = read, transposed, with_weight, rows
        out = x.new_empty(x.shape[0], block.shape[0] * block.shape[1])
        for part, piece, own in _slices(weight, block, read, transposed, rows):
            out[:, part] = x @ bat_delta(piece, own, with_weight=with_weight).to(x.dtype).T
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = gradients
        x, weight, block = ctx.saved_tensors
        for_x, for_weight, for_block = ctx.needs_input_grad[:3]
        grad_x = torch.zeros_like(x) if for_x else None
        grad_block = torch.empty_like(block) if for_block else None
        grad_weight = torch.empty_like(weight) if for_weight else None
        r = block.shape[-1]
        for part, piece, own in _slices(weight, block, ctx.read, ctx.transposed, ctx.rows):
            g = grad[:, part]
            if grad_x is not None:
                grad_x.addmm_(g, bat_delta(piece, own, with_weight=ctx.with_weight).to(g.dtype))
            if grad_block is None and grad_weight is None:
                continue
            outer = (g.T @ x).to(own.dtype).view(own.shape[0], -1, r)  # G_a, laid out as the rows are
            if grad_block is not None:
                # dL/dB_a = sum over b of (W_ab + I)^T G_ab
                total = piece.to(own.dtype).reshape(outer.shape).mT @ outer
                total += outer.view(own.shape[0], r, -1, r).sum(2)
                grad_block[part.start // r : part.stop // r] = total
            if grad_weight is not None:
                to_rows = outer @ own.mT + (outer if ctx.with_weight else 0.0)  # G_ab B_a^T (+ G_ab)
                to_rows = to_rows.view(g.shape[1], -1)
                if ctx.transposed:
                    grad_weight[:, part] = to_rows.T
                else:
                    grad_weight[part] = to_rows
        return grad_x, grad_weight, grad_block, None, None, None, None


def _slices(
    weight: Tensor | None, block: Tensor, read: Callable[[], Tensor] | None, transposed: bool, rows: int
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield a slice of output features, those rows of W, and their blocks in at least fp32."""
    if weight is None:
        weight = cast(Callable[[], Tensor], read)()
    wide = block.to(torch.promote_types(block.dtype, torch.float32))
    k, r, _ = block.shape
    step = max(rows // r, 1)
    for start in range(0, k, step):
        stop = min(start + step, k)
        part = slice(start * r, stop * r)
        yield part, weight[:, part].T if transposed else weight[part], wide[start:stop]


def bat_linear(
    x: Tensor,
    weight: Tensor | Callable[[], Tensor],
    block: Tensor,
    *,
    transposed: bool = False,
    with_weight: bool = False,
    rows: int = 1024,
) -> Tensor:
    """Return x delta W^T, or x (W + delta W)^T, keeping nothing for backward but x, B and a reference to W.

    Args:
        x: (..., in_features), in the dtype of the product.
        weight: W (out_features, in_features), or what returns it, called in forward and again in backward.
        block: B (out_features / r, r, r).
        transposed: Whether W is stored (in_features, out_features), as Conv1D does.
        with_weight: Whether to multiply by W + delta W.
        rows: Output features to build at a time (rounded to blocks): what is held beside input and output.
    """
    read = None if isinstance(weight, Tensor) else weight
    stored = weight if isinstance(weight, Tensor) else None
    # Under autocast the products inside would be cast one by one; their dtypes are chosen here.
    with torch.autocast(x.device.type, enabled=False):
        flat = x.reshape(-1, x.shape[-1])
        out = cast(Tensor, _BatLinear.apply(flat, stored, block, read, transposed, with_weight, rows))
        return out.view(*x.shape[:-1], out.shape[-1])
