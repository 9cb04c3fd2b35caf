"""Merge files: ours, mergekit's, and what is refused in them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hf_ext.merging import MergeConfig, merge
from hf_ext.merging._config import read_config
from tests.conftest import REPOSITORY
from tests.merging.models import CONFIG, equal, merged, random_models, save_model, tensors_of

TIES = """
models:
  - model: {0}
    # no parameters necessary for base model
  - model: {1}
    parameters:
      density: 0.5
      weight: 0.5
  - model: {2}
    parameters:
      density: 0.5
      weight: [0.0, 0.3, 1e-1]   # a gradient
merge_method: ties
base_model: {0}
parameters:
  scope: tensor
  normalize: true
  int8_mask: true
  lambda: 0.9
dtype: float16
tokenizer_source: base
"""
SLERP = """
slices:
  - sources:
      - model: {0}
        layer_range: [0, 2]
      - model: {1}
        layer_range: [0, 2]
merge_method: slerp
base_model: {0}
parameters:
  t:
    - filter: mlp
      value: [0, 0.5, 1]
    - value: 0.5
dtype: bfloat16
"""


def write(tmp_path: Path, text: str, *models: Path) -> Path:
    path = tmp_path / "merge.yaml"
    path.write_text(text.format(*models))
    return path


def test_a_ties_file_of_mergekit_is_read_as_it_is(tmp_path: Path) -> None:
    models = random_models(tmp_path, 3)
    merge(write(tmp_path, TIES, *models), tmp_path / "a", progress=False)
    parents = [{"weight": 0.5}, {"weight": [0.0, 0.3, 0.1]}]
    options = {"dtype": "float16"}
    wanted = merged(
        tmp_path,
        "ties",
        models[1:],
        models[0],
        parents=parents,
        options=options,
        density=0.5,
        lambda_=0.9,
        scope="tensor",
    )
    assert equal(tensors_of(tmp_path / "a"), wanted)


def test_a_slerp_file_with_one_slice_is_read_as_models(tmp_path: Path) -> None:
    models = random_models(tmp_path, 2)
    merge(write(tmp_path, SLERP, *models), tmp_path / "a", progress=False)
    t = [{"filter": "mlp", "value": [0, 0.5, 1]}, {"value": 0.5}]
    assert equal(tensors_of(tmp_path / "a"), merged(tmp_path, "slerp", models, t=t))
    save_model(models[0], tensors_of(models[0]), {**CONFIG, "num_hidden_layers": 3})
    with pytest.raises(
        ValueError, match=r"slices must be of models with as many layers as config\.json says, 3"
    ):
        merge(tmp_path / "merge.yaml", tmp_path / "b", progress=False)


def give_tokenizer(model: Path, **tokens: int) -> None:
    (model / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        ({"tokenizer_source": "union"}, "m0"),
        ({"tokenizer_source": "base"}, "m0"),
        ({"tokenizer": {}}, "m0"),
        ({"tokenizer": {"source": "union", "tokens": {}, "pad_to_multiple_of": None}}, "m0"),
        ({"tokenizer": {"source": "base"}}, "m0"),
        ({"tokenizer": {"source": "m1"}}, "m1"),
        ({"tokenizer_source": "m1"}, "m1"),
    ],
)
def test_every_source_of_equal_vocabularies_is_accepted(
    keys: dict[str, Any], source: str, tmp_path: Path
) -> None:
    models = random_models(tmp_path, 2)
    for model in models:
        give_tokenizer(model, a=0, b=1)
        (model / "chat_template.jinja").write_text(model.name)
    named = json.loads(json.dumps(keys).replace("m1", str(models[1])))
    content = {
        "merge_method": "linear",
        "base_model": str(models[0]),
        "models": [str(m) for m in models],
        **named,
    }
    merge(content, tmp_path / "out", progress=False)
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == source
    give_tokenizer(models[1], a=1, b=0)
    if "union" in json.dumps(keys) or not keys.get("tokenizer", True):
        with pytest.raises(
            ValueError, match=r"vocabularies of m0 and m1 differ in 2 tokens, such as 'a' \(0 and"
        ):
            merge(content, tmp_path / "other", progress=False)


def test_the_first_filter_that_fits_counts() -> None:
    content = {
        "merge_method": "slerp",
        "models": ["a", "b"],
        "parameters": {
            "t": [{"filter": "layers", "value": 0.25}, {"filter": "mlp", "value": 0.75}, {"value": 1}]
        },
    }
    method = MergeConfig.from_mapping(content, "test").method()
    assert method.values_for("model.layers.1.mlp.w", 0.0, [{}, {}])["t"] == 0.25
    assert method.values_for("mlp.w", 0.0, [{}, {}])["t"] == 0.75
    assert method.values_for("head", 0.0, [{}, {}])["t"] == 1.0


GOOD: dict[str, Any] = {"merge_method": "linear", "models": ["a", "b"]}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"merge_metod": "x"}, "unknown field 'merge_metod'; did you mean 'merge_method'"),
        ({"merge_method": "tis"}, "merge 'tis' is unknown; did you mean 'ties'"),
        ({"models": []}, "models must be a list of at least one model"),
        ({"models": ["a", 3]}, r"models\[1\] must be a name or a mapping"),
        ({"models": [{"model": "a", "weights": 1}]}, r"models\[0\]: unknown field 'weights'"),
        ({"models": [{"parameters": {}}]}, r"models\[0\]\.model must be a folder or a name"),
        (
            {"models": [{"model": "a", "parameters": {"normalize": True}}]},
            "normalize must be set for all parents",
        ),
        (
            {"parameters": {"weight": [{"filtre": "a", "value": 1}]}},
            "weight must be made of 'filter' and 'value'",
        ),
        ({"parameters": {"weight": [1, "x"]}}, "weight must be a finite number, got 'x'"),
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"space": "weights"}, "space must be one of"),
        ({"block_bytes": 1000}, "block_bytes must be at least 65536"),
        ({"threads": 0}, "threads must be at least 1"),
        ({"max_shard_size": "5 bananas"}, "max_shard_size must be a size such as '5GB'"),
        ({"max_shard_size": 10}, "max_shard_size must be a size such as '5GB', at least '1MB', got 10"),
        ({"seed": "many"}, "seed must be int"),
        ({"modules": {"text": {}}}, "modules cannot be used here"),
        ({"tokenizer": "union"}, "tokenizer must be a mapping with 'source', got 'union'"),
        (
            {"tokenizer": {"source": "a", "tokens": {"x": {}}}},
            "tokenizer must be made of 'source' alone.*tokens",
        ),
        (
            {"tokenizer": {"pad_to_multiple_of": 64}},
            "tokenizer must be made of 'source' alone.*pad_to_multiple",
        ),
        (
            {"tokenizer": {"source": "a"}, "tokenizer_source": "base"},
            "tokenizer_source must be left out beside tokenizer",
        ),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(change: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        MergeConfig.from_mapping({**GOOD, **change}, "file.yaml")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("- a\n- b\n", "must hold `key: value` lines, got list"),
        ("models: [a\n", "is not a valid merge file"),
        ("models: [a]\nmerge_method: linear\nmodels: [b]\n", r"'models' stands twice \(line 3\)"),
        ("models: !!python/object/apply:os.system ['true']\n", "is not a valid merge file"),
        ("models: [a]\n", "merge_method must be given"),
    ],
)
def test_files_that_are_no_merge_are_refused(text: str, match: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=match):
        read_config(path)
    with pytest.raises(FileNotFoundError, match="there is no such merge file"):
        read_config(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", ["some/model+adapter", "a/b/c/d", "../up"])
def test_names_that_are_no_model_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=r"\+|no such folder"):
        merge({"merge_method": "linear", "models": [name]}, tmp_path / "out")


def test_a_model_of_the_hub_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no-such-org/model at v2 is neither a folder nor to be had"):
        merge({"merge_method": "linear", "models": ["no-such-org/model@v2"]}, tmp_path / "out")
    with pytest.raises(ValueError, match="revision must be the one of 'o/m@v2', got 'v1'"):
        merge({"merge_method": "linear", "models": [{"model": "o/m@v2", "revision": "v1"}]}, tmp_path / "out")


def test_the_command_merges_and_refuses_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from hf_ext.cli import main

    models = random_models(tmp_path, 3)
    path = write(tmp_path, TIES, *models)
    assert main(["merge", str(path), str(tmp_path / "out"), "--threads", "2"]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'out'}\n"
    assert main(["merge", str(path), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("hf-ext: error: out must be a new folder")
    assert main(["merge", str(path), str(tmp_path / "out"), "--overwrite"]) == 0
    path.write_text(path.read_text().replace("lambda:", "lambada:"))
    assert main(["merge", str(path), str(tmp_path / "new")]) == 2
    error = capsys.readouterr().err
    assert "unknown parameter 'lambada' of ties; did you mean 'lambda'" in error
    assert error.count("\n") == 1


def test_the_example_is_a_config_that_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    config = read_config(REPOSITORY / "examples" / "merge.yaml")
    assert config.method().info.name == "ties"
