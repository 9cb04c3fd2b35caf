"""Several LoRA adapters in one folder: a basis for all, and each one's coefficients; no pickle, no code.

    rmm_config.json   format, settings, each adapter's config and hashes, errors, and the form of each factor
    rmm.safetensors   for a factor F of a module, either
                        <module>.<F>.basis  (features, r, p)
                        <module>.<F>.coeff  (features, p, n), or (1, p, n) where one holds for all features
                        <module>.<F>.mean   (features, r), where vectors were centered
                      or <module>.<F>.whole (features, r, n), where a basis would save nothing;
                      and @<number>/<name> for what an adapter has trained whole (modules_to_save)

A position is a column of lora_A or a row of lora_B: one vector of length r for each adapter.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..core.checks import check, check_choice
from ..core.files import atomic_folder, read_json, read_tensors, tensor_header, write_json, write_tensors
from ._basis import aligned, energies, fitted, leading_basis, product_error
from ._checkpoint import ADAPTER, DTYPES, Checkpoint, Entry
from ._lora import read_adapter

_CONFIG, _TENSORS, _FORMAT = "rmm_config.json", "rmm.safetensors", 1
_PREFIX = "base_model.model."
_TYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_SIDES = ("lora_A", "lora_B")
_ROUNDING = 1e-12  # share of a squared norm below which an error is rounding


@dataclass(frozen=True)
class StoreReport:
    """What a store holds.

    Args:
        path: The folder.
        names: The adapters, by whose names they are restored.
        stored_bytes: Bytes of the stored factors.
        adapter_bytes: Bytes that the factors have in the adapters' own files.
        errors: For each adapter the relative error of its updates, |restored - own| / |own| over all modules.
    """

    path: Path
    names: tuple[str, ...]
    stored_bytes: int
    adapter_bytes: int
    errors: Mapping[str, float]


@dataclass
class _Group:
    """Factors that share coefficients: one, or with granularity "layer" both of a module.

    Args:
        module: The module's path.
        sides: "lora_A", "lora_B" or both.
        features: Number of positions of each side.
        x: (positions, d, n), what the basis is of.
        r: Rank that the factors are padded to.
        center: Whether a mean is stored.
        size: Basis vectors; None where the factors are stored as they are.
    """

    module: str
    sides: tuple[str, ...]
    features: tuple[int, ...]
    x: Tensor
    r: int
    center: bool
    size: int | None = 1
    _energies: list[float] = field(default_factory=list)

    def numbers(self, size: int | None) -> int:
        """Return how many numbers a basis of a size takes, with its coefficients."""
        places, d, n = self.x.shape
        if size is None:
            return places * d * n
        return places * (size * (d + n) + (d if self.center else 0))

    def set_size(self, size: int) -> None:
        """Take a basis of a size, or the factors themselves where that is no smaller."""
        small = size < self.limit and self.numbers(size) < self.numbers(None)
        self.size = size if small else None

    @property
    def limit(self) -> int:
        """Size at which nothing is lost."""
        return min(self.x.shape[1:])

    def error(self, size: int | None) -> float:
        """Return how many numbers, of all that the adapters differ in, a basis of a size leaves out."""
        if size is None:
            return 0.0
        if not self._energies:
            centered = self.x - self.x.mean(dim=2, keepdim=True) if self.center else self.x
            self._energies = energies(centered).tolist()
        # What all adapters share (the common start of lora_A) would hide what each has learned.
        apart = float((self.x - self.x.mean(dim=2, keepdim=True)).square().sum())
        left, least = sum(self._energies[size:]), _ROUNDING * sum(self._energies)
        return self.x[..., 0].numel() * left / apart if min(left, apart) > least else 0.0


# Storing ----------------------------------------------------------------------------------------------------


def store_adapters(
    adapters: Mapping[str, str | Path] | Sequence[str | Path],
    out: str | Path,
    *,
    basis_size: int = 2,
    budget: float | None = None,
    granularity: str = "position",
    center: bool = False,
    align: bool = False,
    dtype: str = "bfloat16",
    overwrite: bool = False,
) -> StoreReport:
    """Store LoRA adapters as a shared basis and coefficients, from which `restore_adapter` makes each again.

    Args:
        adapters: Folders by the names to restore them by, or folders alone, which then name them.
        out: The folder to write; it appears when it is complete.
        basis_size: Basis vectors for each factor (p), from 1 to the number of adapters. Factors for which a
            basis would take no less room than they do are stored as they are.
        budget: Share of the adapters' own bytes that the factors may take, in (0, 1], instead of
            `basis_size`: room goes where it saves most of what the adapters differ in for each byte.
        granularity: "position" has a basis for each column of lora_A and row of lora_B, "tensor" one for each
            factor, "layer" one for both factors of a module.
        center: Whether to store the mean of the vectors, and the basis of what differs from it.
        align: Whether to turn each adapter's factors, which leaves its updates as they are, to come near to
            the first one's.
        dtype: Stored type: "bfloat16", "float16" or "float32".
        overwrite: Whether an earlier store may be replaced.

    Raises:
        FileNotFoundError: An adapter is not there.
        ValueError: A setting is outside its range, an adapter is no plain LoRA, or it does not fit the
            others.
    """
    named = _named(adapters)
    check(bool(named), "adapters", list(named), "at least one")
    fits = type(basis_size) is int and 1 <= basis_size <= len(named)
    rule = f"between 1 and {len(named)}, the number of adapters"
    check(fits or budget is not None, "basis_size", basis_size, rule)
    check(budget is None or 0.0 < budget <= 1.0, "budget", budget, "above 0 and at most 1, or left out")
    check_choice("granularity", granularity, ("position", "tensor", "layer"))
    check_choice("dtype", dtype, tuple(_TYPES))
    out = _free(out, overwrite)
    tasks = [_Task(name, folder) for name, folder in named.items()]
    settings = {"granularity": granularity, "center": center, "aligned": align, "dtype": dtype}
    modules = _modules(tasks, align)
    groups = [group for module in modules for group in _groups(module, tasks, settings)]
    own_bytes = sum(task.nbytes() for task in tasks)
    if budget is None:
        for group in groups:
            group.set_size(basis_size)
    else:
        _spend(groups, int(budget * own_bytes), _TYPES[dtype].itemsize)
    tensors: dict[str, Tensor] = {}
    for group in groups:
        tensors.update(_stored(group, _TYPES[dtype]))
    for number, task in enumerate(tasks):
        tensors.update({f"@{number}/{name}": value for name, value in task.full()})
    content = {**_header(settings, modules, tasks), "adapter_bytes": own_bytes}
    return _write(out, content, tensors, {task.name: task for task in tasks})


class _Task:
    """One adapter to store."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        self.checkpoint = Checkpoint(folder, name)
        check(self.checkpoint.is_adapter, "adapters", str(folder), "folders of LoRA adapters")
        self.adapter = read_adapter(self.checkpoint)
        beside = sorted({*self.adapter.embeddings, *self.adapter.bases})
        check(not beside, "target_modules", beside, "without embeddings and heads", where=name)
        self.turned: dict[str, tuple[Tensor, Tensor]] = {}

    def factors(self, module: str) -> tuple[Tensor, Tensor]:
        """Return A (r, in_features) and B (out_features, r) in fp64, without the scale."""
        if module not in self.turned:
            a, b, _ = self.adapter.modules[module]
            self.turned[module] = self._read(a).double(), self._read(b).double()
        for side, value in zip(_SIDES, self.turned[module], strict=True):
            finite = bool(torch.isfinite(value).all())
            check(finite, f"{module}.{side}", "NaN or infinite values", "finite", where=self.name)
        return self.turned[module]

    def rank(self, module: str) -> int:
        return self.adapter.rank(module)

    def nbytes(self) -> int:
        """Return the bytes of A and B of all modules in the adapter's file."""
        return sum(e.numel * e.itemsize for a, b, _ in self.adapter.modules.values() for e in (a, b))

    def full(self) -> Iterator[tuple[str, Tensor]]:
        for name, entry in self.adapter.full.items():
            yield name, self._read(entry)

    def _read(self, entry: Entry) -> Tensor:
        raw = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
        self.checkpoint.read(entry, 0, raw)
        return raw.view(entry.shape)

    def described(self) -> dict[str, Any]:
        ranks = {module: self.rank(module) for module in self.adapter.modules}
        first = next(iter(self.adapter.modules.values()))[0]
        return {
            "config": self.checkpoint.config,
            "dtype": str(DTYPES[first.dtype]).removeprefix("torch."),
            "ranks": ranks,
            "sha256": {path.name: self.checkpoint.digest(path) for path in self.checkpoint.files},
        }


def _named(adapters: Mapping[str, str | Path] | Sequence[str | Path]) -> dict[str, Path]:
    if isinstance(adapters, Mapping):
        return {str(name): Path(folder) for name, folder in adapters.items()}
    folders = [Path(folder) for folder in adapters]
    names = [folder.resolve().name for folder in folders]
    twice = sorted({name for name in names if names.count(name) > 1})
    check(not twice, "adapters", twice, "given with names, where folders are called alike")
    return dict(zip(names, folders, strict=True))


def _free(out: str | Path, overwrite: bool, mark: str = _CONFIG) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check(overwrite, "out", str(out), "a new folder; give overwrite to replace an earlier one")
        check((out / mark).is_file(), "out", str(out), f"an earlier result (with {mark}) to be overwritten")
    return out


@dataclass(frozen=True)
class _Module:
    """A module and the adapters (by number) that have it."""

    path: str
    members: tuple[int, ...]
    r: int
    in_features: int
    out_features: int


def _modules(tasks: Sequence[_Task], align: bool) -> list[_Module]:
    """Return the modules of all adapters; the factors are turned where that is asked for."""
    found: list[_Module] = []
    for path in sorted({path for task in tasks for path in task.adapter.modules}):
        members = tuple(number for number, task in enumerate(tasks) if path in task.adapter.modules)
        shapes = {tasks[number].name: tasks[number].adapter.shape(path) for number in members}
        check(len(set(shapes.values())) == 1, path, shapes, "of one shape in all adapters")
        ranks = [tasks[number].rank(path) for number in members]
        out_features, in_features = next(iter(shapes.values()))
        if align:
            check(len(set(ranks)) == 1, "align", align, "False, where ranks differ", where=path)
            first = tasks[members[0]].factors(path)
            for number in members[1:]:
                tasks[number].turned[path] = aligned(*tasks[number].factors(path), first)
        found.append(_Module(path, members, max(ranks), in_features, out_features))
    return found


def _groups(module: _Module, tasks: Sequence[_Task], settings: Mapping[str, Any]) -> Iterator[_Group]:
    pairs = [tasks[number].factors(module.path) for number in module.members]
    sides = {
        "lora_A": torch.stack([_padded(a.T, module.r) for a, _ in pairs], dim=-1),  # (in_features, r, n)
        "lora_B": torch.stack([_padded(b, module.r) for _, b in pairs], dim=-1),  # (out_features, r, n)
    }
    features = {side: len(x) for side, x in sides.items()}
    n, granularity = len(pairs), settings["granularity"]
    shared = {"r": module.r, "center": settings["center"]}
    if granularity == "layer":
        x = torch.cat([value.reshape(-1, n) for value in sides.values()])[None]
        yield _Group(module.path, _SIDES, tuple(features.values()), x, **shared)
        return
    for side, value in sides.items():
        x = value if granularity == "position" else value.reshape(1, -1, n)
        yield _Group(module.path, (side,), (features[side],), x, **shared)


def _padded(values: Tensor, r: int) -> Tensor:
    return torch.nn.functional.pad(values, (0, r - values.shape[1]))


def _spend(groups: Sequence[_Group], budget: int, itemsize: int) -> None:
    """Choose the sizes of all bases: always the step that saves the most error for its bytes."""
    for group in groups:
        group.set_size(1)
    spent = itemsize * sum(group.numbers(group.size) for group in groups)
    check(spent <= budget, "budget", f"{budget} bytes", f"at least {spent} bytes, for bases of one vector")
    steps: list[tuple[float, int, int, int]] = []  # error saved for a byte, group, size before and after

    def consider(number: int) -> None:
        group = groups[number]
        if group.size is None:
            return
        for size in (*range(group.size + 1, group.limit), None):
            extra = group.numbers(size) - group.numbers(group.size)
            if size is None or extra < group.numbers(None) - group.numbers(group.size):
                saved = (group.error(group.size) - group.error(size)) / max(1, extra)
                heapq.heappush(steps, (-saved, number, group.size, size or 0))

    for number in range(len(groups)):
        consider(number)
    while steps:
        saved, number, before, after = heapq.heappop(steps)
        group, size = groups[number], after or None
        extra = itemsize * (group.numbers(size) - group.numbers(before))
        if group.size == before and saved < 0.0 and spent + extra <= budget:
            group.size, spent = size, spent + extra
            consider(number)


def _stored(group: _Group, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors that a group is stored as."""
    n = group.x.shape[2]
    names = [f"{group.module}.{side}" for side in group.sides]
    if group.size is None:
        return {f"{name}.whole": x.to(dtype) for name, x in _by_side(group, names, group.x, n)}
    made: dict[str, Tensor] = {}
    x = group.x
    if group.center:
        mean = x.mean(dim=2, keepdim=True)
        made.update({f"{name}.mean": m[..., 0].to(dtype) for name, m in _by_side(group, names, mean, 1)})
        x = x - mean
    basis, coefficients = leading_basis(x, group.size)
    made.update({f"{name}.basis": u.to(dtype) for name, u in _by_side(group, names, basis, group.size)})
    shared = group.module if len(names) > 1 else names[0]
    made[f"{shared}.coeff"] = coefficients.to(dtype)
    return made


def _by_side(group: _Group, names: Sequence[str], values: Tensor, last: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (features, r, last) for each factor of a group."""
    parts = values.reshape(-1, group.r, last).split(list(group.features))
    yield from zip(names, parts, strict=True)


def _header(
    settings: Mapping[str, Any], modules: Sequence[_Module], tasks: Sequence[_Task]
) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        "hf_ext_version": version("hf-ext"),
        **settings,
        "names": [task.name for task in tasks],
        "adapters": {task.name: task.described() for task in tasks},
        "modules": {module.path: {"r": module.r, "members": list(module.members)} for module in modules},
    }


def _write(
    out: Path, content: dict[str, Any], tensors: Mapping[str, Tensor], given: Mapping[str, _Task]
) -> StoreReport:
    """Write a store with the errors of the adapters that are at hand."""
    for name, task in given.items():
        errors: dict[str, float] = {}
        wrong = whole = 0.0
        for module in task.adapter.modules:
            a, b = task.factors(module)
            a_hat, b_hat = _factors(content, tensors, name, module)
            errors[module] = product_error(a, b, a_hat, b_hat)
            energy = task.adapter.modules[module][2] ** 2 * float(((b.T @ b) * (a @ a.T)).sum())
            wrong, whole = wrong + errors[module] ** 2 * energy, whole + energy
        content["adapters"][name]["errors"] = errors
        content["adapters"][name]["error"] = (wrong / whole) ** 0.5 if whole else 0.0
    own = [value for name, value in tensors.items() if not name.startswith("@")]
    content["stored_bytes"] = sum(value.numel() * value.element_size() for value in own)
    with atomic_folder(out) as fresh:
        write_tensors(fresh / _TENSORS, tensors)
        write_json(fresh / _CONFIG, content)
    for task in given.values():
        task.checkpoint.close()
    return _report(out, content)


def _report(path: Path, content: Mapping[str, Any]) -> StoreReport:
    errors = {name: content["adapters"][name]["error"] for name in content["names"]}
    return StoreReport(
        path, tuple(content["names"]), content["stored_bytes"], content["adapter_bytes"], errors
    )


# Restoring --------------------------------------------------------------------------------------------------


def read_store(folder: str | Path) -> StoreReport:
    """Return what a store holds, from its config.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: It is damaged or of another format.
    """
    folder = Path(folder)
    return _report(folder, _content(folder))


def restore_state(folder: str | Path, name: str) -> dict[str, Tensor]:
    """Return an adapter of a store as tensors by PEFT's names, in the type that it had.

    Args:
        folder: The store.
        name: Name of the adapter.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: It is damaged, or has no such adapter.
    """
    folder = Path(folder)
    content = _content(folder)
    own = _adapter(content, name)
    tensors = read_tensors(folder / _TENSORS)
    made: dict[str, Tensor] = {}
    for module in own["ranks"]:
        for side, value in zip(_SIDES, _factors(content, tensors, name, module), strict=True):
            made[f"{_PREFIX}{module}.{side}.weight"] = value.to(_TYPES[own["dtype"]]).contiguous()
    mark = f"@{content['names'].index(name)}/"
    full = {key.removeprefix(mark): value for key, value in tensors.items() if key.startswith(mark)}
    return {**made, **{_PREFIX + key: value for key, value in full.items()}}


def restore_adapter(
    folder: str | Path,
    name: str,
    out: str | Path,
    *,
    base: str | Path | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an adapter of a store as a LoRA that PEFT loads, or merged into its base as a model.

    Args:
        folder: The store.
        name: Name of the adapter.
        out: The folder to write; it appears when it is complete.
        base: The model to merge the adapter into; None to write the adapter itself.
        overwrite: Whether an earlier result in `out` may be replaced.

    Raises:
        FileNotFoundError: There is no store.
        ValueError: It is damaged, or has no such adapter, or `base` is not the adapter's.
    """
    import tempfile

    from ._merge import merge

    state = restore_state(folder, name)
    config = _adapter(_content(Path(folder)), name)["config"]
    if base is None:
        out = _free(out, overwrite, "adapter_config.json")
        _write_adapter(out, state, config)
        return out
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.adapter") as between:
        adapter = Path(between) / name.replace("/", "-")
        _write_adapter(adapter, state, config)
        settings = {"merge_method": "linear", "models": [str(adapter)], "base_model": str(base)}
        merge({**settings, "space": "merge_into_base"}, out, overwrite=overwrite, progress=False)
    return out


def _write_adapter(out: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    with atomic_folder(out) as fresh:
        write_tensors(fresh / ADAPTER, state)
        write_json(fresh / "adapter_config.json", dict(config))


def _content(folder: Path) -> dict[str, Any]:
    if not (folder / _CONFIG).is_file() or not (folder / _TENSORS).is_file():
        raise FileNotFoundError(f"{folder} is no store of adapters: it lacks {_CONFIG} or {_TENSORS}")
    content = read_json(folder / _CONFIG)
    check(isinstance(content, dict), _CONFIG, content, "a JSON object", where=str(folder))
    content = cast("dict[str, Any]", content)
    check(content.get("format") == _FORMAT, "format", content.get("format"), str(_FORMAT), where=str(folder))
    header = tensor_header(folder / _TENSORS)
    lacking = [
        f"{module}.{side}"
        for module in content["modules"]
        for side in _SIDES
        if not any(f"{module}.{side}.{kind}" in header for kind in ("basis", "whole"))
    ]
    check(not lacking, _TENSORS, lacking[:3], "with all factors that the config names", where=str(folder))
    return content


def _adapter(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    check_choice("name", name, content["names"])
    return content["adapters"][name]


def _factors(
    content: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, module: str
) -> tuple[Tensor, Tensor]:
    """Return A (r, in_features) and B (out_features, r) as restored, fp64."""
    place = content["modules"][module]["members"].index(content["names"].index(name))
    rank = content["adapters"][name]["ranks"][module]
    a, b = (_side(tensors, module, side)[..., place][:, :rank] for side in _SIDES)
    return a.T, b


def _side(tensors: Mapping[str, Tensor], module: str, side: str) -> Tensor:
    """Return a factor of all members, (features, r, n) in fp64."""
    name = f"{module}.{side}"
    if f"{name}.whole" in tensors:
        return tensors[f"{name}.whole"].double()
    basis, mean = tensors[f"{name}.basis"].double(), tensors.get(f"{name}.mean")
    coefficients = tensors.get(f"{name}.coeff", tensors.get(f"{module}.coeff"))
    check(coefficients is not None, f"{name}.coeff", None, "in the store")
    found = basis @ cast(Tensor, coefficients).double()
    return found if mean is None else found + mean.double()[..., None]


# Adding -----------------------------------------------------------------------------------------------------


def add_adapter(folder: str | Path, adapter: str | Path, name: str | None = None) -> StoreReport:
    """Add an adapter to a store on the bases that are there, which stay as they are.

    What lies outside the bases is lost: look at the error that comes back. Storing all adapters anew fits the
    bases to the new one too.

    Args:
        folder: The store; it is replaced as a whole.
        adapter: Folder of the adapter.
        name: Its name; None for the folder's.

    Raises:
        FileNotFoundError: The store or the adapter is not there.
        ValueError: The name is taken, or the adapter has modules, shapes or ranks that the store has not.
    """
    folder = Path(folder)
    content = _content(folder)
    (name, path), *_ = _named({name: adapter} if name else [adapter]).items()
    check(name not in content["names"], "name", name, "one that is not taken")
    task, tensors = _Task(name, path), read_tensors(folder / _TENSORS)
    for module in task.adapter.modules:
        rule = f"one of the {len(content['modules'])} in the store; or store all adapters anew"
        check(module in content["modules"], "module", module, rule, where=name)
    number = len(content["names"])
    content["names"].append(name)
    content["adapters"][name] = task.described()
    for module in task.adapter.modules:
        _extend(content, tensors, task, module)
        content["modules"][module]["members"].append(number)
    tensors.update({f"@{number}/{key}": value for key, value in task.full()})
    content["adapter_bytes"] += task.nbytes()
    return _write(folder, content, tensors, {name: task})


def _extend(content: Mapping[str, Any], tensors: dict[str, Tensor], task: _Task, module: str) -> None:
    """Append an adapter's column to what the store has of a module."""
    r, rule = content["modules"][module]["r"], "at most {}, that of the store"
    check(task.rank(module) <= r, "rank", task.rank(module), rule.format(r), where=module)
    there = {side: _side(tensors, module, side) for side in _SIDES}
    a, b = task.factors(module)
    shape = (len(there["lora_B"]), len(there["lora_A"]))
    fits = (b.shape[0], a.shape[1]) == shape
    check(fits, module, (b.shape[0], a.shape[1]), f"{shape} as in the store", where=task.name)
    if content["aligned"]:
        check(task.rank(module) == r, "rank", task.rank(module), f"{r}, to be aligned", where=module)
        first = there["lora_A"][..., 0].T, there["lora_B"][..., 0]
        a, b = task.turned[module] = aligned(a, b, first)
    new = {"lora_A": _padded(a.T, r), "lora_B": _padded(b, r)}
    fits_basis: list[tuple[Tensor, Tensor]] = []
    for side in _SIDES:
        name = f"{module}.{side}"
        if f"{name}.whole" in tensors:
            held = tensors[f"{name}.whole"]
            tensors[f"{name}.whole"] = torch.cat([held, new[side][..., None].to(held.dtype)], dim=-1)
            continue
        basis, mean = tensors[f"{name}.basis"], tensors.get(f"{name}.mean")
        x = new[side] if mean is None else new[side] - mean.double()
        if f"{name}.coeff" not in tensors:  # both factors share them
            fits_basis.append((basis.reshape(-1, basis.shape[-1]), x.reshape(-1, 1)))
            continue
        held = tensors[f"{name}.coeff"]
        if len(held) == 1:
            basis, x = basis.reshape(1, -1, basis.shape[-1]), x.reshape(1, -1)
        column = fitted(basis, x[..., None])
        tensors[f"{name}.coeff"] = torch.cat([held, column.to(held.dtype)], dim=-1)
    if fits_basis:
        bases, columns = (torch.cat([pair[index] for pair in fits_basis])[None] for index in (0, 1))
        held = tensors[f"{module}.coeff"]
        tensors[f"{module}.coeff"] = torch.cat([held, fitted(bases, columns).to(held.dtype)], dim=-1)


__all__ = ["StoreReport", "add_adapter", "read_store", "restore_adapter", "restore_state", "store_adapters"]
