"""Bone: one small trained block per linear layer, shared by all slices of its input or applied through W.

Source: Kang 2024, "Bone: Block Affine Transformation as Parameter Efficient Fine-tuning Methods for Large
Language Models", arXiv 2409.15371 (later versions: DiSHA, MiSS); code JL-er/Bone, and PEFT 0.14 to
0.18 (`tuners/bone`, Apache-2.0), whose checkpoints load here. With block size r:

- "plain": D (r, out_features), delta W[o, i] = D[i mod r, o]. PEFT's MiSS with init_weights=True.
- "mini": D (r, mini_r), delta W[o, i] = D[i mod r, o mod mini_r]. MiSS "mini"; Bone itself had no such form.
- "bat", the paper's block-affine update: B (out_features / r, r, r), one block for each r rows of W. On the
  r x r blocks of W, delta W_ab = (W_ab + I) B_a, hence W'_ab = (W_ab + I)(I + B_a) - I. MiSS "bat".

Differs from the paper and its code:
- Plain and mini never build delta W: y = W x + D^T s, where s sums the slices of x, in fp32 for half inputs.
  The last slice may be shorter than r.
- Bat keeps for backward its input, B and a reference to W, and builds W' again there, some rows at a time;
  MiSS keeps weight-sized copies for each layer. Where the product runs in half precision, W x and delta W x
  are separate products: updates below the spacing of half precision would vanish in W + delta W.
- Every adapter has its own form. Several on one layer chain in active order: a bat adapter acts on the weight
  as those before it have left it. Without bat they add up, in any order.
- Unmerging restores the bits that were there, so bat needs no inverse of I + B and no condition on it.
- Dropout, which Bone did not have, acts on the input of delta W in every form.
- Training biases (`bias`) is refused: PEFT's BONE never saved those it had trained.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.checks import check, check_choice
from ..core.lowrank import seeded
from ..core.registry import Variant
from ._base import AdapterConfig, AdapterLinear, AdapterModel, register_adapter
from ._block_affine import bat_delta, bat_linear
from ._bone_checkpoints import block_factors, convert_bone_checkpoint, form_of_checkpoint, tiled_delta

__all__ = ["BoneConfig", "convert_bone_checkpoint"]

FORMS = ("plain", "mini", "bat")


@dataclass
class BoneConfig(AdapterConfig):
    """Settings of Bone, beside those of every adapter.

    Args:
        r: Block size: at most in_features (plain, mini), or a divisor of in_features and out_features (bat).
        form: "plain", "mini" or "bat".
        mini_r: Width of the block in the mini form, a divisor of out_features.
        init_weights: True for a block of zeros, which changes nothing; False for a Kaiming-uniform one. "bat"
            and "mini" stand for True with that form, as in configs of PEFT's BONE and MiSS.
        layer_shapes: (out_features, in_features) by module path, filled in when the adapter is injected; what
            the LoRA export of a saved folder and the check against another base model need.
    """

    r: int = 64
    form: str = "plain"
    mini_r: int = 1
    init_weights: bool | str = True
    layer_shapes: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        # Files state the type, and users do not; those of PEFT lack the shapes.
        self.may_lack_biases = self.peft_type is not None and not self.layer_shapes
        if self.bias == "Bone_only":  # as the help of PEFT's type had it
            self.bias = "bone_only"
        super().__post_init__()

    def validate(self) -> None:
        """Check Bone's own fields, and turn an `init_weights` that names a form into that form."""
        check_choice("form", self.form, FORMS)
        check(self.mini_r >= 1, "mini_r", self.mini_r, "at least 1")
        alias = self.init_weights
        if isinstance(alias, str):
            check(alias in FORMS[1:], "init_weights", alias, "True, False, 'mini' or 'bat'")
            check(
                self.form in ("plain", alias), "init_weights", alias, f"True or False with form={self.form!r}"
            )
            self.form = alias
            self.init_weights = True  # pyright: ignore[reportIncompatibleVariableOverride]


def slice_sums(x: Tensor, r: int) -> Tensor:
    """Return s (..., r) with s[j] = sum of x[i] over i mod r = j, for x (..., n); summed in at least fp32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    count = x.shape[-1] // r
    sums = x[..., : count * r].unflatten(-1, (count, r)).sum(-2, dtype=wide)
    rest = x.shape[-1] - count * r
    if rest:
        sums = sums + F.pad(x[..., count * r :].to(wide), (0, r - rest))
    return sums.to(x.dtype)


class BoneTuner(AdapterModel):
    """Tuner of Bone: a checkpoint's tensors decide between plain and bat, whatever its config says."""

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        layers = {n: m for n, m in model.named_modules() if isinstance(m, BoneLinear)}
        layers = {n: m for n, m in layers.items() if adapter_name in m.configs}
        form = form_of_checkpoint(state_dict, config.form)
        if form != config.form:
            warnings.warn(
                f"the adapter's config says form={config.form!r}, its tensors are of the {form} form, which "
                "is taken (a development version of PEFT wrote init_weights=true with bat tensors)",
                stacklevel=2,
            )
            config.form = form
            for layer in layers.values():
                layer.reform(adapter_name, config)
        remapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for path, layer in layers.items():
            key = f"{path}.bone_block.{adapter_name}"
            given = remapped.get(key, remapped.get(f"base_model.model.{key}"))
            wanted = tuple(layer.bone_block[adapter_name].shape)
            if given is not None:
                check(tuple(given.shape) == wanted, key, tuple(given.shape), f"of shape {wanted}")
        return remapped


@register_adapter(
    "bone",
    config=BoneConfig,
    model=BoneTuner,
    summary="one small block per layer, shared by all slices of the input or applied through the weight",
    paper="arXiv:2409.15371",
    supports={"starts_at_base", "exact_base", "merge", "lora_export", "multi_adapter", "conv1d", "quantized"},
    test_kwargs={"r": 16},
    variants=(
        Variant(name="mini", test_kwargs={"r": 64, "form": "mini", "mini_r": 32}),
        Variant(name="bat", test_kwargs={"r": 4, "form": "bat"}, lacks=frozenset({"lora_export"})),
    ),
    bad_kwargs=(
        {"r": 0},
        {"form": "batt"},
        {"mini_r": 0},
        {"init_weights": "balance"},
        {"form": "mini", "init_weights": "bat"},
        {"bias": "lora_only"},
        {"dropout": 1.0},
    ),
)
class BoneLinear(AdapterLinear):
    """Linear layer with one trained block; equal to its base layer at the start (the block is zero).

    A checkpoint holds bone_block: (r, out_features) plain, (r, mini_r) mini, (out_features / r, r, r) bat.
    """

    adapter_layer_names = ("bone_block",)

    bone_block: nn.ParameterDict

    def shapes(self, r: int, config: BoneConfig) -> dict[str, tuple[int, ...]]:
        """Return the block's shape."""
        if config.form == "bat":
            return {"bone_block": (self.out_features // r, r, r)}
        return {"bone_block": (r, config.mini_r if config.form == "mini" else self.out_features)}

    def initial_values(self, r: int, config: BoneConfig, weight: Tensor | None) -> dict[str, Tensor]:
        """Return a block of zeros."""
        return {name: torch.zeros(shape) for name, shape in self.shapes(r, config).items()}

    def random_values(self, r: int, config: BoneConfig) -> dict[str, Tensor]:
        """Return a Kaiming-uniform block, as PEFT's: within 1 / sqrt(numbers after the first axis)."""
        generator = seeded(config.seed, self.module_name)
        start = self.initial_values(r, config, None)
        return {
            name: nn.init.kaiming_uniform_(block, a=math.sqrt(5), generator=generator)
            for name, block in start.items()
        }

    def check_rank(self, r: int, config: BoneConfig) -> None:
        """Check that the block fits this layer, and for bat that the base weight can be read.

        Raises:
            ValueError: It does not; the text names the field, the layer and what is left over.
        """
        size, where = (self.out_features, self.in_features), self.module_name
        if config.form == "bat":
            left = f"{self.out_features % r} and {self.in_features % r} are left over"
            rule = f"a divisor of out_features and in_features {size} in the bat form ({left})"
            check(all(n % r == 0 for n in size), "r", r, rule, where=where)
            if self.quantization_backend is not None:
                self.base_weight()
            return
        check(
            r <= self.in_features, "r", r, f"at most {self.in_features}, the layer's in_features", where=where
        )
        if config.form == "mini":
            left = f"{self.out_features % config.mini_r} are left over"
            rule = f"a divisor of out_features {self.out_features} ({left})"
            check(self.out_features % config.mini_r == 0, "mini_r", config.mini_r, rule, where=where)

    def add_adapter(self, name: str, config: AdapterConfig) -> None:
        """Create one adapter's block.

        Raises:
            ValueError: The settings do not fit this layer, or were saved from a layer of another shape.
        """
        shapes, shape = cast(BoneConfig, config).layer_shapes, [self.out_features, self.in_features]
        known = list(shapes.get(self.module_name, shape))
        rule = f"{shape}, the layer's (leave layer_shapes empty for a new adapter)"
        check(known == shape, "layer_shapes", known, rule, where=self.module_name)
        super().add_adapter(name, config)
        shapes[self.module_name] = shape

    def reform(self, name: str, config: BoneConfig) -> None:
        """Put an empty block of the config's form in place, to be loaded."""
        r = config.rank_of(self.module_name)
        self.check_rank(r, config)
        old = self.bone_block[name]
        fresh = torch.zeros(self.shapes(r, config)["bone_block"], device=old.device, dtype=old.dtype)
        self.set_tensor("bone_block", name, fresh)
        self.bone_block[name].requires_grad_(old.requires_grad)

    def form(self, name: str) -> str:
        """Return the form of one adapter."""
        return cast(BoneConfig, self.configs[name]).form

    # The update ------------------------------------------------------------------------------------

    @classmethod
    def module_factors(
        cls, tensors: Mapping[str, Tensor], config: BoneConfig, module: str
    ) -> tuple[Tensor, Tensor] | None:
        """Return B (out_features, k) and A (k, in_features), one of them of zeros and ones; None for bat.

        k is r, or mini_r where that is smaller.

        Raises:
            ValueError: The config, of an old checkpoint, does not tell the layer's shape.
        """
        block = tensors["bone_block"]
        if block.ndim == 3:
            return None
        rule = "known for this layer: load the adapter onto its model and export that"
        check(module in config.layer_shapes, "layer_shapes", sorted(config.layer_shapes), rule, where=module)
        out_features, in_features = config.layer_shapes[module]
        return block_factors(block, out_features, in_features)

    def delta_weight(self, name: str) -> Tensor:
        """Return the update of the original base weight, fp32, (out_features, in_features)."""
        merged = list(self.merged_adapters) if self.form(name) == "bat" else []
        if not merged:
            return self.stored_delta([name])
        self.unmerge()
        try:
            return self.stored_delta([name])
        finally:
            self.merge(adapter_names=merged)

    def stored_delta(self, names: Sequence[str]) -> Tensor:
        """Return what turns the stored base weight into that of the adapters chained in this order, fp32."""
        blocks = [self.adapter_tensors(name)["bone_block"] for name in names]
        weight = self.base_weight() if any(block.ndim == 3 for block in blocks) else None
        total = torch.zeros(self.out_features, self.in_features, device=blocks[0].device)
        for block in blocks:
            total = total + self._delta(block, None if weight is None else weight + total)
        return total

    def _delta(self, block: Tensor, weight: Tensor | None) -> Tensor:
        if block.ndim == 3:
            return bat_delta(cast(Tensor, weight), block)
        return tiled_delta(block, self.out_features, self.in_features)

    # Forward ---------------------------------------------------------------------------------------

    def forward_delta(self, x: Tensor, name: str) -> Tensor:
        """Return one adapter's part of the output, on the stored base weight."""
        x, block = self.adapter_dropout[name](x), self.bone_block[name]
        if block.ndim == 3:
            return self._bat_linear(x, block, with_weight=False)
        out = F.linear(slice_sums(x, block.shape[0]), block.T)
        times = self.out_features // block.shape[1]
        return out if times == 1 else out.repeat(*(1 for _ in out.shape[:-1]), times)

    def forward_base(
        self, x: Tensor, active: list[str], *args: Any, **kwargs: Any
    ) -> tuple[Tensor, list[str]]:
        """Return the output up to and with the last bat adapter that does not simply add to the base's."""
        bats = [i for i, name in enumerate(active) if self.form(name) == "bat"]
        last = bats[-1] if bats else -1
        if last == 0 and not args and not kwargs and self._folds(x, active[0]):
            block = self.bone_block[active[0]]
            out = self._bat_linear(self._cast_input_dtype(x, block.dtype), block, with_weight=True)
            bias = cast(Tensor | None, self.get_base_layer().bias)
            return (out if bias is None else out + bias).to(x.dtype), active[1:]
        out, apart = super().forward_base(x, active, *args, **kwargs)
        if last < 1:
            return out, apart
        return self._chained(x, out, active[: last + 1]).to(out.dtype), active[last + 1 :]

    def _folds(self, x: Tensor, name: str) -> bool:
        # One product for both: only where W + delta W keeps small updates, and where nothing but a plain
        # layer's own weight stands behind base_layer.
        core = self.base_layer
        plain = type(core) in (nn.Linear, Conv1D) and self.quantization_backend is None
        hooked = core._forward_hooks or core._forward_pre_hooks or hasattr(core, "_hf_hook")
        dropout = self.adapter_dropout[name]
        drops = self.training and not isinstance(dropout, nn.Identity)
        exact = self._product_dtype(x, self.bone_block[name]) in (torch.float32, torch.float64)
        return plain and exact and not hooked and not drops

    def _product_dtype(self, x: Tensor, block: Tensor) -> torch.dtype:
        device = x.device.type
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else block.dtype

    def _bat_linear(self, x: Tensor, block: Tensor, *, with_weight: bool) -> Tensor:
        weight = self._whole_weight() if self.quantization_backend is None else self.get_base_weight
        x = x.to(self._product_dtype(x, block))
        return bat_linear(x, weight, block, transposed=self.layout.transposed, with_weight=with_weight)

    def _whole_weight(self) -> Tensor:
        weight = self.base_parameter()
        whole = weight.numel() == self.out_features * self.in_features and not hasattr(weight, "full_tensor")
        rule = "whole in forward for the bat form (not sharded by ZeRO-3, or by FSDP2 layer by layer)"
        check(whole and not weight.is_meta, "base weight", tuple(weight.shape), rule, where=self.module_name)
        return weight

    def _chained(self, x: Tensor, out: Tensor, names: Sequence[str]) -> Tensor:
        weight = self._whole_weight() if self.quantization_backend is None else self.get_base_weight()
        weight = self.layout.matrix(weight).float()
        for name in names:
            block = self.bone_block[name]
            delta = self._delta(block.float(), weight)
            inputs = self.adapter_dropout[name](self._cast_input_dtype(x, block.dtype))
            out = out + F.linear(inputs, delta.to(inputs.dtype))
            weight = weight + delta
        return out
