"""EVA: LoRA whose A holds the directions in which each layer's inputs vary most.

Source: Paischer et al. 2024, "One Initialization to Rule them All: Fine-tuning via Explained Variance
Adaptation", arXiv 2410.07170, section 3 and algorithm 1. A starts as the leading principal components of the
layer's inputs, B as 0; ranks are given out by share of explained variance, r per layer on average and at most
rho r. After the start it is a LoRA, and is built on PEFT's own layers.

Differs from the paper, its code and PEFT's `init_lora_weights="eva"`:
- The components come from sums over tokens (`_input_spectra`) instead of incremental PCA: one pass, exact up
  to 4096 features, the same whatever the order of batches and the number of processes. `tau`, at which
  incremental PCA counts as converged, has no part in it.
- A layer that sees too few tokens is an error; PEFT skips it and may read the data for ever.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..core import dist
from ..core.checks import check, check_choice
from ..core.dist import full_tensor
from ..core.lowrank import seeded
from ._data_start import StartData, StartsFromData
from ._injection import some
from ._input_spectra import Components, InputSpectra
from ._lora import LoraStartConfig, LoraStartLayer, LoraStartModel, layers_of, register_lora_start

__all__ = ["EvaConfig", "get_eva_state_dict"]


@dataclass
class EvaConfig(LoraStartConfig):
    """Settings of EVA, beside those of PEFT's `LoraConfig` (`LoraStartConfig`).

    Args:
        rho: Largest rank of a layer as a multiple of its r, >= 1; 1 keeps every layer at its r.
        whiten: Whether rows of A are divided by the square root of their singular value.
        use_label_mask: Whether tokens whose label is `label_mask_value` are left out.
        label_mask_value: That label.
        adjust_scaling_factors: Whether lora_alpha changes with a layer's rank, so that the scale stays.
        method: "gram" (exact, a (d, d) matrix for each distinct input), "sketch", or "auto": gram for inputs
            of up to 4096 features as long as all of them take no more than 4 GiB.
        oversample: Directions of a sketch beyond the components sought, >= 0; None for as many + 10.
        n_passes: Passes of the sketch over the data, 1 or 2.
        n_tokens: Tokens to read, over all processes; at least 10 times the components sought.
        min_rank: Least rank of a layer, 0 to r; with 0 a layer can lose its adapter.
        tau: Has no effect; accepted from configs of PEFT's EVA.
    """

    rho: float = 2.0
    whiten: bool = False
    use_label_mask: bool = True
    label_mask_value: int = -100
    adjust_scaling_factors: bool = True
    method: str = "auto"
    oversample: int | None = None
    n_passes: int = 2
    n_tokens: int = 131072
    min_rank: int = 0
    tau: float | None = None

    def validate(self) -> None:
        """Check EVA's own fields."""
        check(self.rho >= 1.0, "rho", self.rho, "at least 1")
        check_choice("method", self.method, ("auto", "gram", "sketch"))
        check(
            self.oversample is None or self.oversample >= 0,
            "oversample",
            self.oversample,
            "None or at least 0",
        )
        check(self.n_passes in (1, 2), "n_passes", self.n_passes, "1 or 2")
        check(self.n_tokens >= 1, "n_tokens", self.n_tokens, "at least 1")
        check(0 <= self.min_rank <= self.r, "min_rank", self.min_rank, f"between 0 and {self.r}, the rank r")
        if self.tau is not None:
            warnings.warn("tau has no effect: the components are not found iteratively", stacklevel=4)


class EvaModelBase(LoraStartModel):
    """PEFT's LoRA tuner with EVA's start."""

    def check_target(self, target: nn.Module, name: str, config: Any) -> None:
        """Check that a layer has as many input directions as the rank asks for."""
        core = target.get_base_layer() if hasattr(target, "get_base_layer") else target  # type: ignore[operator]
        width = getattr(core, "in_features", None)
        if width is not None:
            r = config.rank_of(name)
            check(r <= width, "r", r, f"at most {width}, the layer's number of inputs", where=name)

    @classmethod
    def fit_to_checkpoint(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: Mapping[str, Tensor]
    ) -> None:
        """Give the layers the ranks of a checkpoint, where EVA had not given them out yet.

        Raises:
            ValueError: EVA has given out others.
        """
        found = {
            key.removesuffix(".lora_A.weight").removeprefix(_PREFIX): tensor.shape[0]
            for key, tensor in state_dict.items()
            if key.endswith(".lora_A.weight")
        }
        halves = {key.partition(".lora_")[0].removeprefix(_PREFIX) for key in state_dict if ".lora_" in key}
        supported = {
            layer.module_name: layer
            for layer in layers_of(model, adapter_name).values()
            if not _is_unsupported(layer)
        }
        waiting = {name: layer for name, layer in supported.items() if layer.awaits(adapter_name)}
        if config.init_weights and not waiting:
            differing = [
                name
                for name, rank in found.items()
                if name in supported and supported[name].r[adapter_name] != rank
            ]
            if differing:
                raise ValueError(
                    f"adapter {adapter_name!r} has already been given ranks from data, and the checkpoint "
                    f"has others ({some(differing)}): do not call initialize_from_data on a model that is "
                    "about to load or resume from a checkpoint, which holds the start"
                )
        if not waiting or halves != set(found) or not halves <= set(waiting):
            return  # nothing to fit, or a checkpoint that the checks after this refuse
        give_ranks(model, adapter_name, {name: found.get(name, 0) for name in waiting})

    def add_weighted_adapter(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, adapters: list[str], weights: list[float], adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add a combination of adapters as PEFT does; one of started adapters has nothing to wait for."""
        super().add_weighted_adapter(adapters, weights, adapter_name, *args, **kwargs)
        layers = layers_of(self.model, adapter_name).values()
        if not all(layer.awaits(adapter_name) for layer in layers):
            for layer in layers:
                layer.awaiting.discard(adapter_name)


_PREFIX = "base_model.model."


@register_lora_start(
    "eva",
    config=EvaConfig,
    model=EvaModelBase,
    summary="LoRA started from the directions in which a layer's inputs vary most, ranks given out by them",
    paper="arXiv:2410.07170",
    supports={
        "starts_at_base",
        "starts_from_data",
        "exact_base",
        "merge",
        "lora_export",
        "multi_adapter",
        "conv1d",
        "quantized",
        "embeddings",
        "convolutions",
    },
    test_kwargs={"r": 4, "rho": 1.0, "n_tokens": 80},
    bad_kwargs=(
        {"r": 0},
        {"lora_alpha": 0},
        {"lora_dropout": 1.0},
        {"rho": 0.5},
        {"method": "pca"},
        {"oversample": -1},
        {"n_passes": 3},
        {"n_tokens": 0},
        {"min_rank": 9},
        {"init_lora_weights": "eva"},
    ),
)
class EvaLayer(StartsFromData, LoraStartLayer):
    """What EVA adds to PEFT's LoRA layers. A checkpoint holds lora_A and lora_B as LoRA's do."""

    def adopt(self, module_name: str) -> None:
        """Take over a fresh LoRA layer."""
        super().adopt(module_name)
        self.watch()

    def fill(self, name: str, config: EvaConfig) -> None:
        """Leave the adapter empty until data have been seen; a layer that EVA cannot start is LoRA's."""
        if _is_unsupported(self):
            return
        for _, parameter in self.low_rank_parameters(name):
            parameter.zero_()
        self.awaiting.add(name)

    def empty_tensors(self, name: str) -> list[Tensor]:
        """Return A and B of one adapter."""
        return [full_tensor(parameter.detach()) for _, parameter in self.low_rank_parameters(name)]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output.

        Raises:
            RuntimeError: An active adapter is to be trained and has not been started.
        """
        layer: Any = self
        if self.awaiting:
            self.check_started(() if layer.disable_adapters else layer.active_adapters)
        return super().forward(x, *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def start_from_data(cls, data: StartData) -> None:
        """Find the components of every layer's inputs, give out ranks and fill A."""
        config, name = data.config, data.adapter_name
        layers = {path: layer for path, layer in data.layers.items() if not _is_unsupported(layer)}
        for layer in layers.values():
            on_meta = any(p.is_meta for _, p in layer.adapter_parameters(name))
            rule = "on a device: inject it with low_cpu_mem_usage=False"
            check(not on_meta, "adapter", "tensors on the meta device", rule, where=layer.module_name)
        chosen = choose_components(data, layers, config)
        ranks = {layers[path].module_name: len(rows) for path, rows in chosen.items()}
        give_ranks(data.model, name, ranks)
        for path, rows in chosen.items():
            if len(rows):
                a = layers[path].lora_A[name].weight
                a.data.copy_(dist.broadcast_(rows.to(a.device, torch.float32)))


def choose_components(data: StartData, layers: Mapping[str, Any], config: Any) -> dict[str, Tensor]:
    """Return the rows of A for each layer, (r', in_features) fp32; r' can be 0.

    Args:
        data: Batches and model.
        layers: Layers by module path, in module order.
        config: EVA's settings.
    """
    # Not a rule of the settings alone: a weighted sum of adapters has a larger r and needs no tokens.
    least = 10 * round(config.rho * config.r)
    check(config.n_tokens >= least, "n_tokens", config.n_tokens, f"at least {least}, 10 for each component")
    ranks = {path: config.rank_of(layer.module_name) for path, layer in layers.items()}
    wanted = {path: min(round(config.rho * ranks[path]), layers[path].in_features) for path in layers}
    spectra = InputSpectra(
        data,
        layers,
        wanted,
        method=config.method,
        oversample=config.oversample,
        n_passes=config.n_passes,
        n_tokens=config.n_tokens,
        use_label_mask=config.use_label_mask,
        label_mask_value=config.label_mask_value,
        seed=config.seed,
    )
    found = {path: spectra.of(path) for path in layers}
    ratios = {
        path: [] if components is None else components.ratios[: wanted[path]].tolist()
        for path, components in found.items()
    }
    counts = dist.gather_objects(redistribute(ratios, ranks, config.min_rank))[0]
    unseen = [layers[path].module_name for path, components in found.items() if components is None]
    if unseen:
        warnings.warn(
            f"no token reached {some(unseen)}: rank {config.min_rank}, started as LoRA's own layers are",
            stacklevel=4,
        )
    return {path: _rows(components, counts[path], layers[path], config) for path, components in found.items()}


def _rows(components: Components | None, count: int, layer: Any, config: Any) -> Tensor:
    if components is None:
        rows = torch.empty(count, layer.in_features)
        if count:
            nn.init.kaiming_uniform_(rows, a=math.sqrt(5), generator=seeded(config.seed, layer.module_name))
        return rows
    rows = components.vectors[:count]
    if config.whiten:
        rows = rows / components.singular_values[:count].float().clamp_min(1e-12).sqrt()[:, None]
    return rows


def redistribute(
    ratios: Mapping[str, Sequence[float]], ranks: Mapping[str, int], min_rank: int = 0
) -> dict[str, int]:
    """Give the budget of all ranks to the components that explain most.

    Args:
        ratios: Shares of the variance of each layer's components, falling; none where nothing is known.
        ranks: Rank of each layer before.
        min_rank: Least rank of each layer.

    Returns:
        Ranks with the same sum as before, less where there are not as many components. Equal shares go to the
        layer that comes first.
    """
    budget = sum(ranks.values())
    counts = {path: min(min_rank, len(values)) if values else min_rank for path, values in ratios.items()}
    rest = [
        (-share, order, index, path)
        for order, (path, values) in enumerate(ratios.items())
        for index, share in enumerate(values)
        if index >= counts[path]
    ]
    for _, _, _, path in sorted(rest)[: max(0, budget - sum(counts.values()))]:
        counts[path] += 1
    return counts


def give_ranks(model: nn.Module, adapter_name: str, ranks: Mapping[str, int]) -> None:
    """Give one adapter's layers new ranks, in place, and write them into its settings.

    A layer of rank 0 loses the adapter; one without any other becomes a plain layer again. Tensors of a layer
    whose rank changes are new parameters, with zeros in them.

    Args:
        model: The model that carries the adapter.
        adapter_name: Its name.
        ranks: New rank by module path, for those of its layers that EVA starts.
    """
    layers = {layer.module_name: (path, layer) for path, layer in layers_of(model, adapter_name).items()}
    shared = next(iter(layers.values()))[1].configs[adapter_name]  # one object for all layers and the tuner
    rank_pattern, alpha_pattern, kept = {}, {}, []
    for name, (path, layer) in layers.items():
        old, alpha = shared.rank_of(name), shared.alpha_of(name)
        new = ranks.get(name, old)
        if new == 0:
            layer.awaiting.discard(adapter_name)
            with _settled(layer):
                layer.delete_adapter(adapter_name)
            if not layer.configs:
                parent = model.get_submodule(path.rpartition(".")[0])
                setattr(parent, path.rpartition(".")[2], layer.get_base_layer())
            continue
        kept.append(name)
        if new != old:
            if shared.adjust_scaling_factors and not shared.use_rslora:
                alpha = alpha * new / old
            elif shared.adjust_scaling_factors:
                alpha = alpha * math.sqrt(new / old)
            _resize(layer, adapter_name, new, alpha, shared)
        if new != shared.r:
            rank_pattern[f"^{re.escape(name)}"] = new
        if alpha != shared.lora_alpha:
            alpha_pattern[f"^{re.escape(name)}"] = alpha
    shared.rank_pattern, shared.alpha_pattern = rank_pattern, alpha_pattern
    shared.target_modules = _exactly(kept, model, layers)
    shared.layers_to_transform, shared.layers_pattern, shared.exclude_modules = None, None, None


def _exactly(names: Sequence[str], model: nn.Module, layers: Mapping[str, tuple[str, Any]]) -> set[str] | str:
    """Return target_modules that match these modules and no others: PEFT takes names as endings too."""
    name, (path, _) = next(iter(layers.items()))
    prefix, endings = path.removesuffix(name), tuple(f".{name}" for name in names)
    paths = {path.removeprefix(prefix) for path, _ in model.named_modules()} - set(names)
    more = any(path.endswith(endings) for path in paths)
    return "|".join(re.escape(name) for name in names) if more else set(names)


def _resize(layer: Any, name: str, r: int, alpha: float, config: Any) -> None:
    """Give one adapter of a layer tensors of another rank: zeros, and DoRA's magnitudes as they start."""
    before = layer.adapter_parameters(name)
    trained, dtype = any(p.requires_grad for _, p in before), before[0][1].dtype
    with torch.random.fork_rng(devices=[]), torch.no_grad(), _settled(layer):
        layer.update_layer(name, r, lora_alpha=alpha, config=config)
        for _, parameter in layer.low_rank_parameters(name):
            parameter.zero_()
    for _, parameter in layer.adapter_parameters(name):
        parameter.data = parameter.data.to(dtype)  # PEFT gives new tensors the base's
        parameter.requires_grad_(trained)


@contextmanager
def _settled(layer: Any) -> Iterator[None]:
    """Keep which adapters of a layer are active and what is trained, whatever PEFT sets in the body."""
    active, flags = layer._active_adapter, {p: p.requires_grad for p in layer.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        yield
    layer._active_adapter = active
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)


_OTHER_INPUTS = (
    nn.Embedding,
    nn.modules.conv._ConvNd,
    nn.MultiheadAttention,
    NonDynamicallyQuantizableLinear,  # the output projection inside MultiheadAttention, which is never called
)


def _is_unsupported(layer: Any) -> bool:
    """Whether a layer's inputs are not rows of features: it starts as LoRA's own layers do, as in PEFT."""
    return isinstance(layer, ParamWrapper) or isinstance(layer.get_base_layer(), _OTHER_INPUTS)


def get_eva_state_dict(
    model: nn.Module,
    dataloader: Iterable[Any],
    config: EvaConfig | None = None,
    *,
    adapter_name: str = "default",
    show_progress: bool = True,
) -> dict[str, Tensor]:
    """Return EVA's rows of A for a model with PEFT's own LoRA, as PEFT's `get_eva_state_dict` does.

    For users of `LoraConfig(init_lora_weights="eva")`: hand the result to
    `peft.initialize_lora_eva_weights(model, eva_state_dict=...)`.

    Args:
        model: A PeftModel with a LoRA adapter.
        dataloader: Batches of model inputs.
        config: EVA's settings; None for r, rank_pattern and `eva_config` of the adapter.
        adapter_name: Which adapter.
        show_progress: Whether to show a progress bar.

    Returns:
        Module path in the model -> (r', in_features), on the layer's device.

    Raises:
        ValueError: The model has no such LoRA adapter, or the data are unfit.
    """
    layers = {
        path: _Plain(path.removeprefix(_PREFIX), module)
        for path, module in model.named_modules()
        if isinstance(module, LoraLayer) and adapter_name in module.r and not _is_unsupported(module)
    }
    check(bool(layers), "adapter_name", adapter_name, "the name of a LoRA adapter on linear layers")
    if config is None:
        lora: Any = model.peft_config[adapter_name]  # type: ignore[index]
        sub = getattr(lora, "eva_config", None)
        known = ("rho", "whiten", "use_label_mask", "label_mask_value", "adjust_scaling_factors")
        given = {} if sub is None else {name: getattr(sub, name) for name in known}
        config = EvaConfig(r=lora.r, rank_pattern=dict(lora.rank_pattern or {}), **given)
    data = StartData(model, adapter_name, layers, config, dataloader, None, show_progress)
    chosen = choose_components(data, layers, config)
    return {path: rows.to(layers[path].device) for path, rows in chosen.items()}


class _Plain:
    """A LoRA layer of PEFT's, as `choose_components` looks at layers."""

    def __init__(self, path: str, layer: Any) -> None:
        self.module_name, self.in_features = path, layer.in_features
        self.device = next(layer.parameters()).device
        self.register_forward_pre_hook = layer.register_forward_pre_hook
        self.get_base_layer = layer.get_base_layer
