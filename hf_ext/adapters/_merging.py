"""What a merge keeps of a base layer, so that undoing it restores the layer's bits."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar, TypeAlias, cast

from torch import Tensor, nn

from .._compat.peft import ModuleSnapshot

# The parameters' data by name; a quantized layer as a whole.
Snapshot: TypeAlias = ModuleSnapshot | dict[str, Tensor]


class KeepsOriginal:
    """A tuner layer that remembers its base layer while adapters are merged; mixed in before PEFT's classes.

    PEFT unmerges by subtraction, which leaves rounding behind, and a second one on quantized weights.
    """

    merges_bias: ClassVar[bool] = False
    merged_adapters: list[str]
    before_merge: Snapshot | None = None

    def snapshot(self) -> Snapshot:
        """Return what `restore` needs; nothing is copied: the weight must be replaced, not written to."""
        core: nn.Module = cast(Any, self).get_base_layer()
        parameters = dict(core.named_parameters(recurse=False))
        if not self.merges_bias:
            parameters.pop("bias", None)  # other values of it may be put in place while the weight is merged
        plain = (type(p) is nn.Parameter and p.is_floating_point() for p in parameters.values())
        if parameters and all(plain):
            return {name: parameter.data for name, parameter in parameters.items()}
        return ModuleSnapshot.take(core)

    def restore(self, snapshot: Snapshot) -> None:
        """Put the base layer back as it was, on the device and in the dtype that it has now."""
        if isinstance(snapshot, ModuleSnapshot):
            snapshot.restore(cast(Any, self))
            return
        now = dict(cast(nn.Module, cast(Any, self).get_base_layer()).named_parameters(recurse=False))
        for name, data in snapshot.items():
            now[name].data = data.to(device=now[name].device, dtype=now[name].dtype)

    def set_base_weight(self, weight_data: Tensor) -> None:
        """Write the base weight as PEFT does; the bias stays."""
        before: nn.Module = cast(Any, self).get_base_layer()
        cast(Any, super()).set_base_weight(weight_data)
        self.keep_bias(before)

    def keep_bias(self, before: nn.Module) -> None:
        """Give the base layer the bias that it had before PEFT made it anew, as its HQQ backend does."""
        now: nn.Module = cast(Any, self).get_base_layer()
        if now is not before and getattr(before, "bias", None) is not None:
            now.bias = before.bias

    def forget_merge(self, snapshot: Snapshot) -> None:
        """Put the base layer back, and count nothing as merged."""
        self.restore(snapshot)
        self.before_merge, self.merged_adapters = None, []

    def unmerge(self) -> None:
        """Put the base layer back as it was before the first merge, bit for bit."""
        if self.before_merge is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        else:
            self.forget_merge(self.before_merge)
