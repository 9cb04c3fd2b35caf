"""Model cards: what was trained on what, with which settings, to which loss, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import EvalResult, ModelCard, ModelCardData

PLOT = "loss.png"
CARD_MARK = "<!-- hf_ext -->"  # what follows is ours, and is replaced when a card is written again


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card tells.

    Args:
        name: Name of the model.
        method: Adapter type, "full" for a fine-tuned whole model, or what was made of it, such as "merged".
        base_model: Hub id of the base, or None: a folder of this machine means nothing to a reader.
        base_label: How the text names the base, where it has no Hub id.
        paper: Identifier of the method's paper, or None.
        dataset: Name of the data set, or None.
        settings: Settings by name.
        metrics: Numbers by name.
        plot: PNG of the losses, or None.
        snippet: Python code that loads the folder.
        is_adapter: Whether the folder holds an adapter rather than a model.
        tags: Tags to add to those of the upstream libraries.
        task: The Hub's name of what the model does; None where that is not known.
        loss_unit: Unit of the held-out loss; empty for none.
    """

    name: str
    method: str
    base_model: str | None
    base_label: str
    paper: str | None
    dataset: str | None
    settings: Mapping[str, object]
    metrics: Mapping[str, float]
    plot: bytes | None
    snippet: str
    is_adapter: bool = True
    tags: tuple[str, ...] = ("hf_ext",)
    task: str | None = "text-generation"
    loss_unit: str = "nats per token"


def write_card(folder: str | Path, facts: CardFacts) -> None:
    """Write or amend the card of a saved model or adapter, and its plot, in place.

    What the upstream libraries have put into an existing card stays, but for a base model that is a path.

    Args:
        folder: The saved folder; one that nobody reads yet, since a card is written in place.
        facts: What to tell.

    Raises:
        OSError: The folder cannot be written.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path) if path.is_file() else ModelCard("---\n{}\n---\n")
    _fill(cast(ModelCardData, card.data), facts)
    kept = card.text.partition(CARD_MARK)[0].strip() if CARD_MARK in card.text else ""
    card.text = "\n\n".join(part for part in (kept, CARD_MARK, _body(facts)) if part) + "\n"
    if facts.plot is not None:
        (Path(folder) / PLOT).write_bytes(facts.plot)
    card.save(path)


def _fill(data: ModelCardData, facts: CardFacts) -> None:
    data.library_name = "peft" if facts.is_adapter else "transformers"
    data.pipeline_tag = facts.task
    data.base_model = facts.base_model  # peft has put the path of a local folder here
    relation = "adapter" if facts.is_adapter else "finetune"
    data["base_model_relation"] = relation if facts.base_model else None
    # peft writes `base_model:adapter:<path>` into the tags, too.
    inherited = [tag for tag in data.tags or [] if not tag.startswith("base_model:")]
    data.tags = sorted({*inherited, *facts.tags})
    if facts.dataset and not facts.dataset.startswith(("embedded:", ".", "/", "~")):
        data.datasets = [facts.dataset]
    data.model_name = facts.name
    after = facts.metrics.get("eval_loss_after")
    if after is not None:
        data.eval_results = [
            EvalResult(
                task_type=facts.task or "other",
                dataset_type=facts.dataset or "unknown",
                dataset_name=facts.dataset or "unknown",
                metric_type="loss",
                metric_name=", ".join(filter(None, ("held-out loss", facts.loss_unit))),
                metric_value=round(after, 6),
            )
        ]


def _body(facts: CardFacts) -> str:
    base = (
        f"[{facts.base_model}](https://huggingface.co/{facts.base_model})"
        if facts.base_model
        else f"`{facts.base_label}`"
    )
    paper = f" ({facts.paper})" if facts.paper else ""
    data = f" on `{facts.dataset}`" if facts.dataset else ""
    parts = [
        f"# {facts.name}",
        f"{base} fine-tuned{data} with **{facts.method}**{paper}.",
        f"## Load it\n\n```python\n{facts.snippet.strip()}\n```",
    ]
    if facts.metrics:
        parts.append(f"## Metrics\n\n{_table(('metric', 'value'), _numbers(facts.metrics))}")
    if facts.plot is not None:
        parts.append(f"![training and held-out loss]({PLOT})")
    if facts.settings:
        parts.append(f"## Settings\n\n{_table(('setting', 'value'), facts.settings)}")
    return "\n\n".join(parts)


def _numbers(metrics: Mapping[str, float]) -> dict[str, str]:
    return {name: f"{value:.6g}" for name, value in metrics.items()}


def _table(heads: tuple[str, str], rows: Mapping[str, Any]) -> str:
    def cell(value: object) -> str:
        return str(value).replace("|", "\\|").replace("\n", " ")

    lines = [f"| {heads[0]} | {heads[1]} |", "|---|---|"]
    lines += [f"| {cell(name)} | {cell(value)} |" for name, value in rows.items()]
    return "\n".join(lines)
