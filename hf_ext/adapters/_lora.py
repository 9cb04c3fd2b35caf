"""Adapters that are a LoRA with another start, on PEFT's own LoRA layers.

Everything of LoRA comes along: quantized layers, embeddings, convolutions, mixed batches, DoRA, tensor
parallelism. What is added: the checks of this package, starts that do not depend on global seeds, unmerging
to the bit, and a type of its own in the checkpoint, whose tensors are named as LoRA's are.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeVar, cast, get_type_hints

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel, ParamWrapper
from peft.tuners.lora.layer import MultiheadAttention
from torch import Tensor, nn

from .._compat.peft import PeftConfig, PeftType, get_pattern_key
from ..core.checks import check, check_fields
from ..core.dist import full_tensor
from ..core.lowrank import seeded
from ..core.registry import MethodInfo, Variant
from ._injection import (
    AtomicInjection,
    check_adapter_name,
    check_checkpoint,
    check_weight_file,
    refuse_sharded_merge,
    register_tuner,
)
from ._merging import KeepsOriginal

LayerT = TypeVar("LayerT", bound="type[LoraStartLayer]")


@dataclass
class LoraStartConfig(LoraConfig):
    """Settings of PEFT's `LoraConfig`, of which `init_lora_weights` belongs to the method, and these.

    Args:
        init_weights: True for the method's start; False for a random one that changes the output from the
            first step, for debugging.
        seed: Seed of everything random at the start; global seeds have no effect on it.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is outside its range.
    """

    init_weights: bool = True
    seed: int = 0

    type_name: ClassVar[str] = ""  # set by register_lora_start

    def __post_init__(self) -> None:
        check(
            self.init_lora_weights is True,
            "init_lora_weights",
            self.init_lora_weights,
            f"left out: the start is {type(self).__name__}'s own",
        )
        inherited = {f.name for f in fields(LoraConfig)} - {"r", "lora_alpha", "lora_dropout"}
        own = [f.name for f in fields(self) if f.name not in inherited]
        hints = {name: hint for name, hint in get_type_hints(type(self)).items() if name in own}
        given = {name: getattr(self, name) for name in own}
        for name, value in check_fields(given, hints, where=type(self).__name__).items():
            setattr(self, name, value)
            check(not isinstance(value, float) or math.isfinite(value), name, value, "finite")
        check(self.r >= 1, "r", self.r, "at least 1")
        check(self.lora_alpha > 0, "lora_alpha", self.lora_alpha, "positive")
        check(0.0 <= self.lora_dropout < 1.0, "lora_dropout", self.lora_dropout, "at least 0 and below 1")
        for pattern, rank in (self.rank_pattern or {}).items():
            check(rank >= 1, f"rank_pattern[{pattern!r}]", rank, "at least 1")
        super().__post_init__()
        if self.type_name:
            self.peft_type = PeftType[self.type_name.upper()]
        self.validate()

    def validate(self) -> None:
        """Check the method's own fields; called at construction, before any model is touched."""

    def rank_of(self, module: str) -> int:
        """Return the rank for one module path."""
        pattern = self.rank_pattern or {}
        return pattern.get(get_pattern_key(list(pattern), module), self.r)

    def alpha_of(self, module: str) -> float:
        """Return lora_alpha for one module path."""
        pattern = self.alpha_pattern or {}
        return pattern.get(get_pattern_key(list(pattern), module), self.lora_alpha)

    def scale_of(self, module: str) -> float:
        """Return the factor of B A for one module path."""
        r = self.rank_of(module)
        return self.alpha_of(module) / (math.sqrt(r) if self.use_rslora else r)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Read the settings; a local folder's weight file is first checked to be whole."""
        check_weight_file(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)

    def plain_lora(self) -> LoraConfig:
        """Return the settings of the ordinary LoRA that the adapter is once it has been started."""
        known = {f.name for f in fields(LoraConfig) if f.init and f.name != "peft_type"}
        return LoraConfig(**{name: getattr(self, name) for name in known})


class LoraStartLayer(KeepsOriginal):
    """What is added to PEFT's LoRA layers; mixed in before them."""

    merges_bias = True  # with lora_bias
    adapter_frozen_names: ClassVar[tuple[str, ...]] = ()
    adapter_layer_names: tuple[str, ...]
    module_name: str
    configs: dict[str, LoraStartConfig]
    merged_adapters: list[str]

    def adopt(self, module_name: str) -> None:
        """Take over a fresh LoRA layer."""
        self.module_name, self.configs = module_name, {}
        names: tuple[str, ...] = cast(Any, self).other_param_names
        self.other_param_names = (*names, "configs")  # PEFT deletes an adapter from all of them

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Name the two classes that this one is made of instead of itself."""
        whole = super().__reduce_ex__(max(2, protocol))
        kinds = type(self).__bases__
        if _CLASSES.get(kinds) is not type(self):  # type: ignore[call-overload]
            return whole  # a class made from this one, by FSDP or a parametrization
        return (_empty_layer, kinds, *whole[2:])

    @abstractmethod
    def fill(self, name: str, config: Any) -> None:
        """Put one adapter's starting values in place; on the meta device they have no effect."""

    def randomize(self, name: str, config: LoraStartConfig) -> None:
        """Put a start in place that changes the output: normal, standard deviation 1 / sqrt(last axis)."""
        generator = seeded(config.seed, self.module_name)
        for _, tensor in self.low_rank_parameters(name):
            drawn = torch.randn(tensor.shape, generator=generator) * tensor.shape[-1] ** -0.5
            tensor.data.copy_(drawn)

    def adapter_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """Return one adapter's parameters with the name of the container that each is in."""
        found = []
        for attribute in dict.fromkeys(self.adapter_layer_names):  # DoRA makes PEFT name its own twice
            held = getattr(self, attribute)
            if name in held:
                member = held[name]
                found += [
                    (attribute, p)
                    for p in ([member] if isinstance(member, nn.Parameter) else member.parameters())
                ]
        return found

    def low_rank_parameters(self, name: str) -> list[tuple[str, nn.Parameter]]:
        """Return one adapter's parameters without DoRA's magnitudes, which start from the base weight."""
        return [(key, p) for key, p in self.adapter_parameters(name) if "magnitude" not in key]

    def checkpoint_tensors(self, name: str) -> dict[str, Tensor]:
        """Return one adapter's tensors as a checkpoint names them after the module: detached and whole."""
        found = {}
        for attribute, parameter in self.adapter_parameters(name):
            held = getattr(self, attribute)[name]
            inner = {id(p): key for key, p in held.named_parameters()} if isinstance(held, nn.Module) else {}
            ending = inner.get(id(parameter), "")
            # LoRA's format has the magnitudes of DoRA without the name of their module's weight.
            key = attribute if not ending or "magnitude" in attribute else f"{attribute}.{ending}"
            found[key] = full_tensor(parameter.detach()).contiguous()
        return found

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Return one adapter's tensors by container (a bias as "lora_B.bias"): detached, whole, fp32."""
        tensors = self.checkpoint_tensors(name).items()
        return {key.removesuffix(".weight"): tensor.float() for key, tensor in tensors}

    def delta_weight(self, name: str) -> Tensor:
        """Return the update of the base weight, fp32, (out_features, in_features) for a linear layer."""
        delta = cast(Any, self).get_delta_weight(name).detach().float()
        return delta.T if getattr(self, "fan_in_fan_out", False) else delta

    def stored_delta(self, names: Iterable[str]) -> Tensor:
        """Return what turns the stored base weight into the merged one, fp32."""
        return torch.stack([self.delta_weight(name) for name in names]).sum(0)

    @classmethod
    def module_factors(
        cls, tensors: Mapping[str, Tensor], config: Any, module: str
    ) -> tuple[Tensor, Tensor] | None:
        """Return s B and A of a linear layer's update; None for other layers and for DoRA's."""
        if set(tensors) != {"lora_A", "lora_B"} or tensors["lora_A"].dim() != 2:
            return None
        return config.scale_of(module) * tensors["lora_B"], tensors["lora_A"]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merge as PEFT does; what was there is kept, so that `unmerge` restores its bits."""
        if isinstance(self, MultiheadAttention):  # its every forward merges, with parameters made anew
            cast(Any, super()).merge(safe_merge=safe_merge, adapter_names=adapter_names)
            return
        refuse_sharded_merge(getattr(cast(Any, self).get_base_layer(), "weight", None), self.module_name)
        before = self.before_merge if self.before_merge is not None else self.snapshot()
        merged, core = list(self.merged_adapters), cast(Any, self).get_base_layer()
        try:
            # The safe way makes a new tensor, which leaves the old one as it was; it also looks for NaN.
            cast(Any, super()).merge(safe_merge=True, adapter_names=adapter_names)
            self.keep_bias(core)
        except Exception as error:
            self.forget_merge(before)
            if merged:
                self.merge(adapter_names=merged)
            raise ValueError(f"{self.module_name}: {error}") from error
        if self.merged_adapters:
            self.before_merge = before

    def unmerge(self) -> None:
        """Put the base weight back as it was before the first merge, to the bit (attention: as PEFT does)."""
        if isinstance(self, MultiheadAttention):
            cast(Any, super(KeepsOriginal, self)).unmerge()
        else:
            super().unmerge()


class LoraStartModel(AtomicInjection, LoraModel):
    """PEFT's LoRA tuner with a start of its own; `register_lora_start` makes one subclass for each method."""

    start_layer: ClassVar[type[LoraStartLayer]]

    def check_injection(self, adapter_name: str) -> None:
        """Check the adapter's name."""
        check_adapter_name(
            adapter_name,
            (key for key in self.model.state_dict() if ".lora_" not in key),
            LoraLayer.adapter_layer_names,
            self.prefix,
        )

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        lora_config: LoraStartConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: str | None = None,
    ) -> None:
        self.check_target(target, current_key, lora_config)
        # As in PEFT: a layer that has this adapter already is wrapped once more, for a further parameter.
        known = isinstance(target, LoraStartLayer) and adapter_name not in target.configs
        # LoRA draws from the global CPU generator.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeded(lora_config.seed, current_key).initial_seed())
            super()._create_and_replace(
                lora_config,
                adapter_name,
                target,
                target_name,
                parent,
                current_key,
                parameter_name=parameter_name,
            )
        layer: Any = target if known else getattr(parent, target_name)
        fresh = not isinstance(layer, LoraStartLayer)
        if fresh:
            layer.__class__ = _with_start(self.start_layer, type(layer))
            layer.adopt(current_key)
            self._undo.append(lambda: setattr(parent, target_name, target))
        else:
            self._undo.append(lambda: layer.delete_adapter(adapter_name))
        layer.configs[adapter_name] = lora_config
        with torch.no_grad():
            if lora_config.init_weights:
                layer.fill(adapter_name, lora_config)
            elif not any(p.is_meta for _, p in layer.adapter_parameters(adapter_name)):
                layer.randomize(adapter_name, lora_config)

    def check_target(self, target: nn.Module, name: str, config: Any) -> None:
        """Check that the settings fit one layer.

        Raises:
            ValueError: They do not.
        """

    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, merge: bool = True, *args: Any, **kwargs: Any
    ) -> nn.Module:
        if not merge:  # PEFT would hand out the merged weights
            for layer in (m for m in self.model.modules() if isinstance(m, LoraStartLayer)):
                if layer.merged_adapters:
                    layer.unmerge()
        return cast(nn.Module, super()._unload_and_optionally_merge(merge, *args, **kwargs))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with LoraModel._enable_peft_forward_hooks(self, *args, **kwargs):  # for activated LoRA
            if names is None:
                yield
            else:
                with self.mixed_batch(names, args, kwargs):
                    yield

    def start_layers(self, adapter_name: str) -> dict[str, Any]:
        """Return the layers that carry one adapter, by module path."""
        return layers_of(self.model, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        cls.fit_to_checkpoint(model, config, adapter_name, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        names = {id(p): key for key, p in model.named_parameters(remove_duplicate=False)}
        layers = layers_of(model, adapter_name).values()
        wanted = {names[id(p)] for layer in layers for _, p in layer.adapter_parameters(adapter_name)}
        check_checkpoint(wanted, remapped, cls.prefix)
        return remapped

    @classmethod
    def fit_to_checkpoint(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> None:
        """Bring an adapter's layers to the shapes of a checkpoint about to be loaded, where a method may."""


def layers_of(model: nn.Module, adapter_name: str) -> dict[str, Any]:
    """Return the layers with a start that carry one adapter, by module path."""
    return {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, LoraStartLayer) and adapter_name in layer.configs
    }


_CLASSES: dict[tuple[type, type], type] = {}


def _with_start(start: type[LoraStartLayer], lora: type) -> type:
    if (start, lora) not in _CLASSES:
        name = f"{start.__name__.removesuffix('Layer')}{lora.__name__}"
        if lora is ParamWrapper:  # PEFT asks for a class of this name
            name = lora.__name__
        made = type(name, (start, lora), {"__module__": start.__module__, "__doc__": lora.__doc__})
        if not hasattr(sys.modules[start.__module__], name):
            setattr(sys.modules[start.__module__], name, made)
        _CLASSES[start, lora] = made
    return _CLASSES[start, lora]


def _empty_layer(start: type[LoraStartLayer], lora: type) -> Any:
    """Return a layer without its state, for pickle: another process may not have made the class yet."""
    made: Any = _with_start(start, lora)
    return made.__new__(made)


def register_lora_start(
    name: str,
    *,
    config: type[LoraStartConfig],
    summary: str,
    paper: str | None,
    supports: Iterable[str] = (),
    test_kwargs: Mapping[str, object] | None = None,
    bad_kwargs: Iterable[Mapping[str, object]] = (),
    variants: Iterable[Variant] = (),
    model: type[LoraStartModel] = LoraStartModel,
) -> Callable[[LayerT], LayerT]:
    """Register a start of PEFT's LoRA as an adapter method, here and with PEFT.

    The arguments are those of `register_adapter`; the class that is decorated is mixed into PEFT's layers.
    """

    def decorate(layer: LayerT) -> LayerT:
        stem = layer.__name__.removesuffix("Layer")
        tuner = type(
            f"{stem}Model",
            (model,),
            {
                "start_layer": layer,
                "__module__": layer.__module__,
                "__doc__": f"LoRA with the start of {stem}.",
            },
        )
        register_tuner(
            tuner,
            MethodInfo(
                name=name,
                kind="adapter",
                summary=summary,
                paper=paper,
                target=layer,
                config=config,
                supports=frozenset(supports) | {"peft_lora"},
                test_kwargs=dict(test_kwargs or {}),
                bad_kwargs=tuple(bad_kwargs),
                variants=tuple(variants),
            ),
        )
        return layer

    return decorate
