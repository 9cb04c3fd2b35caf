"""LoLDU: frozen lower and upper factors of the weight itself, with one trained number for each rank.

Source: Shi et al. 2024, "LoLDU: Low-Rank Adaptation via Lower-Diag-Upper Decomposition for
Parameter-Efficient Fine-Tuning", arXiv 2410.13618; authors' code SKDDJ/LoLDU. With P^T W0 = L D U (LU with
partial pivoting), L_r the first r columns of P L, U_r the first r rows of U and z0 the first r pivots, the
paper trains z in y = (W0 - s L_r diag(z0) U_r) x + s L_r diag(z) U_r x + b, started at z0.

Differs from the paper and its code:
- delta = z - z0 is trained: y = W0 x + b + s L_r (delta * (U_r x)). Values and gradients are the same, the
  base stays untouched and the start is exact. Only weight decay differs: it pulls delta to the base model.
- The permutation is folded into L_r; the code keeps it as a dense matrix that every forward multiplies by.
- Only r steps of the elimination are done, in fp64 on the CPU (`core.lu`).
- s is 1 without an alpha. The code's own defaults disagree with one another, and its s does not train.
- Of the code's starts for z only its LU values and zeros are here: the others change the output at random.
- "first r" goes by the order of elimination, as in the code; `selection="largest"` ranks the terms by size.
- The factors are not orthogonal, whatever the code calls them: triangular ones are not.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check, check_choice
from ..core.lowrank import seeded
from ..core.lu import LUFactors, truncated_lu
from ..core.registry import Variant
from ._base import AdapterConfig, ScaledConfig, register_adapter
from ._recomputed import RecomputedLinear, RecomputedModel, bilinear_form, weight_fingerprint

__all__ = ["LolduConfig"]

WEIGHT_TOLERANCE = 1e-9  # of the base's fingerprint: equal bits, summed in another order
DEQUANTIZED_TOLERANCE = 1e-3  # the same where the weight is a quantization backend's reading of its bits
FACTOR_TOLERANCE = 2e-3  # of the factors' fingerprint: it must survive factors that were cast to bf16


@dataclass
class LolduConfig(ScaledConfig):
    """Settings of LoLDU, beside those of every adapter and its scale (`ScaledConfig`).

    Args:
        r: Number of terms of the factorization, and of trained numbers in each layer.
        selection: "leading" for the first r terms in order of elimination; "largest" for those of largest
            norm, which takes a full factorization of every layer.
        train_scale: Whether the scale is trained too, one more number in each layer.
        save_factors: Whether checkpoints hold L_r and U_r, (out_features + in_features) r numbers for each
            layer. Without them loading factorizes the base again, and refuses another base.
        init_method: "lu" starts at the base model; "zeros" takes the r terms out of it, which changes the
            output.
    """

    r: int = 64
    selection: str = "leading"
    train_scale: bool = False
    save_factors: bool = False
    init_method: str = "lu"

    def validate(self) -> None:
        """Check LoLDU's own fields."""
        super().validate()
        check_choice("selection", self.selection, ("leading", "largest"))
        check_choice("init_method", self.init_method, ("lu", "zeros"))


class Origin(NamedTuple):
    """What one adapter's factors came from: all that it takes to compute them again.

    Args:
        pivots: Row of each pivot, (r,), int32.
        dtype: Smallest floating dtype that holds the base weight's values.
        fingerprint: That of the base weight.
    """

    pivots: Tensor
    dtype: torch.dtype
    fingerprint: float


class LolduTuner(RecomputedModel):
    """Tuner of LoLDU layers."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter, and warn, once for all layers, of trained numbers that cannot train well."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        if not self.peft_config[adapter_name].inference_mode:
            _warn_of_rows(
                {
                    layer.module_name: layer.loldu_U[adapter_name].detach().norm(dim=1)
                    for layer in self.adapter_layers(adapter_name)
                    if isinstance(layer, LolduLinear) and not layer.loldu_U[adapter_name].is_meta
                }
            )


@register_adapter(
    "loldu",
    config=LolduConfig,
    model=LolduTuner,
    summary="one trained number per rank, between frozen LU factors of the weight itself",
    paper="arXiv:2410.13618",
    supports={"starts_at_base", "exact_base", "merge", "lora_export", "multi_adapter", "conv1d", "quantized"},
    test_kwargs={"r": 4, "save_factors": True},
    variants=(
        Variant(name="recomputed", test_kwargs={"save_factors": False}),
        Variant(name="largest", test_kwargs={"r": 8, "selection": "largest", "save_factors": False}),
        Variant(name="train_scale", test_kwargs={"train_scale": True, "alpha": 8.0}),
    ),
    bad_kwargs=(
        {"r": 0},
        {"alpha": 0.0},
        {"selection": "first"},
        {"init_method": "uniform"},
        {"train_scale": "yes"},
        {"dropout": 1.0},
    ),
)
class LolduLinear(RecomputedLinear):
    """Linear layer with s L_r diag(delta) U_r beside it; equal to its base layer at the start.

    A checkpoint holds loldu_delta (r,), or (r + 1,) with train_scale, whose last entry is then the scale; and
    with save_factors loldu_L (out_features, r), loldu_U (r, in_features) and loldu_z0 (r,), frozen, else
    loldu_pivots (r,), int32, loldu_fingerprint (2,), fp64, and loldu_dtype (1,), a zero of the base's dtype.
    """

    adapter_layer_names = ("loldu_delta",)
    adapter_frozen_names = ("loldu_L", "loldu_U", "loldu_z0")
    recomputed_names = adapter_frozen_names
    mark_names = ("fingerprint", "pivots", "dtype")
    kept_by = "save_factors"

    loldu_delta: nn.ParameterDict
    loldu_L: nn.ParameterDict
    loldu_U: nn.ParameterDict
    loldu_z0: nn.ParameterDict

    def __init__(self, base_layer: nn.Module, module_name: str, **quantization: Any) -> None:
        super().__init__(base_layer, module_name, **quantization)
        self.loldu_origin: dict[str, Origin] = {}
        self.other_param_names = (*self.other_param_names, "loldu_origin")
        self._computed: Origin | None = None

    def shapes(self, r: int, config: LolduConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of each tensor."""
        return {
            "loldu_delta": (r + config.train_scale,),
            "loldu_L": (self.out_features, r),
            "loldu_U": (r, self.in_features),
            "loldu_z0": (r,),
        }

    # Start ----------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Create one adapter's tensors, and remember what they came from.

        Raises:
            ValueError: The settings do not fit, or the base weight is not finite.
        """
        self._computed = None
        super().add_adapter(name, config)
        if self._computed is not None:
            self.loldu_origin[name], self._computed = self._computed, None

    def initial_values(self, r: int, config: LolduConfig, weight: Tensor | None) -> dict[str, Tensor]:
        """Return the frozen factors of the base weight, and the start of delta."""
        assert weight is not None
        weight = weight.cpu()  # factors must come out alike wherever the model is
        lu = truncated_lu(weight, r, selection=config.selection, name=self.module_name)
        if not config.save_factors:
            pivots = lu.pivots.to(torch.int32)
            self._computed = Origin(pivots, smallest_dtype(weight), weight_fingerprint(weight))
        values = _frozen(lu)
        delta = torch.zeros(r) if config.init_method == "lu" else -values["loldu_z0"]
        return {**values, "loldu_delta": self._with_scale(delta, config)}

    def random_values(self, r: int, config: LolduConfig) -> dict[str, Tensor]:
        """Return the frozen factors with a normal delta, standard deviation 1 / sqrt(r)."""
        values = self.initial_values(r, config, self.base_weight())
        delta = torch.randn(r, generator=seeded(config.seed, self.module_name)) * r**-0.5
        return {**values, "loldu_delta": self._with_scale(delta, config)}

    def _with_scale(self, delta: Tensor, config: LolduConfig) -> Tensor:
        if not config.train_scale:
            return delta
        return torch.cat([delta, torch.tensor([config.scale_of(self.module_name)])])

    # Maths ----------------------------------------------------------------------------------------

    def forward_delta(self, x: Tensor, name: str) -> Tensor:
        """Return s L_r (delta * (U_r x))."""
        upper = self.loldu_U[name]  # the factors keep fp32 where a trainer has cast what is trained
        inner = F.linear(self._cast_input_dtype(self.adapter_dropout[name](x), upper.dtype), upper)
        return F.linear(
            inner * _diagonal(self.loldu_delta[name], len(upper), self.scale[name]), self.loldu_L[name]
        )

    @classmethod
    def factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return s L_r diag(delta) and U_r."""
        upper = tensors["loldu_U"]
        return tensors["loldu_L"] * _diagonal(tensors["loldu_delta"], len(upper), scale), upper

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Return one adapter's tensors, detached, whole, fp32, with a trained scale put into delta."""
        tensors = super().adapter_tensors(name)
        r = len(tensors["loldu_U"])
        if len(tensors["loldu_delta"]) > r:
            scale = self.scale[name]
            tensors["loldu_delta"] = _diagonal(tensors["loldu_delta"], r, scale) / scale
        return tensors

    # Checkpoints without the factors --------------------------------------------------------------

    def marks(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the pivots, the dtype of the base's values, and fingerprints of the base and the factors."""
        if dist.awaits_broadcast():  # rank 0 has them, and writes
            return {}
        origin = self.loldu_origin[name]
        return {
            "fingerprint": torch.tensor([origin.fingerprint, _form(tensors)], dtype=torch.float64),
            "pivots": origin.pivots.clone(),
            "dtype": torch.zeros(1, dtype=origin.dtype),
        }

    def recall(self, name: str, marks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the factors, computed again where the checkpoint's came from other pivots or rounding.

        Raises:
            ValueError: The base weight is not the one the adapter was trained on.
        """
        config = cast(LolduConfig, self.configs[name])
        pivots, dtype = self._checked(marks, config.rank_of(self.module_name))
        of_base, of_factors = (float(number) for number in marks["fingerprint"])
        origin, values = self.loldu_origin.get(name), self.recomputed(name)
        if origin is None or origin.dtype != dtype or not torch.equal(origin.pivots, pivots):
            weight = self.base_weight().cpu()
            origin = Origin(pivots, dtype, weight_fingerprint(weight.to(dtype)))
            self._compare(origin.fingerprint, of_base, smallest_dtype(weight), dtype)
            leading = config.selection == "leading"
            lu = truncated_lu(
                weight.to(dtype),
                len(pivots),
                selection=config.selection,
                pivots=pivots if leading else None,
                name=self.module_name,
            )
            same = torch.equal(lu.pivots, pivots.long())
            rule = "those of the checkpoint: equal candidates fell otherwise; save it with save_factors=True"
            check(same, "pivots", lu.pivots.tolist(), rule, where=self.module_name)
            values = {attribute: value.to(self._base_device()) for attribute, value in _frozen(lu).items()}
        self._compare(origin.fingerprint, of_base, origin.dtype, dtype)
        found = _form({attribute: dist.full_tensor(value) for attribute, value in values.items()})
        rule = f"{of_factors!r}, as in the checkpoint: the factors did not come out as they were"
        check(abs(found - of_factors) <= FACTOR_TOLERANCE, "fingerprint", found, rule, where=self.module_name)
        return values

    def adopt(self, name: str, marks: Mapping[str, Tensor]) -> None:
        """Remember what the loaded factors came from."""
        pivots, fingerprint = marks["pivots"].cpu().to(torch.int32), float(marks["fingerprint"][0])
        self.loldu_origin[name] = Origin(pivots, marks["dtype"].dtype, fingerprint)

    def _checked(self, marks: Mapping[str, Tensor], r: int) -> tuple[Tensor, torch.dtype]:
        pivots, numbers, dtype = marks["pivots"].cpu(), marks["fingerprint"], marks["dtype"].dtype
        given = pivots.tolist()
        rows = pivots.shape == (r,) and not pivots.is_floating_point() and len(set(given)) == r
        valid = rows and all(0 <= row < self.out_features for row in given)
        rule = f"{r} different rows of the {self.out_features} of the weight"
        check(valid, "pivots", given, rule, where=self.module_name)
        finite = numbers.shape == (2,) and bool(numbers.isfinite().all())
        check(finite, "fingerprint", numbers.tolist(), "two finite numbers", where=self.module_name)
        check(dtype.is_floating_point, "dtype", dtype, "a floating one", where=self.module_name)
        return pivots.to(torch.int32), dtype

    def _compare(self, found: float, wanted: float, now: torch.dtype, dtype: torch.dtype) -> None:
        tolerance = WEIGHT_TOLERANCE if self.quantization_backend is None else DEQUANTIZED_TOLERANCE
        if abs(found - wanted) <= tolerance:
            return
        lost = torch.finfo(now).eps > torch.finfo(dtype).eps
        hint = (
            f"; it was trained on {dtype} values, and the base now holds {now} ones: load it in {dtype}"
            if lost
            else ""
        )
        raise ValueError(
            f"{self.module_name}: the base weight differs from the one this adapter was trained on "
            f"(fingerprint {found!r}, in the checkpoint {wanted!r}){hint}"
        )


def smallest_dtype(weight: Tensor) -> torch.dtype:
    """Return bf16 or fp16 where it holds every value of an fp32 weight exactly, else fp32."""
    for dtype in (torch.bfloat16, torch.float16):
        # The first row tells nearly always, at no cost.
        if all(torch.equal(part.to(dtype).float(), part) for part in (weight[:1], weight)):
            return dtype
    return torch.float32


def _frozen(lu: LUFactors) -> dict[str, Tensor]:
    return {"loldu_L": lu.l.float(), "loldu_U": lu.u.float(), "loldu_z0": lu.d.float()}


def _diagonal(delta: Tensor, r: int, scale: float) -> Tensor:
    if len(delta) > r:  # a trained scale, at the end
        return delta[:r] * delta[r]
    return delta if scale == 1.0 else scale * delta


def _form(tensors: Mapping[str, Tensor]) -> float:
    # Random weights of the terms: their order counts, although the sum does not depend on it.
    lower, upper = (tensors[name].detach().cpu().double() for name in ("loldu_L", "loldu_U"))
    terms = torch.randn(len(upper), generator=seeded(0, "terms"), dtype=torch.float64)
    size = float(lower.norm() * upper.norm())
    return float(bilinear_form(lower * terms, upper)) / size if size else 0.0


def _warn_of_rows(norms: Mapping[str, Tensor], limit: float = 1e4) -> None:
    zero = {name: int((norm == 0.0).sum()) for name, norm in norms.items()}
    if any(zero.values()):
        layers = [name for name, count in zero.items() if count]
        warnings.warn(
            f"{sum(zero.values())} of {sum(map(len, norms.values()))} trained numbers have a factor of zeros "
            f"and no effect, in {len(layers)} layers, such as {layers[0]}: the rank of their weights is "
            "below r",
            stacklevel=3,
        )
    ratio = {}
    for name, norm in norms.items():
        rest = norm[norm > 0.0]
        ratio[name] = float(rest.max() / rest.median()) if len(rest) else 0.0
    large = [name for name in ratio if ratio[name] > limit]
    if large:
        worst = max(large, key=ratio.__getitem__)
        warnings.warn(
            f"in {len(large)} layers one row of U is over {limit:g} times as long as the median row, most in "
            f"{worst} ({ratio[worst]:.2g} times): its number dominates the gradient; lower the learning rate",
            stacklevel=3,
        )
