"""An adapter folded into its base between rounds, and the sum of all rounds as one LoRA at the end.

Two adapters are not to be added tensor by tensor: their update is a product. What can be added is the weight
of a layer with the adapter merged into it. So after a round the merged weights become the base of the next
one, which starts a fresh adapter; the base that the run began with is kept, and what has been added to it
comes back as a LoRA adapter of the rank that it has, exact to rounding, for the original base.

Merging and starting an adapter take whole weights. Where FSDP2 or ZeRO-3 shards the model, the first process
keeps the adapted layers, whole and in main memory, does both with them, and hands the result out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from .._compat.deepspeed import is_split, whole_shape
from ..adapters._data_start import awaits_data
from ..core import dist
from ..core.checks import check
from ._parts import own_part, part_of_whole, put_part, whole_tensor

T = TypeVar("T")


def folded_layers(model: PeftModel) -> dict[str, BaseTunerLayer]:
    """Return the adapter's layers by their path in the base model.

    Raises:
        ValueError: A layer is neither linear nor a Conv1D of full-precision numbers, or something else than
            the adapter trains (biases, `modules_to_save`), or it moves biases too.
    """
    for config in model.peft_config.values():
        moved = getattr(config, "lora_bias", False)
        check(not moved, "lora_bias", moved, "False: rounds of extrapolation fold weights alone")
    found: dict[str, BaseTunerLayer] = {}
    owned: set[int] = set()
    for path, module in cast(nn.Module, model.base_model.model).named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        base = module.get_base_layer()
        plain = isinstance(base, nn.Linear | Conv1D) and base.weight.is_floating_point()
        check(plain, path, type(base).__name__, "linear and not quantized, for its adapter to be folded in")
        found[path] = module
        owned |= {
            id(p)
            for name, p in cast(nn.Module, module).named_parameters()
            if not name.startswith("base_layer.")
        }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in owned:
            raise ValueError(
                f"{name} trains beside the adapter (bias or modules_to_save): rounds of extrapolation fold "
                "adapters alone"
            )
    return found


def base_weights(layers: Mapping[str, BaseTunerLayer]) -> dict[str, nn.Parameter]:
    """Return each layer's base weight, itself, by path."""
    return {path: layer.get_base_layer().weight for path, layer in layers.items()}  # type: ignore[union-attr]


def merged_weights(model: PeftModel, layers: Mapping[str, BaseTunerLayer]) -> dict[str, Tensor]:
    """Return copies of the layers' weights with the adapter merged in; the model is left as it was."""
    before = {path: weight.detach().clone() for path, weight in base_weights(layers).items()}
    model.merge_adapter()
    merged = {path: weight.detach().clone() for path, weight in base_weights(layers).items()}
    model.unmerge_adapter()
    with torch.no_grad():
        for path, weight in base_weights(layers).items():
            weight.copy_(before[path])  # PEFT's own types come back to rounding only
    return merged


class WholeLayers:
    """The adapted layers of a model, whole, on the first process; of the rest of the model only its shape.

    Made before the model is sharded, or after ZeRO-3 has split it (a collective then). It has the model's
    adapters and goes through the same steps.

    Args:
        model: The model; its weights need be there on the first process alone.

    In memory: the adapted layers once, in the main memory of the first process.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model: PeftModel | None = None
        if dist.is_main():
            self.model = _without_values(model)
        own = {} if self.model is None else dict(_tensors(self.model))
        for name, tensor in _tensors(model):
            # Other processes may have nothing but placeholders for what is not split.
            split = is_split(tensor)
            whole = whole_tensor(own_part(tensor), tensor) if split else tensor.detach()
            if own:
                own[name].data.copy_(whole)

    def read(self, model: PeftModel) -> None:
        """Take the layers' tensors from the sharded model (a collective)."""
        own = {} if self.model is None else dict(_tensors(self.model))
        for name, tensor in _tensors(model):
            whole = whole_tensor(own_part(tensor), tensor)
            if self.model is not None:
                own[name].data.copy_(whole)

    def write(self, model: PeftModel) -> None:
        """Give the layers' tensors to the sharded model (a collective)."""
        own = {} if self.model is None else dict(_tensors(self.model))
        for name, tensor in _tensors(model):
            whole = own[name].detach() if own else None
            put_part(tensor, part_of_whole(_from_main(whole, tensor), tensor, name))

    def apply(self, action: Callable[[PeftModel], T]) -> T | None:
        """Return what an action with the layers gives, None on the other processes (a collective)."""
        with dist.together():
            return None if self.model is None else action(self.model)

    def merged_weights(self, model: PeftModel) -> dict[str, Tensor]:
        """Return each process's parts of `merged_weights` (a collective)."""
        self.read(model)
        merged = self.apply(lambda whole: merged_weights(whole, folded_layers(whole))) or {}
        return {
            path: part_of_whole(_from_main(merged.get(path), weight), weight, path)
            for path, weight in base_weights(folded_layers(model)).items()
        }

    def fresh_adapter(self, model: PeftModel, seed: int) -> None:
        """Overwrite the adapter by a new one of its settings, started on the base as it is (a collective)."""
        self.read(model)
        self.apply(lambda whole: fresh_adapter(whole, seed))
        self.write(model)


def _without_values(model: PeftModel) -> PeftModel:
    """Return a copy in main memory with empty parameters, of their shape in the adapted layers alone."""
    kept = {id(tensor): tensor for _, tensor in _tensors(model)}
    put: dict[int, Any] = {}
    for key, tensor in ({id(p): p for p in model.parameters()} | kept).items():
        shape = whole_shape(tensor) if key in kept else (0,)
        empty = torch.empty(shape, dtype=tensor.dtype, device="cpu")
        trains = key in kept and tensor.requires_grad
        put[key] = nn.Parameter(empty, requires_grad=trains) if isinstance(tensor, nn.Parameter) else empty
    return cast(PeftModel, copy.deepcopy(model, put).cpu())


def _tensors(model: PeftModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and the tensor of each parameter and buffer of the adapted layers."""
    for path, layer in folded_layers(model).items():
        module = cast(nn.Module, layer)
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            yield f"{path}.{name}", tensor


def _from_main(whole: Tensor | None, like: Tensor) -> Tensor:
    """Return the first process's tensor on all of them, on the CPU (a collective)."""
    held = torch.empty(whole_shape(like), dtype=like.dtype) if whole is None else whole.contiguous()
    return dist.broadcast_(held)


def _adapter_name(model: PeftModel) -> str:
    active = model.active_adapter
    check(isinstance(active, str), "active adapters", active, "one")
    return str(active)


def fresh_adapter(model: PeftModel, seed: int) -> None:
    """Replace the adapter by a new one of its settings, started on the base as it is now.

    Raises:
        ValueError: Its start needs data.
    """
    name = _adapter_name(model)
    config = model.peft_config[name]
    random_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model.delete_adapter(name)
        model.add_adapter(name, config)
    finally:
        torch.set_rng_state(random_state)
    model.set_adapter(name)
    refuse_data_start(model)


def refuse_data_start(model: PeftModel) -> None:
    """Raise where an adapter still awaits data for its start.

    Raises:
        ValueError: It does.
    """
    waiting = awaits_data(model)
    check(
        not waiting,
        "init_weights",
        True,
        "False for an adapter that starts from data: each round of extrapolation starts a fresh one",
    )


def as_lora(model: PeftModel, original: Mapping[str, Tensor], final: Mapping[str, Tensor]) -> PeftModel:
    """Return the original base with the whole update as a LoRA adapter; the model given is used up.

    Where the model is sharded this is a collective; the base stays sharded, the LoRA adapter is whole.

    Args:
        model: The model of the last round.
        original: Base weights that the run began with, by path; of sharded ones this process's parts.
        final: Weights of the policy to return, likewise.

    Returns:
        A model whose adapter has, for each layer, the rank of its update.
    """
    task = model.peft_config[_adapter_name(model)].task_type
    base: Any = model.unload()
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    with torch.no_grad():
        for path, part in original.items():
            layer = base.get_submodule(path)
            before, after = (whole_tensor(own, layer.weight).float() for own in (part, final[path]))
            put_part(layer.weight, part)
            delta = after - before
            factors[path] = _of_main(*_factors(delta.T if isinstance(layer, Conv1D) else delta))
    ranks = {path: b.size(1) for path, (b, _) in factors.items()}
    top = max(ranks.values())
    lora = LoraConfig(
        r=top,
        lora_alpha=top,
        rank_pattern={f"^{path}$".replace(".", r"\."): rank for path, rank in ranks.items()},
        alpha_pattern={f"^{path}$".replace(".", r"\."): rank for path, rank in ranks.items()},
        target_modules=list(factors),
        task_type=task,
    )
    result = get_peft_model(base, lora)
    with torch.no_grad():
        for path, (b, a) in factors.items():
            layer = cast(Any, result.base_model.model).get_submodule(path)
            layer.lora_B["default"].weight.copy_(b)
            layer.lora_A["default"].weight.copy_(a)
    return result  # type: ignore[return-value]


def _factors(delta: Tensor) -> tuple[Tensor, Tensor]:
    """Return B (m, r) and A (r, n) with B A = delta (m, n) to rounding; r is at least 1."""
    u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
    # What the rounding of fp32 weights alone would show as rank.
    noise = torch.finfo(torch.float32).eps * max(delta.shape) * s[:1]
    rank = max(1, int((s > noise).sum()))
    root = s[:rank].sqrt()
    return (u[:, :rank] * root).to(delta.dtype), (root[:, None] * vh[:rank]).to(delta.dtype)


def _of_main(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """Return the first process's factors on all of them: machines may round to other ranks (a collective)."""
    rank = dist.gather_objects(b.size(1))[0]
    held = [x if dist.is_main() else x.new_empty(shape) for x, shape in
            ((b, (b.size(0), rank)), (a, (rank, a.size(1))))]  # fmt: skip
    return dist.broadcast_(held[0].contiguous()), dist.broadcast_(held[1].contiguous())
