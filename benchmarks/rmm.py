"""RMM: what adapters restored from a shared basis lose, against the room that the store takes.

Run: OMP_NUM_THREADS=1 python benchmarks/rmm.py

LoRA adapters (r = 16, all linear layers) of the embedded model, one for each kind of text (functions, prose,
tables) and seed, all from the same start. Each is restored from stores of several sizes and
evaluated on its own kind of test text. Bytes are counted against the adapters at the same type of numbers,
so that rounding to half the bits is no gain. Baseline at one adapter's size: the mean of the factors.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from _lab import embedded_model, fit, loss_of, save_json, save_plot, table
from _merge_lab import ROOT, corpora
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import set_peft_model_state_dict

from hf_ext.core.files import atomic_folder
from hf_ext.merging import restore_state, store_adapters

DOCS = Path(__file__).resolve().parents[1] / "docs" / "assets"
STEPS, RATE, RANK = 100, 1e-3, 16


def adapter(name: str, seed: int) -> Path:
    """Return the folder of a LoRA trained on one kind of text; made once."""
    folder = ROOT / f"lora-{name}-seed{seed}-r{RANK}-steps{STEPS}"
    if not folder.is_dir():
        torch.manual_seed(0)  # the same start for all: what they share is what a basis can use
        model = get_peft_model(
            embedded_model(), LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear")
        )
        corpus = corpora()[name]
        fit(
            corpus.train, corpus.validation, learning_rate=RATE, seed=seed, max_steps=STEPS, model=model,
            evaluate=False,
        )  # fmt: skip
        with atomic_folder(folder) as fresh:
            model.save_pretrained(fresh)
    return folder


def main() -> None:
    """Train, store, restore, evaluate; write JSON, PNG and a table."""
    seeds = (0, 1)
    folders = {f"{kind}-{seed}": adapter(kind, seed) for seed in seeds for kind in corpora()}
    count = len(folders)
    texts = {name: corpora()[name.partition("-")[0]].test for name in folders}
    model = PeftModel.from_pretrained(embedded_model(), next(iter(folders.values())))

    def loss(state: Mapping[str, torch.Tensor], name: str) -> float:
        set_peft_model_state_dict(model, dict(state))
        return loss_of(model, texts[name])

    rows: list[dict[str, Any]] = []

    def note(
        arm: str, share: float, states: Mapping[str, Mapping[str, torch.Tensor]], error: float | None
    ) -> None:
        losses = {name: loss(states[name], name) for name in folders}
        worst = max(losses[name] / own[name] - 1.0 for name in folders)
        mean = sum(losses[name] / own[name] - 1.0 for name in folders) / len(folders)
        kept = sum((base[n] - losses[n]) / (base[n] - own[n]) for n in folders) / len(folders)
        row = {
            "arm": arm,
            "share": share,
            "losses": losses,
            "worst": worst,
            "mean": mean,
            "kept": kept,
            "error": error,
        }
        rows.append(row)
        print(
            f"{arm:<34} {share:7.1%} worst {worst:+.2%} mean {mean:+.2%} kept {kept:.1%} error {error}",
            flush=True,
        )

    with tempfile.TemporaryDirectory() as work:
        originals: dict[str, dict[str, torch.Tensor]] = {}
        store_adapters(folders, Path(work) / "own", basis_size=count, granularity="tensor", dtype="float32")
        for name in folders:
            originals[name] = restore_state(Path(work) / "own", name)
        own = {name: loss(originals[name], name) for name in folders}
        with model.disable_adapter():
            base = {name: loss_of(model, texts[name]) for name in folders}
        print({name: (round(base[name], 4), round(own[name], 4)) for name in folders})
        average = {k: sum(o[k] for o in originals.values()) / count for k in next(iter(originals.values()))}
        note("mean of the factors", 1 / count, dict.fromkeys(folders, average), None)
        plans: list[tuple[str, dict[str, Any]]] = [
            *((f"position, p = {p}", {"basis_size": p}) for p in range(1, 5)),
            *((f"tensor, p = {p}", {"basis_size": p, "granularity": "tensor"}) for p in range(1, 5)),
            ("layer, p = 3", {"basis_size": 3, "granularity": "layer"}),
            ("tensor, p = 3, aligned", {"basis_size": 3, "granularity": "tensor", "align": True}),
            ("position, budget 0.5", {"budget": 0.5}),
            *((f"tensor, budget {b}", {"budget": b, "granularity": "tensor"}) for b in (0.4, 0.5)),
            ("position, p = 4, bfloat16", {"basis_size": 4, "dtype": "bfloat16"}),
            ("tensor, p = 3, bfloat16", {"basis_size": 3, "granularity": "tensor", "dtype": "bfloat16"}),
        ]
        for number, (arm, options) in enumerate(plans):
            store = Path(work) / str(number)
            report = store_adapters(folders, store, **{"dtype": "float32", **options})
            states = {name: restore_state(store, name) for name in folders}
            note(arm, report.stored_bytes / report.adapter_bytes, states, max(report.errors.values()))
    save_json(DOCS / "rmm.json", {"base": base, "own": own, "rows": rows, "rank": RANK, "steps": STEPS})
    cells = [
        [r["arm"], f"{r['share']:.1%}", f"{r['worst']:+.2%}", f"{r['mean']:+.2%}", f"{r['kept']:.1%}"]
        for r in rows
    ]
    print(table(cells, ["store", "bytes", "loss, worst adapter", "loss, mean", "gain of training kept"]))

    save_plot(DOCS / "rmm.png", lambda axes: draw(axes, rows))


def draw(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw the worst loss against the bytes of the stores."""
    kinds = {"position, p": "position", "tensor, p": "tensor", "tensor, budget": "tensor, by budget"}
    markers = ("o", "s", "^", "x")
    for (start, label), marker in zip({**kinds, "mean": "mean of the factors"}.items(), markers, strict=True):
        chosen = [r for r in rows if r["arm"].startswith(start) and r["arm"].count(",") < 2]
        axes.plot(
            [100 * r["share"] for r in chosen],
            [100 * r["worst"] for r in chosen],
            marker,
            ls="-",
            label=label,
        )
    rounded = [r for r in rows if r["arm"].endswith("bfloat16")]
    axes.plot(
        [100 * r["share"] for r in rounded], [100 * r["worst"] for r in rounded], "*", label="in bfloat16"
    )
    axes.axhline(1.0, color="gray", linestyle="--", label="1 %")
    axes.set(
        xlabel="bytes of the store (% of the adapters')", ylabel="loss above the adapter's own, worst (%)"
    )
    axes.legend()


if __name__ == "__main__":
    main()
