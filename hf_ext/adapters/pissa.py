"""PiSSA: LoRA that starts from the leading singular directions of the weight and trains them.

Source: Meng et al. 2024, "PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language
Models", arXiv 2404.02948, eq. 2-5. The layer computes y = (W0 - U C) x + s B A x, with A = (Sigma / s)^(1/2)
V^T and B = U (Sigma / s)^(1/2) at the start.

Differs from the paper and from PEFT's `init_lora_weights="pissa"`:
- The base stays untouched by default (see `_offset`); `base_mode="residual"` is the paper's form.
- On a quantized base the residual mode is QPiSSA (section 3.3 of the paper and its code): the residual of the
  full-precision weight, read from `original_weights`, is what is quantized, in `qpissa_iters` rounds, each of
  which decomposes what the last one's quantized residual leaves of the weight.
- The decomposition is a seeded block Krylov one in fp32, and its outcome is stored: loading never repeats it,
  and the export to LoRA needs no copy of the initial adapter.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.checks import check
from ..core.files import tensor_of_model
from ..core.lowrank import TruncatedSVD, truncated_svd
from ..core.registry import Variant
from ._base import register_adapter
from ._offset import RESIDUAL_LACKS
from ._principal import PrincipalConfig, PrincipalLinear, PrincipalModel

__all__ = ["PissaConfig", "qpissa_error_ratios"]


@dataclass
class PissaConfig(PrincipalConfig):
    """Settings of PiSSA, beside those of every adapter and of its family (`PrincipalConfig`).

    Args:
        r: Rank of the trained part; the paper's runs use 128 and no dropout.
        original_weights: Folder or Hub id of the full-precision model, as safetensors: needed by the residual
            mode on a quantized base (QPiSSA), at injection and at every load; None elsewhere.
        qpissa_iters: Rounds of QPiSSA, >= 1.
    """

    r: int = 16
    original_weights: str | None = None
    qpissa_iters: int = 5

    def validate(self) -> None:
        """Check PiSSA's own fields."""
        super().validate()
        check(self.qpissa_iters >= 1, "qpissa_iters", self.qpissa_iters, "at least 1")
        check(
            self.original_weights is None or self.base_mode == "residual",
            "original_weights",
            self.original_weights,
            "None unless base_mode is 'residual' and the base is quantized",
        )


@register_adapter(
    "pissa",
    config=PissaConfig,
    model=PrincipalModel,
    summary="LoRA started from the leading singular directions of the weight, with the base left as it is",
    paper="arXiv:2404.02948",
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
        {"alpha": -1.0},
        {"base_mode": "additive"},
        {"n_iter": -1},
        {"oversample": -1},
        {"qpissa_iters": 0},
        {"original_weights": "a/b"},
    ),
)
class PissaLinear(PrincipalLinear):
    """Linear layer with s B A beside it; equal to its base layer at the start.

    A checkpoint holds pissa_A (r, in_features), pissa_B (out_features, r) and, frozen, pissa_U (out_features,
    r) and pissa_C (r, in_features).
    """

    adapter_layer_names = ("pissa_A", "pissa_B")
    adapter_frozen_names = ("pissa_U", "pissa_C")
    offset_names = ("pissa_U", "pissa_C")
    inner_names = ("pissa_A", "pissa_C")

    pissa_A: nn.ParameterDict
    pissa_B: nn.ParameterDict

    def shapes(self, r: int, config: PissaConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {
            "pissa_A": (r, self.in_features),
            "pissa_B": (self.out_features, r),
            "pissa_U": (self.out_features, r),
            "pissa_C": (r, self.in_features),
        }

    def start(self, svd: TruncatedSVD, scale: float) -> dict[str, Tensor]:
        """Return A = (Sigma / s)^(1/2) V^T and B = U (Sigma / s)^(1/2)."""
        if not float(svd.s[0]) > 0.0:
            warnings.warn(
                f"{self.module_name} has a weight of zeros: A and B start at 0, where no gradient moves them",
                stacklevel=2,
            )
        root = (svd.s / scale).sqrt()
        return {"pissa_A": root[:, None] * svd.vh, "pissa_B": svd.u * root}

    @classmethod
    def trained_factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return s B and A."""
        return scale * tensors["pissa_B"], tensors["pissa_A"]

    @classmethod
    def module_factors(
        cls, tensors: Mapping[str, Tensor], config: Any, module: str
    ) -> tuple[Tensor, Tensor] | None:
        """Return the update's factors.

        Raises:
            ValueError: It is QPiSSA's: its base is neither the original nor its quantized form.
        """
        rule = (
            "None for an export against the base: QPiSSA's update is of the quantized residual alone "
            "(against='quantized_base')"
        )
        check(
            config.original_weights is None, "original_weights", config.original_weights, rule, where=module
        )
        return super().module_factors(tensors, config, module)

    @classmethod
    def quantized_base_factors(
        cls, tensors: Mapping[str, Tensor], config: Any, module: str
    ) -> tuple[Tensor, Tensor]:
        """Return s B and A, which QPiSSA adds to the quantized residual.

        Raises:
            ValueError: The adapter is not QPiSSA's.
        """
        rule = "set, as QPiSSA's is, for an export against the quantized residual"
        given = config.original_weights
        check(given is not None, "original_weights", given, rule, where=module)
        return cls.trained_factors(tensors, config.scale_of(module))

    def forward_trained(self, x: Tensor, name: str) -> Tensor:
        """Return s B (A x)."""
        inner = self.layout.project(x, self.pissa_A[name]) * self.scale[name]
        return self.layout.expand(inner, self.pissa_B[name])

    # QPiSSA ---------------------------------------------------------------------------------------

    def writes_residual(self, config: PissaConfig) -> bool:
        """Return whether a residual can be written: into a quantized base from the original weights only."""
        backend = self.quantization_backend
        if backend is None:
            check(
                config.original_weights is None,
                "original_weights",
                config.original_weights,
                "None on a base that is not quantized",
                where=self.module_name,
            )
            return True
        check(
            config.original_weights is None or backend.supports_merge,
            "base_mode",
            "residual",
            f"'projected' on a {backend.backend_name} base, which cannot be written",
            where=self.module_name,
        )
        return config.original_weights is not None

    def _is_quantized_residual(self, config: PissaConfig) -> bool:
        return config.base_mode == "residual" and self.quantization_backend is not None

    def original_weight(self, config: PissaConfig) -> Tensor:
        """Return the full-precision weight, fp32, (out_features, in_features).

        Raises:
            FileNotFoundError: There is no such model.
            ValueError: The model has no such layer, or one of another shape.
        """
        folder = _model_folder(cast(str, config.original_weights))
        weight = tensor_of_model(folder, f"{self.module_name}.weight").float()
        weight = self.layout.matrix(weight)
        shape = (self.out_features, self.in_features)
        rule = f"the model that was quantized, whose {self.module_name} is {shape}"
        check(tuple(weight.shape) == shape, "original_weights", tuple(weight.shape), rule)
        return weight.to(self._base_device())

    def initial_values(self, r: int, config: Any, weight: Tensor | None) -> dict[str, Tensor]:
        """Return A, B, U and C; on a quantized base in residual mode those of QPiSSA's last round."""
        if not self._is_quantized_residual(config):
            return super().initial_values(r, config, weight)
        original = self.original_weight(config)
        before, rest = self.snapshot(), original
        options = {"oversample": config.oversample, "n_iter": config.n_iter, "seed": config.seed}
        try:
            for _ in range(config.qpissa_iters - 1):
                svd = truncated_svd(rest, r, name=self.module_name, **options)
                self._quantize(original - (svd.u * svd.s) @ svd.vh)
                rest = original - self.base_weight()
        finally:
            self.restore(before)
        svd = truncated_svd(rest, r, name=self.module_name, **options)
        values = self.start(svd, config.scale_of(self.module_name))
        return {**values, "pissa_U": svd.u, "pissa_C": svd.s[:, None] * svd.vh}

    def _quantize(self, weight: Tensor) -> None:
        dtype = self.get_base_weight().dtype  # the format's own: another would be kept as its output's
        self.set_base_weight(self.layout.weight(weight).to(dtype).contiguous())

    def after_change(self) -> None:
        """Write the residual into the base, where an adapter asks for it and has not done so."""
        if self.quantization_backend is None:
            super().after_change()
            return
        for name, config in self.configs.items():
            if self.residual_of is None and self._is_quantized_residual(cast(PissaConfig, config)):
                if self.awaits_values(name):
                    continue
                self.residual_of = name
                self._quantize_residual(name)

    def _quantize_residual(self, name: str) -> None:
        original = self.original_weight(cast(PissaConfig, self.configs[name]))
        self._quantize(original - self._product(name))
        self._written = self._state_of(name)

    def forward_base(
        self, x: Tensor, active: list[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, list[str]]:
        """Return the base layer's output, its quantized residual being that of U C as they are now."""
        name = self.residual_of
        quantized = self.quantization_backend is not None and not torch.compiler.is_compiling()
        if name is not None and quantized and self._written != self._state_of(name):
            self._quantize_residual(name)
        return super().forward_base(x, active, *args, **kwargs)

    def rewrite_residual(self, name: str, left: Tensor, right: Tensor) -> None:
        """Write the residual anew after U and C have changed."""
        if self.quantization_backend is None:
            super().rewrite_residual(name, left, right)
        else:
            self._quantize_residual(name)

    def give_back(self, name: str) -> None:
        """Put back what one adapter has taken out; a quantized residual gives way to the original."""
        if self.quantization_backend is None:
            super().give_back(name)
        else:
            self._quantize(self.original_weight(cast(PissaConfig, self.configs[name])))

    def quantization_errors(self, name: str) -> tuple[float, float]:
        """Return what quantization costs this layer, without and with QPiSSA, as Frobenius norms.

        The first is ||W0 - Q(W0)||, the second ||W0 - (what the layer computes with one adapter alone)||.
        """
        config = cast(PissaConfig, self.configs[name])
        original, before = self.original_weight(config), self.snapshot()
        found = original - self.base_weight() - self._product(name) - self.delta_weight(name)
        try:
            self._quantize(original)
            plain = original - self.base_weight()
        finally:
            self.restore(before)
        return float(plain.norm()), float(found.norm())

    def delta_weight(self, name: str) -> Tensor:
        """Return the update s B A - U C, fp32, (out_features, in_features)."""
        b, a = self.trained_factors(self.adapter_tensors(name), self.scale[name])
        return b @ a - self._product(name)


def qpissa_error_ratios(model: nn.Module, adapter_name: str = "default") -> dict[str, float]:
    """Return, for each layer under QPiSSA, its quantization error over that of the plain quantized weight.

    Before training that is ||W0 - Q - s B A||_F / ||W0 - Q(W0)||_F, one less the paper's error reduction.

    Raises:
        ValueError: The adapter is not one of QPiSSA's.
    """
    ratios = {}
    for layer in model.modules():
        if not isinstance(layer, PissaLinear) or layer.quantization_backend is None:
            continue
        if layer.residual_of == adapter_name:
            plain, found = layer.quantization_errors(adapter_name)
            ratios[layer.module_name] = found / plain
    check(bool(ratios), "adapter_name", adapter_name, "one in residual mode on a quantized base")
    return ratios


@lru_cache(maxsize=8)
def _model_folder(name: str) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=["*.safetensors", "*.safetensors.index.json"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"original_weights {name!r} is no folder here, and nothing that the Hub gives: {error}"
        ) from error
