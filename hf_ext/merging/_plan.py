"""From a config to tasks: everything that can be refused is refused here, before a byte is written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..core.checks import check
from ._align import Aligned, align, excluded, same_bytes
from ._base import MergeMethod, Models, TensorInfo
from ._checkpoint import Checkpoint
from ._config import MergeConfig
from ._layout import Layout, parse_size, plan_layout
from ._operands import Operand, Stored, Task
from ._parameters import positions
from ._parents import Parents
from ._vocabulary import MatchedRows

_VERSION = 1  # of what a plan means; an unfinished merge of another version is not gone on with


@dataclass(frozen=True)
class Plan:
    """What will be done.

    Args:
        config: What was asked for.
        method: The method.
        parents: The checkpoints.
        space: One of `SPACES`.
        layout: The output files.
        tasks: The output tensors in the order of their names.
        whole: Whether blocks are whole tensors, whatever the method says.
        files: Further files of the output, by name.
        rows: What tells matched rows of the vocabulary from others; None where none are matched.
        model_config: Content of config.json but the type of the weights; None for that of the side files.
    """

    config: MergeConfig
    method: MergeMethod
    parents: Parents
    space: str
    layout: Layout
    tasks: tuple[Task, ...]
    whole: bool = False
    files: Mapping[str, object] | None = None
    rows: str | None = None
    model_config: Mapping[str, Any] | None = None

    def fingerprint(self) -> str:
        """Return a digest of all that the output's bytes depend on, and of how they are cut into blocks."""
        asked = self.config.to_dict()
        for name in ("threads",):
            asked.pop(name)
        content = {
            "version": _VERSION,
            "config": asked,
            **({"rows": self.rows} if self.rows is not None else {}),
            "parents": [[str(c.folder.resolve()), c.state()] for c in self.parents.all()],
            "layout": [
                [file.name, file.size, hashlib.sha256(file.header).hexdigest()] for file in self.layout.files
            ],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def work(self) -> int:
        """Return the number of elements that all passes see."""
        passes = 1 + self.method.scans
        return sum(task.info.numel * (passes if task.merged else 1) for task in self.tasks)


def make_plan(config: MergeConfig, method: MergeMethod, parents: Parents) -> Plan:
    """Check everything and lay out the output.

    Raises:
        ValueError: The models cannot be merged so; the text lists why.
    """
    if parents.slices:
        from ._slices import plan_slices

        return plan_slices(config, method.for_slices(), parents)
    space = _space(config, method, parents)
    method = method.for_space(space)
    if space in ("product", "merge_into_base"):
        from ._lora import plan_deltas

        return plan_deltas(config, method, parents, space)
    if space == "factors":
        from ._lora import check_factors

        check_factors(parents)
    aligned = _aligned(config, parents, space)
    stored = config.stored_dtype()
    checkpoints = _compared(parents)
    reference = aligned.entries[0]
    dtypes = {
        name: stored if stored is not None and entry.is_float else entry.dtype
        for name, entry in reference.items()
    }
    refuse_doubles(dtypes)
    stem = "adapter_model" if space == "factors" else "model"
    size = parse_size("max_shard_size", config.max_shard_size)
    if space == "factors":  # PEFT reads a single file
        size = 1 << 62
    layout = plan_layout([(name, dtypes[name], reference[name].shape) for name in aligned.names], size, stem)
    tasks = _tasks(config, method, parents, aligned, checkpoints, layout)
    method.check_models(models_of(parents, space, tasks))
    _refuse_differing_integers(aligned, checkpoints)
    files = None
    if space == "factors":
        files = {"adapter_config.json": parents.reference.config}
    rows = None if aligned.matched is None else aligned.matched.digest()
    return Plan(config, method, parents, space, layout, tuple(tasks), files=files, rows=rows)


def models_of(parents: Parents, space: str, tasks: Sequence[Task]) -> Models:
    """Return what a method's own checks see."""
    base = None if parents.base is None else parents.base.label
    labels = tuple(model.label for model in parents.models)
    return Models(labels, base, space, [task.info for task in tasks if task.merged])


def _space(config: MergeConfig, method: MergeMethod, parents: Parents) -> str:
    adapters = [model.label for model in parents.models if model.is_adapter]
    mixed = f"all models or all adapters; adapters are {', '.join(adapters)}"
    check(len(adapters) in (0, len(parents.models)), "models", list(parents.names), mixed)
    space = config.space
    if space == "auto":
        space = "product" if adapters else "full"
    if adapters:
        check(space != "full", "space", space, "'product', 'factors' or 'merge_into_base' for adapters")
        if space == "merge_into_base":
            given = parents.base is not None and not parents.base.is_adapter
            check(given, "base_model", config.base_model, "the model that the adapters are merged into")
        elif parents.base is not None:
            check(parents.base.is_adapter, "base_model", config.base_model, f"an adapter in {space} space")
    else:
        check(space == "full", "space", config.space, "'full' for models")
        check(parents.base is None or not parents.base.is_adapter, "base_model", config.base_model, "a model")
    check(
        config.out_rank is None or space == "product",
        "out_rank",
        config.out_rank,
        "left out outside product space",
    )
    check(
        space in method.spaces, "space", space, f"one that {method.info.name} supports", where=_known(method)
    )
    return space


def _known(method: MergeMethod) -> str:
    return f"{', '.join(sorted(method.spaces))}"


def _compared(parents: Parents) -> list[Checkpoint]:
    """Return the reference and the models, each once, in this order."""
    found = [parents.reference, *parents.models]
    return [model for index, model in enumerate(found) if model not in found[:index]]


def _aligned(config: MergeConfig, parents: Parents, space: str) -> Aligned:
    side, reference = parents.side, parents.reference
    stored = any(name.endswith("lm_head.weight") for name in reference.tensors)
    untied = not side.config.get("tie_word_embeddings", not stored)
    models = _compared(parents)
    source = source_of(config, parents, models)
    given = config.stored_dtype() is not None
    base = None if parents.base is None else models.index(parents.base)
    return align(models, untied=untied, dtype_given=given, source=source, base=base)


def source_of(config: MergeConfig, parents: Parents, models: Sequence[Checkpoint]) -> int | None:
    """Return the number of the model whose vocabulary is asked for, or None where all must have one."""
    asked = config.tokenizer_source not in (None, "union")
    return models.index(parents.side) if asked else None


def refuse_doubles(dtypes: Mapping[str, str]) -> None:
    """Refuse to store a type that is wider than the arithmetic."""
    doubles = [name for name, dtype in dtypes.items() if dtype == "F64"]
    check(not doubles, "dtype", "float64", "another type: arithmetic is fp32", where=", ".join(doubles[:5]))


def _refuse_differing_integers(aligned: Aligned, checkpoints: Sequence[Checkpoint]) -> None:
    wrong: list[str] = []
    for name, entry in aligned.entries[0].items():
        if entry.is_float:
            continue
        for model, own in zip(checkpoints[1:], aligned.entries[1:], strict=True):
            if not same_bytes(checkpoints[0], entry, model, own[name]):
                wrong.append(f"{name} ({model.label})")
    if wrong:
        raise ValueError(f"tensors that are no floats must be equal in all models: {', '.join(wrong)}")


def _tasks(
    config: MergeConfig,
    method: MergeMethod,
    parents: Parents,
    aligned: Aligned,
    checkpoints: Sequence[Checkpoint],
    layout: Layout,
) -> list[Task]:

    def operand(model: Checkpoint, name: str) -> Stored | MatchedRows:
        return aligned.operand(checkpoints.index(model), name)

    place = positions(aligned.names)
    task_vectors = method.operands == "task_vectors"
    tasks: list[Task] = []
    for index, name in enumerate(aligned.names):
        slot = layout.slots[name]
        reads = method.reads(name, len(parents.models))
        if reads is None or not aligned.entries[0][name].is_float or excluded(name, config.exclude):
            info = TensorInfo(name, slot.shape, index, 1, {})
            tasks.append(Task(info, slot, (operand(parents.reference, name),), None, merged=False))
            continue
        operands = tuple(operand(parents.models[parent], source) for parent, source in reads)
        own = [parents.own[parent] for parent, _ in reads]
        values = method.values_for(name, place[name], own)
        labels = tuple(operand.label for operand in operands)
        info = TensorInfo(name, slot.shape, index, len(operands), values, labels)
        base: Operand | None = None
        if parents.base is not None and (task_vectors or method.needs_base):
            base = operand(parents.base, name)
        _check_shapes(name, slot.shape, operands)
        tasks.append(Task(info, slot, operands, base, subtract=task_vectors, add_base=task_vectors))
    return tasks


def _check_shapes(name: str, shape: tuple[int, ...], operands: Sequence[Stored | MatchedRows]) -> None:
    for operand in operands:
        if operand.entry.shape != shape:
            raise ValueError(
                f"{name} {list(shape)} cannot be made of {operand.entry.name} {list(operand.entry.shape)}"
            )


def with_indices(tasks: Sequence[Task]) -> tuple[Task, ...]:
    """Return tasks numbered in order."""
    return tuple(replace(task, info=replace(task.info, index=index)) for index, task in enumerate(tasks))


def resolved(config: MergeConfig, parents: Parents) -> dict[str, Any]:
    """Return the config as the manifest tells it, without paths of this machine."""
    asked = config.to_dict()
    labels = {name: model.label for name, model in zip(parents.names, parents.models, strict=True)}
    if parents.base is not None and config.base_model is not None:
        labels[config.base_model] = parents.base.label
        asked["base_model"] = parents.base.label
    named = [*asked["models"], *(source for one in asked["slices"] for source in one["sources"])]
    for one in asked["slices"]:
        if one["base_model"] is not None:
            one["base_model"] = labels.get(one["base_model"], _short_name(one["base_model"]))
    for parent in named:
        parent["model"] = labels.get(parent["model"], _short_name(parent["model"]))
    source = asked["tokenizer_source"]
    if source not in (None, "base", "union"):
        asked["tokenizer_source"] = labels.get(source, _short_name(source))
    return asked


def _short_name(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]
