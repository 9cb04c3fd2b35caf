"""Adapters whose frozen tensors are functions of the base weight, and can be left out of checkpoints.

A config field says whether a checkpoint holds them. Where it does not, it holds marks in their place (a
fingerprint, and whatever else repeating the computation takes), and loading computes the tensors from the
base weight again and checks the outcome against the marks: another base is refused.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check
from ..core.lowrank import seeded
from ._base import AdapterConfig, AdapterLinear, AdapterModel

_PREFIX = "base_model.model."


class RecomputedLinear(AdapterLinear):
    """Linear layer with frozen tensors that loading can compute again.

    A method names them, the field of its config that keeps them in checkpoints, and the marks.
    """

    needs_base_at_init: ClassVar[bool] = True
    recomputed_names: ClassVar[tuple[str, ...]]
    kept_by: ClassVar[str]
    mark_names: ClassVar[tuple[str, ...]] = ("fingerprint",)

    @abstractmethod
    def marks(self, name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what a checkpoint holds in place of the recomputed tensors, for every one of `mark_names`.

        Args:
            name: The adapter.
            tensors: The recomputed tensors as they are kept, whole, by attribute name.
        """

    @abstractmethod
    def recall(self, name: str, marks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the recomputed tensors for a checkpoint with the given marks.

        Raises:
            ValueError: They do not come out as the checkpoint's did.
        """

    def adopt(self, name: str, marks: Mapping[str, Tensor]) -> None:
        """Take over a checkpoint's marks; called once every layer has recalled its tensors."""

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Create one adapter's tensors.

        Raises:
            ValueError: The settings do not fit, or the base weight is not finite.
        """
        super().add_adapter(name, config)
        if not getattr(config, self.kept_by) and self.awaits_values(name):
            self._fill(name, config)

    def recomputed(self, name: str) -> dict[str, Tensor]:
        """Return one adapter's recomputed tensors as the layer has them, by attribute name."""
        return {attribute: getattr(self, attribute)[name] for attribute in self.recomputed_names}

    def _fill(self, name: str, config: AdapterConfig) -> None:
        """Compute the tensors for an adapter that is loaded onto empty ones and does not bring them."""
        core = self.get_base_layer()
        stored = (*core.parameters(recurse=False), *core.buffers(recurse=False))
        check(
            not any(tensor.is_meta for tensor in stored),
            self.kept_by,
            False,
            "True for checkpoints that are loaded before their base model's weights are",
            where=self.module_name,
        )
        values = self.initial_values(config.rank_of(self.module_name), config, self.base_weight())
        for attribute in self.recomputed_names:  # past init_empty_weights, which would empty them again
            value = self.stored(attribute, values[attribute]).to(self._base_device())
            value = nn.Parameter(value, requires_grad=False)
            getattr(self, attribute)._parameters[name] = value


class RecomputedModel(AdapterModel):
    """Tuner of adapters with recomputed tensors."""

    tuner_layer_cls: type[RecomputedLinear]  # pyright: ignore[reportIncompatibleVariableOverride]

    @classmethod
    def _saved_names(cls, config: AdapterConfig) -> tuple[str, ...]:
        names, layer = super()._saved_names(config), cls.tuner_layer_cls
        if getattr(config, layer.kept_by):
            return names
        return tuple(name for name in names if name not in layer.recomputed_names)

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
        if getattr(config, cls.tuner_layer_cls.kept_by):
            return selected
        layers = {layer.module_name: layer for layer in cls._layers(model, adapter_name).values()}
        names = {f".{name}.": name for name in cls.tuner_layer_cls.recomputed_names}
        kept: dict[str, Tensor] = {}
        found: dict[tuple[str, str], dict[str, Tensor]] = defaultdict(dict)
        for key, value in selected.items():
            part = next((part for part in names if part in key), None)
            if part is None:
                kept[key] = value
            else:
                path, _, end = key.rpartition(part)
                found[path, end][names[part]] = dist.full_tensor(value)
        for (path, end), tensors in found.items():
            marks = layers[path.removeprefix(_PREFIX)].marks(adapter_name, tensors)
            kept.update({f"{path}.{cls.prefix}{mark}.{end}": value for mark, value in marks.items()})
        return kept

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        layer_class = cls.tuner_layer_cls
        names = {f"{cls.prefix}{mark}": mark for mark in layer_class.mark_names}
        tensors: dict[str, Tensor] = {}
        marks: dict[str, dict[str, Tensor]] = defaultdict(dict)
        for key, value in state_dict.items():
            path, _, name = key.rpartition(".")
            if name in names:
                marks[path.removeprefix(_PREFIX)][names[name]] = value
            else:
                tensors[key] = value
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, tensors)
        if getattr(config, layer_class.kept_by):  # what injection has computed is in the checkpoint too
            return remapped
        layers = cls._layers(model, adapter_name)
        if dist.awaits_broadcast():  # there is no base yet to compute from
            own = {path: layer.recomputed(adapter_name) for path, layer in layers.items()}
        else:
            own = {}
            for path, layer in layers.items():
                given = marks[path.removeprefix(_PREFIX)]
                for mark in layer_class.mark_names:
                    rule = f"in a checkpoint saved with {layer_class.kept_by}=False"
                    check(mark in given, mark, None, rule, where=layer.module_name)
                own[path] = layer.recall(adapter_name, given)
            for path, layer in layers.items():
                layer.adopt(adapter_name, marks[path.removeprefix(_PREFIX)])
        for path, values in own.items():
            remapped.update({f"{path}.{name}.{adapter_name}": value for name, value in values.items()})
        return remapped

    @classmethod
    def _layers(cls, model: nn.Module, adapter_name: str) -> dict[str, RecomputedLinear]:
        return {
            path: layer
            for path, layer in model.named_modules()
            if isinstance(layer, cls.tuner_layer_cls) and adapter_name in layer.configs
        }


def bilinear_form(left: Tensor, right: Tensor) -> Tensor:
    """Return x^T left right y for fixed random x and y, fp64, (); a fingerprint of a product.

    Args:
        left: (m, k).
        right: (k, n).
    """
    x, y = _directions(left.shape[0], right.shape[1])
    return (x @ left.detach().cpu().double()) @ (right.detach().cpu().double() @ y)


def weight_fingerprint(weight: Tensor, rows: int = 1024) -> float:
    """Return x^T W y / ||W||_F for fixed random x and y, computed in fp64; 0 for a weight of zeros.

    A change of any one entry w by a share e moves it by about e w / ||W||_F.

    Args:
        weight: (m, n), any floating dtype and device.
        rows: How many rows are converted at a time.
    """
    x, y = _directions(*weight.shape)
    form, square = 0.0, 0.0
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows].detach().cpu().double()
        form += float(x[start : start + rows] @ (part @ y))
        square += float(part.square().sum())
    return form / square**0.5 if square else 0.0


def _directions(m: int, n: int) -> tuple[Tensor, Tensor]:
    left = torch.randn(m, generator=seeded(0, "left"), dtype=torch.float64)
    return left, torch.randn(n, generator=seeded(0, "right"), dtype=torch.float64)
