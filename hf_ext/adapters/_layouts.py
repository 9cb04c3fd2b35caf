"""The kinds of layers that adapters sit on, each as the product of its inputs with one matrix.

At every position t a layer computes y_t = W x_t, with W (out_features, in_features):

- linear: nn.Linear, Conv1D, quantized linear layers. x_t holds a token's features.
- convolution: nn.Conv1d, nn.Conv2d, nn.Conv3d of one group. W is the weight (out_channels, in_channels,
  *kernel) with all axes but the first as one, and x_t the patch under the kernel.
- embedding: nn.Embedding. W is the transposed weight (embedding_dim, num_embeddings), and x_t is 1, or the
  layer's `embed_scale`, at the token and 0 elsewhere. The row of `padding_idx` belongs to what no gradient
  reaches, as in nn.Embedding itself.

So an update of low rank is B (out_features, r) times A (r, in_features) for all of them. Adapter tensors are
kept as the layer computes with them, which also tells the kinds of layers in a checkpoint apart: what is next
to the inputs is (r, in_features), as filters (r, in_channels, *kernel) for a convolution; for an embedding
every matrix is transposed: A (num_embeddings, r), B (r, embedding_dim).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._compat.peft import in_out_features
from ..core import dist
from ..core.checks import check

__all__ = [
    "KINDS",
    "LINEAR",
    "ConvolutionLayout",
    "EmbeddingLayout",
    "Layout",
    "layout_of",
    "refuse_tensor_parallel",
]


_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_NAMES = {
    "linear": "nn.Linear, Conv1D and quantized linear layers",
    "convolution": "nn.Conv1d, nn.Conv2d and nn.Conv3d",
    "embedding": "nn.Embedding",
}


KINDS, LINEAR = frozenset(_NAMES), frozenset({"linear"})


class Layout:
    """A linear layer as a product with a matrix.

    Args:
        core: The base layer.
    """

    kind = "linear"
    settings: tuple[str, ...] = ()  # attributes of the base layer, beside those of every adapted layer

    def __init__(self, core: nn.Module) -> None:
        self.transposed = isinstance(core, Conv1D)
        self.in_features, self.out_features = cast(tuple[int, int], in_out_features(core))

    # Weights and adapter tensors -----------------------------------------------------------------------

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight of the base layer's layout as (out_features, in_features)."""
        return weight.T if self.transposed else weight

    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out_features, in_features) in the layout of the base layer's weight."""
        return matrix.T if self.transposed else matrix

    def trainable(self, matrix: Tensor) -> Tensor:
        """Return the matrix with zeros where training never changes the layer's weight."""
        return matrix

    def stored(self, matrix: Tensor, inner: bool) -> Tensor:
        """Return a matrix of an adapter as it is kept.

        Args:
            matrix: (k, in_features) where `inner`, else (out_features, k); vectors stay as they are.
            inner: Whether it is next to the inputs.
        """
        return matrix

    def plain(self, stored: Tensor, inner: bool) -> Tensor:
        """Return the matrix of a tensor as it is kept: the inverse of `stored`."""
        return stored

    @staticmethod
    def as_lora(b: Tensor, a: Tensor) -> dict[str, Tensor]:
        """Return an update's factors as a LoRA checkpoint names and shapes them.

        Args:
            b: (out_features, r).
            a: (r, in_features).

        Raises:
            ValueError: PEFT's LoRA has no such layers.
        """
        return {"lora_A.weight": a, "lora_B.weight": b}

    # Products ------------------------------------------------------------------------------------------

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        """Return A x_t at every position, for A as it is kept, in the shape of an output of k features."""
        return F.linear(x, a)

    def expand(self, inner: Tensor, b: Tensor) -> Tensor:
        """Return B h_t at every position, for B as it is kept and h as `project` returns it."""
        return F.linear(inner, b)

    def per_feature(self, values: Tensor) -> Tensor:
        """Return a vector (k,) in a shape that multiplies the features of what `project` returns."""
        return values

    def drop(self, dropout: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Return what a linear function of the input gives where entries of the input are dropped."""
        return forward(dropout(x))

    # Gradients -----------------------------------------------------------------------------------------

    def rows(self, out: Tensor) -> Tensor:
        """Return an output, or what has its shape, as (positions, features)."""
        return out.reshape(-1, out.shape[-1])

    def reaching(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of an output with zeros where it does not reach the weight."""
        return grad

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return sum_t g_t x_t^T, (k, in_features), for an input and a gradient of k features."""
        return self.rows(grad).T @ self.rows(x)


class ConvolutionLayout(Layout):
    """A convolution of one group as a product with a matrix."""

    kind = "convolution"
    settings = tuple(nn.Conv1d.__constants__)

    def __init__(self, core: Any) -> None:
        self.core = core
        self.filter_shape = (core.in_channels, *core.kernel_size)
        self.dims = len(core.kernel_size)
        self.in_features, self.out_features = torch.Size(self.filter_shape).numel(), core.out_channels
        self.convolve = next(call for cls, call in _CONVOLUTIONS.items() if isinstance(core, cls))

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight (out_channels, in_channels, *kernel) as (out_features, in_features)."""
        return weight.flatten(1)

    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out_features, in_features) as (out_channels, in_channels, *kernel)."""
        return matrix.unflatten(1, self.filter_shape)

    def stored(self, matrix: Tensor, inner: bool) -> Tensor:
        """Return a matrix as it is kept: filters (k, in_channels, *kernel) where it is next to the inputs."""
        return matrix.unflatten(1, self.filter_shape) if inner else matrix

    def plain(self, stored: Tensor, inner: bool) -> Tensor:
        """Return the matrix of a tensor as it is kept."""
        return stored.flatten(1) if inner else stored

    def as_lora(self, b: Tensor, a: Tensor) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return an update's factors as filters, as a LoRA checkpoint has them."""
        for name, known in (("dilation", (1,) * self.dims), ("padding_mode", "zeros")):
            given = getattr(self.core, name)
            rule = f"{known!r} in convolutions that are exported: PEFT's LoRA takes no other (merge instead)"
            check(given == known, name, given, rule)
        return {"lora_A.weight": a.unflatten(1, self.filter_shape), "lora_B.weight": self._pointwise(b)}

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        """Return the convolution of x with filters, with the layer's stride, padding and dilation."""
        return self.core._conv_forward(x, a, None)

    def expand(self, inner: Tensor, b: Tensor) -> Tensor:
        """Return the convolution with filters of size 1 that mixes channels by B."""
        return self.convolve(inner, self._pointwise(b))

    def per_feature(self, values: Tensor) -> Tensor:
        """Return a vector (k,) in a shape that multiplies channels."""
        return values.reshape(-1, *(1,) * self.dims)

    def _pointwise(self, b: Tensor) -> Tensor:
        return b.reshape(*b.shape, *(1,) * self.dims)

    def rows(self, out: Tensor) -> Tensor:
        """Return an output (..., features, *space) as (positions, features)."""
        channels = -self.dims - 1
        return out.movedim(channels, -1).reshape(-1, out.shape[channels])

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return sum_t g_t x_t^T, as the gradient of filters: no patch is copied out."""
        filters = x.new_zeros(grad.shape[-self.dims - 1], *self.filter_shape).requires_grad_()
        with torch.enable_grad():
            out = self.project(x, filters)
        return torch.autograd.grad(out, filters, grad)[0].flatten(1)


class EmbeddingLayout(Layout):
    """An embedding as a product with a matrix."""

    kind = "embedding"
    settings = tuple(nn.Embedding.__constants__)

    def __init__(self, core: Any) -> None:
        self.core = core
        self.in_features, self.out_features = core.num_embeddings, core.embedding_dim

    def matrix(self, weight: Tensor) -> Tensor:
        """Return a weight (num_embeddings, embedding_dim) as (out_features, in_features)."""
        return weight.T

    def weight(self, matrix: Tensor) -> Tensor:
        """Return a matrix (out_features, in_features) as (num_embeddings, embedding_dim)."""
        return matrix.T

    def trainable(self, matrix: Tensor) -> Tensor:
        """Return the matrix with zeros in the column of the padding token."""
        padding = self.core.padding_idx
        if padding is None or matrix.is_meta or not bool(matrix[:, padding].any()):
            return matrix
        matrix = matrix.clone()
        matrix[:, padding] = 0.0
        return matrix

    def stored(self, matrix: Tensor, inner: bool) -> Tensor:
        """Return a matrix as it is kept: transposed."""
        return matrix.T if matrix.dim() == 2 else matrix

    def plain(self, stored: Tensor, inner: bool) -> Tensor:
        """Return the matrix of a tensor as it is kept."""
        return stored.T if stored.dim() == 2 else stored

    @staticmethod
    def as_lora(b: Tensor, a: Tensor) -> dict[str, Tensor]:
        """Return an update's factors as a LoRA checkpoint names them."""
        return {"lora_embedding_A": a, "lora_embedding_B": b}

    def project(self, x: Tensor, a: Tensor) -> Tensor:
        """Return the rows of A (num_embeddings, k) for tokens x (...), times the layer's scale: (..., k)."""
        return self._scaled(F.embedding(x, a, self.core.padding_idx))

    def expand(self, inner: Tensor, b: Tensor) -> Tensor:
        """Return the product of (..., k) with B (k, embedding_dim)."""
        return inner @ b

    def drop(self, dropout: nn.Module, x: Tensor, forward: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the output where tokens are dropped: x_t has one entry that is not 0."""
        out = forward(x)
        return out if isinstance(dropout, nn.Identity) else out * dropout(out.new_ones(*out.shape[:-1], 1))

    def reaching(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return the gradient of an output with zeros at padding tokens."""
        padding = self.core.padding_idx
        return grad if padding is None else grad * (x != padding)[..., None]

    def weight_gradient(self, x: Tensor, grad: Tensor) -> Tensor:
        """Return sum_t g_t x_t^T: the gradients of each token, summed."""
        rows = self.rows(self._scaled(grad))
        return rows.new_zeros(self.in_features, rows.shape[1]).index_add_(0, x.reshape(-1), rows).T

    def _scaled(self, out: Tensor) -> Tensor:
        scale = getattr(self.core, "embed_scale", None)
        if scale is None:
            return out
        # Rounded as the base rounds it.
        return out * (scale.to(self.core.weight.dtype).to(out.dtype) if isinstance(scale, Tensor) else scale)


def layout_of(
    core: nn.Module, kinds: frozenset[str], module: str, *, quantized: bool, linear: bool
) -> Layout:
    """Return a base layer as a product with a matrix.

    Args:
        core: The base layer.
        kinds: The kinds that the adapter takes.
        module: Its path, for errors.
        quantized: Whether its weight is quantized.
        linear: Whether it is a quantized linear layer.

    Raises:
        TypeError: It is of no kind that the adapter takes.
        ValueError: It is of one, with a setting that makes it none.
    """
    if isinstance(core, nn.Linear | Conv1D) or linear:
        return Layout(core)
    base = next((cls for cls in (*_CONVOLUTIONS, nn.Embedding) if isinstance(core, cls)), None)
    found = EmbeddingLayout if base is nn.Embedding else ConvolutionLayout
    if base is None or found.kind not in kinds:
        supported = ", ".join(text for kind, text in _NAMES.items() if kind in kinds)
        raise TypeError(
            f"{module}: layers of type {type(core).__name__} cannot be adapted; supported are {supported}"
        )
    known = type(core).forward is base.forward or (base is nn.Embedding and _is_scaled(core))
    if not known or getattr(type(core), "_conv_forward", None) is not getattr(base, "_conv_forward", None):
        raise TypeError(
            f"{module}: layers of type {type(core).__name__} cannot be adapted: they compute something else "
            f"than {base.__name__} does"
        )
    if not isinstance(core._parameters.get("weight"), nn.Parameter):
        raise TypeError(f"{module}: a weight that is computed from others cannot be adapted")
    check(not quantized, "target_modules", module, f"without quantized {found.kind}s")
    layer: Any = core
    if found is ConvolutionLayout:
        check(layer.groups == 1, "groups", layer.groups, "1 in a convolution to be adapted", where=module)
    else:
        rule = "None in an embedding to be adapted: it would change the weight in every forward"
        check(layer.max_norm is None, "max_norm", layer.max_norm, rule, where=module)
        rule = "False in an embedding to be adapted"
        given = layer.scale_grad_by_freq
        check(not given, "scale_grad_by_freq", given, rule, where=module)
    return found(core)


class _Scaled(nn.Embedding):
    embed_scale: Any

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale


class _ScaledInWeightDtype(_Scaled):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.embed_scale.to(self.weight.dtype)


def _is_scaled(core: nn.Module) -> bool:
    """Return whether an embedding's one forward of its own is, as code, the product with `embed_scale`."""
    scale = getattr(core, "embed_scale", None)
    if not (isinstance(scale, int | float) or (isinstance(scale, Tensor) and scale.numel() == 1)):
        return False
    classes = type(core).__mro__[: type(core).__mro__.index(nn.Embedding)]
    own = [cls.__dict__["forward"] for cls in classes if "forward" in cls.__dict__]
    # A comparison of outputs could miss a token, and there may be no weights yet to compute them with.
    return [_code(forward) for forward in own] in (
        [_code(_Scaled.forward)],
        [_code(_ScaledInWeightDtype.forward)],
    )


def _code(function: Any) -> tuple[bytes, tuple[str, ...]] | None:
    """Return the instructions of a function without constants, whatever it names its arguments."""
    code = getattr(function, "__code__", None)
    return None if code is None else (code.co_code, code.co_names)


def refuse_tensor_parallel(core: nn.Module, module: str) -> None:
    """Refuse a layer of which each process of a tensor-parallel group has a part.

    Raises:
        ValueError: It is one.
    """
    weight = getattr(core, "weight", None)
    if getattr(core, "_hf_tp_plan", None) is not None or (
        weight is not None and dist.is_tensor_parallel(weight)
    ):
        raise ValueError(
            f"{module}: tensor-parallel layers cannot be adapted; load the model without a tp_plan"
        )
