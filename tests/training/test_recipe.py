"""Every fault in a recipe is one line that names the file and the field, before a weight is read."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hf_ext.cli import main
from hf_ext.training.recipe import known_fields, parse_overrides, read_recipe


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    def read(*_: object, **__: object) -> None:
        raise AssertionError("weights were read")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown key": ({"learning_rte": 1.0}, ["'learning_rte'", "'learning_rate'"]),
    "unknown key of ours": ({"generate_sample": 1}, ["'generate_sample'", "'generate_samples'"]),
    "list for a number": ({"max_steps": [1]}, ["max_steps must be int", "list [1]"]),
    "text for a number": ({"learning_rate": "fast"}, ["learning_rate must be float", "'fast'"]),
    "fraction for a count": ({"max_steps": 1.5}, ["max_steps must be int"]),
    "text for a flag": ({"merge": "yes please"}, ["merge must be bool"]),
    "not one of a list": ({"lr_scheduler_type": "cosinee"}, ["lr_scheduler_type", "'cosinee'", "'cosine'"]),
    "not one of ours": ({"dtype": "float31"}, ["dtype must be one of", "'float32'"]),
    "missing": ({"output_dir": ""}, ["output_dir is missing"]),
    "out of range": ({"generate_samples": -1}, ["generate_samples must be at least 0", "-1"]),
    "contradiction": ({"dataset_test_split": "train"}, ["dataset_test_size", "dataset_test_split"]),
    "without effect": ({"hub_strategy": "end"}, ["hub_strategy has no effect"]),
    "push to nowhere": ({"push_to_hub": True}, ["hub_model_id"]),
    "adapter type": ({"adapter": {"type": "sorso"}}, ["adapter.type 'sorso' is unknown", "'sorsa'"]),
    "adapter without type": ({"adapter": {"r": 4}}, ["adapter.type", "hf-ext list adapter"]),
    "adapter key": ({"adapter": {"type": "sorsa", "gama": 1.0}}, ["adapter.'gama'", "'gamma'"]),
    "adapter value": ({"adapter": {"type": "sorsa", "r": 0}}, ["adapter.r must be at least 1", "0"]),
    "adapter value's type": ({"adapter": {"type": "sorsa", "r": [4]}}, ["adapter.r must be int"]),
    "peft's own key": (
        {"adapter": {"type": "lora", "lora_alph": 1}},
        ["adapter.'lora_alph'", "'lora_alpha'"],
    ),
    "target": (
        {"adapter": {"type": "sorsa", "target_modules": ["q_proj", "v_prj"]}},
        ["adapter.target_modules", "'v_prj' matches no layer", "'v_proj'"],
    ),
    "target pattern": (
        {"adapter": {"type": "sorsa", "target_modules": "nothing_like_it"}},
        ["adapter.", "nothing_like_it"],
    ),
    "rank": (
        {"adapter": {"type": "sorsa", "r": 17, "target_modules": ["k_proj"]}},
        ["adapter.r must be at most 16", "17", "layers.0.self_attn.k_proj"],
    ),
    "export": ({"adapter": {"type": "lora", "target_modules": ["q_proj"]}}, ["export_lora", "'lora'"]),
    "length": ({"max_length": 65}, ["max_length must be at most 64", "65"]),
    "data file": ({"dataset_name": "./nowhere.jsonl"}, ["dataset_name", "./nowhere.jsonl"]),
    "embedded data": ({"dataset_name": "embedded:docs"}, ["dataset_name", "embedded:stdlib-docstrings"]),
    "embedded split": (
        {"dataset_name": "embedded:stdlib-docstrings", "dataset_train_split": "trian"},
        ["dataset_train_split must be one of", "'train'"],
    ),
    "split": ({"dataset_train_split": "test"}, ["dataset_train_split 'test'"]),
    "renamed column": (
        {"dataset_columns": {"prompt": "question"}},
        ["dataset_columns.prompt", "'question'", "prompt"],
    ),
    "text column": ({"dataset_text_field": "promp"}, ["dataset_text_field", "'promp'", "'prompt'"]),
    "held-out rows": ({"dataset_test_size": 48}, ["dataset_test_size", "fewer than the 48 rows"]),
    "model folder": ({"model_name_or_path": "./no/model"}, ["model_name_or_path", "./no/model"]),
    "embedded model": (
        {"model_name_or_path": "embedded:tiny-lama"},
        ["model_name_or_path", "embedded:tiny-llama"],
    ),
    "nothing to evaluate": (
        {"dataset_test_size": None, "eval_strategy": "epoch"},
        ["eval_strategy", "'epoch'"],
    ),
    "processes": ({"expected_processes": 2}, ["expected_processes asks for 2", "1 run", "--num_processes 2"]),
    "nothing to resume": ({"resume_from_checkpoint": True}, ["resume_from_checkpoint", "no checkpoint"]),
    "no such checkpoint": ({"resume_from_checkpoint": "x/checkpoint-1"}, ["x/checkpoint-1"]),
    "file for a folder": ({"output_dir": f"{__file__}/out"}, ["output_dir", "test_recipe.py"]),
}


@pytest.mark.parametrize("case", BAD)
def test_a_fault_is_one_line_that_names_the_field(
    case: str, recipe: Callable[..., str], no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    changes, named = BAD[case]
    path = recipe(**changes)
    assert main(["train", path]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("hf-ext: error:")]
    assert len(lines) == 1
    for part in named:
        assert part in lines[0]
    assert not Path(path).with_name("out").exists()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("- a\n- b\n", "must hold `key: value` lines"),
        ("a: [1\n", "not a valid recipe"),
        ("seed: 1\nseed: 2\n", "'seed' stands twice (line 2)"),
        ("x: !!python/object/apply:os.system ['true']\n", "not a valid recipe"),
    ],
)
def test_a_file_that_is_no_recipe(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"r\.yaml") as caught:
        read_recipe(path)
    assert named in str(caught.value)


def test_missing_columns_name_the_close_ones(
    tmp_path: Path, recipe: Callable[..., str], no_weights: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"promt": "a", "completion": "b"}) + "\n")
    assert main(["train", recipe(dataset_name=str(rows), dataset_test_size=None)]) == 2
    error = capsys.readouterr().err
    assert "'prompt'; did you mean 'promt'?" in error
    assert "It has: promt, completion." in error


def test_a_full_disk_is_foreseen(
    monkeypatch: pytest.MonkeyPatch,
    recipe: Callable[..., str],
    no_weights: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import shutil

    real = shutil.disk_usage("/")
    monkeypatch.setattr("hf_ext.training.preflight.shutil.disk_usage", lambda _: real._replace(free=1000))
    assert main(["train", recipe()]) == 2
    assert "output_dir: the outputs need about" in capsys.readouterr().err


def test_number_like_text_and_overrides(recipe: Callable[..., str]) -> None:
    path = recipe(eval_strategy=False)  # what YAML makes of `eval_strategy: no`
    job = read_recipe(
        path, ["--learning_rate", "5e-4", "--adapter.r", "2", "--merge=false", "--push_to_hub", "false"]
    )
    assert job.settings["learning_rate"] == 5e-4
    assert job.settings["eval_strategy"] == "no"
    assert job.recipe.adapter == {"type": "sorsa", "r": 2, "target_modules": "all-linear"}
    assert job.recipe.merge is False
    assert read_recipe(path).settings["learning_rate"] == 1e-2
    assert (
        read_recipe(path, ["--adapter", "null", "--export_lora", "false", "--merge", "false"]).recipe.adapter
        is None
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--learning_rte", "1"], "'learning_rte'; did you mean 'learning_rate'"),
        (["--max_steps", "many"], "command line: max_steps must be int"),
        (["--adaptor.r", "1"], "'adaptor.r'; did you mean 'adapter'"),
        (["max_steps", "1"], "expected --key value"),
    ],
)
def test_overrides_are_checked_as_the_file_is(
    recipe: Callable[..., str], arguments: list[str], named: str
) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        read_recipe(recipe(), arguments)
    assert named in str(caught.value)


def test_override_values() -> None:
    hints, _ = known_fields()
    found = parse_overrides(
        ["--run_name", "123", "--merge", "--warmup_steps", "-1", "--report_to", "[a, b]"], hints
    )
    assert found == {"run_name": "123", "merge": True, "warmup_steps": -1, "report_to": ["a", "b"]}


def test_the_quickstart_passes_every_check(repository: Path, no_weights: None, tmp_path: Path) -> None:
    from hf_ext.training.run import check_job

    path = repository / "examples" / "quickstart.yaml"
    ready = check_job(read_recipe(path, ["--output_dir", str(tmp_path / "out")]))
    assert ready.prepared.test is not None
    assert len(ready.prepared.test) == ready.job.recipe.max_eval_samples
    assert ready.prepared.trainable > 0
    assert {"prompt", "completion"} <= set(ready.prepared.train.column_names)


def test_help_and_list_import_nothing_heavy() -> None:
    script = (
        "import sys\nfrom hf_ext.cli import main\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
        "assert main([]) == 2\nassert main(['list', 'adapter']) == 0\n"
        "heavy = {'torch', 'transformers', 'peft', 'trl', 'datasets', 'accelerate', 'yaml', 'numpy'}\n"
        "print(sorted(heavy & {*sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "sorsa" in done.stdout


def test_info_explains_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "sorsa"]) == 0
    out = capsys.readouterr().out
    for part in (
        "arXiv:2409.00055",
        "lora_export",
        "gamma = 0.0004",
        "Weight of the orthonormality",
        "target_modules",
    ):
        assert part in out
    assert main(["info", "sorso"]) == 2
    assert "did you mean 'sorsa'" in capsys.readouterr().err


def test_list_refuses_an_unknown_kind(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "adaptor"]) == 2
    assert "did you mean 'adapter'" in capsys.readouterr().err
