"""Anchors: the policy's own completions of a prompt, which a loss holds up; their table, batches and state.

Anchors that were sampled stand in a table of the training process, not in the data set: a batch carries the
numbers of its rows, and gets its anchors at the moment of its loss. Workers of a dataloader and batches that
are made ahead therefore never hold anchors that have since been replaced.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import IterableDataset
from torch import Tensor

from .._compat.trl import pad
from ..core import dist
from ..core.checks import check
from ._log_ratios import encode_completions
from ._sampling import Sampler, decode_completions, seed_of

# Column with the number of a row, unique among the data sets of a trainer.
ROW = "row_id"
# Draws for an anchor that the filter refuses, after the first.
RETRIES = 3

Anchors = list[list[int]]
AnchorFilter = Callable[..., Sequence[Any]]


@dataclass
class AnchorSet:
    """The anchors of one data set.

    Args:
        dataset: The prepared data set: `prompt_ids`, `rejected_ids`, and perhaps `anchor_ids`.
        start: Number of its first row.
        given: Whether its rows bring `anchor_ids`.
        kept: Whether checkpoints hold its anchors.
        rows: Sampled anchors of each row; None before the first sampling.
        step: Optimizer step at which they were sampled.
    """

    dataset: Any
    start: int
    given: bool
    kept: bool
    rows: list[Anchors] | None = None
    step: int = 0


class AnchorTable:
    """The anchor sets of a trainer by the names of its data sets."""

    def __init__(self) -> None:
        self.sets: dict[str, AnchorSet] = {}
        self.rows = 0

    def add(self, name: str, dataset: Any, *, given: bool, kept: bool) -> Any:
        """Number the rows of a prepared data set, keep it, and return it with the column `ROW`."""
        start = self.rows
        self.rows += len(dataset)
        if ROW in dataset.column_names:
            dataset = dataset.remove_columns(ROW)
        dataset = dataset.add_column(ROW, list(range(start, self.rows)))
        while name in self.sets:
            name += "_again"
        self.sets[name] = AnchorSet(dataset, start, given, kept)
        return dataset

    def examples(self, numbers: Sequence[int]) -> list[dict[str, Any]] | None:
        """Return rows with their sampled anchors, for the collator; None if theirs are in the data set."""
        found: list[dict[str, Any]] = []
        for number in numbers:
            one = self.of(number)
            if one.rows is None:
                return None
            row = one.dataset[number - one.start]
            found.append({"prompt_ids": row["prompt_ids"], "rejected_ids": row["rejected_ids"], ROW: number})
            found[-1]["anchor_ids"] = one.rows[number - one.start]
        return found

    def of(self, number: int) -> AnchorSet:
        """Return the set that a row is in."""
        return max((one for one in self.sets.values() if one.start <= number), key=lambda one: one.start)

    def state_dict(self) -> dict[str, Any]:
        """Return the anchors of the kept sets: for each tokens, lengths of anchors, and anchors of rows."""
        state: dict[str, Any] = {"steps": {}}
        for name, one in self.sets.items():
            if one.rows is not None and one.kept:
                state["steps"][name] = one.step
                anchors = [anchor for row in one.rows for anchor in row]
                state[f"{name}/tokens"] = _integers([token for anchor in anchors for token in anchor])
                state[f"{name}/lengths"] = _integers([len(anchor) for anchor in anchors])
                state[f"{name}/anchors"] = _integers([len(row) for row in one.rows])
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned.

        Raises:
            ValueError: A data set has another number of rows than the checkpoint's.
        """
        for name, step in state["steps"].items():
            if name not in self.sets:
                continue  # a data set for evaluation that is not given this time
            counts = state[f"{name}/anchors"].tolist()
            one = self.sets[name]
            rule = f"of {len(counts)} rows, as in the checkpoint, whose anchors are theirs"
            check(len(one.dataset) == len(counts), f"the {name} data set", len(one.dataset), rule)
            tokens = state[f"{name}/tokens"].split(state[f"{name}/lengths"].tolist())
            anchors = iter([anchor.tolist() for anchor in tokens])
            one.rows = [[next(anchors) for _ in range(count)] for count in counts]
            one.step = step


def _integers(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# Rows -------------------------------------------------------------------------------------------------------


def encode_row(example: Mapping[str, Any], tokenizer: Any) -> dict[str, Any]:
    """Return `prompt_ids`, `rejected_ids` and, where a row brings anchors, `anchor_ids` other than y_l."""
    given = list(example["anchors"]) if "anchors" in example else []
    found = encode_completions(example, [example["rejected"], *given], tokenizer)
    rejected, *anchors = found["completion_ids"]
    row: dict[str, Any] = {"prompt_ids": found["prompt_ids"], "rejected_ids": rejected}
    return {**row, "anchor_ids": without(anchors, rejected)} if "anchors" in example else row


def without(anchors: Anchors, rejected: list[int]) -> Anchors:
    """Return the anchors that are not the bad completion."""
    return [anchor for anchor in anchors if anchor != rejected]


def fits(example: Mapping[str, Any], max_length: int) -> bool:
    """Return whether a prompt leaves room for a token of its completion."""
    return len(example["prompt_ids"]) < max_length


def prompt_columns(dataset: Any) -> list[str]:
    """Return the columns that the tokens of a prompt are made of."""
    return [name for name in ("prompt", "tools", "chat_template_kwargs") if name in dataset.column_names]


def check_anchors(dataset: Any, limit: int, name: str) -> None:
    """Raise unless the `anchors` of each row are 1 to `limit` completions; streamed rows are not read.

    Raises:
        ValueError: They are not; the row is named.
    """
    if isinstance(dataset, IterableDataset):
        return
    for row, anchors in enumerate(dataset["anchors"]):
        sound = isinstance(anchors, list) and 1 <= len(anchors) <= limit and all(anchors)
        rule = f"a list of 1 to num_anchors ({limit}) completions that are not empty"
        check(sound, f"{name}: 'anchors' of row {row}", anchors, rule)


def warn_without_anchors(rows: Sequence[Any], what: str) -> None:
    """Warn if some rows have no anchor left."""
    bare = [number for number, anchors in enumerate(rows) if not anchors]
    if bare:
        warnings.warn(
            f"{what}: {len(bare)} of {len(rows)} rows, first row {bare[0]}, have no anchor that differs from "
            "'rejected' and passes anchor_filter; nothing holds their other completions up",
            stacklevel=2,
        )


# Sampling ---------------------------------------------------------------------------------------------------


def draw_anchors(
    sampler: Sampler,
    prompts: Sequence[Any],
    sampling_ids: Sequence[Sequence[Sequence[int]]],
    *,
    seed: int,
    model: Any = None,
    accept: AnchorFilter | None = None,
) -> list[Anchors]:
    """Return anchors of rows, drawn again up to three times where a filter refuses them (a collective).

    Args:
        sampler: Draws completions.
        prompts: The rows' prompts, for the filter.
        sampling_ids: (rows, K) prompts to draw from, as token ids; one anchor each.
        seed: Of the draws.
        model: Another model than the trainer's to draw from.
        accept: Called on the first process with flat lists `prompts`, `completions` and `completion_ids`;
            gives for each whether it may be an anchor.

    Returns:
        For each row its anchors; those refused to the end are left out.

    Raises:
        ValueError: A prompt is too long, or the filter gives another count than that of the completions.
    """
    flat = [list(ids) for row in sampling_ids for ids in row]
    owners = [number for number, row in enumerate(sampling_ids) for _ in row]
    found: list[list[int] | None] = [None] * len(flat)
    open_places = list(range(len(flat)))
    for attempt in range(RETRIES + 1):
        names = [f"the prompt of row {owners[place]}" for place in open_places]
        drawn = sampler.completions(
            [flat[place] for place in open_places],
            1,
            seed=seed_of(seed, attempt),
            model=model,
            names=names,
        )
        given = [one for (one,) in drawn]
        passed = [True] * len(given)
        if accept is not None:
            asked = [prompts[owners[place]] for place in open_places]
            passed = _verdicts(accept, asked, given, sampler.tokenizer)
        for place, anchor, good in zip(open_places, given, passed, strict=True):
            found[place] = anchor if good else None
        open_places = [place for place, good in zip(open_places, passed, strict=True) if not good]
        if not open_places:
            break
    rows: list[Anchors] = [[] for _ in sampling_ids]
    for owner, anchor in zip(owners, found, strict=True):
        if anchor is not None:
            rows[owner].append(anchor)
    return rows


def _verdicts(accept: AnchorFilter, prompts: list[Any], ids: list[list[int]], tokenizer: Any) -> list[bool]:
    passed: list[bool] = []
    with dist.together():
        if dist.is_main():  # its answer may differ from call to call
            texts = [one for (one,) in decode_completions(tokenizer, prompts, [[row] for row in ids])]
            answer = list(accept(prompts=prompts, completions=texts, completion_ids=ids))
            rule = f"{len(ids)} values, one for each completion"
            check(len(answer) == len(ids), "the answer of anchor_filter", len(answer), rule)
            passed = [bool(value) for value in answer]
    return dist.gather_objects(passed)[0]


def with_prefix(prompt: Any, prefix: str) -> Any:
    """Return a prompt with an instruction before it; in a chat it begins the first message of the user."""
    if isinstance(prompt, str):
        return prefix + prompt
    messages = [dict(message) for message in prompt]
    first = next((m for m in messages if m["role"] == "user"), messages[0])
    first["content"] = prefix + first["content"]
    return messages


# Batches ----------------------------------------------------------------------------------------------------


@dataclass
class AnchorCollator:
    """Lays out B samples: rows 0 to B - 1 are the negatives, then come the anchors sample by sample.

    Returns `input_ids`, `attention_mask`, `completion_mask` (R, L) and `ROW` (B,); with anchors also
    `anchor_mask` (B, K), true where a sample has its k-th anchor, so that R = B + its sum; and with
    precomputed references `ref_rejected_logps` (B,) and `ref_anchor_logps` (B, K).

    Args:
        pad_token_id: Fills up short rows.
        max_length: Rows are cut to it; None leaves them.
        truncation_mode: "keep_start" or "keep_end".
        pad_to_multiple_of: The length of rows is a multiple of it.
    """

    pad_token_id: int | None = None
    max_length: int | None = None
    truncation_mode: str = "keep_start"
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Return one batch."""
        rows = [(one["prompt_ids"], one["rejected_ids"]) for one in examples]
        batch: dict[str, Tensor] = {}
        if "anchor_ids" in examples[0]:
            counts = torch.tensor([len(one["anchor_ids"]) for one in examples])
            width = int(counts.max())
            if "ref_anchor_logps" in examples[0]:
                batch["ref_anchor_logps"] = torch.tensor([one["ref_anchor_logps"] for one in examples])
                batch["ref_rejected_logps"] = torch.tensor([one["ref_rejected_logps"] for one in examples])
                width = batch["ref_anchor_logps"].size(1)
            batch["anchor_mask"] = torch.arange(width) < counts[:, None]
            rows += [(one["prompt_ids"], anchor) for one in examples for anchor in one["anchor_ids"]]
        if ROW in examples[0]:
            batch[ROW] = torch.tensor([one[ROW] for one in examples])
        cut = self._cut()
        whole = [torch.tensor([*prompt, *completion][cut]) for prompt, completion in rows]
        masks = [torch.tensor(([0] * len(prompt) + [1] * len(rest))[cut]) for prompt, rest in rows]
        return {
            "input_ids": self._padded(whole, int(self.pad_token_id or 0)),
            "attention_mask": self._padded([torch.ones_like(row) for row in whole], 0),
            "completion_mask": self._padded(masks, 0),
            **batch,
        }

    def _cut(self) -> slice:
        if self.max_length is None:
            return slice(None)
        if self.truncation_mode == "keep_end":
            return slice(-self.max_length, None)
        return slice(None, self.max_length)

    def _padded(self, rows: list[Tensor], value: int) -> Tensor:
        return pad(
            rows, padding_value=value, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of
        )


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Return values (N,) at the N true places of a mask (B, K) row by row, 0 elsewhere."""
    return torch.zeros_like(mask, dtype=values.dtype).masked_scatter(mask, values)
