"""What was merged from what: a manifest for programs, and a model card with the lineage for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from ._checkpoint import Checkpoint
from ._plan import Plan, resolved

SCHEMA = 1


def manifest(
    plan: Plan,
    parents: Mapping[int, Mapping[str, str]],
    output: Mapping[str, str],
    notes: Mapping[str, object],
) -> dict[str, Any]:
    """Return the content of merge_manifest.json.

    Args:
        plan: What was done.
        parents: SHA-256 of each weight file by checkpoint (its `id`) and name.
        output: SHA-256 of each file of the output.
        notes: What the merge reports beside.
    """
    return {
        "schema": SCHEMA,
        "hf_ext_version": version("hf-ext"),
        "merge_method": plan.method.info.name,
        "paper": plan.method.info.paper,
        "space": plan.space,
        "seed": plan.config.seed,
        "config": resolved(plan.config, plan.parents),
        "base": None if plan.parents.base is None else _parent(plan.parents.base, parents),
        "models": [
            {**_parent(model, parents), "parameters": dict(own)}
            for model, own in zip(plan.parents.models, plan.parents.own, strict=True)
        ],
        "output": dict(sorted(output.items())),
        "tensors": {
            "merged": sum(t.merged for t in plan.tasks),
            "copied": sum(not t.merged for t in plan.tasks),
        },
        **notes,
    }


def _parent(model: Checkpoint, digests: Mapping[int, Mapping[str, str]]) -> dict[str, Any]:
    return {"name": model.label, "revision": model.revision, "sha256": dict(digests[id(model)])}


def card(plan: Plan, content: Mapping[str, Any]) -> str:
    """Return the model card: front matter with the lineage, the recipe and a table of the parents.

    Args:
        plan: What was done.
        content: The manifest.
    """
    method = plan.method.info
    name, summary, paper = method.name, method.summary, f" ({method.paper})" if method.paper else ""
    if plan.config.merge_method == "passthrough":
        name, summary, paper = "passthrough", "their layers put together as they are", ""
    ids = _hub_ids(plan)
    matter: dict[str, object] = {}
    if ids:
        matter = {"base_model": ids, "base_model_relation": "merge"}
    adapter = plan.space in ("product", "factors")
    matter["library_name"] = "peft" if adapter else "transformers"
    matter["tags"] = ["merge", name, "hf_ext", *(["lora"] if adapter else [])]
    recipe = yaml.safe_dump(_short(content["config"]), sort_keys=False, allow_unicode=True).strip()
    rows = [_row("base", content["base"], {})] if content["base"] else []
    rows += [_row(f"model {i}", m, m["parameters"]) for i, m in enumerate(content["models"], start=1)]
    head = "| role | model | revision | parameters | sha256 of weight files |\n|---|---|---|---|---|"
    title = plan.parents.reference.label.rpartition("/")[2]
    return (
        f"---\n{yaml.safe_dump(matter, sort_keys=False).strip()}\n---\n\n"
        f"# {title}, merged\n\n"
        f"{len(content['models'])} models merged with **{name}**{paper}: {summary}.\n\n"
        f"## Parents\n\n{head}\n" + "\n".join(rows) + "\n\n"
        f"## Recipe\n\n```yaml\n{recipe}\n```\n\n"
        "`merge_manifest.json` holds the same for programs, with the hashes of the files here.\n"
    )


def _row(role: str, model: Mapping[str, Any], parameters: Mapping[str, Any]) -> str:
    digests = "<br>".join(f"`{name}` {digest}" for name, digest in model["sha256"].items())
    settings = ", ".join(f"{name.rstrip('_')}: {value}" for name, value in sorted(parameters.items()))
    cells = (role, f"`{model['name']}`", model["revision"] or "", settings, digests)
    return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"


def _hub_ids(plan: Plan) -> list[str]:
    # A folder of this machine means nothing to a reader.
    models = [*([plan.parents.base] if plan.parents.base else []), *plan.parents.models]
    ids = [model.label for model in models if re.fullmatch(r"[\w.-]+/[\w.-]+", model.label)]
    return list(dict.fromkeys(ids))


def _short(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = (
        "merge_method",
        "models",
        "slices",
        "base_model",
        "parameters",
        "dtype",
        "out_dtype",
        "space",
        "out_rank",
        "seed",
    )
    short: dict[str, Any] = {}
    for name in kept:
        value = config.get(name)
        if value in (None, {}, []) or (name == "space" and value == "auto"):
            continue
        if name == "models":
            value = _without_empty(value)
        if name == "slices":
            value = [{**one, "sources": _without_empty(one["sources"])} for one in _without_empty(value)]
        short[name] = value
    return short


def _without_empty(items: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in item.items() if v not in (None, {})} for item in items]
