"""A model of an earlier time: its trained tensors, or the likeliest tokens that it gave."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from .._compat import deepspeed
from ..core import dist
from ..core.checks import check
from ._base import zero_stage


class HeldWeights:
    """A frozen copy of the tensors that train, which can stand in for them.

    It is exact for full fine-tuning and for every adapter type, also one whose layers hold factors of the
    base weight, because nothing but those tensors moves. It costs their memory once.

    Args:
        model: The model in training, unwrapped.
        field: The setting that asks for it, for errors.
        dtype: In which they are kept; None for their own.
        device: Where they are kept; None for their own.

    Raises:
        ValueError: The tensors are sharded by FSDP1.
    """

    def __init__(
        self, model: nn.Module, field: str, *, dtype: torch.dtype | None = None, device: str | None = None
    ) -> None:
        self.field, self.dtype, self.device = field, dtype, device
        self.tensors: dict[str, Tensor] = {}  # under ZeRO-3 this process's parts
        self._split: dict[str, nn.Parameter] = {}  # the parameters whose parts they are
        self.take(model)

    def take(self, model: nn.Module) -> None:
        """Copy the tensors that train as they are now; earlier ones are overwritten where they stand."""
        trained = trained_tensors(model, self.field)
        if trained.keys() != self.tensors.keys():
            self.tensors = {
                name: torch.empty_like(p, dtype=self.dtype or p.dtype, device=self.device or p.device)
                for name, p in trained.items()
                if not deepspeed.is_split(p)
            }
            self._split = {name: p for name, p in trained.items() if deepspeed.is_split(p)}
        for name, parameter in trained.items():
            if name in self._split:
                part = deepspeed.own_part(parameter)
                self.tensors[name] = part.to(
                    dtype=self.dtype or part.dtype, device=self.device or part.device
                )
            else:
                self.tensors[name].copy_(parameter.detach())

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Overwrite the copy.

        Raises:
            ValueError: The names or shapes are not those of the tensors that train.
        """
        check_tensors(
            tensors, {name: self._split.get(name, x) for name, x in self.tensors.items()}, self.field
        )
        for name, value in tensors.items():
            held = self.tensors[name]
            if name in self._split:
                value = deepspeed.as_part(value, self._split[name])
            elif isinstance(held, DTensor):
                value = distribute_tensor(value.to(held.device), held.device_mesh, held.placements)
            held.copy_(value)

    def whole(self) -> dict[str, Tensor]:
        """Return the copy whole, on the CPU, for the first process to write; the others have none of it.

        Where it is sharded or split this is a collective, of one tensor at a time.
        """
        found: dict[str, Tensor] = {}
        for name in self.tensors:
            whole = self._whole(name)
            if dist.is_main():
                found[name] = whole.cpu()
        return found

    def _whole(self, name: str) -> Tensor:
        """Return one tensor with its shards or parts gathered (a collective)."""
        value = self.tensors[name]
        if name in self._split:
            return deepspeed.whole_of_parts(value, self._split[name])
        if isinstance(value, DTensor):  # shards kept elsewhere are gathered where the mesh is
            return dist.full_tensor(value.to(value.device_mesh.device_type))
        return value

    def fingerprint(self) -> float:
        """Return a number that other tensors are most unlikely to have (a collective, as `whole`)."""
        return sum(float(self._whole(name).double().abs().sum()) for name in self.tensors)

    @contextlib.contextmanager
    def in_place_of(self, model: nn.Module) -> Generator[None]:
        """Let the copy stand in for the tensors that train, with dropout off and without gradients.

        The parameters, under ZeRO-3 their parts, point at the copy meanwhile, and nothing of the model's own
        is copied or changed; under FSDP2 the shards are overwritten, and put back.

        Args:
            model: The model in training, unwrapped.
        """
        trained = trained_tensors(model, self.field)
        training = [module for module in model.modules() if module.training]
        own: dict[str, Tensor] = {}
        try:
            for name, parameter in trained.items():
                own[name] = _exchange(parameter, self.tensors[name])
            for module in training:
                module.training = False
            with torch.no_grad():
                yield
        finally:
            reshard(model)
            for name, values in own.items():
                _exchange(trained[name], values)
            for module in training:
                module.training = True


def check_tensors(tensors: Mapping[str, Tensor], trained: Mapping[str, Tensor], field: str) -> None:
    """Raise where whole tensors are not those of the parameters that train.

    Raises:
        ValueError: Names or shapes differ.
    """
    wanted = {name: tuple(deepspeed.whole_shape(value)) for name, value in trained.items()}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if wanted != found:
        names = sorted(name for name in {**wanted, **found} if wanted.get(name) != found.get(name))
        raise ValueError(
            f"{field}: the tensors are not those that train; they differ in "
            f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        )


def trained_tensors(model: nn.Module, field: str) -> dict[str, nn.Parameter]:
    """Return the parameters that train, by name.

    Raises:
        ValueError: They are sharded by FSDP1, where they cannot be exchanged.
    """
    reshard(model)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        rule = "a setting that needs no copy of the weights where FSDP1 shards them"
        check(not hasattr(parameter, "_sharded_size"), field, name, rule)
    return trained


def awaits_sharding(trainer: Any, model: nn.Module) -> bool:
    """Tell whether FSDP2 or ZeRO-3 will shard a model that is whole as yet.

    Args:
        trainer: The trainer.
        model: Its model, unwrapped.
    """
    if zero_stage(trainer) == 3:
        return not any(map(deepspeed.is_split, model.parameters()))
    return trainer.is_fsdp_enabled and not isinstance(model, FSDPModule)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 give back what it has gathered: its parameters are then the shards that the optimizer has.

    Under ZeRO-3, whose parameters keep their parts beside them, none is on its way after it.
    """
    deepspeed.settle(model)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _exchange(parameter: nn.Parameter, values: Tensor) -> Tensor:
    """Let a parameter have other values in the place of its own, and return those."""
    if deepspeed.is_split(parameter):
        return deepspeed.exchange_part(parameter, values)
    values = values.to(device=parameter.device, dtype=parameter.dtype)
    if not isinstance(parameter, DTensor):
        own, parameter.data = parameter.data, values
        return own
    own = parameter.detach().clone()  # FSDP2 gathers from a storage that it made once
    with torch.no_grad():
        parameter.copy_(values)
    return own


class TopKCache:
    """The likeliest tokens at every label of a data set, with their probabilities, on the CPU.

    Args:
        lengths: Labels that count in each row.
        k: Tokens kept for each label.
    """

    def __init__(self, lengths: Tensor, k: int) -> None:
        self.starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
        total = int(self.starts[-1])
        self.tokens = torch.zeros(total, k, dtype=torch.int32)
        self.probs = torch.zeros(total, k, dtype=torch.float16)
        self.filled = torch.zeros(len(lengths), dtype=torch.bool)

    def _slots(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Return where the labels of some rows are.

        Raises:
            ValueError: A row has another number of labels than the data set's.
        """
        rows, counts = rows.cpu(), counts.cpu()
        wanted = self.starts[rows + 1] - self.starts[rows]
        if not torch.equal(wanted, counts):
            row = int(rows[wanted != counts][0])
            raise ValueError(f"teacher='cache': row {row} of train_dataset no longer has the labels it had")
        return torch.cat([torch.arange(int(self.starts[row]), int(self.starts[row + 1])) for row in rows])

    def write(self, rows: Tensor, counts: Tensor, tokens: Tensor, probs: Tensor) -> None:
        """Keep tokens (N, k) and probabilities (N, k) at the N labels of rows (B,), `counts` (B,) in each."""
        slots = self._slots(rows, counts)
        self.tokens[slots] = tokens.to(self.tokens)
        self.probs[slots] = probs.to(self.probs)
        self.filled[rows.cpu()] = True

    def read(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return tokens (N, k), probabilities (N, k) in fp32, and whether there are any (N,)."""
        slots = self._slots(rows, counts)
        there = self.filled[rows.cpu()].repeat_interleave(counts.cpu())
        return self.tokens[slots].long(), self.probs[slots].float(), there

    def merge(self, accelerator: Any) -> None:
        """Take in what the other processes have written (a collective); of a row's two, the first one's."""
        if accelerator.num_processes == 1:
            return
        device = accelerator.device
        ranks = torch.where(self.filled, accelerator.process_index, accelerator.num_processes)
        owner = accelerator.gather(ranks[None].to(device)).amin(dim=0).cpu()
        mine = (owner == accelerator.process_index).repeat_interleave(self.starts.diff())[:, None]
        for values in (self.tokens, self.probs):
            # Zero but for one process: the sum is that one's values.
            own = torch.where(mine, values, torch.zeros_like(values)).to(device)
            own = own.float() if own.is_floating_point() else own  # few back-ends add fp16
            values.copy_(accelerator.reduce(own, "sum").to(values))
        self.filled = owner < accelerator.num_processes

    def clear(self) -> None:
        """Forget all rows."""
        self.filled.zero_()

    def state(self, prefix: str) -> dict[str, Tensor]:
        """Return its tensors by name."""
        names = ("tokens", "probs", "filled")
        return {f"{prefix}.{name}": getattr(self, name).clone() for name in names}

    def load(self, state: Mapping[str, Any], prefix: str) -> None:
        """Restore what `state` returned.

        Raises:
            ValueError: The data set or k is another.
        """
        for name in ("tokens", "probs", "filled"):
            value, held = state[f"{prefix}.{name}"], getattr(self, name)
            rule = f"as in the checkpoint, whose cache has the shape {tuple(value.shape)}"
            check(value.shape == held.shape, "train_dataset or cache_top_k", tuple(held.shape), rule)
            held.copy_(value)
