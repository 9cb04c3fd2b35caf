"""LoRA adapters as parents: their updates s B A, merged into a LoRA or into the base.

Source of the scale: PEFT, s = alpha / r, or alpha / sqrt(r) with use_rslora; alpha and r by module where the
config has patterns. A weighted sum of updates is the product of the stacked factors, [w_1 s_1 B_1 ...] and
[A_1; ...], so that it is exact at the sum of the ranks, and truncated by the QR factors of both and a small
SVD below it; the update itself is never formed. Other methods see the updates as tensors, one module at a
time. An embedding's factors are stored the other way round: its update is s (B A)^T. The base weights that
PEFT saves beside the factors of embeddings and heads are no part of the update; they are carried over.

What PEFT would compute otherwise than as s B A is refused by name: `add_weighted_adapter` of PEFT 0.21 merges
such adapters without a word into something else.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ..core.checks import check
from ..core.lowrank import recompress, truncated_svd
from ..core.peft_starts import changes_base
from ._align import excluded, same_bytes
from ._base import MergeMethod, TensorInfo
from ._checkpoint import DTYPES, Checkpoint, Entry
from ._config import MergeConfig
from ._layout import Slot, parse_size, plan_layout
from ._operands import Operand, Stored, Task, Workspace
from ._parameters import Setting, positions
from ._parents import Parents
from ._plan import Plan, models_of, refuse_doubles

_PREFIX = "base_model.model."
_ROWS = 32  # of the update, computed together: the same rows always, so that blocks do not show in the bits
# Settings under which the update is not s B A on the base that the config names.
_REFUSED = (
    "use_dora", "lora_bias", "use_qalora", "use_bdlora", "alora_invocation_tokens", "layer_replication",
    "target_parameters", "trainable_token_indices", "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
_KINDS = {"A.weight": "A", "B.weight": "B", "embedding_A": "A", "embedding_B": "B"}
_BASE = ".base_layer.weight"
_UNTIED = "lm_head.weight"
# What averaging of factors needs to be equal.
_SHAPING = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "fan_in_fan_out", "peft_type")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter by modules.

    Args:
        checkpoint: Its file.
        modules: Entries of A and B, and the scale, by module path.
        full: Tensors that were trained whole (modules_to_save), by their name in the base.
        embeddings: Those of the modules that are embeddings: A is (r, num_embeddings), B (embedding_dim, r).
        bases: Base weights that the file holds beside factors, by module path.
    """

    checkpoint: Checkpoint
    modules: Mapping[str, tuple[Entry, Entry, float]]
    full: Mapping[str, Entry]
    embeddings: frozenset[str] = frozenset()
    bases: Mapping[str, Entry] = field(default_factory=dict)

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Return fp32 factors of the update: s B (out_features, r) and A (r, in_features).

        For an embedding s A^T (num_embeddings, r) and B^T (r, embedding_dim).
        """
        a, b, scale = self.modules[module]
        left, right = _tensor(self.checkpoint, b), _tensor(self.checkpoint, a)
        if module in self.embeddings:
            left, right = right.T.contiguous(), left.T.contiguous()
        return left.mul_(scale), right

    def rank(self, module: str) -> int:
        """Return a module's rank."""
        return self.modules[module][0].shape[0]

    def shape(self, module: str) -> tuple[int, int]:
        """Return an update's shape: (out_features, in_features) or (num_embeddings, embedding_dim)."""
        a, b, _ = self.modules[module]
        rows, columns = b.shape[0], a.shape[1]
        return (columns, rows) if module in self.embeddings else (rows, columns)

    def keys(self, module: str) -> tuple[str, str]:
        """Return the keys in the file of what `factors` returns, left and right."""
        turned = module in self.embeddings
        left, right = ("embedding_A", "embedding_B") if turned else ("B.weight", "A.weight")
        return f"{_PREFIX}{module}.lora_{left}", f"{_PREFIX}{module}.lora_{right}"


def _tensor(checkpoint: Checkpoint, entry: Entry) -> Tensor:
    raw = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
    checkpoint.read(entry, 0, raw)
    return raw.to(torch.float32, copy=True).view(entry.shape)


@dataclass(frozen=True, eq=False)
class Update:
    """The update of one module as an operand.

    Args:
        adapter: The adapter.
        module: The module's path.
        transposed: Whether the base stores the weight as (in_features, out_features).
    """

    adapter: Adapter
    module: str
    transposed: bool = False

    @property
    def label(self) -> str:
        """Name of the adapter."""
        return self.adapter.checkpoint.label

    def read(self, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        b, a = self.adapter.factors(self.module)
        left, right = (a.T.contiguous(), b.T.contiguous()) if self.transposed else (b, a)
        columns = right.shape[1]
        for row in range(start // columns // _ROWS * _ROWS, -(-stop // columns), _ROWS):
            rows = (left[row : row + _ROWS] @ right).view(-1)
            place = row * columns
            low, high = max(start, place), min(stop, place + rows.numel())
            out[low - start : high - start] = rows[low - place : high - place]


@dataclass(frozen=True, eq=False)
class Difference:
    """What a wholly trained tensor differs from the base's in, as an operand.

    Args:
        trained: The trained tensor.
        base: The base's.
    """

    trained: Stored
    base: Stored

    @property
    def label(self) -> str:
        """Name of the adapter."""
        return self.trained.label

    def read(self, start: int, stop: int, out: Tensor, workspace: Workspace) -> None:
        self.trained.read(start, stop, out, workspace)
        before = workspace.take("difference", stop - start)
        self.base.read(start, stop, before, workspace)
        out.sub_(before)


# Reading ----------------------------------------------------------------------------------------------------


def read_adapter(checkpoint: Checkpoint) -> Adapter:
    """Return an adapter by modules, from its headers and its config.

    Raises:
        ValueError: It is no plain LoRA, or its tensors do not fit together; the text names the setting or the
            tensor.
    """
    config, where = checkpoint.config, checkpoint.label
    _check_config(config, where)
    pairs: dict[str, dict[str, Entry]] = {}
    full: dict[str, Entry] = {}
    embeddings: set[str] = set()
    for key, entry in checkpoint.tensors.items():
        name = key.removeprefix(_PREFIX)
        module, marked, kind = name.partition(".lora_")
        if not marked:
            full[name] = entry
            continue
        rule = "lora_A.weight or lora_B.weight, or an embedding's lora_embedding_A or lora_embedding_B"
        check(kind in _KINDS, "tensor", key, rule, where=where)
        rule = "a float matrix; updates of other layers than linear ones and embeddings cannot be merged"
        check(entry.is_float and len(entry.shape) == 2, key, list(entry.shape), rule, where=where)
        pairs.setdefault(module, {})[_KINDS[kind]] = entry
        if kind.startswith("embedding"):
            embeddings.add(module)
    check(bool(pairs), "adapter_model.safetensors", sorted(full)[:3], "one with LoRA tensors", where=where)
    modules: dict[str, tuple[Entry, Entry, float]] = {}
    for module, pair in sorted(pairs.items()):
        check(set(pair) == {"A", "B"}, module, sorted(pair), "given with lora_A and lora_B", where=where)
        a, b = pair["A"], pair["B"]
        rule = f"of the rank of lora_A, {a.shape[0]}"
        check(b.shape[1] == a.shape[0] > 0, f"{module}.lora_B", list(b.shape), rule, where=where)
        modules[module] = (a, b, _scale(config, module, a.shape[0], where))
    bases = {module: full.pop(f"{module}{_BASE}") for module in modules if f"{module}{_BASE}" in full}
    return Adapter(checkpoint, modules, full, frozenset(embeddings), bases)


def _check_config(config: Mapping[str, Any], where: str) -> None:
    check(bool(config), "adapter_config.json", None, "given", where=where)
    kind = config.get("peft_type")
    rule = "'LORA'; export another type of this library with hf-ext export-lora first"
    check(kind == "LORA", "peft_type", kind, rule, where=where)
    for name in _REFUSED:
        value = config.get(name)
        check(not value, name, value, "off: such an adapter is more than s B A", where=where)
    check(config.get("bias", "none") == "none", "bias", config.get("bias"), "'none'", where=where)
    start = config.get("init_lora_weights")
    rule = "one that leaves the base as it is; save it with path_initial_model_for_weight_conversion"
    check(not changes_base(start), "init_lora_weights", start, rule, where=where)


def _scale(config: Mapping[str, Any], module: str, r: int, where: str) -> float:
    import peft  # noqa: F401 (its import imports ours, which must not meet _compat half imported)

    from .._compat.peft import get_pattern_key

    def of(pattern: str, default: object) -> object:
        patterns = config.get(pattern) or {}
        return patterns.get(get_pattern_key(list(patterns), module), default)

    wanted = of("rank_pattern", config.get("r"))
    check(wanted == r, f"rank of {module}", r, f"{wanted}, as its config says", where=where)
    alpha = of("alpha_pattern", config.get("lora_alpha"))
    check(isinstance(alpha, int | float), "lora_alpha", alpha, "a number", where=where)
    return float(cast(float, alpha)) / (r**0.5 if config.get("use_rslora") else r)


def check_factors(parents: Parents) -> None:
    """Refuse to merge factors of adapters that scale them differently.

    Raises:
        ValueError: Their configs differ; the text names the field.
    """
    first = parents.models[0]
    for other in [*parents.models[1:], *([parents.base] if parents.base is not None else [])]:
        for name in _SHAPING:
            rule = f"{first.config.get(name)!r}, that of {first.label}, for factors; or set space: product"
            same = other.config.get(name) == first.config.get(name)
            check(same, name, other.config.get(name), rule, where=other.label)


# Planning ---------------------------------------------------------------------------------------------------


def plan_deltas(config: MergeConfig, method: MergeMethod, parents: Parents, space: str) -> Plan:
    """Return the plan of a merge of updates, in product space or into the base.

    Raises:
        ValueError: The adapters cannot be merged so; the text lists why.
    """
    adapters = [read_adapter(model) for model in parents.models]
    _check_alike(adapters)
    if space == "merge_into_base":
        return _into_base(config, method, parents, adapters)
    return _product(config, method, parents, adapters)


def _check_alike(adapters: Sequence[Adapter]) -> None:
    first, problems = adapters[0], list[str]()
    name = first.checkpoint.label
    for other in adapters[1:]:
        label = other.checkpoint.label
        lacking = sorted({*first.modules, *first.full} - {*other.modules, *other.full})
        further = sorted({*other.modules, *other.full} - {*first.modules, *first.full})
        problems += [f"{label} lacks {', '.join(lacking)}"] if lacking else []
        problems += [f"only {label} has {', '.join(further)}"] if further else []
        for module, entry in first.bases.items():
            beside = other.bases.get(module)
            if beside is None or not _same(first.checkpoint, entry, other.checkpoint, beside):
                problems.append(f"{module}{_BASE} of {label} is not {name}'s")
        for module in sorted(set(other.bases) - set(first.bases)):
            problems.append(f"only {label} has {module}{_BASE}")
        for module in first.modules:
            if module in other.modules and other.shape(module) != first.shape(module):
                problems.append(
                    f"{module} is {other.shape(module)} in {label} and {first.shape(module)} in {name}"
                )
        if bool(other.checkpoint.config.get("fan_in_fan_out")) != bool(
            first.checkpoint.config.get("fan_in_fan_out")
        ):
            problems.append(f"fan_in_fan_out of {label} differs from {name}'s")
    if problems:
        raise ValueError(f"the adapters cannot be merged: {'; '.join(problems)}")


def _same(one: Checkpoint, a: Entry, other: Checkpoint, b: Entry) -> bool:
    """Whether two tensors hold the same numbers; of two types, those that the narrower one can hold."""
    if a.shape != b.shape or not (a.is_float and b.is_float):
        return False
    if a.dtype == b.dtype:
        return same_bytes(one, a, other, b)
    narrow = DTYPES[min(a, b, key=lambda entry: entry.itemsize).dtype]
    return torch.equal(_tensor(one, a).to(narrow), _tensor(other, b).to(narrow))


def _into_base(
    config: MergeConfig, method: MergeMethod, parents: Parents, adapters: Sequence[Adapter]
) -> Plan:
    base = parents.base
    assert base is not None
    quantized = base.config.get("quantization_config")
    check(not quantized, "quantization_config", quantized, "absent: dequantize first", where=base.label)
    transposed = bool(adapters[0].checkpoint.config.get("fan_in_fan_out"))
    made = _operands_on_base(base, adapters, transposed)
    stored = config.stored_dtype()
    dtypes = {n: stored if stored is not None and e.is_float else e.dtype for n, e in base.tensors.items()}
    refuse_doubles(dtypes)
    size = parse_size("max_shard_size", config.max_shard_size)
    layout = plan_layout([(name, dtypes[name], e.shape) for name, e in base.tensors.items()], size)
    place = positions(base.tensors)
    tasks: list[Task] = []
    for index, (name, entry) in enumerate(base.tensors.items()):
        slot, held = layout.slots[name], Stored(base, entry)
        if name not in made or excluded(name, config.exclude):
            info = TensorInfo(name, entry.shape, index, 1, {})
            tasks.append(Task(info, slot, (held,), None, merged=False))
            continue
        info = _info(method, name, entry.shape, index, place[name], parents.own, made[name])
        tasks.append(Task(info, slot, made[name], held, add_base=True))
    method.check_models(models_of(parents, "merge_into_base", tasks))
    return Plan(config, method, parents, "merge_into_base", layout, tuple(tasks))


def _operands_on_base(
    base: Checkpoint, adapters: Sequence[Adapter], transposed: bool
) -> dict[str, tuple[Operand, ...]]:
    made: dict[str, tuple[Operand, ...]] = {}
    problems: list[str] = []
    for module in adapters[0].modules:
        name = f"{module}.weight"
        shape, embedding = adapters[0].shape(module), module in adapters[0].embeddings
        tied = embedding and base.config.get("tie_word_embeddings", _UNTIED not in base.tensors)
        rule = "false: the head of a tied base would change with the updated embeddings; untie it first"
        check(not tied, "tie_word_embeddings", True, rule, where=base.label)
        turned = transposed and not embedding
        wanted = shape[::-1] if turned else shape
        entry = base.tensors.get(name)
        if entry is None or entry.shape != wanted or not entry.is_float:
            found = "none" if entry is None else f"{list(entry.shape)} {entry.dtype}"
            problems.append(f"{name} {list(wanted)} (the base has {found})")
            continue
        saved = adapters[0].bases.get(module)
        if saved is not None and not _same(base, entry, adapters[0].checkpoint, saved):
            problems.append(f"{name} (the adapter's file has another one, in {module}{_BASE})")
        made[name] = tuple(Update(adapter, module, turned) for adapter in adapters)
    for name in adapters[0].full:
        entry = base.tensors.get(name)
        if entry is None or any(adapter.full[name].shape != entry.shape for adapter in adapters):
            problems.append(f"{name} (trained whole)")
            continue
        held = Stored(base, entry)
        made[name] = tuple(
            Difference(Stored(adapter.checkpoint, adapter.full[name]), held) for adapter in adapters
        )
    if problems:
        raise ValueError(f"{base.label} is not the base of these adapters: {', '.join(problems)}")
    return made


def _info(
    method: MergeMethod,
    name: str,
    shape: tuple[int, ...],
    index: int,
    place: float,
    own: Sequence[Mapping[str, Setting]],
    operands: Sequence[Operand],
) -> TensorInfo:
    values = method.values_for(name, place, own)
    return TensorInfo(name, shape, index, len(operands), values, tuple(o.label for o in operands))


# Product space ----------------------------------------------------------------------------------------------


def _product(config: MergeConfig, method: MergeMethod, parents: Parents, adapters: Sequence[Adapter]) -> Plan:
    first = adapters[0]
    total = max(sum(adapter.rank(module) for adapter in adapters) for module in first.modules)
    given = config.out_rank is not None or method.weighted_sum
    rule = f"given: what {method.info.name} makes of updates has no low rank, and is truncated to it"
    check(given, "out_rank", config.out_rank, rule)
    rule = "left out in product space: updates have none"
    check(parents.base is None, "base_model", config.base_model, rule)
    if first.full:
        named = ", ".join(first.full)
        check(method.info.name == "linear", "modules_to_save", named, "merged by linear, or into the base")
    rank = config.out_rank or total
    stored = config.stored_dtype()
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    for module in first.modules:
        rows, columns = first.shape(module)
        dtype = stored or first.modules[module][0].dtype
        left, right = first.keys(module)
        turned = module in first.embeddings
        tensors.append((left, dtype, (rank, rows) if turned else (rows, rank)))
        tensors.append((right, dtype, (columns, rank) if turned else (rank, columns)))
    for module, entry in first.bases.items():
        tensors.append((f"{_PREFIX}{module}{_BASE}", entry.dtype, entry.shape))
    for name, entry in first.full.items():
        tensors.append((_PREFIX + name, stored or entry.dtype, entry.shape))
    refuse_doubles({name: dtype for name, dtype, _ in tensors})
    layout = plan_layout(tensors, 1 << 62, "adapter_model")
    tasks = _product_tasks(method, parents, adapters, layout.slots, rank)
    method.check_models(models_of(parents, "product", tasks))
    files = {"adapter_config.json": _settings(adapters, rank)}
    return Plan(config, method, parents, "product", layout, tuple(tasks), whole=True, files=files)


def _product_tasks(
    method: MergeMethod,
    parents: Parents,
    adapters: Sequence[Adapter],
    slots: Mapping[str, Slot],
    rank: int,
) -> list[Task]:
    first = adapters[0]
    names = [f"{module}.weight" for module in first.modules] + list(first.full)
    place = positions(names)
    tasks: list[Task] = []
    for index, module in enumerate(first.modules):
        left, right = (slots[key] for key in first.keys(module))
        pair = Pair(left, right, rank, turned=module in first.embeddings)
        operands = tuple(Update(adapter, module) for adapter in adapters)
        name = f"{module}.weight"
        info = _info(method, name, first.shape(module), index, place[name], parents.own, operands)
        if method.weighted_sum:
            tasks.append(Task(info, None, operands, None, make=Stacked(method, adapters, module, pair)))
        else:
            tasks.append(Task(info, None, operands, None, finish=Truncated(module, pair)))
    for index, (name, entry) in enumerate(first.full.items(), start=len(tasks)):
        stored = tuple(Stored(adapter.checkpoint, adapter.full[name]) for adapter in adapters)
        alike = all(one.entry.shape == entry.shape and one.entry.is_float for one in stored)
        check(alike, name, [list(one.entry.shape) for one in stored], "a float tensor of one shape in all")
        info = _info(method, name, entry.shape, index, place[name], parents.own, stored)
        tasks.append(Task(info, slots[_PREFIX + name], stored, None))
    for index, (module, entry) in enumerate(first.bases.items(), start=len(tasks)):
        slot = slots[f"{_PREFIX}{module}{_BASE}"]
        info = TensorInfo(f"{module}{_BASE}", entry.shape, index, 1, {})
        tasks.append(Task(info, slot, (Stored(first.checkpoint, entry),), None, merged=False))
    return tasks


@dataclass(frozen=True)
class Pair:
    """Where the factors of a merged update go.

    Args:
        left: Place of the left factor, (rows, rank) or, turned, (rank, rows).
        right: Place of the right factor, (rank, columns) or, turned, (columns, rank).
        rank: The rank; smaller factors are padded with zeros.
        turned: Whether both are stored transposed, as an embedding's are.
    """

    left: Slot
    right: Slot
    rank: int
    turned: bool

    def placed(self, b: Tensor, a: Tensor) -> list[tuple[Slot, Tensor]]:
        """Return b (rows, k) and a (k, columns), k at most the rank, as they are stored."""
        missing = self.rank - a.shape[0]
        b = torch.nn.functional.pad(b, (0, missing))
        a = torch.nn.functional.pad(a, (0, 0, 0, missing))
        if self.turned:
            b, a = b.T, a.T
        return [(self.left, b.contiguous()), (self.right, a.contiguous())]


@dataclass(frozen=True, eq=False)
class Stacked:
    """Makes the merged factors of a weighted sum from the stacked ones."""

    method: MergeMethod
    adapters: Sequence[Adapter]
    module: str
    pair: Pair

    def __call__(self, task: Task) -> tuple[list[tuple[Slot, Tensor]], dict[str, float]]:
        weights = self.method.coefficients(task.info)
        pairs = [adapter.factors(self.module) for adapter in self.adapters]
        b = torch.cat([left.mul_(weight) for (left, _), weight in zip(pairs, weights, strict=True)], dim=1)
        a = torch.cat([right for _, right in pairs])
        dropped = 0.0
        if a.shape[0] > self.pair.rank:
            b, a, dropped = recompress(b, a, rank=self.pair.rank, tol=0.0)
        return self.pair.placed(b, a), {"dropped_energy": dropped}


@dataclass(frozen=True, eq=False)
class Truncated:
    """Makes factors of a merged update by truncating it."""

    module: str
    pair: Pair

    def __call__(self, task: Task, result: Tensor) -> tuple[list[tuple[Slot, Tensor]], dict[str, float]]:
        energy = float(result.double().square().sum())
        found = truncated_svd(result, min(self.pair.rank, *result.shape), name=self.module)
        root = found.s.sqrt()
        kept = float(found.s.double().square().sum())
        dropped = max(0.0, 1.0 - kept / energy) if energy else 0.0
        return self.pair.placed(found.u * root, root[:, None] * found.vh), {"dropped_energy": dropped}


def _settings(adapters: Sequence[Adapter], rank: int) -> dict[str, Any]:
    """Return the config of the merged LoRA, whose scale is 1."""
    config = copy.deepcopy(dict(adapters[0].checkpoint.config))
    bases = {str(adapter.checkpoint.config.get("base_model_name_or_path")) for adapter in adapters}
    if len(bases) > 1:
        config["base_model_name_or_path"] = None
    config.update(
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        rank_pattern={},
        alpha_pattern={},
        init_lora_weights=True,
        # The very modules, whatever rule chose them.
        target_modules=sorted(adapters[0].modules),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        inference_mode=True,
    )
    return json.loads(json.dumps(config))
