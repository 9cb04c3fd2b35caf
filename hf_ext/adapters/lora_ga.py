"""LoRA-GA: LoRA whose first step follows the gradient of full fine-tuning.

Source: Wang, Yu and Li 2024, "LoRA-GA: Low-Rank Adaptation with Gradient Approximation", arXiv 2407.05000,
section 3 and algorithm 1; authors' code Outsider565/LoRA-GA (Apache-2.0). With G ~ U Sigma V^T the mean
gradient of the loss with respect to the weight W0 (m, n), the layer computes
y = (W0 - s B0 A0) x + s B A x, started at A = A0 = c V[:, :r]^T and B = B0 = c U[:, r:2r] with
c = m^(1/4) / gamma^(1/2). One step of SGD then changes s B A by -lr s^2 c^2 times the best approximation of G
of rank 2r.

Differs from the paper, its code and PEFT's `init_lora_weights="lora_ga"`:
- The base stays untouched by default: A0 and B0 are frozen tensors (see `_offset`); `base_mode="residual"` is
  the paper's form. So loading needs no gradient, and the export to LoRA no copy of the initial adapter.
- G is never formed. Its two sketches G Omega and Psi G are summed up over tokens from each layer's input and
  the gradient of its output, in one pass over the data, and G is recovered from them as in Tropp et al. 2017,
  "Practical sketching algorithms for low-rank matrix approximation", eq. 4.3 (arXiv 1609.00048, algorithm 4).
  No weight needs a gradient, so quantized bases work. Further passes (`n_passes`) sharpen the outcome.
- As in the code and unlike PEFT: both factors are scaled, and neither by the singular values; the random
  direction draws disjoint indices; every process starts from the gradient of all data.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check, check_choice
from ..core.lowrank import seeded, truncated_svd
from ..core.registry import Variant
from ._base import AdapterConfig, register_adapter
from ._data_start import StartData, StartsFromData
from ._gradient_sketch import GradientSketches
from ._offset import RESIDUAL_LACKS, OffsetConfig, OffsetLinear

__all__ = ["LoraGaConfig"]


@dataclass
class LoraGaConfig(OffsetConfig):
    """Settings of LoRA-GA, beside those of every adapter and of its base (`OffsetConfig`).

    Args:
        r: Rank, at most half of every target layer's smaller side.
        alpha: Numerator of the scale, > 0; None for a scale of 1.
        use_rslora: Whether the scale is alpha / sqrt(r), as in the paper, rather than alpha / r.
        base_mode: "additive" leaves the base weight untouched; "residual" writes W0 - s B0 A0 into it.
        direction: Which singular vectors start A and B: "ArB2r" (the first r, the next r), "A2rBr" (the other
            way round), "ArBr" (the even and the odd ones) or "random".
        scale: "stable" (both times m^(1/4) / stable_gamma^(1/2)), "unit" (1), "gd" (both over s) or "weightS"
            (both times the mean of sqrt(sigma_i(W0) / s) over i <= r).
        stable_gamma: gamma of the stable scale, > 0.
        norm_clip: Whether to shrink s B0 A0 where its largest entry would be above the largest of W0.
        n_samples: Rows to estimate the gradient from, over all processes, >= 1; whole batches are used, and
            all rows where the data have fewer.
        n_passes: Passes over those rows, 1 to 3.
        sketch: Directions of the sketch, at least 2r; None for 12 r in one pass, 4 r in several.
        train_mode: Whether dropout acts while gradients are estimated; gradient checkpointing too, which
            transformers' models switch off outside training.
    """

    r: int = 8
    alpha: float | None = 16.0
    use_rslora: bool = True
    base_mode: str = "additive"
    direction: str = "ArB2r"
    scale: str = "stable"
    stable_gamma: float = 16.0
    norm_clip: bool = False
    n_samples: int = 64
    n_passes: int = 1
    sketch: int | None = None
    train_mode: bool = False

    untouched_mode: ClassVar[str] = "additive"

    def validate(self) -> None:
        """Check LoRA-GA's own fields."""
        super().validate()
        check_choice("direction", self.direction, ("ArB2r", "A2rBr", "ArBr", "random"))
        check_choice("scale", self.scale, ("stable", "unit", "gd", "weightS"))
        check(self.stable_gamma > 0.0, "stable_gamma", self.stable_gamma, "positive")
        check(self.n_samples >= 1, "n_samples", self.n_samples, "at least 1")
        check(1 <= self.n_passes <= 3, "n_passes", self.n_passes, "1, 2 or 3")
        largest = max([self.r, *self.rank_pattern.values()])
        check(
            self.sketch is None or self.sketch >= 2 * largest,
            "sketch",
            self.sketch,
            f"None or at least {2 * largest}, twice the largest rank",
        )

    def scale_of(self, module: str) -> float:
        """Return alpha / sqrt(r), or alpha / r, for one module path; 1 without an alpha."""
        plain = super().scale_of(module)
        has_alpha = self.value_for(module, self.alpha_pattern, self.alpha) is not None
        return plain * math.sqrt(self.rank_of(module)) if self.use_rslora and has_alpha else plain


@register_adapter(
    "lora_ga",
    config=LoraGaConfig,
    prefix="loraga_",  # PEFT would take "lora_" in it for LoRA's own
    summary="LoRA started so that its first step follows the gradient of full fine-tuning",
    paper="arXiv:2407.05000",
    supports={
        "starts_at_base",
        "starts_from_data",
        "exact_base",
        "merge",
        "lora_export",
        "multi_adapter",
        "conv1d",
        "quantized",
        "embeddings",
        "convolutions",
    },
    test_kwargs={"r": 4, "n_samples": 4},
    variants=(Variant(name="residual", test_kwargs={"base_mode": "residual"}, lacks=RESIDUAL_LACKS),),
    bad_kwargs=(
        {"r": 0},
        {"alpha": 0.0},
        {"base_mode": "projected"},
        {"direction": "ArBr2"},
        {"scale": "weight_svd"},
        {"stable_gamma": 0.0},
        {"n_samples": 0},
        {"n_passes": 4},
        {"r": 8, "sketch": 15},
    ),
)
class LoraGaLinear(StartsFromData, OffsetLinear):
    """Linear layer with s B A - s B0 A0 beside it; equal to its base layer at the start.

    A checkpoint holds loraga_A (r, in_features), loraga_B (out_features, r) and, frozen, loraga_A0 and
    loraga_B0 of the same shapes.
    """

    adapter_layer_names = ("loraga_A", "loraga_B")
    adapter_frozen_names = ("loraga_A0", "loraga_B0")
    offset_names = ("loraga_B0", "loraga_A0")
    inner_names = ("loraga_A", "loraga_A0")

    loraga_A: nn.ParameterDict
    loraga_B: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, module_name: str, **quantization: Any) -> None:
        super().__init__(base_layer, module_name, **quantization)
        self.watch()

    def check_rank(self, r: int, config: Any) -> None:
        """Check that 2r singular vectors exist."""
        limit = min(self.in_features, self.out_features) // 2
        rule = f"at most {limit}, half of the layer's smaller side"
        check(r <= limit, "r", r, rule, where=self.module_name)

    def shapes(self, r: int, config: LoraGaConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        a, b = (r, self.in_features), (self.out_features, r)
        return {"loraga_A": a, "loraga_B": b, "loraga_A0": a, "loraga_B0": b}

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Create one adapter's tensors, empty until data have been seen."""
        super().add_adapter(name, config)
        if config.init_weights:
            self.awaiting.add(name)

    def initial_values(self, r: int, config: Any, weight: Tensor | None) -> dict[str, Tensor]:
        """Return zeros: the start needs a gradient (`start_from_data`)."""
        return {name: torch.zeros(shape) for name, shape in self.shapes(r, config).items()}

    @classmethod
    def trained_factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return s B and A."""
        return scale * tensors["loraga_B"], tensors["loraga_A"]

    @classmethod
    def offset_scale(cls, scale: float) -> float:
        """Return s: what is taken out is s B0 A0."""
        return scale

    def forward_trained(self, x: Tensor, name: str) -> Tensor:
        """Return s B (A x)."""
        # In the order in which the offset is computed: at the start the two cancel to the bit.
        inner = self.layout.project(x, self.loraga_A[name]) * self.scale[name]
        return self.layout.expand(inner, self.loraga_B[name])

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output.

        Raises:
            RuntimeError: An active adapter is to be trained and has not been started.
        """
        self.check_started(() if self.disable_adapters else self.active_adapters)
        return super().forward(x, *args, **kwargs)

    @classmethod
    def start_from_data(cls, data: StartData) -> None:
        """Estimate every layer's gradient and start the factors from it."""
        config, name = data.config, data.adapter_name
        sketches = GradientSketches(
            data,
            ranks={path: 2 * config.rank_of(layer.module_name) for path, layer in data.layers.items()},
            size=config.sketch,
            n_passes=config.n_passes,
            n_samples=config.n_samples,
            train_mode=config.train_mode,
            seed=config.seed,
        )
        values = {}
        still = []
        for path, layer in data.layers.items():
            u, s, vh = sketches.leading(path)
            if not float(s[0]) > 0.0:
                still.append(layer.module_name)
            values[path] = layer.started(u, s, vh, config)
        if still:
            warnings.warn(
                f"no gradient reached {', '.join(still[:3])}{' and more' if len(still) > 3 else ''}: "
                "started as LoRA's own layers are",
                stacklevel=3,
            )
        for path, layer in data.layers.items():
            before = [tensor.detach().clone() for tensor in layer.offset(name)]
            for attribute, value in values[path].items():
                target = getattr(layer, attribute)[name]
                value = layer.stored(attribute, value)
                target.data.copy_(dist.broadcast_(value.to(target.device, torch.float32)))
            if layer.residual_of == name:
                layer.rewrite_residual(name, *before)

    def started(self, u: Tensor, s: Tensor, vh: Tensor, config: LoraGaConfig) -> dict[str, Tensor]:
        """Return the tensors started from the leading 2r triplets of the gradient.

        Args:
            u: (out_features, 2r).
            s: (2r,), falling.
            vh: (2r, in_features).
            config: The adapter's settings.
        """
        r = config.rank_of(self.module_name)
        generator = seeded(config.seed, self.module_name)
        if not float(s[0]) > 0.0:
            a = torch.empty(r, self.in_features)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5), generator=generator)
            zero = {n: torch.zeros(shape) for n, shape in self.shapes(r, config).items()}
            return {**zero, "loraga_A": a}
        for_a, for_b = directions(config.direction, r, generator)
        c = self._factor(config, r)
        a, b = c * vh[for_a].float(), c * u[:, for_b].float()
        if config.norm_clip:
            scale = config.scale_of(self.module_name)
            largest = scale * (b @ a).abs().max()
            limit = self.original(self.base_weight()).abs().max().to(largest.device)
            if largest > limit > 0.0:
                root = (limit / largest).sqrt()
                a, b = a * root, b * root
        return {"loraga_A": a, "loraga_B": b, "loraga_A0": a.clone(), "loraga_B0": b.clone()}

    def _factor(self, config: LoraGaConfig, r: int) -> float:
        scale = config.scale_of(self.module_name)
        if config.scale == "stable":
            return self.out_features**0.25 / math.sqrt(config.stable_gamma)
        if config.scale == "gd":
            return 1.0 / scale
        if config.scale == "weightS":
            weight = self.original(self.base_weight())
            sigma = truncated_svd(weight, r, seed=config.seed, name=self.module_name).s
            return float((sigma / scale).sqrt().mean())
        return 1.0


def directions(direction: str, r: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
    """Return which of the leading 2r singular vectors start the rows of A, and which the columns of B."""
    if direction == "ArB2r":
        return list(range(r)), list(range(r, 2 * r))
    if direction == "A2rBr":
        return list(range(r, 2 * r)), list(range(r))
    if direction == "ArBr":
        return list(range(1, 2 * r, 2)), list(range(0, 2 * r, 2))
    shuffled = torch.randperm(2 * r, generator=generator).tolist()
    return shuffled[:r], shuffled[r:]
