"""Biases of the base model that are trained with an adapter: `bias="all"` or `"<type>_only"`.

As PEFT's LoRA has it: the base's own parameters train in place, and a checkpoint holds them under the model's
names. Unlike there they belong to the adapter: wherever it is not in use (disabled, another one active,
deleted, unloaded), the base's parameters hold the values they had before it, to the bit. What is not in place
is kept beside; places change by copying, so that optimizers keep the parameters they know.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .._compat.peft import AuxiliaryTrainingWrapper, BaseTunerLayer, adapters_of_wrapper, gather_params_ctx
from ..core import dist
from ..core.checks import check
from ._injection import AtomicInjection

__all__ = ["HasBiases", "TrainedBiases", "TrainsBiases", "bias_owners", "load_biases"]

_PREFIX = "base_model.model."


class TrainedBiases:
    """The biases that one adapter trains, and the values that are not in place at the time.

    Args:
        name: The adapter.
        owners: Adapted layers, and other modules, whose parameter `bias` is trained.
    """

    def __init__(self, name: str, owners: Iterable[nn.Module]) -> None:
        self.name = name
        self.owners = list(owners)
        self.used = True  # whether what the adapter trained is in place
        parameters = self.parameters()
        with gather_params_ctx(parameters, modifier_rank=None):
            self.kept = [parameter.detach().clone() for parameter in parameters]

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters as the modules have them now, each (features,)."""
        return [cast(nn.Parameter, bias_of(owner)) for owner in self.owners]

    def check_place(self, used: bool) -> None:
        """Check that `place` can be done.

        Raises:
            ValueError: The parameters are in parts on several processes, or offloaded.
        """
        for parameter, kept in zip(self.parameters(), self.kept, strict=True) if used != self.used else ():
            whole = parameter.shape == kept.shape and not hasattr(parameter, "full_tensor")
            rule = "'none' where biases are sharded or offloaded: the base's could not be put back"
            check(whole and not parameter.is_meta, "bias", tuple(parameter.shape), rule, where=self.name)

    def place(self, used: bool, trains: bool | None = None) -> None:
        """Put the adapter's values in place, or the base's.

        Args:
            used: Whether the adapter is in use.
            trains: Whether its biases are to be trained then; None to leave that as it is.

        Raises:
            ValueError: The parameters are in parts on several processes, or offloaded.
        """
        self.check_place(used)
        parameters = self.parameters()
        if used != self.used:
            for index, parameter in enumerate(parameters):
                new, self.kept[index] = self.kept[index], parameter.detach().clone()
                parameter.data.copy_(new)
            self.used = used
        if trains is not None:
            for parameter in parameters:
                parameter.requires_grad_(used and trains)

    def load(self, index: int, value: Tensor) -> None:
        """Take over one bias from a checkpoint."""
        if not self.used:
            self.kept[index].copy_(value)
            return
        parameter = self.parameters()[index]
        with gather_params_ctx(parameter):
            parameter.data.copy_(value)


def bias_of(owner: nn.Module) -> nn.Parameter | None:
    """Return the bias of a module, or of the base of an adapted layer; None where it is no parameter."""
    core = owner.get_base_layer() if isinstance(owner, BaseTunerLayer) else owner
    bias = core._parameters.get("bias")
    return bias if isinstance(bias, nn.Parameter) and bias.is_floating_point() else None


def bias_owners(model: nn.Module, adapter: str | None = None) -> list[nn.Module]:
    """Return the modules with a bias, an adapted layer in place of its base.

    A bias that two modules share is counted once.

    Args:
        model: The model.
        adapter: The adapter whose biases they are to be; modules that it trains whole are left out.
    """
    inner: set[nn.Module] = set()
    shared: set[int] = set()
    owners = []
    for module in model.modules():  # outer ones first
        if module in inner:
            continue
        if isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
            inner.update(cast(nn.Module, module).modules())
        if isinstance(module, AuxiliaryTrainingWrapper):
            if adapter not in adapters_of_wrapper(module):  # another's: this one uses what is wrapped
                inner.difference_update(cast(nn.Module, module.original_module).modules())
            continue
        bias = bias_of(module)
        if bias is not None and id(bias) not in shared:
            shared.add(id(bias))
            owners.append(module)
    return owners


def biases_on(model: nn.Module) -> list[TrainedBiases]:
    """Return what the adapted layers of a model hold of trained biases."""
    held = (getattr(module, "biases", None) for module in model.modules())
    return list({id(one): one for one in held if isinstance(one, TrainedBiases)}.values())


class Place(NamedTuple):
    """Where a trained bias is.

    Args:
        holder: What holds it.
        number: Its index there.
        saved_as: Its key in a checkpoint: that of a model with no other adapter, as it is to load on one.
    """

    holder: TrainedBiases
    number: int
    saved_as: str


def named_biases(model: nn.Module) -> dict[str, Place]:
    """Return the trained biases by the keys that they have in the model's state."""
    places = {
        id(parameter): (biases, index)
        for biases in biases_on(model)
        for index, parameter in enumerate(biases.parameters())
    }
    found = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in places:
            holder, index = places[id(parameter)]
            saved_as = _without_others(model, path, holder.name)
            found[_without_fsdp(path)] = Place(holder, index, _without_fsdp(saved_as))
    return found


def _without_fsdp(path: str) -> str:
    return path.replace("_fsdp_wrapped_module.", "")


def _without_others(model: nn.Module, path: str, adapter: str) -> str:
    """Return a parameter's path without what adapters other than the given one have put around modules."""
    *parts, leaf = path.split(".")
    kept, module = [], model
    for part in parts:
        foreign = (
            isinstance(module, HasBiases)
            and part == "base_layer"
            and adapter not in cast(Any, module).configs
        ) or (
            isinstance(module, AuxiliaryTrainingWrapper)
            and part == "original_module"
            and adapter not in adapters_of_wrapper(module)
        )
        if not foreign:
            kept.append(part)
        module = cast(nn.Module, module._modules[part])
    return ".".join([*kept, leaf])


def load_biases(model: nn.Module, values: Mapping[str, Tensor]) -> None:
    """Take over a checkpoint's biases, by the model's keys, wherever those of the adapter are at the time."""
    for key, place in named_biases(model).items() if values else ():
        place.holder.load(place.number, values[key])


class HasBiases:
    """An adapted layer that keeps the right biases in place; mixed in before PEFT's classes."""

    biases: TrainedBiases | None = None  # set where an adapter of this layer trains any
    merged_adapters: list[str]
    _disable_adapters: bool

    def check_bias(self, choice: str) -> None:
        """Check that this layer's own bias, if it has one, can be trained where an adapter asks for it.

        Raises:
            ValueError: It is no parameter, as in some kinds of quantized layers.
        """
        core: nn.Module = cast(Any, self).get_base_layer()
        can = getattr(core, "bias", None) is None or bias_of(core) is not None
        rule = f"'none' or 'all' here: the bias of a layer of type {type(core).__name__} is no parameter"
        check(choice in ("none", "all") or can, "bias", choice, rule, where=cast(Any, self).module_name)

    def uses(self, name: str, active: Sequence[str] | None = None, enabled: bool | None = None) -> bool:
        """Return whether an adapter is in use: merged or, where none is, active, and not switched off.

        Args:
            name: The adapter.
            active: The active ones; None for those that are.
            enabled: Whether adapters are switched on; None for how they are.
        """
        enabled = not self._disable_adapters if enabled is None else enabled
        in_use = self.merged_adapters or (cast(Any, self).active_adapters if active is None else active)
        return enabled and name in in_use

    def place_biases(self, trains: bool | None = None) -> None:
        """Put the biases in place that go with the adapters in use.

        Args:
            trains: Whether they are to be trained; None to leave that as it is.
        """
        if self.biases is not None:
            self.biases.place(self.uses(self.biases.name), trains)

    def place_merged_biases(self) -> None:
        """Put the biases in place that go with the merged adapters, also while adapters are switched off."""
        if self.biases is not None and self.merged_adapters:
            self.biases.place(self.biases.name in self.merged_adapters)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones, trained unless in inference mode; biases follow."""
        if self.biases is not None:  # refused before anything is changed
            active = [adapter_names] if isinstance(adapter_names, str) else adapter_names
            self.biases.check_place(self.uses(self.biases.name, active=active))
        cast(Any, super()).set_adapter(adapter_names, inference_mode=inference_mode)
        self.place_biases(trains=not inference_mode)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the adapters on or off; biases follow."""
        if self.biases is not None:  # refused before anything is changed
            self.biases.check_place(self.uses(self.biases.name, enabled=enabled))
        cast(Any, super()).enable_adapters(enabled)
        self.place_biases(trains=enabled)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter, and with it what it holds of biases."""
        cast(Any, super()).delete_adapter(adapter_name)
        if self.biases is not None and self.biases.name == adapter_name:
            self.biases = None  # the base's are in place: the adapter is no longer active


class TrainsBiases(AtomicInjection):
    """A tuner whose adapters can train biases of the base."""

    def check_biases(self, config: Any) -> None:
        """Check that an adapter can train the biases that its config asks for.

        Raises:
            ValueError: Another adapter trains biases, or there are no values yet to go back to.
        """
        if config.bias == "none":
            return
        others = ", ".join(repr(biases.name) for biases in biases_on(self.model))
        rule = f"'none' beside adapter {others}, which trains biases already"
        check(not others, "bias", config.bias, rule)
        parameters = [cast(nn.Parameter, bias_of(owner)) for owner in bias_owners(self.model)]
        absent = any(parameter.is_meta for parameter in parameters) or dist.awaits_broadcast()
        rule = "'none' where the base model's weights are loaded after the adapter"
        check(not absent, "bias", config.bias, rule)
        with gather_params_ctx(parameters, modifier_rank=None):
            empty = any(parameter.numel() == 0 for parameter in parameters)
        check(not empty, "bias", config.bias, "'none' where biases are in parts on several processes already")

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter into every target layer, and give it the biases that it trains."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        self._start_copies_from_base(adapter_name)
        config: Any = self.peft_config[adapter_name]
        if config.bias == "none":
            return
        layers = [m for m in self.model.modules() if isinstance(m, HasBiases)]
        layers = [layer for layer in layers if adapter_name in cast(Any, layer).configs]
        found: dict[HasBiases, TrainedBiases] = {}
        if config.bias == "all":
            whole = TrainedBiases(adapter_name, bias_owners(self.model, adapter_name))
            found = dict.fromkeys(layers, whole) if whole.owners else {}
        else:
            owners = [layer for layer in layers if bias_of(cast(Any, layer)) is not None]
            found = {layer: TrainedBiases(adapter_name, [cast(Any, layer)]) for layer in owners}
        if not found:
            warnings.warn(f"bias={config.bias!r}: there are no biases that could be trained", stacklevel=2)
        for layer, biases in found.items():
            layer.biases = biases
            biases.used = layer.uses(adapter_name)  # its values are still the base's
            layer.place_biases(trains=not config.inference_mode)

    def _start_copies_from_base(self, adapter_name: str) -> None:
        # PEFT copies modules to save as they are, with what another adapter has trained of them.
        kept = {
            owner: value
            for biases in biases_on(self.model)
            if biases.used
            for owner, value in zip(biases.owners, biases.kept, strict=True)
        }
        for wrapper in self.model.modules() if kept else ():
            if isinstance(wrapper, AuxiliaryTrainingWrapper) and adapter_name in adapters_of_wrapper(wrapper):
                copies = getattr(wrapper, "modules_to_save", {})
                for path, module in cast(nn.Module, wrapper.original_module).named_modules():
                    if module in kept and adapter_name in copies:
                        copies[adapter_name].get_submodule(path).bias.data.copy_(kept[module])

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter from every layer, where the base's biases can be put back."""
        for biases in biases_on(self.model):
            if biases.name == adapter_name:
                biases.check_place(False)
        super().delete_adapter(adapter_name)

    def disable_adapter_layers(self) -> None:
        """Switch all adapters off; upstream warns that trained biases stay, which they do not here."""
        self._enable_adapter_layers(enabled=False)

    @classmethod
    def split_biases(
        cls, model: nn.Module, config: Any, tensors: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return a checkpoint's trained biases by the model's keys, and its other tensors.

        A checkpoint of an older format, which held no biases, leaves those of the base in use.

        Raises:
            ValueError: A bias is missing, has another shape, or is not finite.
        """
        places = named_biases(model) if config.bias != "none" else {}
        own = {_in_file(place.saved_as): key for key, place in places.items()}
        biases = {own[_in_file(key)]: value for key, value in tensors.items() if _in_file(key) in own}
        if places and not biases and config.may_lack_biases:
            warnings.warn(
                f"bias={config.bias!r}: this checkpoint's version of PEFT never saved the biases that the "
                "adapter had trained; those of the base model are used as they are",
                stacklevel=2,
            )
            config.bias = "none"
            for layer in (module for module in model.modules() if isinstance(module, HasBiases)):
                if layer.biases is not None:
                    layer.biases.place(False, trains=False)
                    layer.biases = None
            return {}, dict(tensors)
        for key, place in sorted(places.items()):
            check(key in biases, "bias", "none in the checkpoint", f"there for {place.saved_as}")
            wanted, shape = tuple(place.holder.kept[place.number].shape), tuple(biases[key].shape)
            check(shape == wanted, key, shape, f"of shape {wanted}")
            if not bool(torch.isfinite(biases[key]).all()):
                raise ValueError(f"the adapter checkpoint's {key} has NaN or infinite values")
        return biases, {key: value for key, value in tensors.items() if _in_file(key) not in own}

    @classmethod
    def _get_learnable_bias_state_dict(
        cls, model: nn.Module, state_dict: dict[str, Tensor], config: Any
    ) -> dict[str, Tensor]:
        if config.bias == "none":
            return {}
        return {
            place.saved_as: state_dict[key] if place.holder.used else place.holder.kept[place.number]
            for key, place in named_biases(model).items()
            if key in state_dict
        }


def _in_file(key: str) -> str:
    """Return a checkpoint's key, which names a PeftModel's module also where the model is none."""
    return _PREFIX + key.removeprefix(_PREFIX)
