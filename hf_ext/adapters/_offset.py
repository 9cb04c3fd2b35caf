"""Adapters whose trained product starts as a fixed one, which is taken out of the base.

The layer computes (W0 - L R) x + f(x) with a frozen product L R (L (out_features, k), R (k, in_features)),
where f starts as L R: the start changes nothing, and f is not small. The principal-component family and
LoRA-GA are of this form; `base_mode` says how L R is taken out:

- "projected" (LoRA-GA: "additive"): the base weight is not written, -L R x is part of the adapter's output.
  So disabling the adapter gives the base model, several adapters compose, quantized bases work, and the
  update f - L R needs nothing but the checkpoint to be exported.
- "residual": W0 - L R is written into the base, for LoRA's speed; what the adapter has taken out is added
  back wherever the adapter is not active.

L and R travel with the checkpoint, so that loading never repeats how they were found.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check, check_choice
from ._base import AdapterConfig, AdapterLinear, ScaledConfig

# Capability flags that the residual mode takes away.
RESIDUAL_LACKS = frozenset({"exact_base", "multi_adapter", "quantized"})


@dataclass
class OffsetConfig(ScaledConfig):
    """Settings of adapters that take a frozen product out of the base, beside those of `ScaledConfig`.

    Args:
        base_mode: "residual" writes the base weight less the product into the base; the class's other choice
            leaves the base weight untouched.
    """

    base_mode: str = "projected"

    untouched_mode: ClassVar[str] = "projected"

    @property
    def writes_base(self) -> bool:
        """Whether an injection writes into the base weights."""
        return self.base_mode == "residual"

    def validate(self) -> None:
        """Check the mode."""
        super().validate()
        check_choice("base_mode", self.base_mode, (self.untouched_mode, "residual"))


class OffsetLinear(AdapterLinear):
    """Linear layer out of whose base a frozen product is taken, in exchange for trained factors.

    A method names its frozen tensors (L, R) and gives the trained part as factors (`trained_factors`) and as
    a forward (`forward_trained`).
    """

    offset_names: ClassVar[tuple[str, str]]  # attribute names of L (out_features, k) and R (k, in_features)

    def __init__(self, base_layer: nn.Module, module_name: str, **quantization: Any) -> None:
        super().__init__(base_layer, module_name, **quantization)
        # Name of the adapter whose L R is missing from the stored base weight.
        self.residual_of: str | None = None
        self._offset_before_load: tuple[Tensor, Tensor] | None = None
        self._base_loaded = False
        # Kept until the first forward: a checkpoint loaded right after injection starts from exact weights.
        self._original: Any = None
        self._written: tuple[int, ...] = ()  # which L and R the residual was written for
        self.register_load_state_dict_pre_hook(_remember_offset)
        self.register_load_state_dict_post_hook(_refresh_residual)

    # What a method supplies ------------------------------------------------------------------------

    @classmethod
    @abstractmethod
    def trained_factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return B (out_features, r) and A (r, in_features) of the trained part, scale included."""

    @abstractmethod
    def forward_trained(self, x: Tensor, name: str) -> Tensor:
        """Return the trained part's output for x, already dropped out."""

    @classmethod
    def offset_scale(cls, scale: float) -> float:
        """Return the factor of L R, where it is not 1; `scale` is the layer's."""
        return 1.0

    # Start ----------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Create one adapter's tensors.

        Raises:
            ValueError: The settings do not fit, or a second adapter asks for the residual mode.
        """
        residual = cast(OffsetConfig, config).base_mode == "residual"
        if residual:
            self.check_residual(cast(OffsetConfig, config))
        super().add_adapter(name, config)
        if residual and dist.awaits_broadcast():
            self.residual_of = name  # the residual itself comes from rank 0

    def check_residual(self, config: OffsetConfig) -> None:
        """Check that the residual mode is possible on this layer.

        Raises:
            ValueError: Another adapter has already written its residual, or the base cannot be written.
        """
        untouched = repr(config.untouched_mode)
        check(
            self.residual_of is None,
            "base_mode",
            "residual",
            f"{untouched} beside adapter {self.residual_of!r}, which has already written its residual",
            where=self.module_name,
        )
        check(
            self.writes_residual(config)
            and not hasattr(getattr(self.get_base_layer(), "weight", None), "full_tensor"),
            "base_mode",
            "residual",
            f"{untouched} on a quantized or sharded base: the residual would be rounded or misplaced",
            where=self.module_name,
        )

    def writes_residual(self, config: Any) -> bool:
        """Return whether a residual can be written into this kind of base."""
        return self.quantization_backend is None

    def random_values(self, r: int, config: Any) -> dict[str, Tensor]:
        """Return random trained tensors that are added to the whole base weight: nothing is taken out."""
        values = super().random_values(r, config)
        return {**values, **{name: torch.zeros_like(values[name]) for name in self.offset_names}}

    def offset(self, name: str) -> tuple[Tensor, Tensor]:
        """Return one adapter's frozen L (out_features, k) and R (k, in_features), as they are kept."""
        left, right = self.offset_names
        return getattr(self, left)[name], getattr(self, right)[name]

    # Maths ----------------------------------------------------------------------------------------

    @classmethod
    def factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return the update's factors [B, -L] (out_features, r + k) and [A; R] (r + k, in_features)."""
        b, a = cls.trained_factors(tensors, scale)
        left, right = (tensors[name] for name in cls.offset_names)
        return torch.cat([b, -cls.offset_scale(scale) * left], dim=1), torch.cat([a, right], dim=0)

    def forward_delta(self, x: Tensor, name: str) -> Tensor:
        """Return the trained part, less L R x where the stored base still holds it."""
        out = self.layout.drop(self.adapter_dropout[name], x, lambda kept: self.forward_trained(kept, name))
        return out if self.residual_of == name else out - self._forward_offset(x, name)

    def _forward_offset(self, x: Tensor, name: str) -> Tensor:
        left, right = self.offset(name)
        # L and R keep fp32 where a trainer has cast what is trained.
        inner = self.layout.project(self._cast_input_dtype(x, right.dtype), right)
        factor = self.offset_scale(self.scale[name])
        return self.layout.expand(inner if factor == 1.0 else inner * factor, left)

    def forward_base(
        self, x: Tensor, active: list[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, list[str]]:
        """Return the base layer's output, its residual being that of L R as they are now."""
        if self._original is not None:
            self._settle()
        return super().forward_base(x, active, *args, **kwargs)

    def add_inactive(self, out: Tensor, x: Tensor, active: Sequence[str]) -> Tensor:
        """Put L R x back where the adapter that wrote its residual is not active."""
        name = self.residual_of
        return out if name is None or name in active else out + self._forward_offset(x, name)

    def _settle(self) -> None:
        """At the first forward, write the residual of L R as it is now, and let the original go.

        transformers' `load_adapter` sets parameters without `load_state_dict`.
        """
        name = self.residual_of
        if torch.compiler.is_compiling() or dist.is_distributed() or name is None:
            self._original = None
            return
        if self._state_of(name) != self._written:
            self._write_base(self._original, -1.0, self._product(name))
        self._original = None

    def _state_of(self, name: str) -> tuple[int, ...]:
        return tuple(number for tensor in self.offset(name) for number in (id(tensor), tensor._version))

    def stored_delta(self, names: Sequence[str]) -> Tensor:
        """Return what turns the stored base weight into the merged one, fp32."""
        return super().stored_delta(names) + self.taken_out()

    # The residual in the base ---------------------------------------------------------------------

    def _product(self, name: str) -> Tensor:
        return self._multiplied(*self.offset(name), self.scale[name])

    def _multiplied(self, left: Tensor, right: Tensor, scale: float) -> Tensor:
        left, right = (self.plain(key, t) for key, t in zip(self.offset_names, (left, right), strict=True))
        return (self.offset_scale(scale) * left.float() @ right.float()).detach()

    def taken_out(self) -> Tensor | float:
        """Return what the stored base weight lacks of the original, fp32; 0.0 where nothing."""
        return 0.0 if self.residual_of is None else self._product(self.residual_of)

    def original(self, weight: Tensor) -> Tensor:
        """Return a stored base weight, fp32, with what it lacks put back; the same tensor where nothing."""
        return weight if self.residual_of is None else weight + self.taken_out()

    def base_beside(self, name: str) -> Tensor | None:
        """Return the base weight that goes with one adapter's tensors: without another one's residual."""
        found = super().base_beside(name)
        if self.takes_base(name):
            return found
        weight = self.base_parameter().data if found is None else found
        return (weight.float() + self.layout.weight(self._product(cast(str, self.residual_of)))).to(
            weight.dtype
        )

    def takes_base(self, name: str) -> bool:
        """Return whether no other adapter has taken anything out of the base."""
        return self.residual_of in (None, name)

    def after_change(self) -> None:
        """Write the residual into the base, where an adapter asks for it and has not done so."""
        for name, config in self.configs.items():
            if self.residual_of is None and cast(OffsetConfig, config).base_mode == "residual":
                if self.awaits_values(name) or self.base_parameter().is_meta:
                    continue
                self._original = self.base_parameter().data
                self.residual_of = name
                self._write_base(self._original, -1.0, self._product(name))
                self._written = self._state_of(name)

    def adopt_residual(self) -> None:
        """Take the base weight for the residual of the adapter that asks for one, whose tensors are there."""
        for name, config in self.configs.items():
            if cast(OffsetConfig, config).base_mode == "residual" and not self.awaits_values(name):
                self.residual_of, self._written = name, self._state_of(name)

    def rewrite_residual(self, name: str, left: Tensor, right: Tensor) -> None:
        """Write the residual of L and R as they are now into a base that lacks the product of earlier ones.

        Args:
            name: The adapter that has written its residual.
            left: L as it was then, (out_features, k), as it is kept.
            right: R as it was then, (k, in_features), as it is kept.
        """
        now = self.offset(name)
        left, right = left.to(now[0].device), right.to(now[1].device)
        if torch.equal(now[0], left) and torch.equal(now[1], right):
            return
        if self._original is None:
            self._write_base(self.base_parameter().data, 1.0, self._multiplied(left, right, self.scale[name]))
        base = self.base_parameter().data if self._original is None else self._original
        self._write_base(base, -1.0, self._product(name))
        self._written = self._state_of(name)

    def _write_base(self, weight: Tensor, sign: float, change: Tensor) -> None:
        check(
            not hasattr(weight, "full_tensor"),
            "base weight",
            "sharded",
            "whole to be written",
            where=self.module_name,
        )
        now = self.base_parameter()
        # PEFT's `low_cpu_mem_usage` moves an adapter to the base's device only after it has loaded it.
        change = self.layout.weight(change).to(now.device)
        new = weight.to(now.device).float() + sign * change
        now.data = new.to(now.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter, and give the base back what it had taken out (to the base dtype's rounding)."""
        if self.residual_of != adapter_name:
            super().delete_adapter(adapter_name)
            return
        merged = [name for name in self.merged_adapters if name != adapter_name]
        if self.merged_adapters:  # a merged weight holds what was taken out already
            self.unmerge()
        self.give_back(adapter_name)
        self.residual_of, self._original = None, None
        super().delete_adapter(adapter_name)
        if merged:
            self.merge(adapter_names=merged)

    def give_back(self, name: str) -> None:
        """Put what one adapter has taken out back into the base, which is not merged."""
        if self._original is not None:
            now = self.base_parameter()
            now.data = self._original.to(device=now.device, dtype=now.dtype)
        else:
            self._write_base(self.base_parameter().data, 1.0, self._product(name))


def _remember_offset(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    layer = cast(OffsetLinear, module)
    # A state of the whole model brings the base as it was, residual and all (FSDP loads so).
    whole = any(key.startswith(f"{prefix}base_layer.") for key in state_dict)
    layer._base_loaded = whole
    if whole:
        layer._original = None
    ours = any(key.startswith(f"{prefix}{name}.") for key in state_dict for name in layer.tensor_names)
    if ours and layer.merged_adapters:
        warnings.warn(f"{layer.module_name} is merged; unmerging it to load an adapter", stacklevel=2)
        layer.unmerge()
    if layer.residual_of is not None and not whole:
        left, right = layer.offset(layer.residual_of)
        layer._offset_before_load = (left.detach().clone(), right.detach().clone())


def _refresh_residual(module: nn.Module, _: object) -> None:
    """Rebuild the residual after a checkpoint has brought its own L and R."""
    layer = cast(OffsetLinear, module)
    before, layer._offset_before_load = layer._offset_before_load, None
    name = layer.residual_of
    if name is None:
        if layer._base_loaded:
            layer.adopt_residual()
        layer.after_change()
        return
    if before is not None:
        layer.rewrite_residual(name, *before)
