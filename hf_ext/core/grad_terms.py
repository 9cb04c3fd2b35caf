"""Gradients of parameter-only terms, added right before an optimizer steps, in any training loop.

A term that depends on parameters alone (an orthonormality or sparsity penalty) needs no forward pass: its
gradient has a closed form. Adding it in a hook that torch runs at the start of every `Optimizer.step` makes
it independent of how the loss is built: of gradient accumulation, of loss normalisation, of clipping (done by
then) and of loss scaling (`GradScaler.step` has unscaled by then, or hands the scale to fused optimizers).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from .dist import shard_like

ParamGroup = dict[str, Any]
# The optimizer's parameter group of a parameter, or None where this optimizer does not hold it.
GroupOf = Callable[[nn.Parameter], ParamGroup | None]
_MARK = "_with_grad_terms"  # attribute of a gradient: its version when the terms went in
Gradients = Callable[[list[nn.Module], GroupOf], Iterable[tuple[nn.Parameter, Tensor]]]


class GradTerm:
    """One kind of term, shared by all modules that carry it.

    Args:
        gradients: Called at each step with the living watched modules, oldest first (the order must be equal
            on all ranks), and the optimizer's group look-up; returns parameters with the whole (unsharded)
            fp32 tensors to add to their gradients.
        title: How errors name the term.
        parameters: The trainable parameters of a watched module that the term is for; None for all. If an
            engine keeps them from the optimizer, the step is refused.
    """

    in_use: list[GradTerm] = []

    def __init__(
        self,
        gradients: Gradients,
        *,
        title: str,
        parameters: Callable[[nn.Module], Iterable[nn.Parameter]] | None = None,
    ) -> None:
        self._gradients = gradients
        self._title = title
        self._parameters = parameters or nn.Module.parameters
        self._watched: list[weakref.ref[nn.Module]] = []

    def watch(self, module: nn.Module) -> None:
        """Include a module from the next step on, for as long as it lives."""
        if not GradTerm.in_use:
            # Not traced: a compiled step would rebuild the list of watched modules, and wrongly.
            register_optimizer_step_pre_hook(cast(Any, torch.compiler.disable(_before_step)))
        if self not in GradTerm.in_use:
            GradTerm.in_use.append(self)
        if all(known() is not module for known in self._watched):
            self._watched.append(weakref.ref(module))

    def modules(self) -> list[nn.Module]:
        """Return the living watched modules, oldest first."""
        living = [(known, known()) for known in self._watched]
        self._watched = [known for known, module in living if module is not None]
        return [module for _, module in living if module is not None]

    def apply(self, optimizer: Optimizer, groups: dict[int, ParamGroup]) -> list[nn.Parameter]:
        """Add the term's gradients to those of an optimizer, and return the parameters touched."""
        modules = self.modules()
        if not modules:
            return []
        self._refuse_flattened(modules, optimizer, groups)
        scale = getattr(optimizer, "grad_scale", None)  # set by GradScaler for fused optimizers
        touched: list[nn.Parameter] = []
        for parameter, gradient in self._gradients(modules, lambda p: groups.get(id(p))):
            if scale is not None:
                gradient = gradient * scale
            part = shard_like(gradient.to(parameter.dtype), parameter)
            if parameter.grad is None:
                parameter.grad = part.clone()
            else:
                parameter.grad.add_(part)
            touched.append(parameter)
        return touched

    def _refuse_flattened(
        self, modules: list[nn.Module], optimizer: Optimizer, groups: dict[int, ParamGroup]
    ) -> None:
        # An engine that steps flat copies of the parameters would leave the term out without a word.
        held = [p for group in optimizer.param_groups for p in group["params"]]
        flat = {p.untyped_storage().data_ptr() for p in held if getattr(p, "_is_flat_param", False)}
        for module in modules:
            for parameter in self._parameters(module):
                if not parameter.requires_grad or id(parameter) in groups or _has_terms(parameter):
                    continue
                inside = bool(flat) and parameter.untyped_storage().data_ptr() in flat
                if inside or hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping"):
                    raise RuntimeError(
                        f"{self._title}: the optimizer steps flattened copies of parameters (DeepSpeed ZeRO "
                        "or FSDP1), where the term cannot be added; set its weight to 0, or use DDP or FSDP2"
                    )


def _before_step(
    optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    # The arguments start with the optimizer itself, since step is hooked as an unbound function.
    closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
    if closure is None:
        _apply_all(optimizer)
        return None

    def with_terms() -> Any:  # a closure clears the gradients, so the terms must come after it
        with torch.enable_grad():
            loss = closure()
        _apply_all(optimizer)
        return loss

    if "closure" in kwargs:
        return args, {**kwargs, "closure": with_terms}
    return (*args[:1], with_terms, *args[2:]), kwargs


@torch.no_grad()
def _apply_all(optimizer: Optimizer) -> None:
    held = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    groups = {id(p): group for p, group in held if not _has_terms(p)}
    touched = [p for term in GradTerm.in_use for p in term.apply(optimizer, groups)]
    for parameter in touched:
        grad = parameter.grad
        assert grad is not None
        setattr(grad, _MARK, grad._version)


def _has_terms(parameter: nn.Parameter) -> bool:
    # An optimizer that wraps another fires the hook twice for one step. A gradient that nobody has written to
    # since the terms went in holds them already.
    grad = parameter.grad
    return grad is not None and getattr(grad, _MARK, -1) == grad._version
