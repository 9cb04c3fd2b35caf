"""What a tuner must check around PEFT's injection and loading, whatever layers it injects."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._compat.peft import PEFT_TYPE_TO_TUNER_MAPPING, BaseTuner, add_lora_option, add_peft_type
from ..core.checks import check, refuse_unknown
from ..core.files import tensor_header
from ..core.registry import MethodInfo, register
from ._mixed_batch import BASE, check_names, mixed_batch, repeats_of

__all__ = [
    "AtomicInjection",
    "add_lora_option",
    "check_adapter_name",
    "check_checkpoint",
    "check_weight_file",
    "refuse_sharded_merge",
    "register_tuner",
    "some",
    "tuner_of",
]

_WEIGHTS = "adapter_model.safetensors"


def check_weight_file(folder: str, subfolder: str | None) -> None:
    """Check that a local folder's weight file is whole.

    PEFT reads the config before anything else of a checkpoint, so a truncated file is refused here, by name,
    before a model is touched.

    Raises:
        ValueError: The file is damaged.
    """
    weights = Path(folder, subfolder or "", _WEIGHTS)
    if weights.is_file():
        tensor_header(weights)


def check_adapter_name(name: str, keys: Iterable[str], own: Iterable[str], prefix: str) -> None:
    """Check an adapter's name against the model's module paths.

    Args:
        name: The adapter's name.
        keys: Keys of the model's state.
        own: Attribute names of the tuner's layers.
        prefix: The tuner's prefix.

    Raises:
        ValueError: PEFT could not tell the adapter from a module: it looks for ".name." in keys.
    """
    parts = {part for key in keys for part in key.split(".")} | {*own, "base_layer", "base_model", "model"}
    check(name not in parts, "adapter_name", name, "no part of a module path")
    check(name not in prefix, "adapter_name", name, f"no part of {prefix!r}")
    check(name != BASE, "adapter_name", name, f"another than {BASE!r}, which names rows without an adapter")


def check_checkpoint(wanted: set[str], tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Check that a checkpoint's tensors are an adapter's, all of them and no others, and finite.

    PEFT loads with strict=False and leaves a missing tensor at its starting value.

    Args:
        wanted: Keys that the adapter has.
        tensors: Those of the checkpoint, by the model's keys.
        prefix: What marks a key as an adapter's.

    Raises:
        ValueError: Tensors are missing, unknown or not finite; they are named.
    """
    given = {key for key in tensors if f".{prefix}" in key}
    if missing := sorted(wanted - given):
        raise ValueError(f"the adapter checkpoint lacks {some(missing)}")
    if unknown := sorted(given - wanted):
        raise ValueError(f"the adapter checkpoint holds tensors that no adapted layer has: {some(unknown)}")
    for key in sorted(given):
        if not bool(torch.isfinite(tensors[key]).all()):
            raise ValueError(f"the adapter checkpoint's {key} has NaN or infinite values")


def refuse_sharded_merge(weight: object, module: str) -> None:
    """Refuse to merge into a weight of which each process holds a part.

    Raises:
        ValueError: The weight is sharded.
    """
    if hasattr(weight, "full_tensor"):
        raise ValueError(
            f"{module}: a sharded base cannot be merged into; save the adapter, or export it to LoRA, and "
            "merge it into a model that is loaded whole"
        )


def some(names: Sequence[str], limit: int = 3) -> str:
    """Return the first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def tuner_of(config: Any) -> Any:
    """Return the tuner class that PEFT has for a config."""
    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]


def register_tuner(tuner: type[BaseTuner], info: MethodInfo) -> None:
    """Register an adapter method, here and with PEFT.

    Args:
        tuner: The PEFT tuner; it becomes an attribute of its module, where pickle looks for it.
        info: The method's row; its name in upper case becomes the PEFT type.

    Raises:
        ValueError: The name is taken.
    """
    setattr(sys.modules[tuner.__module__], tuner.__name__, tuner)
    config: Any = info.config
    config.type_name = info.name
    register(info)
    if not add_peft_type(info.name, config, tuner):
        warnings.warn(f"PEFT ships a type {info.name.upper()} of its own, which stays in place", stacklevel=2)


class AtomicInjection(BaseTuner):
    """A tuner whose injection succeeds for every target layer or leaves the model as it was."""

    _undo: list[Callable[[], None]]

    def check_injection(self, adapter_name: str) -> None:
        """Check what can be refused before any layer is touched.

        Raises:
            ValueError: The adapter cannot be injected.
        """

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter into every target layer, or, where one refuses, leave the model as it was."""
        self.check_injection(adapter_name)
        # A copy: PEFT writes into it, and one object given for two adapters or models must not tie them.
        self.peft_config[adapter_name] = copy.deepcopy(self.peft_config[adapter_name])
        self._undo = []
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        except Exception:
            for undo in reversed(self._undo):
                undo()
            self.peft_config.pop(adapter_name, None)
            raise
        finally:
            del self._undo

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base; `unmerge_adapter` restores its bits.

        Raises:
            ValueError: There is no adapter of one of the names.
        """
        self.check_names(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def check_names(self, adapter_names: list[str] | None) -> None:
        """Check that adapters of the given names exist."""
        for name in adapter_names or ():
            if name not in self.peft_config:
                refuse_unknown("adapter_names", name, self.peft_config)

    def mixed_batch(
        self, adapter_names: object, args: Sequence[object], kwargs: Mapping[str, Any]
    ) -> AbstractContextManager[None]:
        """Return a context in which each row of a batch uses the adapter of its name.

        Args:
            adapter_names: What the user gave.
            args: Of the forward or of `generate` that runs in it.
            kwargs: The same.

        Raises:
            ValueError: They name no adapters, or the model is in training mode or merged.
        """
        names = check_names(adapter_names, list(self.peft_config))
        check(not self.training, "adapter_names", names, "None in training mode: call model.eval() first")
        layer_class: type = self.tuner_layer_cls
        layers = [layer for layer in self.model.modules() if isinstance(layer, layer_class)]
        biased = [n for n, config in self.peft_config.items() if getattr(config, "bias", "none") != "none"]
        rule = "None on a model that has trained biases, which all rows share"
        check(not biased, "adapter_names", names, rule, where=", ".join(biased))
        merged = any(layer.merged_adapters for layer in layers)
        check(
            not merged,
            "adapter_names",
            names,
            "None while adapters are merged: call unmerge_adapter first",
        )
        # They see some rows' tokens in an order of their own, sometimes as many as there are names.
        experts = [
            path
            for path, module in self.model.named_modules()
            if isinstance(module, layer_class) and "experts" in path.split(".")
        ]
        rule = "None where layers of experts are adapted, which do not see the rows"
        check(not experts, "adapter_names", names, rule, where=", ".join(experts[:2]))
        return mixed_batch(self.model, layer_class, names, repeats_of(args, kwargs))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        if names is None:
            yield
        else:
            with self.mixed_batch(names, args, kwargs):
                yield
