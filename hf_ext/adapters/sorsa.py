"""SORSA: leading singular triplets trained apart, with factors held near orthonormal.

Source: Cao 2024, "SORSA: Singular Values and Orthonormal Regularized Singular Vectors Adaptation", arXiv
2409.00055, eq. 4-8; authors' code Gunale0926/SORSA (Apache-2.0). The layer computes
y = (W0 - U C) x + s B diag(S) A x, started from the leading triplets of W0, with the penalty
R = mean over all factor matrices of ||A A^T - I||_F and ||B^T B - I||_F.

Differs from the paper and its code:
- The base stays untouched by default (see `_principal`); `base_mode="residual"` is the paper's form.
- The decomposition runs in fp32; the code's cast to fp32 has no effect.
- With an alpha, S starts at Sigma / s, so that what the base gives up is its leading part; the code takes s
  times that part out, and its S s times as large, so that its "residual" is none.
- ||M||_F is smoothed to sqrt(||M||_F^2 + eps^2) - eps. At the start M is rounding noise, and the gradient of
  the unsmoothed norm would turn that noise into a step of full length. `ortho_eps=0` is the paper's norm.
- As in the code, gamma / (peak learning rate) times the gradient of R is added after clipping and goes
  through the optimizer's moments; the paper writes two learning rates on one schedule, which is the same for
  SGD. Here that happens inside `Optimizer.step` (`core.grad_terms`), in any loop, with no callback to
  register.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.checks import check, check_choice
from ..core.dist import full_tensor
from ..core.grad_terms import GradTerm, GroupOf
from ..core.lowrank import TruncatedSVD
from ..core.registry import Variant
from ._base import register_adapter
from ._offset import RESIDUAL_LACKS
from ._principal import PrincipalConfig, PrincipalLinear, PrincipalModel

__all__ = ["SorsaConfig", "orthonormality"]


@dataclass
class SorsaConfig(PrincipalConfig):
    """Settings of SORSA, beside those of every adapter and of its family (`PrincipalConfig`).

    Args:
        r: Rank of the trained part; the paper's runs use 128.
        gamma: Weight of the orthonormality penalty relative to the peak learning rate, >= 0; 0 switches it
            off. The peak is the parameter group's `max_lr` (OneCycleLR) or `initial_lr`, which every other
            learning-rate scheduler sets, or its `lr`.
        ortho_eps: Smoothing of the penalty's norms, in units of sqrt(r), >= 0.
        ortho_form: "norm" for the Frobenius norm, "squared" for its square.
    """

    r: int = 16
    gamma: float = 4e-4
    ortho_eps: float = 1e-4
    ortho_form: str = "norm"

    def validate(self) -> None:
        """Check SORSA's own fields."""
        super().validate()
        check(self.gamma >= 0.0, "gamma", self.gamma, "at least 0")
        check(self.ortho_eps >= 0.0, "ortho_eps", self.ortho_eps, "at least 0")
        check_choice("ortho_form", self.ortho_form, ("norm", "squared"))


@register_adapter(
    "sorsa",
    config=SorsaConfig,
    model=PrincipalModel,
    summary="leading singular triplets, trained with the factors held near orthonormal",
    paper="arXiv:2409.00055",
    supports={
        "starts_at_base",
        "exact_base",
        "merge",
        "lora_export",
        "multi_adapter",
        "conv1d",
        "quantized",
        "embeddings",
        "convolutions",
    },
    test_kwargs={"r": 4},
    variants=(Variant(name="residual", test_kwargs={"base_mode": "residual"}, lacks=RESIDUAL_LACKS),),
    bad_kwargs=(
        {"r": 0},
        {"alpha": 0.0},
        {"gamma": -1e-4},
        {"ortho_eps": -1.0},
        {"ortho_form": "cubed"},
        {"base_mode": "other"},
        {"dropout": 1.0},
        {"n_iter": -1},
        {"oversample": -1},
    ),
)
class SorsaLinear(PrincipalLinear):
    """Linear layer with s B diag(S) A beside it; equal to its base layer at the start.

    A checkpoint holds sorsa_A (r, in_features), sorsa_S (r,), sorsa_B (out_features, r) and, frozen, sorsa_U
    (out_features, r) and sorsa_C (r, in_features).
    """

    adapter_layer_names = ("sorsa_A", "sorsa_S", "sorsa_B")
    adapter_frozen_names = ("sorsa_U", "sorsa_C")
    offset_names = ("sorsa_U", "sorsa_C")
    inner_names = ("sorsa_A", "sorsa_C")

    sorsa_A: nn.ParameterDict
    sorsa_S: nn.ParameterDict
    sorsa_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, module_name: str, **quantization: Any) -> None:
        super().__init__(base_layer, module_name, **quantization)
        ORTHONORMALITY.watch(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # a copied or unpickled layer carries the penalty too
        ORTHONORMALITY.watch(self)

    def shapes(self, r: int, config: SorsaConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {
            "sorsa_A": (r, self.in_features),
            "sorsa_S": (r,),
            "sorsa_B": (self.out_features, r),
            "sorsa_U": (self.out_features, r),
            "sorsa_C": (r, self.in_features),
        }

    def start(self, svd: TruncatedSVD, scale: float) -> dict[str, Tensor]:
        """Return A = V^T, S = Sigma / s and B = U."""
        return {"sorsa_A": svd.vh, "sorsa_S": svd.s / scale, "sorsa_B": svd.u.clone()}

    @classmethod
    def trained_factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return s B diag(S) and A."""
        return tensors["sorsa_B"] * (scale * tensors["sorsa_S"]), tensors["sorsa_A"]

    def forward_trained(self, x: Tensor, name: str) -> Tensor:
        """Return s B (S * (A x))."""
        a, s, b = self.sorsa_A[name], self.sorsa_S[name], self.sorsa_B[name]
        # Scaling r numbers per token is cheaper than scaling out_features of them.
        inner = self.layout.project(x, a) * self.layout.per_feature(self.scale[name] * s)
        return self.layout.expand(inner, b)

    @classmethod
    def training_metrics(cls, model: nn.Module) -> dict[str, float]:
        """Return the mean distance of the trained factors from orthonormal ones."""
        matrices = _matrices(model)
        return {"orthonormality": _mean_norm(matrices)} if matrices else {}

    def factor_matrices(self, names: Sequence[str]) -> Iterator[tuple[str, nn.Parameter, bool]]:
        """Yield adapter name, factor, and whether its rows (A) or columns (B) are the singular vectors.

        Filters are rows; an embedding's factors are kept transposed.
        """
        turned = self.layout.kind == "embedding"
        for name in names:
            if name in self.configs:
                yield name, cast(nn.Parameter, self.sorsa_A[name]), not turned
                yield name, cast(nn.Parameter, self.sorsa_B[name]), turned


def orthonormality_gradients(
    factors: Sequence[Tensor], by_rows: Sequence[bool], eps: float, form: str = "norm"
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each factor's smoothed ||M|| and its gradient, with M = F F^T - I (rows) or F^T F - I (columns).

    The norm is sqrt(||M||_F^2 + e^2) - e with e = eps sqrt(r), its gradient 2 M F / sqrt(||M||_F^2 + e^2);
    the squared form is ||M||_F^2 with gradient 4 M F. Factors of one shape are done in one batch.

    Args:
        factors: (r, n) or (m, r) each.
        by_rows: For each factor, whether its r rows rather than its r columns should be orthonormal.
        eps: Smoothing in units of sqrt(r).
        form: "norm" or "squared".

    Returns:
        Norms, each (), and gradients, each of its factor's shape.
    """
    batches: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for index, (factor, rows) in enumerate(zip(factors, by_rows, strict=True)):
        batches[(*factor.shape, rows, factor.device)].append(index)
    norms: list[Tensor] = [torch.empty(0)] * len(factors)
    gradients: list[Tensor] = [torch.empty(0)] * len(factors)
    for key, indices in batches.items():
        rows = key[2]
        batch = torch.stack([factors[i] for i in indices])
        batch = batch if batch.dtype == torch.float64 else batch.float()  # (k, r, n) or (k, m, r)
        gram = batch @ batch.mT if rows else batch.mT @ batch
        gram.diagonal(dim1=-2, dim2=-1).sub_(1.0)
        square = gram.square().sum(dim=(-2, -1))  # (k,)
        if form == "squared":
            value, factor_of = square, torch.full_like(square, 4.0)
        else:
            e = eps * math.sqrt(gram.shape[-1])
            root = (square + e * e).sqrt()
            # root - e without its cancellation. Unsmoothed, the norm has no gradient at 0; 0 is a
            # subgradient.
            value = torch.where(root > 0.0, square / (root + e), 0.0)
            factor_of = torch.where(root > 0.0, 2.0 / root, 0.0)
        product = gram @ batch if rows else batch @ gram
        for position, index in enumerate(indices):
            norms[index] = value[position]
            gradients[index] = factor_of[position] * product[position]
    return norms, gradients


def _by_adapter(
    layers: Sequence[nn.Module], wanted: GroupOf | None
) -> dict[int, tuple[SorsaConfig, list[tuple[nn.Parameter, bool]]]]:
    # Layers of one injection share their config object: it tells which matrices are averaged together.
    adapters: dict[int, tuple[SorsaConfig, list[tuple[nn.Parameter, bool]]]] = {}
    for layer in layers:
        if not isinstance(layer, SorsaLinear) or layer.disable_adapters:
            continue
        for name, factor, rows in layer.factor_matrices(layer.active_adapters):
            config = cast(SorsaConfig, layer.configs[name])
            if factor.requires_grad and (wanted is None or wanted(factor) is not None):
                adapters.setdefault(id(config), (config, []))[1].append((factor, rows))
    return adapters


def _penalty_gradients(layers: list[nn.Module], group_of: GroupOf) -> Iterator[tuple[nn.Parameter, Tensor]]:
    counts = {key: len(matrices) for key, (_, matrices) in _by_adapter(layers, None).items()}
    for key, (config, matrices) in _by_adapter(layers, group_of).items():
        if config.gamma == 0.0:
            continue
        count = counts[key]  # of the adapter, also where several optimizers share it
        whole = [full_tensor(factor.detach()).flatten(1) for factor, _ in matrices]
        _, gradients = orthonormality_gradients(
            whole, [rows for _, rows in matrices], config.ortho_eps, config.ortho_form
        )
        for (factor, _), gradient in zip(matrices, gradients, strict=True):
            group = group_of(factor)
            assert group is not None
            # OneCycleLR's initial_lr is where its warm-up starts; its peak is max_lr.
            peak = max(float(group.get(name, 0.0)) for name in ("max_lr", "initial_lr", "lr"))
            rule = "0 where the peak learning rate is 0 (a warm-up by hand gives the group an initial_lr)"
            check(peak > 0.0, "gamma", config.gamma, rule)
            _warn_of_decay(group)
            yield factor, gradient.mul_(config.gamma / (peak * count)).reshape(factor.shape)


def _warn_of_decay(group: dict[str, Any]) -> None:
    if group.get("weight_decay", 0.0):  # Python shows a warning once; a mark in the group would be saved
        warnings.warn(
            "weight_decay pulls SORSA's factors away from orthonormality; set it to 0 for them", stacklevel=2
        )


def _penalised(layer: nn.Module) -> list[nn.Parameter]:
    adapters = _by_adapter([layer], None).values()
    return [factor for config, matrices in adapters if config.gamma > 0.0 for factor, _ in matrices]


ORTHONORMALITY = GradTerm(_penalty_gradients, title="SORSA's gamma", parameters=_penalised)


def orthonormality(model: nn.Module) -> float:
    """Return R of the active SORSA adapters: the mean of ||A A^T - I||_F and ||B^T B - I||_F over layers.

    Raises:
        ValueError: The model has no active, trainable SORSA adapter.
    """
    matrices = _matrices(model)
    check(bool(matrices), "model", type(model).__name__, "one with an active, trainable SORSA adapter")
    return _mean_norm(matrices)


def _matrices(model: nn.Module) -> list[tuple[nn.Parameter, bool]]:
    return [m for _, found in _by_adapter(list(model.modules()), None).values() for m in found]


def _mean_norm(matrices: Sequence[tuple[nn.Parameter, bool]]) -> float:
    norms, _ = orthonormality_gradients(
        [full_tensor(factor.detach()).flatten(1) for factor, _ in matrices],
        [rows for _, rows in matrices],
        eps=0.0,
    )
    return float(torch.stack([norm.cpu() for norm in norms]).mean())
