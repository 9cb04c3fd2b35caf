"""Weights that a model has in several places: a change in one of them would be one of all.

transformers' tied embeddings are such, heads that decoders share, and whatever a model assigns twice.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

from torch import nn

from ._injection import AtomicInjection


class KeepsShared(AtomicInjection):
    """A tuner that changes no weight which layers beside the adapted one have too."""

    _shared: dict[int, list[str]]  # during an injection

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Inject an adapter into every target layer, or leave the model as it was."""
        self._shared = shared_weights(self.model)
        try:
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        finally:
            del self._shared

    def check_weight(self, target: nn.Module, module: str, *, writes: bool) -> None:
        """Check, during an injection, that a layer's weight is its own.

        Args:
            target: The layer, adapted or not.
            module: Its path.
            writes: Whether the injection writes into it; else a linear layer's may be shared, with a warning.

        Raises:
            ValueError: It is another's too.
        """
        core = base_of(target)
        if core is target:
            refuse_tied(self.model, self.get_model_config(self.model), target, module)
        if writes or isinstance(core, nn.Embedding | nn.modules.conv._ConvNd):
            refuse_shared(self._shared, core, module, "target_modules")
        elif core is target and (others := others_of(self._shared, core, module)):
            warnings.warn(
                f"{module}.weight is {others[0]} too: the adapter works beside it, a merge is refused",
                stacklevel=2,
            )

    def check_merged_weights(self, adapter_names: list[str] | None) -> None:
        """Check that the layers into which adapters are to be merged have weights of their own.

        Raises:
            ValueError: One has not.
        """
        shared = shared_weights(self.model)
        for path, layer in self.model.named_modules() if shared else ():
            if isinstance(layer, self.tuner_layer_cls):
                names = cast(Any, layer).active_adapters if adapter_names is None else adapter_names
                if any(name in cast(Any, layer).configs for name in names):
                    refuse_shared(shared, base_of(cast(nn.Module, layer)), path, "a merge")

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base; `unmerge_adapter` restores its bits.

        Raises:
            ValueError: There is no adapter of one of the names, or a layer's weight is another's too.
        """
        self.check_merged_weights(adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)


def base_of(layer: nn.Module) -> nn.Module:
    """Return the base layer of an adapted layer, or the layer itself."""
    return cast(Any, layer).get_base_layer() if hasattr(layer, "get_base_layer") else layer


def shared_weights(model: nn.Module) -> dict[int, list[str]]:
    """Return the names of every parameter that a model has in several places, by the parameter's id.

    A module in several places has its parameters in as many; one whose parent is in several is in one, as a
    layer put into its place is in all of them.
    """
    names: dict[int, list[str]] = {}
    places = [("", model)]
    for path, parent in model.named_modules():
        prefix = f"{path}." if path else ""
        places += [
            (f"{prefix}{name}.", child) for name, child in parent._modules.items() if child is not None
        ]
    for prefix, module in places:
        for key, parameter in module._parameters.items():
            if parameter is not None:
                names.setdefault(id(parameter), []).append(f"{prefix}{key}")
    return {key: found for key, found in names.items() if len(found) > 1}


def refuse_tied(model: nn.Module, settings: Mapping[str, Any], target: nn.Module, module: str) -> None:
    """Refuse a layer whose weight is the input embedding's in a model that is configured so.

    Args:
        model: The model.
        settings: Those of its config.
        target: The layer.
        module: Its path.

    Raises:
        ValueError: Its weight is that.
    """
    weight = getattr(target, "weight", None)
    if (
        weight is None
        or not settings.get("tie_word_embeddings")
        or not hasattr(model, "get_input_embeddings")
    ):
        return
    embedding = cast(Any, model).get_input_embeddings()
    if embedding is not None and getattr(embedding, "weight", None) is weight:
        raise ValueError(
            f"target_modules: {module} shares its weight with the input embedding (tie_word_embeddings); "
            "load the model with tie_word_embeddings=False to adapt it, or, where its class ties them all "
            "the same (as T5's does), give each layer a weight of its own and set tie_word_embeddings of its "
            "config to False"
        )


def refuse_shared(shared: Mapping[int, list[str]], target: nn.Module, module: str, what: str) -> None:
    """Refuse a layer whose weight is another's too.

    Args:
        shared: What `shared_weights` gives.
        target: The layer, or the base layer of an adapted one.
        module: Its path.
        what: The field or the act that asks for the layer.

    Raises:
        ValueError: A change of its weight would be one of another layer.
    """
    others = others_of(shared, target, module)
    if others:
        raise ValueError(
            f"{what}: {module}.weight is {', '.join(others[:2])} too, which would change with it; give each "
            "of them a weight of its own first"
        )


def others_of(shared: Mapping[int, list[str]], target: nn.Module, module: str) -> list[str]:
    """Return the names under which a layer's weight is another's too; the arguments are `refuse_shared`'s."""
    own = {f"{module}.weight", f"{module}.base_layer.weight"}
    found = shared.get(id(target._parameters.get("weight")), [])
    return [name.replace(".base_layer.", ".") for name in found if name not in own]
