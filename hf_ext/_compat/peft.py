"""Names of PEFT without a stability promise, checked on 0.21."""

from __future__ import annotations

import copy
import functools
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _get_in_out_features,
    check_adapters_to_merge,
)
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    get_quantization_kwargs,
    register_peft_method,
    resolve_quantization_backend,
)
from peft.utils.integrations import gather_params_ctx
from peft.utils.other import AuxiliaryTrainingWrapper, get_pattern_key
from peft.utils.peft_types import PeftType
from torch import nn

__all__ = [
    "PEFT_TYPE_TO_CONFIG_MAPPING",
    "PEFT_TYPE_TO_PREFIX_MAPPING",
    "PEFT_TYPE_TO_TUNER_MAPPING",
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "AuxiliaryTrainingWrapper",
    "BaseTuner",
    "BaseTunerLayer",
    "ModuleSnapshot",
    "PeftConfig",
    "PeftType",
    "adapters_of_wrapper",
    "add_lora_option",
    "add_peft_type",
    "check_adapters_to_merge",
    "extend_enum",
    "gather_params_ctx",
    "get_pattern_key",
    "get_quantization_kwargs",
    "in_out_features",
    "resolve_quantization_backend",
]

in_out_features = _get_in_out_features


def adapters_of_wrapper(module: AuxiliaryTrainingWrapper) -> set[str]:
    """Return the names of the adapters that a module is trained whole with."""
    return module._adapters


def extend_enum(enum: type[Enum], name: str, value: str) -> Enum:
    """Add a member to a closed `str` enum, or return the member that already has the value.

    Upstream validates against these enums and offers no way to extend them; afterwards the new member looks
    up, iterates, copies and pickles as a native one does (Python 3.10 to 3.13).
    """
    members: dict[Any, Any] = enum._value2member_map_
    if value in members:
        return members[value]
    member = str.__new__(enum, value)  # pyright: ignore[reportArgumentType, reportCallIssue]
    member._name_, member._value_ = name, value  # pyright: ignore[reportAttributeAccessIssue]
    member.__objclass__, member._sort_order_ = enum, len(enum._member_names_)  # pyright: ignore
    type.__setattr__(enum, name, member)  # EnumType.__setattr__ would refuse
    enum._member_names_.append(name)
    enum._member_map_[name] = member  # pyright: ignore[reportArgumentType]
    members[value] = member
    return member  # pyright: ignore[reportReturnType]


def add_peft_type(name: str, config: type[PeftConfig], model: type[BaseTuner]) -> bool:
    """Register a tuner with PEFT as type NAME.

    Returns:
        False where PEFT already ships a type of that name: upstream's class stays in place.
    """
    peft_type = extend_enum(PeftType, name.upper(), name.upper())
    if peft_type in PEFT_TYPE_TO_CONFIG_MAPPING:
        return False
    register_peft_method(name=name, config_cls=config, model_cls=model, prefix=model.prefix)
    return True


def add_lora_option(export: Callable[..., object], handles: Callable[[str], bool]) -> None:
    """Give `PeftModel.save_pretrained` an option: `as_lora=True` writes an ordinary LoRA checkpoint.

    Args:
        export: Takes the model, the folder and `adapter_name`, and writes the checkpoint.
        handles: Takes a PEFT type's name and returns whether `export` knows it; others are saved as ever.
    """
    original = PeftModel.save_pretrained
    if "as_lora" in (getattr(original, "__kwdefaults__", None) or {}):
        return

    @functools.wraps(original)
    def save_pretrained(
        self: PeftModel, save_directory: str, *args: Any, as_lora: bool = False, **kwargs: Any
    ) -> Any:
        if not as_lora:
            return original(self, save_directory, *args, **kwargs)
        given = inspect.signature(original).bind(self, save_directory, *args, **kwargs).arguments
        chosen = given.get("selected_adapters") or list(self.peft_config)
        if len(chosen) != 1 or chosen[0] not in self.peft_config:
            raise ValueError(
                f"as_lora writes one adapter of the model: name it in selected_adapters, got {chosen}"
            )
        kind: Any = self.peft_config[chosen[0]].peft_type
        if not handles(str(getattr(kind, "value", kind))):
            return original(self, save_directory, *args, **kwargs)
        grouped = torch.distributed.is_available() and torch.distributed.is_initialized()
        if not given.get("is_main_process", True) and not grouped:
            return None  # in a process group all take part, and the first one writes
        folder = save_directory if chosen[0] == "default" else os.path.join(save_directory, chosen[0])
        return export(self, folder, adapter_name=chosen[0])

    PeftModel.save_pretrained = save_pretrained


@dataclass
class ModuleSnapshot:
    """A quantized base layer as it was before a merge: unmerging is then exact, not a second rounding."""

    module: nn.Module
    parameters: dict[str, Any]
    parameter_state: dict[str, dict[str, Any]]
    attributes: dict[str, Any]

    @classmethod
    def take(cls, module: nn.Module) -> ModuleSnapshot:
        """Remember a layer's parameter objects, their attributes and the layer's quantization state."""
        parameters = dict(module._parameters)
        # bitsandbytes writes into the old parameter's __dict__ when it makes the new one.
        state = {name: dict(p.__dict__) for name, p in parameters.items() if p is not None}
        held = {name: copy.copy(module.__dict__[name]) for name in ("state",) if name in module.__dict__}
        return cls(module, parameters, state, held)

    def restore(self, layer: BaseTunerLayer) -> None:
        """Put everything back; the HQQ backend has replaced the whole module, the others its weight."""
        owner: Any = layer
        while isinstance(owner.base_layer, BaseTunerLayer):
            owner = owner.base_layer
        owner.base_layer = self.module
        for name, parameter in self.parameters.items():
            self.module.__dict__.pop(name, None)
            self.module._parameters[name] = parameter
            if parameter is not None:
                parameter.__dict__.update(self.parameter_state[name])
        # Copies again: the layer's state object is written to by the next merge.
        self.module.__dict__.update({name: copy.copy(value) for name, value in self.attributes.items()})
