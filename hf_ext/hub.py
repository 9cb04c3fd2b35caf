"""Pushing adapters and models to the Hub: one commit with a card, or nothing.

`PeftModel.push_to_hub` replaces the card by a generic one, and `HfApi.upload_folder` splits a folder into
several commits where hf_xet is installed and there are many files, or a commit has failed. Here the files and
the card go into a single `HfApi.create_commit` on top of the commit that was looked at, so that a reader sees
the old repository or the new one. Loading back needs nothing of this module: `import hf_ext` is enough.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from .core.checks import check

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

    from .training.card import CardFacts

__all__ = ["PushError", "push_to_hub"]

T = TypeVar("T")
_CARD, _ADAPTER = "README.md", "adapter_config.json"
# What the Trainer leaves beside a model: checkpoints to resume from, and its arguments as a pickle.
_LEFT_OUT = ("checkpoint-*/*", "training_args.bin", ".*", "*/.*", "*.partial", "__pycache__/*")
_MODEL_WEIGHTS = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*-of-*.bin",
    "pytorch_model.bin.index.json",
)
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LONGEST_WAIT = 30.0  # seconds between two attempts
_TRANSIENT = frozenset({408, 409, 412, 425, 429})  # and every 5xx
_TEMPLATE = "[More Information Needed]"  # in the empty cards that PEFT and transformers write
# Fields of an adapter_config.json that are no settings of a method.
_CLASSIFIES = ("SEQ_CLS", "TOKEN_CLS")
# The Hub's names of what models do, by the ends of their classes' names.
_TASKS = {
    "CausalLM": "text-generation",
    "SequenceClassification": "text-classification",
    "TokenClassification": "token-classification",
    "QuestionAnswering": "question-answering",
    "MaskedLM": "fill-mask",
}
_PEFT_TASKS = {
    "CAUSAL_LM": "CausalLM",
    "SEQ_CLS": "SequenceClassification",
    "TOKEN_CLS": "TokenClassification",
    "QUESTION_ANS": "QuestionAnswering",
}
_BOOKKEEPING = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "inference_mode",
        "peft_type",
        "peft_version",
        "revision",
        "task_type",
    }
)


class PushError(OSError):
    """A push that failed for good; the text names repository, file or request, cause and remedy."""


def push_to_hub(
    model_or_folder: object,
    repo_id: str,
    *,
    adapter_name: str = "default",
    tokenizer: object = None,
    base_model: str | None = None,
    method: str | None = None,
    dataset: str | None = None,
    settings: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    log_history: Sequence[Mapping[str, Any]] | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    attempts: int = 3,
    wait: float = 1.0,
) -> str:
    """Upload an adapter or a model with its card in one commit, and return the commit's address.

    The commit holds what changed; weights of an earlier push that `from_pretrained` would read instead of the
    new ones, or together with them, are removed in it. Files that have reached the Hub are not sent again,
    neither in the next attempt nor in a later call. Call it in one process.

    Args:
        model_or_folder: A PeftModel, a transformers model with or without an adapter, or the folder of a
            saved adapter, LoRA export or model. A folder is not changed, and its files go up as they are,
            but for checkpoints, hidden files and pickled training arguments, which stay, and for the card
            and the adapter's settings where they name a base model by a path of this machine. A card is
            written for a folder without one or with PEFT's empty template, and if method, dataset,
            settings, metrics or a log is given.
        repo_id: "owner/name", or "name" for the token's own account; made if there is none.
        adapter_name: Which adapter of a model.
        tokenizer: Saved along with a model; a folder holds its own.
        base_model: Hub id of the base, where it was loaded from a folder.
        method: What the card calls the method; None for the adapter's type, or "full".
        dataset: Hub id of the data, for the card.
        settings: Further settings for the card, beside those of the adapter.
        metrics: Finite numbers for the card and its `model-index`.
        log_history: A trainer's `state.log_history`, for the plot of the losses.
        private: Whether a new repository is private; None for the account's default.
        token: Token that may write, None or True for the stored one.
        revision: Branch; made if there is none. None for the main one.
        commit_message: None for "Upload" and the method's name.
        attempts: How often the whole upload is tried when the connection or the Hub fails, >= 1; each of them
            has the retries of huggingface_hub.
        wait: Seconds before the second attempt, >= 0; doubled each time, up to 30.

    Raises:
        ValueError: An argument, or a file of the folder, is not as it must be; nothing has been sent then.
        TypeError: The model cannot be saved.
        PushError: The Hub refuses the push, or all attempts have failed.
    """
    _check_arguments(repo_id, base_model, metrics, private, attempts, wait)
    with tempfile.TemporaryDirectory(prefix="hf_ext-push-") as name:
        scratch = Path(name)
        if isinstance(model_or_folder, str | os.PathLike):
            check(tokenizer is None, "tokenizer", tokenizer, "left out with a folder, which holds its own")
            folder = Path(cast("str | os.PathLike[str]", model_or_folder))
            described = any(given is not None for given in (method, dataset, settings, metrics, log_history))
            writes_card = described or _TEMPLATE in (_text(folder / _CARD) or _TEMPLATE)
        else:
            folder, named = _save(model_or_folder, scratch / "saved", adapter_name, tokenizer)
            base_model, writes_card = base_model or named, True
        files = _files(folder)
        content = _Content.read(folder, base_model, method)
        repository = _Repository.open(repo_id, revision, private, token, attempts, wait)
        changed = scratch / "changed"
        changed.mkdir()
        if writes_card:
            plot = None if log_history is None else _plot(log_history, content)
            facts = content.facts(repository.repo_id, dataset, settings or {}, metrics or {}, plot)
            earlier = repository.card(scratch / "remote")
            _write_card(changed, earlier or _text(folder / _CARD), facts, metrics or {})
        _without_paths(folder, changed, content, card=not writes_card)
        files.update({path.name: path for path in sorted(changed.iterdir())})
        return repository.commit(files, commit_message or f"Upload {content.method}")


def _check_arguments(
    repo_id: str,
    base_model: str | None,
    metrics: Mapping[str, float] | None,
    private: bool | None,
    attempts: int,
    wait: float,
) -> None:
    import math

    from huggingface_hub import constants
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for field, value in (("repo_id", repo_id), ("base_model", base_model)):
        try:
            check(value is None or isinstance(value, str), field, value, "text")
            check(value != "", field, value, "'owner/name'")
            validate_repo_id(value)
        except HFValidationError as error:
            raise ValueError(f"{field} must be 'owner/name', got {value!r}: {error}") from error
    check(isinstance(repo_id, str), "repo_id", repo_id, "'owner/name'")
    for name, value in (metrics or {}).items():
        finite = isinstance(value, int | float) and math.isfinite(value)
        check(finite, f"metrics[{name!r}]", value, "a finite number")
    check(private is None or isinstance(private, bool), "private", private, "True, False or None")
    check(attempts >= 1, "attempts", attempts, "at least 1")
    check(0.0 <= wait < math.inf, "wait", wait, "at least 0")
    check(not constants.HF_HUB_OFFLINE, "HF_HUB_OFFLINE", "1", "unset for a push")


# What is pushed ---------------------------------------------------------------------------------------------


def _save(model: Any, folder: Path, adapter_name: str, tokenizer: Any) -> tuple[Path, str | None]:
    """Save a model, and return the folder and the Hub id of its base, where it knows one."""
    if not callable(getattr(model, "save_pretrained", None)):
        raise TypeError(f"model_or_folder must be a model or the folder of one, got {type(model).__name__}")
    named: str | None = None
    adapters: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    if adapters:
        known = ", ".join(map(repr, adapters))
        check(adapter_name in adapters, "adapter_name", adapter_name, f"one of {known}")
        _save_adapter(model, folder, adapter_name)
        if adapter_name != "default" and (folder / adapter_name).is_dir():
            folder = folder / adapter_name  # where PEFT puts all but the default one
    else:
        model.save_pretrained(folder)
        named = _hub_id(getattr(getattr(model, "config", None), "name_or_path", None))
    if tokenizer is not None:
        cast(Any, tokenizer).save_pretrained(folder)
    return folder, named


def _save_adapter(model: Any, folder: Path, adapter_name: str) -> None:
    from peft import PeftModel

    if isinstance(model, PeftModel):
        model.save_pretrained(str(folder), selected_adapters=[adapter_name])
        return
    # A transformers model after `add_adapter` saves its active adapter alone.
    active = model.active_adapters()
    try:
        model.set_adapter(adapter_name)
        model.save_pretrained(folder)
    finally:
        model.set_adapter(active)


def _files(folder: Path) -> dict[str, Path]:
    """Return the files to push by their names in the repository, weights checked to be whole.

    Raises:
        ValueError: There is no such folder, it holds nothing to load, or a file is truncated or missing.
    """
    from .core.files import read_json, tensor_header

    check(folder.is_dir(), "model_or_folder", str(folder), "a model or an existing folder")
    found = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))}
    files = {name: path for name, path in found.items() if path.is_file() and not _matches(name, _LEFT_OUT)}
    is_adapter, is_model = _ADAPTER in files, "config.json" in files
    rule = f"a folder with an {_ADAPTER} or a config.json"
    check(is_adapter or is_model, "model_or_folder", str(folder), rule, where=f"{len(files)} files")
    needed = _ADAPTER_WEIGHTS if is_adapter else _MODEL_WEIGHTS
    check(
        any(_matches(name, needed) for name in files),
        "model_or_folder",
        str(folder),
        "a folder with weights",
        where=f"none of {', '.join(needed)}",
    )
    for name, path in files.items():
        if name.endswith(".safetensors"):
            tensor_header(path)
        elif name.endswith(".index.json"):
            shards = set(read_json(path).get("weight_map", {}).values())
            missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
            check(not missing, name, missing, "complete; these shards are missing", where=str(folder))
    return files


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


@dataclass(frozen=True)
class _Content:
    """What a folder's own files tell of it.

    Args:
        adapter: Content of adapter_config.json; None for a whole model.
        auto_class: Class of transformers that loads the (base) model.
        base_model: Hub id of the base.
        base_path: Path of this machine that a file names as the base, else None.
        method: Name for the card.
        has_tokenizer: Whether a tokenizer lies beside.
        labels: Outputs of the head that an adapter has trained; None where it has none of its own.
    """

    adapter: dict[str, Any] | None
    auto_class: str
    base_model: str | None
    base_path: str | None
    method: str
    has_tokenizer: bool
    labels: int | None = None

    @classmethod
    def read(cls, folder: Path, base_model: str | None, method: str | None) -> _Content:
        from .core.files import read_json

        is_adapter = (folder / _ADAPTER).is_file()
        adapter: dict[str, Any] | None = read_json(folder / _ADAPTER) if is_adapter else None
        card = _card_data(_text(folder / _CARD)) or {}
        if adapter is not None:
            named = adapter.get("base_model_name_or_path")
            mapping = adapter.get("auto_mapping") or {}
            known = _PEFT_TASKS.get(adapter.get("task_type") or "CAUSAL_LM", "")
            architecture = mapping.get("base_model_class") or f"For{known}"
        else:
            named = card.get("base_model")
            architecture = (read_json(folder / "config.json").get("architectures") or [""])[0]
        named = named if isinstance(named, str) else None
        kind = "full" if adapter is None else str(adapter.get("peft_type", "adapter")).lower()
        return cls(
            adapter=adapter,
            auto_class=_auto_class(str(architecture)),
            base_model=base_model or _hub_id(named),
            base_path=named if named and _hub_id(named) is None else None,
            method=method or kind,
            has_tokenizer=(folder / "tokenizer_config.json").is_file(),
            labels=_labels(folder, adapter),
        )

    def is_ours(self) -> bool:
        """Return whether the adapter's type needs this package to load."""
        from . import adapters  # noqa: F401 (registers)
        from .core import registry

        return str((self.adapter or {}).get("peft_type", "")).lower() in registry.names("adapter")

    def facts(
        self,
        repo_id: str,
        dataset: str | None,
        settings: Mapping[str, object],
        metrics: Mapping[str, float],
        plot: bytes | None,
    ) -> CardFacts:
        from .core import registry
        from .training.card import CardFacts

        own = {
            name: value
            for name, value in (self.adapter or {}).items()
            if name not in _BOOKKEEPING and value not in (None, {}, [])
        }
        kind = str((self.adapter or {}).get("peft_type", "")).lower()
        paper = registry.get("adapter", kind).paper if self.is_ours() else None
        return CardFacts(
            name=repo_id.rpartition("/")[2],
            method=self.method,
            base_model=self.base_model,
            base_label=Path(self.base_path).name if self.base_path else "a model without a Hub id",
            paper=paper,
            dataset=dataset,
            settings={**{f"adapter.{name}": value for name, value in own.items()}, **settings},
            metrics=metrics,
            plot=plot,
            snippet=self.snippet(repo_id),
            is_adapter=self.adapter is not None,
            tags=tuple(sorted({"hf_ext", kind or "full"})),
            task=_TASKS.get(self.auto_class.removeprefix("AutoModelFor")),
        )

    def snippet(self, repo_id: str) -> str:
        """Return the code that loads the repository."""
        names = [self.auto_class, *(["AutoTokenizer"] if self.has_tokenizer else [])]
        lines: list[str] = []
        labels = "" if self.labels is None else f", num_labels={self.labels}"
        if self.adapter is None:
            lines += [f"from transformers import {', '.join(names)}", ""]
            lines.append(f'model = {self.auto_class}.from_pretrained("{repo_id}")')
        else:
            base = self.base_model or f"path/to/{Path(self.base_path or 'base').name}"
            lines += ["import hf_ext  # makes the adapter type known to PEFT"] if self.is_ours() else []
            lines += ["from peft import PeftModel", f"from transformers import {', '.join(names)}", ""]
            lines.append(f'base = {self.auto_class}.from_pretrained("{base}"{labels})')
            lines.append(f'model = PeftModel.from_pretrained(base, "{repo_id}")')
        if self.has_tokenizer:
            lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{repo_id}")')
        return "\n".join(lines)


def _labels(folder: Path, adapter: Mapping[str, Any] | None) -> int | None:
    """Return the number of outputs of a classifier's head that is saved with an adapter."""
    from .core.files import tensor_header

    path = folder / _ADAPTER_WEIGHTS[0]
    if adapter is None or adapter.get("task_type") not in _CLASSIFIES or not path.is_file():
        return None
    heads = tuple(f".{name}.weight" for name in adapter.get("modules_to_save") or ())
    found = [entry["shape"] for key, entry in tensor_header(path).items() if heads and key.endswith(heads)]
    return int(found[0][0]) if len(found) == 1 else None


def _auto_class(architecture: str) -> str:
    _, found, task = architecture.partition("For")
    return f"AutoModelFor{task}" if found and task in _TASKS else "AutoModel"


def _hub_id(name: object) -> str | None:
    """Return the name if it can be a Hub id and is no folder of this machine, else None."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or not name or Path(name).exists():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


# The card ---------------------------------------------------------------------------------------------------

_UNKNOWN = "unknown"  # the name that model-index entries have for data without one


def _write_card(folder: Path, earlier: str | None, facts: CardFacts, metrics: Mapping[str, float]) -> None:
    """Write the card into a folder; the metadata, and what people wrote, of an earlier one are kept."""
    from huggingface_hub import EvalResult, ModelCard

    from .training.card import CARD_MARK, write_card

    path = folder / _CARD
    if earlier is not None and _card_data(earlier) is not None:
        # `write_card` keeps the text before its mark; of upstream's templates it drops all of it.
        by_people = CARD_MARK not in earlier and _TEMPLATE not in earlier
        path.write_text(f"{earlier.rstrip()}\n\n{CARD_MARK}\n" if by_people else earlier, encoding="utf-8")
    write_card(folder, facts)
    # `write_card` knows one metric; a push may have several.
    card = ModelCard.load(path)
    data = cast(Any, card.data)
    results: list[EvalResult] = [
        EvalResult(
            task_type=data.pipeline_tag,
            dataset_type=facts.dataset or _UNKNOWN,
            dataset_name=facts.dataset or _UNKNOWN,
            metric_type=name,
            metric_name=name,
            metric_value=value,
        )
        for name, value in metrics.items()
    ]
    # The numbers of an earlier push are not those of these weights.
    data.eval_results = results or None
    card.save(path)


def _card_data(text: str | None) -> dict[str, Any] | None:
    """Return the metadata of a card's text, or None where there is no text, or none that can be read."""
    import yaml
    from huggingface_hub import ModelCard

    if text is None:
        return None
    try:
        return ModelCard(text).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError):
        return None


def _text(path: Path) -> str | None:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None


def _plot(log_history: Sequence[Mapping[str, Any]], content: _Content) -> bytes:
    from .training.plot import loss_plot

    return loss_plot(log_history, content.method)


def _without_paths(folder: Path, changed: Path, content: _Content, *, card: bool) -> None:
    """Write copies of the files that name the base model by a path here, with its Hub id or none."""
    from huggingface_hub import ModelCard

    from .core.files import write_json

    adapter = content.adapter
    if adapter is not None and adapter.get("base_model_name_or_path") != content.base_model:
        write_json(changed / _ADAPTER, {**adapter, "base_model_name_or_path": content.base_model})
    text = _text(folder / _CARD) if card else None
    named = (_card_data(text) or {}).get("base_model")
    if text is None or not isinstance(named, str) or _hub_id(named) is not None:
        return
    copy = ModelCard(text.replace(named, Path(named).name))
    data = cast(Any, copy.data)
    data.base_model = content.base_model
    data.tags = [tag for tag in data.tags or [] if not tag.startswith("base_model:")] or None
    if content.base_model is None:
        data["base_model_relation"] = None
    copy.save(changed / _CARD)


# The upload -------------------------------------------------------------------------------------------------


class _Repository:
    """One branch of a repository on the Hub.

    Args:
        api: The client.
        repo_id: As the caller typed it; `open` completes it.
        revision: Branch, or None for the main one.
        attempts: How often a step is tried.
        wait: Seconds before the second try.
    """

    def __init__(self, api: HfApi, repo_id: str, revision: str | None, attempts: int, wait: float) -> None:
        self.api, self.repo_id, self.revision = api, repo_id, revision
        self.attempts, self.wait = attempts, wait

    @classmethod
    def open(
        cls,
        repo_id: str,
        revision: str | None,
        private: bool | None,
        token: str | bool | None,
        attempts: int,
        wait: float,
    ) -> _Repository:
        """Return the repository, made if there is none.

        Raises:
            ValueError: It exists and is public where a private one is asked for, or the other way round.
            PushError: It cannot be reached or made.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RevisionNotFoundError

        api = HfApi(token=token, library_name="hf_ext")
        self = cls(api, repo_id, revision, attempts, wait)
        made = self._attempt(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        self.repo_id = made.repo_id
        if private is not None:
            # Upstream ignores the wish for an existing repository, and shows what is meant to be private.
            there = self._attempt(lambda: api.model_info(self.repo_id)).private
            rule = f"{there} as the existing repository {self.repo_id} is, or None"
            check(there is None or private == there, "private", private, rule)
        if revision is not None:
            try:
                self._attempt(lambda: api.model_info(self.repo_id, revision=revision))
            except PushError as error:
                if not isinstance(error.__cause__, RevisionNotFoundError):
                    raise
                self._attempt(lambda: api.create_branch(self.repo_id, branch=revision, exist_ok=True))
        return self

    def card(self, scratch: Path) -> str | None:
        """Return the card that is in the repository now, or None."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def read() -> str | None:
            try:  # into a folder of its own: a card in the cache may be an old one
                path = self.api.hf_hub_download(
                    self.repo_id, _CARD, revision=self.revision, local_dir=str(scratch)
                )
            except LocalEntryNotFoundError:
                raise
            except EntryNotFoundError:
                return None
            return _text(Path(path))

        return self._attempt(read)

    def commit(self, files: Mapping[str, Path], message: str) -> str:
        """Upload files in one commit, and return its address."""
        return str(self._attempt(lambda: self._commit_once(files, message), files).commit_url)

    def _commit_once(self, files: Mapping[str, Path], message: str) -> CommitInfo:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        # Looked at anew in each attempt: if the answer to a commit that was made got lost, the next one finds
        # nothing left to change; if somebody else has committed since, the Hub refuses this parent.
        info = self.api.model_info(self.repo_id, revision=self.revision)
        there = [entry.rfilename for entry in info.siblings or []]
        operations: list[Any] = [CommitOperationAdd(name, str(path)) for name, path in files.items()]
        operations += [CommitOperationDelete(name, is_folder=False) for name in _stale(there, files)]
        return self.api.create_commit(
            self.repo_id, operations, commit_message=message, revision=self.revision, parent_commit=info.sha
        )

    def _attempt(self, step: Callable[[], T], files: Mapping[str, Path] | None = None) -> T:
        import httpx2

        for attempt in range(1, self.attempts + 1):
            try:
                return step()
            except (httpx2.HTTPError, OSError, RuntimeError, ValueError) as error:
                if attempt == self.attempts or not _is_transient(error):
                    raise PushError(self._failure(error, attempt, files)) from error
                time.sleep(min(_LONGEST_WAIT, self.wait * 2 ** (attempt - 1)))
        raise AssertionError("attempts is at least 1")

    def _failure(self, error: Exception, attempt: int, files: Mapping[str, Path] | None) -> str:
        place = self.repo_id if self.revision is None else f"{self.repo_id} ({self.revision})"
        where, is_commit = _place_of_failure(error)
        if files is None:
            where, state = "the repository could not be opened", "nothing was sent"
        elif is_commit and _status(error) is None:
            state = "the repository holds what it held before, or the whole push"
        else:
            state = "the repository is unchanged"
        times = "" if attempt == 1 else f" after {attempt} attempts"
        return f"push to {place} failed{times}: {where}: {_cause(error)}; {state}. {_advice(error)}"


def _stale(there: Sequence[str], files: Mapping[str, Path]) -> list[str]:
    # from_pretrained prefers an adapter to a model, and one whole file to shards.
    weights = _ADAPTER_WEIGHTS if _ADAPTER in files else (_ADAPTER, *_ADAPTER_WEIGHTS, *_MODEL_WEIGHTS)
    return [name for name in there if name not in files and _matches(name, weights)]


def _chain(error: BaseException) -> Iterator[BaseException]:
    for _ in range(10):
        yield error
        following = error.__cause__ or error.__context__
        if following is None:
            return
        error = following


def _status(error: BaseException) -> int | None:
    from huggingface_hub.errors import HfHubHTTPError

    answers = (e.response.status_code for e in _chain(error) if isinstance(e, HfHubHTTPError))
    return next(answers, None)


def _is_transient(error: BaseException) -> bool:
    import httpx2

    status = _status(error)
    if status is not None:
        return status in _TRANSIENT or status >= 500
    broken = (httpx2.TransportError, ConnectionError, TimeoutError, json.JSONDecodeError)
    # hf_xet raises plain RuntimeErrors. An answer that is no JSON comes from a machine in between.
    return any(isinstance(e, broken) for e in _chain(error)) or isinstance(error, RuntimeError)


def _place_of_failure(error: BaseException) -> tuple[str, bool]:
    for e in _chain(error):
        sent = re.search(r"Error while uploading '(.+)' to the Hub", str(e))
        if sent:
            return sent[1], False
        try:
            url = str(cast(Any, e).request.url)
        except (AttributeError, RuntimeError):  # httpx raises the latter where there was no request
            continue
        if "/commit/" in url:
            return "the commit", True
        if "validate-yaml" in url:
            return _CARD, False
    if "README.md" in str(error):
        return _CARD, False
    return "the upload", False


def _cause(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    chain = list(_chain(error))
    told = next((e for e in chain if isinstance(e, HfHubHTTPError)), None)
    if told is not None:
        said = " ".join((told.server_message or "").split())
        return f"the Hub answered {told.response.status_code}" + (f", {said}" if said else "")
    wrapped = isinstance(error, RuntimeError) and error.__cause__ is not None
    source = chain[1] if wrapped else error
    return " ".join(str(source).split()) or type(source).__name__


def _advice(error: BaseException) -> str:
    status = _status(error)
    if status in (401, 403):
        return "Log in with `hf auth login`, or pass a token that may write to this repository."
    if status == 404:
        return "Check repo_id and revision, and that the token may see the repository."
    if status in (409, 412):
        return "Somebody else commits to the repository; push again."
    if _is_transient(error):
        return "Push again: what has arrived is not sent twice."
    return "Correct that and push again."
