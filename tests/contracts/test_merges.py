"""What holds for every registered merge method."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from hf_ext.core.registry import MethodInfo
from hf_ext.merging import MergeConfig, MergeMethod, merge
from tests.conftest import REPOSITORY, ModelFactory
from tests.merging.models import equal, random_models, save_model, tensors_of
from tests.registry_cases import methods, refused_settings

MERGES = methods("merge")


def method_of(info: MethodInfo) -> MergeMethod:
    """Return the method with its test settings, as a config would build it."""
    cls = cast("type[MergeMethod]", info.target)
    return cls(**cls.parse(info.test_kwargs, "test"))


def config(info: MethodInfo, models: list[Path], **options: Any) -> dict[str, Any]:
    """Return the config of a method's test settings; the first model is the base where one is needed."""
    parents = models[1:3] if "two_parents" in info.supports else models[1:]
    content: dict[str, Any] = {
        "merge_method": info.name,
        "models": [str(model) for model in parents],
        "parameters": dict(info.test_kwargs),
        **options,
    }
    if method_of(info).needs_base:
        content["base_model"] = str(models[0])
    return content


def result(content: Mapping[str, Any], out: Path) -> dict[str, Tensor]:
    """Merge and return the tensors."""
    merge(content, out, progress=False, overwrite=True)
    return tensors_of(out)


# Settings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("info", "bad"), refused_settings("merge"))
def test_bad_settings_are_refused_by_name(info: MethodInfo, bad: dict[str, Any], tmp_path: Path) -> None:
    name = list(bad)[-1]
    content = {"merge_method": info.name, "models": ["a"], "parameters": {**info.test_kwargs, **bad}}
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        merge(content, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("info", MERGES)
def test_an_unknown_setting_is_refused_by_name(info: MethodInfo) -> None:
    for place in ("parameters", "models"):
        content: dict[str, Any] = {
            "merge_method": info.name,
            "models": ["a"],
            "parameters": dict(info.test_kwargs),
        }
        if place == "parameters":
            content["parameters"]["no_such_setting"] = 1
        else:
            content["models"] = [{"model": "a", "parameters": {"no_such_setting": 1}}]
        with pytest.raises(ValueError, match="unknown parameter 'no_such_setting'"):
            MergeConfig.from_mapping(content, "test")


@pytest.mark.parametrize("info", MERGES)
def test_a_config_survives_json(info: MethodInfo) -> None:
    content = {"merge_method": info.name, "models": ["a", "b"], "parameters": dict(info.test_kwargs)}
    first = MergeConfig.from_mapping(content, "test")
    again = MergeConfig.from_mapping(json.loads(json.dumps(first.to_dict())), "test")
    assert again == first
    assert again.method() == first.method()


# Results ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", MERGES)
def test_bits_do_not_depend_on_blocks_threads_or_shards(info: MethodInfo, tmp_path: Path) -> None:
    models = random_models(tmp_path, 4)
    whole = result(config(info, models, block_bytes=1 << 26, threads=1), tmp_path / "whole")
    for number, options in enumerate(
        ({"block_bytes": 65536, "threads": 3}, {"block_bytes": 131072, "threads": 1, "max_shard_size": "1MB"})
    ):
        assert equal(result(config(info, models, **options), tmp_path / f"out{number}"), whole)
    reference = tensors_of(models[0])
    assert {name: (v.dtype, v.shape) for name, v in whole.items()} == {
        name: (v.dtype, v.shape) for name, v in reference.items()
    }
    assert not equal(whole, reference), "the test settings change something"
    assert all(bool(torch.isfinite(value).all()) for value in whole.values())


@pytest.mark.parametrize("info", MERGES)
def test_equal_models_come_back_unchanged(info: MethodInfo, tmp_path: Path) -> None:
    models = random_models(tmp_path, 1, dtype=torch.float32)
    tensors = tensors_of(models[0])
    models += [save_model(tmp_path / f"same{number}", tensors) for number in range(3)]
    if "identity" not in info.supports and not method_of(info).needs_base:
        pytest.skip("the row does not say that equal models come back")
    # With a base: every task vector is zero.
    assert equal(result(config(info, models), tmp_path / "out"), tensors)


@pytest.mark.parametrize("info", methods("merge", supports="bit_identity"))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_model_comes_back_bit_for_bit(info: MethodInfo, dtype: torch.dtype, tmp_path: Path) -> None:
    models = random_models(tmp_path, 2, dtype=dtype)
    content = {**config(info, models), "parameters": {}}
    assert equal(result(content, tmp_path / "out"), tensors_of(models[1]))


@pytest.mark.parametrize("info", methods("merge", supports="symmetric"))
def test_the_order_of_the_models_does_not_matter(info: MethodInfo, tmp_path: Path) -> None:
    models = random_models(tmp_path, 4, dtype=torch.float32)
    weights = [0.5, 1.0, 2.0]
    content = config(info, models)
    named = [{"model": str(m), "parameters": {"weight": w}} for m, w in zip(models[1:], weights, strict=True)]
    one = result({**content, "models": named}, tmp_path / "one")
    # Without a base the first model is the reference, whose side files are taken: of no matter here.
    other = result({**content, "models": named[::-1]}, tmp_path / "other")
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("info", methods("merge", supports="zero_weight"))
def test_a_model_with_weight_zero_is_as_if_absent(info: MethodInfo, tmp_path: Path) -> None:
    models = random_models(tmp_path, 4)
    content = config(info, models)
    named = [
        {"model": str(m), "parameters": {"weight": w}}
        for m, w in zip(models[1:], (1.0, 0.5, 0.0), strict=True)
    ]
    with_it = result({**content, "models": named}, tmp_path / "with")
    assert equal(with_it, result({**content, "models": named[:2]}, tmp_path / "without"))


HASHES = """
import hashlib, json, sys
from hf_ext.merging import merge
for number, content in enumerate(json.loads(sys.argv[1])):
    merge(content, f"{sys.argv[2]}/{number}", progress=False)
    print(hashlib.sha256(open(f"{sys.argv[2]}/{number}/model.safetensors", "rb").read()).hexdigest())
"""


def test_two_processes_with_different_hash_seeds_write_the_same_bytes(tmp_path: Path) -> None:
    models = random_models(tmp_path, 4)
    contents = [config(case.values[0], models, threads=2) for case in MERGES]
    found = []
    for seed in ("1", "2"):
        (tmp_path / seed).mkdir()
        arguments = [sys.executable, "-c", HASHES, json.dumps(contents), str(tmp_path / seed)]
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)}
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found.append(done.stdout.split())
    assert found[0] == found[1]
    assert len(found[0]) == len(MERGES)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", MERGES)
def test_what_does_not_fit_is_refused_by_name_before_anything_is_written(
    info: MethodInfo, tmp_path: Path
) -> None:
    models = random_models(tmp_path, 4)
    tensors = tensors_of(models[2])
    del tensors["model.layers.0.norm.weight"]
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    tensors["extra"] = torch.zeros(2)
    save_model(models[2], tensors)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"layers\.0\.norm\.weight") as caught:
        result(config(info, models), tmp_path / "out")
    text = str(caught.value)
    assert "lm_head.weight [96, 64] instead of [97, 64]" in text
    assert "only m2 has: extra" in text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("info", MERGES)
def test_a_value_that_is_not_finite_is_refused_by_name(info: MethodInfo, tmp_path: Path) -> None:
    models = random_models(tmp_path, 4)
    tensors = tensors_of(models[2])
    tensors["model.layers.1.mlp.up_proj.weight"][299, 129] = float("nan")
    save_model(models[2], tensors)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight.*NaN"):
        result(config(info, models), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


# Outputs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("info", MERGES)
def test_the_output_loads_and_says_what_it_is(
    info: MethodInfo, tiny_llama: ModelFactory, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    folders = [tmp_path / f"m{number}" for number in range(4)]
    for seed, folder in enumerate(folders):
        tiny_llama(seed=seed, dtype=torch.bfloat16).save_pretrained(folder)
    found = merge(config(info, folders), tmp_path / "out", progress=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all())
    on_disk = json.loads((tmp_path / "out" / "merge_manifest.json").read_text())
    assert on_disk == found.manifest
    for name, digest in on_disk["output"].items():
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    card = (tmp_path / "out" / "README.md").read_text()
    assert info.name in card
    assert str(tmp_path) not in card + json.dumps(on_disk), "paths of this machine stay here"
