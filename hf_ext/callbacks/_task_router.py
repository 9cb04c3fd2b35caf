"""Which adapter answers an instruction: similarity of TF-IDF vectors to the instructions of each task."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from ..core.checks import check

Vector = dict[str, float]


class TfidfRouter:
    """Route instructions to the adapters of earlier tasks, or to a new one.

    A text is a vector of its lower-cased words: their count times ln((1 + n) / (1 + df)) + 1, divided by the
    vector's l2 norm, with n the texts that the router knows and df those of them with the word. A word that
    none has counts too, with df = 0: a text of new words is like no task.

    Args:
        threshold: Similarity from which a task goes on with an earlier one's adapter, in (0, 1]. The paper
            has 0.9 for tasks with one instruction, and 0.3 for those with ten that differ.

    Raises:
        ValueError: The threshold is outside its range.
    """

    def __init__(self, threshold: float = 0.9) -> None:
        check(0.0 < threshold <= 1.0, "threshold", threshold, "in (0, 1]")
        self.threshold = threshold
        self._texts: dict[str, list[str]] = {}
        self._codebooks: dict[str, list[Vector]] = {}
        self._seen: Counter[str] = Counter()

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters, in the order in which they came."""
        return list(self._texts)

    def add(self, adapter: str, instructions: Iterable[str]) -> None:
        """Add a task's instructions to an adapter's; equal ones count once.

        Raises:
            ValueError: The adapter has no instruction with a word.
        """
        _refuse_text(instructions)
        texts = [*self._texts.get(adapter, []), *(text for text in instructions if words(text))]
        texts = list(dict.fromkeys(texts))
        check(
            bool(texts), "instructions", adapter, "given with at least one word", where=f"adapter {adapter}"
        )
        self._texts[adapter] = texts
        everything = [text for known in self._texts.values() for text in known]
        self._seen = Counter(word for text in everything for word in set(words(text)))
        self._codebooks = {name: [self._vector(text) for text in own] for name, own in self._texts.items()}

    def similarities(self, instructions: Iterable[str]) -> dict[str, float]:
        """Return, by adapter, the mean cosine of all pairs of these and the adapter's instructions."""
        _refuse_text(instructions)
        vectors = [self._vector(text) for text in instructions]
        check(bool(vectors), "instructions", [], "at least one")
        return {
            name: sum(_cosine(a, b) for a in vectors for b in codebook) / (len(vectors) * len(codebook))
            for name, codebook in self._codebooks.items()
        }

    def adapter_for_task(self, instructions: Iterable[str]) -> str | None:
        """Return the adapter to train further on a new task, or None where it should have one of its own."""
        found = self.similarities(instructions)
        best = max(found, key=found.__getitem__, default=None)
        return best if best is not None and found[best] >= self.threshold else None

    def adapter_for(self, instruction: str) -> str:
        """Return the adapter that answers an instruction.

        Raises:
            ValueError: The router has no adapter yet.
        """
        found = self.similarities([instruction])
        check(bool(found), "adapters", [], "at least one; add() them first")
        return max(found, key=found.__getitem__)

    def _vector(self, text: str) -> Vector:
        count = sum(len(texts) for texts in self._texts.values())
        weights = {
            word: times * (math.log((1 + count) / (1 + self._seen[word])) + 1.0)
            for word, times in Counter(words(text)).items()
        }
        norm = math.sqrt(sum(weight * weight for weight in weights.values()))
        return {word: weight / norm for word, weight in weights.items()}

    def to_json(self) -> dict[str, Any]:
        """Return threshold and instructions as JSON values."""
        return {
            "threshold": self.threshold,
            "adapters": {name: list(texts) for name, texts in self._texts.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TfidfRouter:
        """Return the router of `to_json`.

        Raises:
            ValueError: A field is missing or unknown.
        """
        fields = ["adapters", "threshold"]
        check(sorted(values) == fields, "router", sorted(values), f"an object with the fields {fields}")
        router = cls(values["threshold"])
        for adapter, texts in values["adapters"].items():
            router.add(adapter, texts)
        return router


def words(text: str) -> list[str]:
    """Return a text's words of letters and digits, in lower case."""
    return re.findall(r"\w+", text.lower())


def _refuse_text(instructions: Iterable[str]) -> None:
    alone = isinstance(instructions, str)  # whose letters it would otherwise take for texts
    check(not alone, "instructions", instructions, "a list of texts, not one text")


def _cosine(a: Vector, b: Vector) -> float:
    return sum(weight * b.get(word, 0.0) for word, weight in a.items())
