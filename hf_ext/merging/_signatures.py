"""Signatures in files: extracted from three models, patched into others, scaled, and taken off bit for bit.

A signature is a folder:

    rws.json          format, settings, shapes and norms of its tensors, hashes of the models it comes from
    rws.safetensors   <tensor>.codes and <tensor>.limits of each tensor, and norm/<tensor> of the robust model

A patched model carries in `rws/`, beside what any loader reads: the original tensors, the signatures, and
applied.json with their strengths. Every change starts from the originals again, so that signatures commute,
and without any the files are those that were patched, byte for byte.
"""

from __future__ import annotations

import fnmatch
import hashlib
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..core.checks import check, check_choice
from ..core.files import atomic_folder, read_json, read_tensors, write_json, write_tensors
from ..core.lowrank import truncated_svd
from ._checkpoint import ADAPTER, DTYPES, Checkpoint, Entry, file_digest
from ._deltas import TaskVector, tensor_of
from ._quantized import Quantized, quantize, stored

_CONFIG, _TENSORS, _FORMAT = "rws.json", "rws.safetensors", 1
_FOLDER, _APPLIED, _ORIGINAL, _MANIFEST = "rws", "applied.json", "original.safetensors", "merge_manifest.json"
_EMBEDDING = re.compile(r"embed|\bwte\b|\bwpe\b")
_LAST = re.compile(r"(^|\.)(lm_head|embed_out|classifier|score|fc|head|output)\.")
NORM = re.compile(r"(^|[._])(\w*norm\w*|bn\d*|ln_\w+|running_mean|running_var)([._]|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Signature:
    """A signature in memory.

    Args:
        label: What the robust model is robust to.
        tensors: Its tensors.
        norms: Normalization tensors of the robust model, where they were kept.
        info: What else its rws.json says.
    """

    label: str
    tensors: Mapping[str, Quantized]
    norms: Mapping[str, Tensor]
    info: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Bytes of codes, ranges and normalization tensors."""
        norms = sum(value.numel() * value.element_size() for value in self.norms.values())
        return norms + sum(value.nbytes for value in self.tensors.values())


# Which tensors ----------------------------------------------------------------------------------------------


def forward_order(names: Iterable[str]) -> list[str]:
    """Return names in the order of the layers as their numbers tell it, heads last."""

    def key(name: str) -> tuple[bool, list[tuple[int, str]]]:
        pieces = re.findall(r"\d+|\D+", name)
        return bool(_LAST.search(name)), [(int(p), "") if p.isdecimal() else (-1, p) for p in pieces]

    return sorted(names, key=key)


def shallow(shapes: Mapping[str, tuple[int, ...]], keep_num: int, order: Sequence[str] | None) -> list[str]:
    """Return weights and biases of the first modules that have weights of two or more dimensions.

    Embeddings and normalization layers do not count.

    Args:
        shapes: Of the model's tensors.
        keep_num: Number of modules.
        order: Tensors in forward order; None for what their names tell.
    """
    ordered = forward_order(shapes) if order is None else [n for n in dict.fromkeys(order) if n in shapes]
    weights = [name for name in ordered if is_weight(name, shapes[name])][:keep_num]
    chosen = set(weights) | {name.removesuffix("weight") + "bias" for name in weights}
    return [name for name in ordered if name in chosen]


def is_weight(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is a layer's weight: no embedding, and no normalization layer's."""
    return (
        name.endswith("weight") and len(shape) >= 2 and not _EMBEDDING.search(name) and not NORM.search(name)
    )


# Extracting -------------------------------------------------------------------------------------------------


def extract_signature(
    start: str | Path,
    clean: str | Path,
    robust: str | Path,
    out: str | Path,
    *,
    label: str | None = None,
    keep_num: int = 7,
    tensors: Sequence[str] = (),
    order: Sequence[str] | None = None,
    bits: int = 8,
    quant_mode: str = "symmetric",
    keep_norms: bool = False,
    overwrite: bool = False,
) -> Signature:
    """Write what training on a corrupted domain changed, beside what training on the clean one changed.

    s = v - (<v, a> / <a, a>) a for each tensor, with a = clean - start and v = robust - start; a tensor that
    clean training did not change keeps v.

    Args:
        start: Folder of the model that both were trained from.
        clean: Folder of the model trained on clean data.
        robust: Folder of the model trained on corrupted data.
        out: The folder to write; it appears when it is complete.
        label: What the signature is called; None for the robust folder's name.
        keep_num: Number of shallow layers (modules with weights) that it covers, at least 1.
        tensors: Patterns of tensor names to cover instead.
        order: Names of tensors in forward order, such as `list(model.state_dict())`; None for the order that
            the numbers in the names tell.
        bits: Bits of a number: 2 to 8, 16 or 32.
        quant_mode: "symmetric", "minmax" or "log".
        keep_norms: Whether to keep the robust model's normalization tensors, for norm_mode "mean_of_robust".
        overwrite: Whether an earlier signature may be replaced.

    Raises:
        FileNotFoundError: A model is not there.
        ValueError: The models do not fit together, a setting is outside its range, or no tensor is covered.
    """
    out = _free(out, overwrite, _CONFIG)
    models = [Checkpoint(folder) for folder in (start, clean, robust)]
    check(keep_num >= 1, "keep_num", keep_num, "at least 1")
    a, v = TaskVector(models[1], models[0]), TaskVector(models[2], models[0])
    a.names()
    names = v.names()
    shapes = {name: models[0].tensors[name].shape for name in names}
    if tensors:
        chosen = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in tensors)]
    else:
        chosen = shallow(shapes, keep_num, order)
    check(bool(chosen), "tensors", list(tensors) or keep_num, "such that a tensor is covered")
    made: dict[str, Quantized] = {}
    described: dict[str, Any] = {}
    for name in chosen:
        change = v.off(a, name)
        check(
            bool(torch.isfinite(change).all()), name, "NaN or infinite values", "finite in all three models"
        )
        made[name] = quantize(change, bits, quant_mode)
        norm = float(change.double().norm())
        wrong = float((made[name].values().double() - change.double()).norm())
        described[name] = {
            "shape": list(change.shape),
            "norm": norm,
            "quantization_error": wrong / norm if norm else 0.0,
            "projected": a.norm([name]) > 0.0,
        }
    kept = [n for n in names if NORM.search(n) and len(shapes[n]) <= 1] if keep_norms else []
    norms = {name: tensor_of(models[2], name) for name in kept}
    info = {
        "format": _FORMAT,
        "label": label or models[2].label,
        "bits": bits,
        "quant_mode": quant_mode,
        "tensors": described,
        "sources": {
            role: {path.name: model.digest(path) for path in model.files}
            for role, model in zip(("start", "clean", "robust"), models, strict=True)
        },
    }
    signature = Signature(str(info["label"]), made, norms, info)
    with atomic_folder(out) as fresh:
        _write_signature(fresh, signature)
    for model in models:
        model.close()
    return signature


def _write_signature(folder: Path, signature: Signature) -> None:
    tensors = {f"norm/{name}": value for name, value in signature.norms.items()}
    for name, value in signature.tensors.items():
        tensors.update(value.tensors(name))
    write_tensors(folder / _TENSORS, tensors)
    write_json(folder / _CONFIG, dict(signature.info))


def read_signature(folder: str | Path) -> Signature:
    """Read a signature.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged or of another format.
    """
    folder = Path(folder)
    if not (folder / _CONFIG).is_file() or not (folder / _TENSORS).is_file():
        raise FileNotFoundError(f"{folder} is no signature: it lacks {_CONFIG} or {_TENSORS}")
    info = cast("dict[str, Any]", read_json(folder / _CONFIG))
    check(info.get("format") == _FORMAT, "format", info.get("format"), str(_FORMAT), where=str(folder))
    held = read_tensors(folder / _TENSORS)
    lacking = [
        name for name in info["tensors"] if f"{name}.codes" not in held or f"{name}.limits" not in held
    ]
    check(not lacking, _TENSORS, lacking[:3], "with all tensors that the config names", where=str(folder))
    tensors = {
        name: stored(held, name, tuple(own["shape"]), info["bits"], info["quant_mode"])
        for name, own in info["tensors"].items()
    }
    norms = {key.removeprefix("norm/"): value for key, value in held.items() if key.startswith("norm/")}
    return Signature(info["label"], tensors, norms, info)


# Patching files ---------------------------------------------------------------------------------------------


def apply_signatures(
    model: str | Path,
    signatures: Mapping[str | Path, float] | Sequence[str | Path],
    out: str | Path,
    *,
    norm_mode: str = "keep",
    overwrite: bool = False,
) -> Path:
    """Write a model with signatures added to its weights, theta + sum_c alpha_c s_c, rounded once.

    A model that carries signatures already keeps them; one of the same label is scaled anew.

    Args:
        model: Folder of the model, of the architecture that the signatures come from.
        signatures: Folders of signatures with their strengths alpha, in [-2, 2]; without strengths each has
            1 / their number.
        out: The folder to write; it appears when it is complete. It may be `model` itself, with `overwrite`.
        norm_mode: "keep" leaves normalization layers; "mean_of_robust" puts in the mean of the robust
            models', which the signatures must have kept.
        overwrite: Whether an earlier patched model may be replaced.

    Raises:
        FileNotFoundError: The model or a signature is not there.
        ValueError: A signature does not fit the model, or a strength is outside its range.
    """
    if not isinstance(signatures, Mapping):
        signatures = {folder: 1.0 / len(signatures) for folder in signatures}
    check(bool(signatures), "signatures", {}, "at least one")
    check_choice("norm_mode", norm_mode, ("keep", "mean_of_robust"))
    found: dict[str, tuple[Signature, float]] = dict(_applied(Path(model)))
    new: set[str] = set()
    for folder, alpha in signatures.items():
        signature = read_signature(folder)
        check(-2.0 <= alpha <= 2.0, "alpha", alpha, "between -2 and 2", where=signature.label)
        check(signature.label not in new, "label", signature.label, "different for each signature")
        new.add(signature.label)
        found[signature.label] = signature, alpha
    return _patched(Path(model), found, Path(out), norm_mode, overwrite)


def remove_signatures(
    model: str | Path, out: str | Path, labels: Sequence[str] | None = None, *, overwrite: bool = False
) -> Path:
    """Write a patched model without some of its signatures; without any it is as it was, bit for bit.

    Args:
        model: Folder of the patched model.
        out: The folder to write; it may be `model` itself, with `overwrite`.
        labels: Labels of the signatures to take off; None for all.
        overwrite: Whether an earlier patched model may be replaced.

    Raises:
        ValueError: The model has no such signature, or its originals are damaged.
    """
    found = _applied(Path(model))
    check(bool(found), "model", str(model), f"a patched one (with {_FOLDER}/{_APPLIED})")
    for label in found if labels is None else labels:
        check_choice("label", label, tuple(found))
    kept = {label: pair for label, pair in found.items() if labels is not None and label not in labels}
    mode = read_json(Path(model) / _FOLDER / _APPLIED)["norm_mode"]
    return _patched(Path(model), kept, Path(out), mode, overwrite)


def _applied(model: Path) -> dict[str, tuple[Signature, float]]:
    place = model / _FOLDER
    if not (place / _APPLIED).is_file():
        return {}
    content = read_json(place / _APPLIED)
    check(content.get("format") == _FORMAT, "format", content.get("format"), str(_FORMAT), where=str(place))
    found: dict[str, tuple[Signature, float]] = {}
    for number, one in enumerate(content["signatures"]):
        digest = file_digest(place / str(number) / _TENSORS)
        check(digest == one["sha256"], one["label"], digest, "as it was applied", where=str(place))
        found[one["label"]] = read_signature(place / str(number)), one["alpha"]
    return found


def _patched(
    model: Path, wanted: Mapping[str, tuple[Signature, float]], out: Path, norm_mode: str, overwrite: bool
) -> Path:
    """Write the model with these signatures, from its original tensors."""
    target = Checkpoint(model)
    wanted = dict(sorted(wanted.items()))  # sums in one order, whatever came first
    changed = _changed(target, [signature for signature, _ in wanted.values()], norm_mode)
    originals = _originals(model, target)
    if out.resolve() == model.resolve():
        check(overwrite, "out", str(out), "another folder than the model's; or give overwrite")
    else:
        _free(out, overwrite, f"{_FOLDER}/{_APPLIED}")
    with atomic_folder(out) as fresh:
        shutil.copytree(model, fresh, dirs_exist_ok=True, ignore=_own_files(model))
        held: dict[str, Tensor] = {}
        files: set[Path] = set()
        for name in sorted({*originals, *changed}):
            entry = target.tensors[name]
            held[name] = originals[name] if name in originals else _raw(target, entry)
            value = _sum(name, held[name], wanted, norm_mode) if name in changed else held[name]
            path = fresh / entry.path.relative_to(target.folder)
            _overwrite(path, entry.offset, value)
            files.add(path)
        kept = {name: held[name] for name in changed}
        if wanted:
            _write_record(fresh / _FOLDER, wanted, kept, norm_mode)
        _write_manifest(model, fresh, files, wanted)
    target.close()
    return out


def _own_files(model: Path) -> Any:
    def ignored(folder: str, names: list[str]) -> list[str]:
        return [_FOLDER] if Path(folder) == model and _FOLDER in names else []

    return ignored


def _changed(target: Checkpoint, signatures: Sequence[Signature], norm_mode: str) -> set[str]:
    """Return the tensors that signatures change, after a look at whether they fit."""
    problems: list[str] = []
    names: set[str] = set()
    for signature in signatures:
        norms = signature.norms if norm_mode == "mean_of_robust" else {}
        check(
            norm_mode == "keep" or bool(norms),
            "norm_mode",
            norm_mode,
            "'keep', where a signature has not kept the norms (keep_norms)",
            where=signature.label,
        )
        shapes = {name: value.shape for name, value in signature.tensors.items()}
        shapes.update({name: tuple(value.shape) for name, value in norms.items()})
        for name, shape in shapes.items():
            entry = target.tensors.get(name)
            if entry is None or entry.shape != shape or not entry.is_float:
                has = "none" if entry is None else f"{list(entry.shape)} {entry.dtype}"
                problems.append(f"{name} {list(shape)} of {signature.label} ({target.label} has {has})")
        names |= set(shapes)
    if problems:
        raise ValueError(f"the signature does not fit the model: {'; '.join(problems[:8])}")
    return names


def _originals(model: Path, target: Checkpoint) -> dict[str, Tensor]:
    path = model / _FOLDER / _ORIGINAL
    if not path.is_file():
        return {}
    digests = read_json(model / _FOLDER / _APPLIED)["original"]
    held = read_tensors(path)
    wrong = [
        name for name in {*held, *digests} if name not in held or _digest(held[name]) != digests.get(name)
    ]
    check(not wrong, _ORIGINAL, sorted(wrong)[:3], "as it was written", where=str(path))
    for name, value in held.items():
        entry = target.tensors.get(name)
        same = entry is not None and entry.shape == tuple(value.shape) and DTYPES[entry.dtype] == value.dtype
        check(same, name, list(value.shape), "a tensor of the model that was patched", where=str(model))
    return held


def _raw(target: Checkpoint, entry: Entry) -> Tensor:
    raw = torch.empty(entry.numel, dtype=DTYPES[entry.dtype])
    target.read(entry, 0, raw)
    return raw.view(entry.shape)


def _sum(
    name: str, original: Tensor, wanted: Mapping[str, tuple[Signature, float]], norm_mode: str
) -> Tensor:
    """Return a tensor with signatures, in its own type."""
    total = original.double() if original.dtype == torch.float64 else original.float()
    if norm_mode == "mean_of_robust":
        norms = [signature.norms[name] for signature, _ in wanted.values() if name in signature.norms]
        total = torch.stack(norms).mean(dim=0) if norms else total
    for signature, alpha in wanted.values():
        if name in signature.tensors:
            total = total + alpha * signature.tensors[name].values()
    rounded = total.to(original.dtype)
    check(bool(torch.isfinite(rounded).all()), name, "NaN or infinite values", "finite once it is patched")
    return rounded


def _overwrite(path: Path, offset: int, value: Tensor) -> None:
    if not value.numel():
        return
    path.chmod(path.stat().st_mode | 0o200)  # what was copied from a cache may be read-only
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(value.contiguous().view(-1).view(torch.uint8).numpy().data)


def _write_record(
    folder: Path,
    wanted: Mapping[str, tuple[Signature, float]],
    originals: Mapping[str, Tensor],
    norm_mode: str,
) -> None:
    listed: list[dict[str, Any]] = []
    for number, (label, (signature, alpha)) in enumerate(wanted.items()):
        _write_signature(folder / str(number), signature)
        digest = file_digest(folder / str(number) / _TENSORS)
        listed.append({"label": label, "alpha": alpha, "sha256": digest})
    write_tensors(folder / _ORIGINAL, originals)
    digests = {name: _digest(value) for name, value in originals.items()}
    content = {"format": _FORMAT, "signatures": listed, "original": digests, "norm_mode": norm_mode}
    write_json(folder / _APPLIED, content)


def _digest(value: Tensor) -> str:
    raw = value.contiguous().view(-1).view(torch.uint8).numpy().data if value.numel() else b""
    return hashlib.sha256(raw).hexdigest()


def _write_manifest(
    model: Path, fresh: Path, files: set[Path], wanted: Mapping[str, tuple[Signature, float]]
) -> None:
    """Bring the manifest of a merged model up to date, or back to what it was."""
    kept, before = model / _FOLDER / _MANIFEST, model / _MANIFEST
    source = kept if kept.is_file() else before
    if not source.is_file():
        return
    if not wanted:
        shutil.copyfile(source, fresh / _MANIFEST)
        return
    shutil.copyfile(source, fresh / _FOLDER / _MANIFEST)
    content = read_json(source)
    output = dict(content.get("output", {}))
    output.update({str(path.relative_to(fresh)): file_digest(path) for path in files})
    strengths = {label: alpha for label, (_, alpha) in wanted.items()}
    write_json(fresh / _MANIFEST, {**content, "output": output, "signatures": strengths})


def _free(out: str | Path, overwrite: bool, mark: str) -> Path:
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        check(overwrite, "out", str(out), "a new folder; give overwrite to replace an earlier one")
        check((out / mark).is_file(), "out", str(out), f"an earlier result (with {mark}) to be overwritten")
    return out


# In memory, and as a LoRA -----------------------------------------------------------------------------------


class SignaturePatch:
    """Signatures added to a model in memory, from now until `remove`.

    Originals of the covered tensors are kept, so that taking the patch off restores their bits.

    Args:
        model: The model; its tensors are changed in place.
        signatures: Signatures, or folders of them.
        alpha: Strength of each, or one for all; None for 1 / their number.

    Raises:
        ValueError: A signature does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        signatures: Sequence[Signature | str | Path],
        alpha: float | Sequence[float] | None = None,
    ) -> None:
        self.signatures = [one if isinstance(one, Signature) else read_signature(one) for one in signatures]
        state = model.state_dict(keep_vars=True)
        self._tensors: dict[str, Tensor] = {}
        for signature in self.signatures:
            for name, value in signature.tensors.items():
                has = tuple(state[name].shape) if name in state else None
                check(has == value.shape, name, has, f"{value.shape} in the model", where=signature.label)
                self._tensors[name] = state[name]
        self._originals = {name: tensor.detach().clone() for name, tensor in self._tensors.items()}
        self.scale(1.0 / max(1, len(self.signatures)) if alpha is None else alpha)

    @torch.no_grad()
    def scale(self, alpha: float | Sequence[float]) -> None:
        """Set the strengths, whatever they were before."""
        count = len(self.signatures)
        alphas = [float(alpha)] * count if isinstance(alpha, int | float) else [float(a) for a in alpha]
        check(len(alphas) == count, "alpha", alphas, f"one number for each of {count} signatures")
        for value in alphas:
            check(-2.0 <= value <= 2.0, "alpha", value, "between -2 and 2")
        pairs = sorted(zip(self.signatures, alphas, strict=True), key=lambda pair: pair[0].label)
        wanted = {f"{number}": pair for number, pair in enumerate(pairs)}
        for name, tensor in self._tensors.items():
            tensor.copy_(_sum(name, self._originals[name].cpu(), wanted, "keep"))

    @torch.no_grad()
    def remove(self) -> None:
        """Restore the original bits."""
        for name, tensor in self._tensors.items():
            tensor.copy_(self._originals[name])


def signature_to_lora(
    folder: str | Path, out: str | Path, *, rank: int, alpha: float = 1.0, overwrite: bool = False
) -> float:
    """Write a signature as a LoRA that PEFT switches on and off; return the share of its energy that is lost.

    Args:
        folder: The signature.
        out: The folder to write.
        rank: Rank of the LoRA, at least 1; matrices with a smaller side have their own full rank.
        alpha: Strength, in [-2, 2].
        overwrite: Whether an earlier adapter there may be replaced.

    Raises:
        ValueError: The signature changes tensors that are no matrices, which a LoRA cannot hold.
    """
    signature = read_signature(folder)
    check(rank >= 1, "rank", rank, "at least 1")
    check(-2.0 <= alpha <= 2.0, "alpha", alpha, "between -2 and 2")
    others = [
        n for n, value in signature.tensors.items() if len(value.shape) != 2 or not n.endswith(".weight")
    ]
    check(not others, "signature", others[:5], "one of weight matrices alone; a LoRA has no place for others")
    out = _free(out, overwrite, "adapter_config.json")
    state: dict[str, Tensor] = {}
    energy = kept = 0.0
    for name, value in signature.tensors.items():
        delta = alpha * value.values()
        found = truncated_svd(delta, min(rank, *delta.shape), name=name)
        root, missing = found.s.sqrt(), rank - len(found.s)
        module = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = root[:, None] * found.vh, found.u * root
        state[f"{module}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, missing))
        state[f"{module}.lora_B.weight"] = torch.nn.functional.pad(b, (0, missing))
        energy += float(delta.double().square().sum())
        kept += float(found.s.double().square().sum())
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "inference_mode": True,
        "target_modules": [name.removesuffix(".weight") for name in signature.tensors],
        "base_model_name_or_path": None, "task_type": None,
    }  # fmt: skip
    with atomic_folder(out) as fresh:
        write_tensors(fresh / ADAPTER, state)
        write_json(fresh / "adapter_config.json", config)
    return max(0.0, 1.0 - kept / energy) if energy else 0.0


__all__ = [
    "Signature",
    "SignaturePatch",
    "apply_signatures",
    "extract_signature",
    "read_signature",
    "remove_signatures",
    "signature_to_lora",
]
