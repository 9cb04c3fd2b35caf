"""The principal-component family: adapters that train the leading singular directions of the base weight.

Source: Meng et al. 2024, "PiSSA", arXiv 2404.02948, eq. 2-5. With W0 the base weight, U (out_features, r) its
leading left singular vectors and C = U^T W0, the layer computes (W0 - U C) x + f(x), where f starts as U C.

Differs from the paper and from PEFT's PiSSA:
- The base weight is not written by default (see `_offset`); `base_mode="residual"` is the paper's form.
- U and C travel with the checkpoint, so that loading never repeats a decomposition, which is not reproducible
  across machines. `save_basis=False` leaves them out, repeats it and checks the outcome.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check
from ..core.lowrank import TruncatedSVD, seeded, truncated_svd
from ._base import AdapterConfig, AdapterModel
from ._offset import OffsetConfig, OffsetLinear

FINGERPRINT_TOLERANCE = (
    1e-3  # relative; another machine's decomposition differs by rounding, another base by more
)


@dataclass
class PrincipalConfig(OffsetConfig):
    """Settings of the principal-component family, beside those of its base (`OffsetConfig`).

    The start does not depend on alpha.

    Args:
        n_iter: Krylov steps of the decomposition after the first, >= 0; more, closer to the exact SVD.
        oversample: Directions that it seeks beyond r, >= 0; None for max(16, r // 4).
        save_basis: Whether checkpoints hold the frozen U and C (as large as the adapter itself). Without them
            loading decomposes the base again, and compares one number of each module with the original's.
    """

    n_iter: int = 9
    oversample: int | None = None
    save_basis: bool = True

    def validate(self) -> None:
        """Check the family's fields."""
        super().validate()
        check(self.n_iter >= 0, "n_iter", self.n_iter, "at least 0")
        check(
            self.oversample is None or self.oversample >= 0,
            "oversample",
            self.oversample,
            "None or at least 0",
        )


class PrincipalLinear(OffsetLinear):
    """Linear layer whose leading singular directions are replaced by trained factors.

    A method says how its factors start from a decomposition (`start`).
    """

    needs_base_at_init: ClassVar[bool] = True

    @abstractmethod
    def start(self, svd: TruncatedSVD, scale: float) -> dict[str, Tensor]:
        """Return the trained tensors with scale * (their product) = u diag(s) vh."""

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Create one adapter's tensors.

        Raises:
            ValueError: The settings do not fit, the base weight is not finite, or a second adapter asks for
                the residual mode.
        """
        super().add_adapter(name, config)
        if not cast(PrincipalConfig, config).save_basis and self.awaits_values(name):
            self._fill_basis(name, cast(PrincipalConfig, config))

    def initial_values(self, r: int, config: Any, weight: Tensor | None) -> dict[str, Tensor]:
        """Return the trained tensors and the basis from the leading r triplets of the base weight."""
        assert weight is not None
        weight = weight + self.taken_out()  # the second adapter starts from W0 as the first one did
        svd = truncated_svd(
            weight,
            r,
            oversample=config.oversample,
            n_iter=config.n_iter,
            seed=config.seed,
            name=self.module_name,
        )
        u, c = self.offset_names
        values = self.start(svd, config.scale_of(self.module_name))
        # u^T W0 = diag(s) vh whatever the quality of the decomposition: the start cancels to rounding.
        return {**values, u: svd.u, c: svd.s[:, None] * svd.vh}

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
        for attribute in self.offset_names:  # past init_empty_weights, which would empty them again
            value = nn.Parameter(values[attribute].to(base.device), requires_grad=False)
            getattr(self, attribute)._parameters[name] = value


class PrincipalModel(AdapterModel):
    """Tuner of the principal-component family."""

    tuner_layer_cls: type[PrincipalLinear]  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def _saved_names(cls, config: AdapterConfig) -> tuple[str, ...]:
        names = super()._saved_names(config)
        if cast(PrincipalConfig, config).save_basis:
            return names
        return tuple(name for name in names if name not in cls.tuner_layer_cls.offset_names)

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
        u, c = (f".{name}." for name in cls.tuner_layer_cls.offset_names)
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
                basis = layer.offset(adapter_name)
                _compare(known.get(path.removeprefix(_PREFIX)), *basis, where=layer.module_name)
                for attribute, value in zip(layer.offset_names, basis, strict=True):
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
