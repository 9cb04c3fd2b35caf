"""What a run leaves behind: each folder is written aside, reloaded, compared, and only then put in place."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel, PeftType
from safetensors import SafetensorError
from torch import Tensor, nn

from ..core.files import atomic_folder
from .card import CardFacts, write_card
from .preflight import Prepared
from .recipe import Job
from .sources import auto_class, hub_id, load_model

_PROBE_TOKENS = 64
# Largest difference of logits, relative to the largest logit: rounding in fp32, and in 8 bits of mantissa
# through all layers where weights or activations are rounded.
TOLERANCE = {True: 1e-4, False: 5e-2}


@dataclass
class Trained:
    """The model as training left it.

    Args:
        model: Without the engine's wrapper.
        state: All weights, where an engine has them sharded; None where the model holds them.
        probe: Token ids (1, T) to compare on.
        logits: The model's for them, fp32, on the CPU.
        exact: Whether weights and activations are fp32.
        device: Where reloaded models are compared.
    """

    model: Any
    state: dict[str, Any] | None
    probe: Tensor
    logits: Tensor
    exact: bool
    device: torch.device


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Return a model's logits in evaluation mode, fp32, on the CPU."""
    was_training = model.training
    model.eval()
    out = model(input_ids=ids).logits.float().cpu()
    model.train(was_training)
    return out


def probe_of(rows: Any, tokenizer: Any, device: torch.device) -> Tensor:
    """Return the first tokens of the first row, (1, T)."""
    row = rows[0]
    if "input_ids" in row:
        ids = row["input_ids"]
    elif "prompt_ids" in row:
        ids = [*row["prompt_ids"], *row.get("chosen_ids", [])]
    elif "chosen_ids" in row:
        ids = row["chosen_ids"]
    elif isinstance(row["prompt"], str):
        ids = tokenizer(row["prompt"])["input_ids"]
    else:
        ids = tokenizer.apply_chat_template(row["prompt"], tokenize=True, return_dict=True)["input_ids"]
    return torch.tensor([ids[:_PROBE_TOKENS]], device=device)


@contextmanager
def saving(folder: Path) -> Iterator[Path]:
    """Give an empty folder that replaces `folder` if the block succeeds; a full disk is always an OSError."""
    with atomic_folder(folder) as fresh:
        try:
            yield fresh
        except (SafetensorError, RuntimeError) as error:
            if is_disk_error(error):
                raise OSError(errno.EIO, str(error)) from error
            raise


def is_disk_error(error: BaseException) -> bool:
    """Return whether a library's own exception stands for a failed write."""
    text = str(error)
    return (isinstance(error, SafetensorError) and "os error" in text) or "PytorchStreamWriter" in text


class Outputs:
    """Writes the folders of one run; used by one process.

    Args:
        job: The recipe.
        prepared: What the checks have built.
        trained: The trained model.
        facts: What the adapter's (or whole model's) card tells.
    """

    def __init__(self, job: Job, prepared: Prepared, trained: Trained, facts: CardFacts) -> None:
        self.job, self.prepared, self.trained, self.facts = job, prepared, trained, facts
        self.folder = Path(job.output_dir)
        self.differences: dict[str, float] = {}

    def write(self) -> nn.Module:
        """Write everything that the recipe asks for, and return a model to generate with.

        Raises:
            OSError: A folder cannot be written; the one that was there before is unchanged.
            RuntimeError: A reloaded model does not compute what the trained one does.
        """
        full = self.prepared.adapter is None
        reloaded = self._save_trained("model" if full else "adapter")
        if self.job.recipe.export_lora:
            self._export()
        if self.job.recipe.merge:
            assert isinstance(reloaded, PeftModel)
            reloaded = self._merge(reloaded)
        return self.trained.model if reloaded is None else reloaded

    def _save_trained(self, name: str) -> nn.Module | None:
        reloaded: nn.Module | None = None
        with saving(self.folder / name) as fresh:
            self.trained.model.save_pretrained(fresh, state_dict=self.trained.state)
            self._finish(fresh, self.facts)
            if self.job.recipe.verify_outputs or self.job.recipe.merge:
                reloaded = self._reload_model(fresh) if name == "model" else self._reload_adapter(fresh)
                self._compare(name, reloaded)
        return reloaded

    def _export(self) -> None:
        from ..adapters.export import export_to_lora

        model = self.trained.model
        with saving(self.folder / "lora") as fresh:
            if model.peft_config[model.active_adapter].peft_type == PeftType.LORA:  # the run's result is one
                shutil.copytree(self.folder / "adapter", fresh, dirs_exist_ok=True)
            else:
                export_to_lora(str(self.folder / "adapter"), str(fresh))
            self._finish(fresh, self._facts_for("lora", is_adapter=True))
            if self.job.recipe.verify_outputs:
                self._compare("lora", self._reload_adapter(fresh))

    def _merge(self, adapted: PeftModel) -> nn.Module:
        with saving(self.folder / "merged") as fresh:
            merged: Any = adapted.merge_and_unload(safe_merge=True)
            merged.save_pretrained(fresh)
            self._finish(fresh, self._facts_for("merged", is_adapter=False))
            if self.job.recipe.verify_outputs:
                merged = self._reload_model(fresh)
                self._compare("merged", merged)
        return merged

    def _finish(self, folder: Path, facts: CardFacts) -> None:
        self.prepared.tokenizer.save_pretrained(folder)
        write_card(folder, facts)

    def _facts_for(self, name: str, *, is_adapter: bool) -> CardFacts:
        method = f"{self.facts.method}, exported to LoRA" if is_adapter else f"{self.facts.method}, merged"
        place = place_of(self.job, name)
        snippet = loading_snippet(self.job, "lora" if is_adapter else "merged", place)
        tags = (*self.facts.tags, name)
        return replace(self.facts, method=method, snippet=snippet, is_adapter=is_adapter, tags=tags)

    # Reloading ----------------------------------------------------------------------------------------------

    def _reload_adapter(self, folder: Path) -> PeftModel:
        base: Any = cast(nn.Module, load_model(self.job)).to(self.trained.device)
        return PeftModel.from_pretrained(base, str(folder)).eval()

    def _reload_model(self, folder: Path) -> nn.Module:
        dtype = next(self.trained.model.parameters()).dtype if self.prepared.adapter is None else "auto"
        trust = bool(self.job.settings.get("trust_remote_code", False))
        model: Any = auto_class(self.job).from_pretrained(str(folder), dtype=dtype, trust_remote_code=trust)
        return model.to(self.trained.device).eval()

    def _compare(self, name: str, reloaded: nn.Module) -> None:
        found = logits_of(reloaded, self.trained.probe)
        difference = float((found - self.trained.logits).abs().max())
        limit = TOLERANCE[self.trained.exact] * max(1.0, float(self.trained.logits.abs().max()))
        if not difference <= limit:  # NaN is no match either
            raise RuntimeError(
                f"{self.folder / name}: the reloaded model's logits are off by {difference:.3g} "
                f"(at most {limit:.3g} is rounding); the folder was not put in place"
            )
        self.differences[name] = difference


# Text and upload --------------------------------------------------------------------------------------------


def place_of(job: Job, name: str) -> str:
    """Return what a reader passes to `from_pretrained`: the Hub id of what is pushed, else the folder."""
    pushed = "model" if job.recipe.adapter is None else "adapter"
    return (
        str(job.recipe.hub_model_id)
        if job.recipe.push_to_hub and name == pushed
        else f"{job.output_dir}/{name}"
    )


def base_label(job: Job) -> str:
    """Return the base model's name for people; of a folder the last part alone."""
    name = job.recipe.model_name_or_path
    return name if name.startswith("embedded:") else Path(name).name or name


def loading_snippet(job: Job, kind: str, place: str) -> str:
    """Return the code that loads an output.

    Args:
        job: The recipe.
        kind: The adapter's type, "lora" for an ordinary one, or "full" or "merged" for a whole model.
        place: Hub id or folder.
    """
    from ..core import registry

    ours, auto = kind in registry.names("adapter"), job.kind.auto_class
    lines = ["import hf_ext  # makes the adapter type known to PEFT"] if ours else []
    if kind in ("full", "merged"):
        lines += [f"from transformers import {auto}, AutoTokenizer", ""]
        lines.append(f'model = {auto}.from_pretrained("{place}")')
    elif hub_id(job) is not None:
        peft_auto, labels = auto.replace("Auto", "AutoPeft", 1), ", num_labels=1" if job.kind.scores else ""
        lines += [f"from peft import {peft_auto}", "from transformers import AutoTokenizer", ""]
        lines.append(f'model = {peft_auto}.from_pretrained("{place}"{labels})')
    else:
        embedded = job.recipe.model_name_or_path.startswith("embedded:")
        base = f'resolve("{base_label(job)}")' if embedded else f'"path/to/{base_label(job)}"'
        lines += ["from hf_ext.assets import resolve"] if embedded else []
        lines += [
            "from peft import PeftModel",
            f"from transformers import {auto}, AutoTokenizer",
            "",
        ]
        options = f'dtype="{job.recipe.dtype}"' + (", num_labels=1" if job.kind.scores else "")
        lines.append(f"base = {auto}.from_pretrained({base}, {options})")
        lines.append(f'model = PeftModel.from_pretrained(base, "{place}")')
    return "\n".join([*lines, f'tokenizer = AutoTokenizer.from_pretrained("{place}")'])


def push(job: Job) -> str:
    """Upload the adapter, or the whole model, with the card beside it, and return the commit's address.

    Raises:
        OSError: The Hub cannot be reached, or refuses.
    """
    from ..hub import push_to_hub

    recipe = job.recipe
    return push_to_hub(
        Path(job.output_dir) / ("model" if recipe.adapter is None else "adapter"),
        str(recipe.hub_model_id),
        base_model=hub_id(job),
        private=recipe.hub_private_repo,
        token=recipe.hub_token,
        revision=recipe.hub_revision,
    )


def as_json(value: object) -> str:
    """Return a setting as a card shows it."""
    return value if isinstance(value, str) else json.dumps(value, default=str)
