"""Everything of an adapter but the method's own maths: settings, injection, forward, merging, loading.

A method supplies a config (its fields and `validate`), a layer with `shapes`, `initial_values`,
`forward_delta` and, where the update has low rank, `factors`; `register_adapter` makes the PEFT tuner and
registers both.
"""

from __future__ import annotations

import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, TypeVar, cast, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._compat.peft import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    BaseTunerLayer,
    PeftConfig,
    PeftType,
    check_adapters_to_merge,
    gather_params_ctx,
    get_pattern_key,
    get_quantization_kwargs,
    resolve_quantization_backend,
)
from ..core import dist
from ..core.checks import check, check_choice, check_fields
from ..core.lowrank import seeded
from ..core.registry import MethodInfo, Variant
from ._biases import HasBiases, TrainsBiases, load_biases
from ._injection import (
    check_adapter_name,
    check_checkpoint,
    check_weight_file,
    refuse_sharded_merge,
    register_tuner,
)
from ._layouts import LINEAR, layout_of, refuse_tensor_parallel
from ._merging import KeepsOriginal
from ._mixed_batch import RowNames
from ._shared_weights import KeepsShared

T = TypeVar("T")
LayerT = TypeVar("LayerT", bound="type[AdapterLinear]")


@dataclass
class AdapterConfig(PeftConfig):
    """Settings that every adapter has; the names and meanings of PEFT's own types.

    Args:
        r: Rank of the update, at least 1 and at most the smaller side of every target layer.
        dropout: Probability with which entries of the layer's input are dropped on the adapter's path, in [0,
            1).
        target_modules: Names (or name endings) of the layers to adapt, a regular expression, or "all-linear";
            None for PEFT's choice for the architecture.
        exclude_modules: Names (or name endings), or a regular expression, of layers to leave alone.
        modules_to_save: Further modules to train in full and save with the adapter.
        layers_to_transform: Indices of the blocks to adapt; needs target_modules to be a list.
        layers_pattern: Name of the block list, where it is not a common one such as "layers" or "h".
        rank_pattern: Rank by module name or regular expression, where it differs from r.
        init_weights: True for the method's start; False for a random one that changes the output from the
            first step, for debugging.
        bias: Which biases of the base are trained with the adapter, and saved with it: "none", "all", or
            "<type>_only" ("bone_only", ...) for those of the adapted layers. One adapter of a model may.
        seed: Seed of everything random at the start; global seeds have no effect on it.

    Raises:
        TypeError: A field has the wrong type.
        ValueError: A field is outside its range.
    """

    r: int = 8
    dropout: float = 0.0
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    init_weights: bool = True
    bias: str = "none"
    seed: int = 0

    type_name: ClassVar[str] = ""  # set by register_adapter
    may_lack_biases = False  # whether its checkpoint may be of a version that left them out

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.type_name:  # the JSON hands a plain string, PEFT looks up by member
            self.peft_type = PeftType[self.type_name.upper()]
        inherited = {f.name for f in fields(PeftConfig)}
        own = [f.name for f in fields(self) if f.name not in inherited]
        hints = {name: hint for name, hint in get_type_hints(type(self)).items() if name in own}
        given = {name: getattr(self, name) for name in own}
        for name, value in check_fields(given, hints, where=type(self).__name__).items():
            setattr(self, name, value)  # text that spells a number is one
            check(not isinstance(value, float) or math.isfinite(value), name, value, "finite")
        for name in ("target_modules", "exclude_modules"):  # PEFT's own configs hold sets
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        check_choice("bias", self.bias, ("none", "all", f"{self.type_name}_only"))
        check(self.r >= 1, "r", self.r, "at least 1")
        check(0.0 <= self.dropout < 1.0, "dropout", self.dropout, "at least 0 and below 1")
        for pattern, rank in self.rank_pattern.items():
            check(rank >= 1, f"rank_pattern[{pattern!r}]", rank, "at least 1")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                value = getattr(self, name)
                check(
                    value is None,
                    name,
                    value,
                    "None when target_modules is a regular expression or a shorthand",
                )
        self.validate()

    @property
    def writes_base(self) -> bool:
        """Whether an injection writes into the base weights."""
        return False

    def validate(self) -> None:
        """Check the method's own fields; called at construction, before any model is touched."""

    def rank_of(self, module: str) -> int:
        """Return the rank for one module path."""
        return self.value_for(module, self.rank_pattern, self.r)

    @staticmethod
    def value_for(module: str, pattern: Mapping[str, T], default: T) -> T:
        """Return the value of the pattern that matches a module path, by PEFT's rules, or the default."""
        return pattern.get(get_pattern_key(list(pattern), module), default)

    def scale_of(self, module: str) -> float:
        """Return the factor of the update for one module path; a method with an alpha overrides this."""
        return 1.0

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any):
        """Read the settings; a local folder's weight file is first checked to be whole."""
        check_weight_file(pretrained_model_name_or_path, subfolder)
        return super().from_pretrained(pretrained_model_name_or_path, subfolder=subfolder, **kwargs)


@dataclass
class ScaledConfig(AdapterConfig):
    """Settings of an adapter whose update is multiplied by alpha / r, beside those of every adapter.

    Args:
        alpha: Numerator of the scale alpha / r, > 0; None for a scale of 1.
        alpha_pattern: alpha by module name or regular expression, where it differs.
    """

    alpha: float | None = None
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def validate(self) -> None:
        """Check the scale's fields."""
        check(self.alpha is None or self.alpha > 0.0, "alpha", self.alpha, "None or positive")
        for pattern, alpha in self.alpha_pattern.items():
            check(alpha > 0.0, f"alpha_pattern[{pattern!r}]", alpha, "positive")

    def scale_of(self, module: str) -> float:
        """Return alpha / r for one module path; 1 without an alpha."""
        alpha = self.value_for(module, self.alpha_pattern, self.alpha)
        return 1.0 if alpha is None else alpha / self.rank_of(module)


class AdapterLinear(HasBiases, KeepsOriginal, nn.Module, BaseTunerLayer):
    """A linear layer (nn.Linear, Conv1D or a quantized one) with named adapters beside it.

    All adapter tensors are fp32 unless the user casts them, on the base layer's device, in `ParameterDict`s
    keyed by adapter name: `adapter_layer_names` are trained, `adapter_frozen_names` are not and are saved all
    the same. (Frozen parameters and not buffers: FSDP2 shards them, and Accelerate's loading from rank 0
    broadcasts parameters only.) Weights are in (out_features, in_features) layout throughout; `layout` knows
    the base layer's own. A method that computes with it alone takes embeddings and convolutions too.
    """

    adapter_layer_names: tuple[str, ...] = ()
    adapter_frozen_names: tuple[str, ...] = ()
    inner_names: ClassVar[tuple[str, ...]] = ()  # those of shape (k, in_features), for such methods
    kinds: ClassVar[frozenset[str]] = LINEAR  # of layers that it takes; set by register_adapter
    needs_base_at_init: ClassVar[bool] = False

    base_layer: nn.Module
    in_features: int
    out_features: int

    def __init__(self, base_layer: nn.Module, module_name: str, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.module_name = module_name
        core = self.get_base_layer()
        self.quantization_backend = resolve_quantization_backend(core, **quantization)
        backend = self.quantization_backend
        self.layout = layout_of(
            core,
            self.kinds,
            module_name,
            quantized=backend is not None,
            linear=backend is not None and backend.layer_type == "linear",
        )
        refuse_tensor_parallel(core, module_name)
        self.in_features, self.out_features = self.layout.in_features, self.layout.out_features
        for setting in self.layout.settings:  # models ask their layers for them, as Whisper for a stride
            setattr(self, setting, getattr(core, setting))
        for name in self.tensor_names:
            setattr(self, name, nn.ParameterDict())
        self.configs: dict[str, AdapterConfig] = {}
        self.scale: dict[str, float] = {}
        self.adapter_dropout = nn.ModuleDict()
        # PEFT deletes an adapter from every container named here.
        self.other_param_names = ("configs", "scale", "adapter_dropout", *self.adapter_frozen_names)
        # The class defaults of PEFT are shared between layers.
        self.merged_adapters: list[str] = []
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.cast_input_dtype_enabled = True

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of all adapter tensors, trained and frozen."""
        return (*self.adapter_layer_names, *self.adapter_frozen_names)

    # What a method supplies ------------------------------------------------------------------------

    @abstractmethod
    def shapes(self, r: int, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shape of each adapter tensor, for every name in the two name tuples."""

    @abstractmethod
    def initial_values(self, r: int, config: Any, weight: Tensor | None) -> dict[str, Tensor]:
        """Return the starting value of each tensor.

        Args:
            r: The layer's rank.
            config: The adapter's settings.
            weight: fp32 base weight (out_features, in_features), or None unless `needs_base_at_init`.
        """

    def check_rank(self, r: int, config: Any) -> None:
        """Check that a rank, with the settings that go with it, fits this layer.

        Raises:
            ValueError: It does not; the text names the field and the layer.
        """
        limit = min(self.in_features, self.out_features)
        check(r <= limit, "r", r, f"at most {limit}, the layer's smaller side", where=self.module_name)
        # A checkpoint could not be told from a linear layer's.
        square = self.layout.kind == "embedding" and r == self.in_features == self.out_features
        check(not square, "r", r, "below both sides of an embedding", where=self.module_name)

    def random_values(self, r: int, config: Any) -> dict[str, Tensor]:
        """Return a start that changes the output: normal, standard deviation 1 / sqrt(last axis)."""
        generator = seeded(config.seed, self.module_name)
        return {
            name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
            for name, shape in self.shapes(r, config).items()
        }

    @classmethod
    def factors(cls, tensors: Mapping[str, Tensor], scale: float) -> tuple[Tensor, Tensor] | None:
        """Return B (out_features, k) and A (k, in_features) of the update B @ A; None if it has no low rank.

        Args:
            tensors: One adapter's tensors of one layer, by attribute name, fp32.
            scale: The layer's factor.
        """
        return None

    @classmethod
    def module_factors(
        cls, tensors: Mapping[str, Tensor], config: Any, module: str
    ) -> tuple[Tensor, Tensor] | None:
        """Return `factors` for one module path; a method whose tensors do not tell them overrides this."""
        return cls.factors(tensors, config.scale_of(module))

    @abstractmethod
    def forward_delta(self, x: Tensor, name: str) -> Tensor:
        """Return what one adapter adds to the stored base layer's output; x has the adapter's dtype."""

    def delta_weight(self, name: str) -> Tensor:
        """Return the update of the original base weight, fp32, (out_features, in_features)."""
        pair = self.module_factors(self.adapter_tensors(name), self.configs[name], self.module_name)
        assert pair is not None, "a method without low-rank factors defines delta_weight itself"
        b, a = pair
        return b @ a

    def stored_delta(self, names: Sequence[str]) -> Tensor:
        """Return what turns the stored base weight into the merged one, fp32."""
        return torch.stack([self.delta_weight(name) for name in names]).sum(0)

    def add_inactive(self, out: Tensor, x: Tensor, active: Sequence[str]) -> Tensor:
        """Return the output with what adapters that are not active have taken out of the base put back."""
        return out

    @classmethod
    def training_metrics(cls, model: nn.Module) -> dict[str, float]:
        """Return the method's own numbers for the training log; called at log time on every rank."""
        return {}

    def after_change(self) -> None:
        """Bring what is derived from adapter tensors up to date after they were set or loaded."""

    # Life of an adapter ----------------------------------------------------------------------------

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Create one adapter's tensors, with their starting values unless they are on the meta device.

        Raises:
            ValueError: The settings do not fit this layer; nothing has been changed then.
        """
        if self.merged_adapters:  # a start taken from the merged weight would be of another model
            warnings.warn(f"{self.module_name} is merged; unmerging it to add an adapter", stacklevel=2)
            self.unmerge()
        r = config.rank_of(self.module_name)
        self.check_rank(r, config)
        self.check_bias(config.bias)
        shapes = self.shapes(r, config)
        values = self._values(r, config)
        device = self._base_device()
        # The config is shared by the layers of one injection: identity tells which belong together.
        self.configs[name] = config
        self.scale[name] = config.scale_of(self.module_name)
        self.adapter_dropout[name] = nn.Dropout(config.dropout) if config.dropout > 0.0 else nn.Identity()
        for attribute in self.tensor_names:
            value = torch.zeros(shapes[attribute]) if values is None else values[attribute]
            self.set_tensor(attribute, name, self.stored(attribute, value).to(device))
        if values is not None:
            self.after_change()

    def set_tensor(self, attribute: str, name: str, value: Tensor) -> None:
        """Put a tensor in place as a parameter, trained or frozen as its attribute is."""
        trained = attribute in self.adapter_layer_names
        getattr(self, attribute)[name] = nn.Parameter(value.detach(), requires_grad=trained)

    def stored(self, attribute: str, matrix: Tensor) -> Tensor:
        """Return a matrix as the tensor of that name is kept, contiguous; zeros where nothing is trained."""
        inner = attribute in self.inner_names
        return self.layout.stored(self.layout.trainable(matrix) if inner else matrix, inner).contiguous()

    def plain(self, attribute: str, stored: Tensor) -> Tensor:
        """Return the matrix of a tensor that is kept under that name."""
        return self.layout.plain(stored, attribute in self.inner_names)

    def awaits_values(self, name: str) -> bool:
        """Return whether one adapter's trained tensors are on the meta device, to be loaded."""
        return any(getattr(self, attribute)[name].is_meta for attribute in self.adapter_layer_names)

    def _values(self, r: int, config: AdapterConfig) -> dict[str, Tensor] | None:
        core = self.get_base_layer()
        stored = next((p for p in (*core.parameters(recurse=False), *core.buffers(recurse=False))), None)
        if nn.Parameter(torch.empty(0)).is_meta or _creates_meta() or (stored is not None and stored.is_meta):
            return None
        if dist.awaits_broadcast():
            return None
        if not config.init_weights:
            return self.random_values(r, config)
        return self.initial_values(r, config, self.base_weight() if self.needs_base_at_init else None)

    def _base_device(self) -> torch.device:
        device, _ = self._get_base_layer_device_and_dtype(self.get_base_layer())
        if device is None:
            parameter = next(self.get_base_layer().parameters(), None)
            device = parameter.device if parameter is not None else torch.device("cpu")
        return device

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # Upstream also casts to the base's dtype. A start computed in fp32 would be rounded to bf16 by that,
        # tensor by tensor, and no longer cancel.
        target = device if device is not None else self._base_device()
        for attribute in self.tensor_names:
            container = getattr(self, attribute)
            if adapter_name not in container or container[adapter_name].is_meta:
                continue
            if container[adapter_name].device != target:
                container[adapter_name].data = container[adapter_name].data.to(target)

    def adapter_tensors(self, name: str) -> dict[str, Tensor]:
        """Return one adapter's tensors by attribute name, as matrices: detached, whole, fp32."""
        return {
            attribute: self.plain(
                attribute, dist.full_tensor(getattr(self, attribute)[name].detach()).float()
            )
            for attribute in self.tensor_names
        }

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter; the last one to go leaves the layer a plain base layer."""
        super().delete_adapter(adapter_name)

    # Base weight ----------------------------------------------------------------------------------

    def base_weight(self) -> Tensor:
        """Return the stored base weight, dequantized and gathered, fp32, (out_features, in_features).

        Raises:
            ValueError: The quantization backend cannot read its weights back.
        """
        weight = getattr(self.get_base_layer(), "weight", None)
        with gather_params_ctx(weight if weight is not None else []):
            try:
                whole = dist.full_tensor(self.get_base_weight())
            except (NotImplementedError, TypeError) as error:
                backend = getattr(self.quantization_backend, "backend_name", "")
                raise ValueError(
                    f"{self.module_name}: {backend} weights cannot be read back: {error}"
                ) from error
            return self.layout.matrix(whole).detach().float()

    def base_parameter(self) -> Tensor:
        """Return the weight of an unquantized base layer, in its own layout and dtype."""
        return cast(Tensor, self.get_base_layer().weight)

    def base_beside(self, name: str) -> Tensor | None:
        """Return the base weight that goes with one adapter's tensors, where it is not the one in place."""
        return self.before_merge["weight"] if isinstance(self.before_merge, dict) else None

    def takes_base(self, name: str) -> bool:
        """Return whether the base weight of a checkpoint of that adapter can be put in place."""
        return True

    # Merging --------------------------------------------------------------------------------------

    def get_delta_weight(self, adapter: str) -> Tensor:
        """Return the update in the base layer's own layout, as PEFT's LoRA conversion asks for it."""
        return self.layout.weight(self.delta_weight(adapter))

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Return whether the update is a fixed low-rank matrix of a linear layer, as PEFT takes it to be."""
        if self.layout.kind != "linear":
            return False
        tensors, config = self.adapter_tensors(adapter_name), self.configs[adapter_name]
        return self.module_factors(tensors, config, self.module_name) is not None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write adapters into the base weight; the original is kept, so that `unmerge` restores its bits.

        Args:
            safe_merge: Whether to check the result for NaN and infinity before it replaces anything.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: The result is not finite (safe_merge), or the base is of a kind that cannot be
            written.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.configs]
        if not names:
            return
        backend = self.quantization_backend
        if backend is not None and not backend.supports_merge:
            raise ValueError(f"{self.module_name}: a {backend.backend_name} base cannot be merged into")
        refuse_sharded_merge(getattr(self.get_base_layer(), "weight", None), self.module_name)
        snapshot = self.before_merge if self.before_merge is not None else self.snapshot()
        self.restore(snapshot)
        target = [*self.merged_adapters, *names]
        try:
            stored = self.get_base_weight()
            delta = self.stored_delta(target)
            merged = (stored.float() + self.layout.weight(delta)).to(stored.dtype)
            if safe_merge and not bool(torch.isfinite(merged).all()):
                raise ValueError(
                    f"{self.module_name}: merging {', '.join(names)} gives NaN or infinite weights"
                )
            self.set_base_weight(merged)
        except Exception:
            self.forget_merge(snapshot)
            self.place_biases()
            raise
        self.before_merge = snapshot
        self.merged_adapters = target
        self.place_biases()

    def unmerge(self) -> None:
        """Put the base layer back as it was before the first merge, bit for bit."""
        super().unmerge()
        self.place_biases()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """Return the bare base layer, merged or as it was; PEFT calls this where a layer has it."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            self.place_merged_biases()
        if not merge or not self.merged_adapters:  # nothing to merge here: give back what adapters have taken
            if self.merged:
                self.unmerge()
            for name in list(self.configs):
                self.delete_adapter(name)
        return self.get_base_layer()

    # Forward --------------------------------------------------------------------------------------

    def forward(self, x: Tensor, *args: Any, adapter_names: RowNames | None = None, **kwargs: Any) -> Tensor:
        """Return the base layer's output plus that of the active adapters, in the base output's dtype.

        Args:
            x: (..., in_features); for a convolution or an embedding what it takes.
            args: What else the base layer takes.
            adapter_names: The adapter of each row of x, in place of the active ones.
            kwargs: What else the base layer takes.
        """
        if self._disable_adapters:
            if self.merged_adapters:
                self.unmerge()
            active: list[str] = []
        elif self.merged_adapters:
            return self.base_layer(x, *args, **kwargs)
        else:
            active = [name for name in self.active_adapters if name in self.configs]
            if adapter_names is not None:
                groups = adapter_names.groups(len(x), x.device, self.module_name)
                if len(groups) > 1:
                    return self._forward_groups(x, groups, *args, **kwargs)
                active = [name for name in groups if name in self.configs]
        out, apart = self.forward_base(x, active, *args, **kwargs)
        return self._add(out, x, active, apart)

    def _forward_groups(self, x: Tensor, groups: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Return the output for rows of several adapters, given the indices of each one's rows."""
        out, _ = self.forward_base(x, [], *args, **kwargs)  # one product with the base for all rows
        mixed = torch.empty_like(out)
        for name, rows in groups.items():
            active = [name] if name in self.configs else []
            mixed[rows] = self._add(out[rows], x[rows], active, active)
        return mixed

    def _add(self, out: Tensor, x: Tensor, active: Sequence[str], apart: Sequence[str]) -> Tensor:
        """Return the base's output plus that of the adapters that are not in it yet."""
        dtype = out.dtype
        for name in apart:
            weight = getattr(self, self.adapter_layer_names[0])[name]
            out = out + self.forward_delta(self._cast_input_dtype(x, weight.dtype), name)
        out = self.add_inactive(out, x, active)
        return out if out.dtype == dtype else out.to(dtype)

    def _cast_input_dtype(self, x: Tensor, dtype: torch.dtype) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return x if self.layout.kind == "embedding" else super()._cast_input_dtype(x, dtype)

    def forward_base(
        self, x: Tensor, active: list[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, list[str]]:
        """Return the base layer's output, and the adapters still to be added: a method may fold some in."""
        out = self.base_layer(x, *args, **kwargs)
        if active and self.quantization_backend is not None:
            out = self.quantization_backend.maybe_clone_base_result(out)
        return out, active

    def low_rank(self, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return (x A^T) B^T for A (k, in_features) and B (out_features, k)."""
        return F.linear(F.linear(x, a), b)

    def __repr__(self) -> str:
        return f"hf_ext.{super().__repr__()}"


def _creates_meta() -> bool:
    # accelerate's init_empty_weights patches register_parameter, and so acts on module attributes alone.
    probe = nn.Module()
    probe.p = nn.Parameter(torch.empty(0))
    return probe.p.is_meta


class AdapterModel(KeepsShared, TrainsBiases):
    """PEFT tuner of every adapter here; `register_adapter` makes one subclass for each method."""

    prefix: str
    tuner_layer_cls: type[AdapterLinear]  # pyright: ignore[reportIncompatibleVariableOverride]
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def check_injection(self, adapter_name: str) -> None:
        """Check the adapter's name and what it asks of the biases."""
        self.check_biases(self.peft_config[adapter_name])
        layer = self.tuner_layer_cls
        own = {*layer.adapter_layer_names, *layer.adapter_frozen_names}
        keys = (
            key for key in self.model.state_dict() if {*own, "adapter_dropout"}.isdisjoint(key.split("."))
        )
        check_adapter_name(adapter_name, keys, own, self.prefix)

    def _unload_and_optionally_merge(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        self.check_names(adapter_names)
        if merge:
            self.check_merged_weights(adapter_names)
        if merge and safe_merge:  # all layers or none: a half-unloaded model is no use
            self._check_merges(adapter_names)
        return cast(
            nn.Module, super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)
        )

    def _check_merges(self, adapter_names: list[str] | None) -> None:
        for layer in self.adapter_layers():
            merged = list(layer.merged_adapters)
            try:
                layer.merge(safe_merge=True, adapter_names=adapter_names)
            finally:
                if layer.merged_adapters and layer.merged_adapters != merged:
                    layer.unmerge()
                    if merged:
                        layer.merge(adapter_names=merged)

    def _create_and_replace(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        peft_config: AdapterConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        self.check_weight(target, current_key, writes=peft_config.writes_base)
        if isinstance(target, self.tuner_layer_cls):
            self._undo.append(lambda: target.delete_adapter(adapter_name))
            target.add_adapter(adapter_name, peft_config)
            target.set_adapter(target.active_adapters)
            return
        layer = self.tuner_layer_cls(target, current_key, **get_quantization_kwargs(self))

        def put_back() -> None:
            layer.delete_adapter(adapter_name)  # which also gives the base back what it had taken
            setattr(parent, target_name, target)

        self._undo.append(put_back)
        layer.add_adapter(adapter_name, peft_config)
        layer.set_adapter(self.active_adapters)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # Upstream's also moves what the new module holds, which our layers have done by themselves, and which
        # fails for layers whose weight is on the meta device or absent.
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        for layer in self.adapter_layers(adapter_name):
            _, base_dtype = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
            for attribute in layer.tensor_names:
                parameter = getattr(layer, attribute)[adapter_name]
                if autocast_adapter_dtype:
                    dtype = torch.float32 if parameter.dtype in (torch.float16, torch.bfloat16) else None
                else:
                    dtype = base_dtype if base_dtype is not None and base_dtype.is_floating_point else None
                if (
                    dtype is not None and dtype != parameter.dtype
                ):  # upstream's cast would unfreeze frozen ones
                    parameter.data = parameter.data.to(dtype)

    def adapter_layers(self, adapter_name: str | None = None) -> list[AdapterLinear]:
        """Return the adapted layers in module order; those of one adapter where a name is given."""
        layers = [layer for layer in self.model.modules() if isinstance(layer, AdapterLinear)]
        return [layer for layer in layers if adapter_name is None or adapter_name in layer.configs]

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        for path, layer in model.named_modules():
            # PEFT goes on to take the base of an adapted embedding or head from this state.
            key = f"{path}.base_layer.weight"
            if isinstance(layer, AdapterLinear) and key in state_dict:
                weight = layer.base_beside(adapter_name)
                state_dict[key] = state_dict[key] if weight is None else weight
        return super()._get_adapter_state_dict(
            model=model,
            config=config,
            adapter_name=adapter_name,
            state_dict=state_dict,
            unwanted_adapter_names=unwanted_adapter_names,
        )

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PeftConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map a checkpoint's keys to the model's, and refuse one that is not wholly this adapter's.

        PEFT loads with strict=False and leaves a missing tensor at its starting value.
        """
        biases, state_dict = cls.split_biases(model, config, state_dict)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = {n: m for n, m in model.named_modules() if isinstance(m, cls.tuner_layer_cls)}
        wanted = {
            f"{path}.{attribute}.{adapter_name}"
            for path, layer in layers.items()
            if adapter_name in layer.configs
            for attribute in cls._saved_names(cast(AdapterConfig, config))
        }
        check_checkpoint(wanted, remapped, cls.prefix)
        for path, layer in layers.items():
            if not layer.takes_base(adapter_name):
                remapped.pop(f"{path}.base_layer.weight", None)
        load_biases(model, biases)
        return remapped

    @classmethod
    def _saved_names(cls, config: AdapterConfig) -> tuple[str, ...]:
        layer = cls.tuner_layer_cls
        return (*layer.adapter_layer_names, *layer.adapter_frozen_names)


def register_adapter(
    name: str,
    *,
    config: type[AdapterConfig],
    summary: str,
    paper: str | None,
    supports: Iterable[str] = (),
    test_kwargs: Mapping[str, object] | None = None,
    bad_kwargs: Iterable[Mapping[str, object]] = (),
    variants: Iterable[Variant] = (),
    prefix: str | None = None,
    model: type[AdapterModel] = AdapterModel,
) -> Callable[[LayerT], LayerT]:
    """Register a layer class as an adapter method, here and with PEFT.

    Args:
        name: Lower-case name; the PEFT type is its upper case.
        config: The settings class.
        summary: One line of what a user gets.
        paper: Identifier, or None.
        supports: Flags: "starts_at_base", "exact_base" (disabled, it is the base bit for bit), "merge",
            "lora_export", "multi_adapter" (several of one form on one layer), "conv1d", "quantized",
            "embeddings", "convolutions".
        test_kwargs: Smallest settings for the contract suite.
        bad_kwargs: Settings to be refused.
        variants: Further forms of the method for the contract suite.
        prefix: What the names of its tensors begin with; None for name + "_".
        model: Base of the tuner class that is made.

    Raises:
        ValueError: The name is taken.
    """
    supported = frozenset(supports)

    def decorate(layer: LayerT) -> LayerT:
        flags = {"embeddings": "embedding", "convolutions": "convolution"}
        layer.kinds = LINEAR | {kind for flag, kind in flags.items() if flag in supported}
        stem = layer.__name__.removesuffix("Linear")
        tuner = type(
            f"{stem}Model",
            (model,),
            {
                "prefix": prefix or f"{name}_",
                "tuner_layer_cls": layer,
                "__module__": layer.__module__,
                "__doc__": f"PEFT tuner of `{stem}Linear` layers.",
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
                supports=supported,
                test_kwargs=dict(test_kwargs or {}),
                bad_kwargs=tuple(bad_kwargs),
                variants=tuple(variants),
            ),
        )
        return layer

    return decorate
