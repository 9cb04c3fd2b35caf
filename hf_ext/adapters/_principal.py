"""The principal-component family: adapters that train the leading singular directions of the base weight.

Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, eq. 2-5. With W0 the base weight, U (out_features, r) its
leading left singular vectors and C = U^T W0, the layer computes (W0 - U C) x + f(x), where f starts as U C.

Differs from the paper and from PEFT's PiSSA:
- The base weight is not written (`base_mode="projected"`): U and C are frozen tensors, and -U C x is part of
  the adapter's output. So disabling the adapter gives the base model, several adapters compose, quantized
  bases work, and the update f - U C needs nothing but the checkpoint to be exported. `base_mode="residual"`
  writes W0 - U C into the base, as the paper does, for LoRA's speed; what the adapter has taken out is then
  added back wherever the adapter is not active.
- U and C travel with the checkpoint, so that loading never repeats a decomposition, which is not reproducible
  across machines. `save_basis=False` leaves them out, repeats it and checks the outcome.
"""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check, check_choice
from ..core.lowrank import TruncatedSVD, seeded, truncated_svd
from ._base import AdapterConfig, AdapterLinear, AdapterModel

FINGERPRINT_TOLERANCE = (
    1e-3  # relative; another machine's decomposition differs by rounding, another base by more
)


@dataclass
class PrincipalConfig(AdapterConfig):
    """Settings of the principal-component family, beside those of every adapter.

    Args:
        alpha: Numerator of the scale alpha / r, > 0; None for a scale of 1. The start does not depend on it.
        alpha_pattern: alpha by module name or regular expression, where it differs.
        base_mode: "projected" leaves the base weight untouched; "residual" writes the residual into it.
        n_iter: Krylov steps of the decomposition after the first, >= 0; more, closer to the exact SVD.
        oversample: Directions that it seeks beyond r, >= 0; None for max(16, r // 4).
        save_basis: Whether checkpoints hold the frozen U and C (as large as the adapter itself). Without them
            loading decomposes the base again, and compares one number of each module with the original's.
    """

    alpha: float | None = None
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    base_mode: str = "projected"
    n_iter: int = 9
    oversample: int | None = None
    save_basis: bool = True

    def validate(self) -> None:
        """Check the family's fields."""
        check(self.alpha is None or self.alpha > 0.0, "alpha", self.alpha, "None or positive")
        for pattern, alpha in self.alpha_pattern.items():
            check(alpha > 0.0, f"alpha_pattern[{pattern!r}]", alpha, "positive")
        check_choice("base_mode", self.base_mode, ("projected", "residual"))
        check(self.n_iter >= 0, "n_iter", self.n_iter, "at least 0")
        check(
            self.oversample is None or self.oversample >= 0,
            "oversample",
            self.oversample,
            "None or at least 0",
        )

    def scale_of(self, module: str) -> float:
        """Return alpha / r for one module path; 1 without an alpha."""
        alpha = self.value_for(module, self.alpha_pattern, self.alpha)
        return 1.0 if alpha is None else alpha / self.rank_of(module)


class PrincipalLinear(AdapterLinear):
    """Linear layer whose leading singular directions are replaced by trained factors.

    A method names its frozen tensors (U, C), says how the factors start from a decomposition (`start`), and
    gives the trained part as factors (`trained_factors`).
    """

    needs_base_at_init: ClassVar[bool] = True
    basis_names: ClassVar[tuple[str, str]]  # attribute names of U (out_features, r) and C (r, in_features)

    def __init__(self, base_layer: nn.Module, module_name: str, **quantization: Any) -> None:
        super().__init__(base_layer, module_name, **quantization)
        # Name of the adapter whose U C is missing from the stored base weight.
        self.residual_of: str | None = None
        self._basis_before_load: tuple[Tensor, Tensor] | None = None
        # Kept until the first forward: a checkpoint loaded right after injection starts from exact weights.
        self._original: Any = None
        self._written: tuple[int, ...] = ()  # which basis the residual was written for
        self.register_load_state_dict_pre_hook(_remember_basis)
        self.register_load_state_dict_post_hook(_refresh_basis)

    # What a method supplies ------------------------------------------------------------------------

    @abstractmethod
    def start(self, svd: TruncatedSVD, scale: float) -> dict[str, Tensor]:
        """Return the trained tensors with scale * (their product) = u diag(s) vh."""

    @classmethod
    @abstractmethod
    def trained_factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return B (out_features, r) and A (r, in_features) of the trained part, scale included."""

    # Start ----------------------------------------------------------------------------------------

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Create one adapter's tensors.

        Raises:
            ValueError: The settings do not fit, the base weight is not finite, or a second adapter asks for
                the residual mode.
        """
        config = cast(PrincipalConfig, config)
        if config.base_mode == "residual":
            check(
                self.residual_of is None,
                "base_mode",
                "residual",
                f"'projected' beside adapter {self.residual_of!r}, which has already written its residual",
                where=self.module_name,
            )
            check(
                self.quantization_backend is None and not hasattr(self.base_parameter(), "full_tensor"),
                "base_mode",
                "residual",
                "'projected' on a quantized or sharded base: the residual would be rounded or misplaced",
                where=self.module_name,
            )
        super().add_adapter(name, config)
        if config.base_mode == "residual" and dist.awaits_broadcast():
            self.residual_of = name  # the residual itself comes from rank 0
        if not config.save_basis and self.awaits_values(name):
            self._fill_basis(name, config)

    def initial_values(self, r: int, config: Any, weight: Tensor | None) -> dict[str, Tensor]:
        """Return the trained tensors and the basis from the leading r triplets of the base weight."""
        assert weight is not None
        weight = weight + self._taken_out()  # the second adapter starts from W0 as the first one did
        svd = truncated_svd(
            weight,
            r,
            oversample=config.oversample,
            n_iter=config.n_iter,
            seed=config.seed,
            name=self.module_name,
        )
        u, c = self.basis_names
        values = self.start(svd, config.scale_of(self.module_name))
        # u^T W0 = diag(s) vh whatever the quality of the decomposition: the start cancels to rounding.
        return {**values, u: svd.u, c: svd.s[:, None] * svd.vh}

    def random_values(self, r: int, config: Any) -> dict[str, Tensor]:
        """Return random trained tensors that are added to the whole base weight: an empty basis."""
        values = super().random_values(r, config)
        return {**values, **{name: torch.zeros_like(values[name]) for name in self.basis_names}}

    def _fill_basis(self, name: str, config: PrincipalConfig) -> None:
        """Decompose the base for an adapter that is loaded onto empty tensors and brings no basis."""
        base = self.base_parameter()
        check(
            not base.is_meta,
            "save_basis",
            False,
            "True for checkpoints that are loaded before their base model's weights are",
            where=self.module_name,
        )
        values = self.initial_values(config.rank_of(self.module_name), config, self.base_weight())
        for attribute in self.basis_names:  # past init_empty_weights, which would empty them again
            value = nn.Parameter(values[attribute].to(base.device), requires_grad=False)
            getattr(self, attribute)._parameters[name] = value

    def basis(self, name: str) -> tuple[Tensor, Tensor]:
        """Return one adapter's frozen U (out_features, r) and C (r, in_features)."""
        u, c = self.basis_names
        return getattr(self, u)[name], getattr(self, c)[name]

    # Maths ----------------------------------------------------------------------------------------

    @classmethod
    def factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor]:
        """Return the update's factors [B, -U] (out_features, 2r) and [A; C] (2r, in_features)."""
        b, a = cls.trained_factors(tensors, scale)
        u, c = (tensors[name] for name in cls.basis_names)
        return torch.cat([b, -u], dim=1), torch.cat([a, c], dim=0)

    def forward_delta(self, x: Tensor, name: str) -> Tensor:
        """Return the trained part, less U C x where the stored base still holds it."""
        out = self.forward_trained(self.adapter_dropout[name](x), name)
        if self.residual_of == name:
            return out
        u, c = self.basis(name)
        # The basis keeps fp32 where a trainer has cast what is trained.
        return out - self.low_rank(self._cast_input_dtype(x, c.dtype), c, u)

    @abstractmethod
    def forward_trained(self, x: Tensor, name: str) -> Tensor:
        """Return the trained part's output for x, already dropped out."""

    def add_inactive(self, out: Tensor, x: Tensor, active: Sequence[str]) -> Tensor:
        """Put U C x back where the adapter that wrote its residual is not active."""
        if self._original is not None:
            self._settle()
        name = self.residual_of
        if name is None or name in active:
            return out
        u, c = self.basis(name)
        return out + self.low_rank(self._cast_input_dtype(x, c.dtype), c, u)

    def _settle(self) -> None:
        """At the first forward, write the residual of the basis as it is now, and let the original go.

        transformers' `load_adapter` sets parameters without `load_state_dict`.
        """
        name = self.residual_of
        if torch.compiler.is_compiling() or dist.is_distributed() or name is None:
            self._original = None
            return
        if self._state_of(name) != self._written:
            self._write_base(self._original, -1.0, *self.basis(name))
        self._original = None

    def _state_of(self, name: str) -> tuple[int, ...]:
        return tuple(number for tensor in self.basis(name) for number in (id(tensor), tensor._version))

    def stored_delta(self, names: Sequence[str]) -> Tensor:
        """Return what turns the stored base weight into the merged one, fp32."""
        return super().stored_delta(names) + self._taken_out()

    # The residual in the base ---------------------------------------------------------------------

    def _taken_out(self) -> Tensor | float:
        if self.residual_of is None:
            return 0.0
        u, c = self.basis(self.residual_of)
        return (u.float() @ c.float()).detach()

    def after_change(self) -> None:
        """Write the residual into the base, where an adapter asks for it and has not done so."""
        for name, config in self.configs.items():
            if self.residual_of is None and cast(PrincipalConfig, config).base_mode == "residual":
                if self.awaits_values(name) or self.base_parameter().is_meta:
                    continue
                self._original = self.base_parameter().data
                self.residual_of = name
                self._write_base(self._original, -1.0, *self.basis(name))
                self._written = self._state_of(name)

    def _write_base(self, weight: Tensor, sign: float, u: Tensor, c: Tensor) -> None:
        check(
            not hasattr(weight, "full_tensor"),
            "base weight",
            "sharded",
            "whole to be written",
            where=self.module_name,
        )
        change = (u.float() @ c.float()).detach()
        now = self.base_parameter()
        new = weight.to(now.device).float() + sign * (change.T if self.is_conv1d else change)
        now.data = new.to(now.dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter, and give the base back what it had taken out (to the base dtype's rounding)."""
        if self.residual_of == adapter_name:
            u, c = self.basis(adapter_name)
            if self._original is not None:
                now = self.base_parameter()
                now.data = self._original.to(device=now.device, dtype=now.dtype)
            else:
                self._write_base(self.base_parameter().data, 1.0, u, c)
            self.residual_of, self._original = None, None
        super().delete_adapter(adapter_name)


def _remember_basis(module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object) -> None:
    layer = cast(PrincipalLinear, module)
    # A state of the whole model brings the base as it was, residual and all (FSDP loads so).
    whole = any(key.startswith(f"{prefix}base_layer.") for key in state_dict)
    if whole:
        layer._original = None
    ours = any(key.startswith(f"{prefix}{name}.") for key in state_dict for name in layer.tensor_names)
    if ours and layer.merged_adapters:
        warnings.warn(f"{layer.module_name} is merged; unmerging it to load an adapter", stacklevel=2)
        layer.unmerge()
    if layer.residual_of is not None and not whole:
        u, c = layer.basis(layer.residual_of)
        layer._basis_before_load = (u.detach().clone(), c.detach().clone())


def _refresh_basis(module: nn.Module, _: object) -> None:
    """Rebuild the residual after a checkpoint has brought its own basis."""
    layer = cast(PrincipalLinear, module)
    before, layer._basis_before_load = layer._basis_before_load, None
    if layer.residual_of is None:
        layer.after_change()
        return
    u, c = layer.basis(layer.residual_of)
    if before is None or (torch.equal(u, before[0]) and torch.equal(c, before[1])):
        return
    if layer._original is None:
        layer._write_base(layer.base_parameter().data, 1.0, *before)
        base = layer.base_parameter().data
    else:
        base = layer._original
    layer._write_base(base, -1.0, u, c)
    layer._written = layer._state_of(layer.residual_of)


class PrincipalModel(AdapterModel):
    """Tuner of the principal-component family."""

    tuner_layer_cls: type[PrincipalLinear]  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def _saved_names(cls, config: AdapterConfig) -> tuple[str, ...]:
        names = super()._saved_names(config)
        if cast(PrincipalConfig, config).save_basis:
            return names
        return tuple(name for name in names if name not in cls.tuner_layer_cls.basis_names)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        selected = super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )
        if config.save_basis:
            return selected
        u, c = (f".{name}." for name in cls.tuner_layer_cls.basis_names)
        kept = {key: value for key, value in selected.items() if u not in key and c not in key}
        for key, value in selected.items():
            if u in key:
                pair = dist.full_tensor(value), dist.full_tensor(selected[key.replace(u, c)])
                kept[key.replace(u, cls._mark())] = fingerprint(*pair)
        return kept

    @classmethod
    def _mark(cls) -> str:
        return f".{cls.prefix}fingerprint."

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        mark = cls._mark().rstrip(".")
        marks = {key: value for key, value in state_dict.items() if key.endswith(mark)}
        tensors = {key: value for key, value in state_dict.items() if key not in marks}
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        if config.save_basis:  # what injection has computed is what the checkpoint left out
            return remapped
        known = {key.removesuffix(mark).removeprefix(_PREFIX): value for key, value in marks.items()}
        for path, layer in model.named_modules():
            if isinstance(layer, PrincipalLinear) and adapter_name in layer.configs:
                basis = layer.basis(adapter_name)
                _compare(known.get(path.removeprefix(_PREFIX)), *basis, where=layer.module_name)
                for attribute, value in zip(layer.basis_names, basis, strict=True):
                    remapped[f"{path}.{attribute}.{adapter_name}"] = value
        return remapped


_PREFIX = "base_model.model."


def fingerprint(u: Tensor, c: Tensor) -> Tensor:
    """Return a fixed random form of U C, fp64, (1,); no sign or rotation of the basis changes it."""
    left = torch.randn(u.shape[0], generator=seeded(0, "left"), dtype=torch.float64)
    right = torch.randn(c.shape[1], generator=seeded(0, "right"), dtype=torch.float64)
    return ((left @ u.detach().cpu().double()) @ (c.detach().cpu().double() @ right)).reshape(1)


def _compare(known: Tensor | None, u: Tensor, c: Tensor, *, where: str) -> None:
    if dist.awaits_broadcast():
        return
    check(known is not None, "fingerprint", None, "in a checkpoint saved with save_basis=False", where=where)
    found, wanted = float(fingerprint(u, c)), float(cast(Tensor, known))
    # Relative to the size of U C: the form itself can come out near zero.
    check(
        abs(found - wanted) <= FINGERPRINT_TOLERANCE * float(c.detach().norm()),
        "fingerprint",
        found,
        f"{wanted!r}, as in the checkpoint: this is not the base model the adapter was made for",
        where=where,
    )
