"""Outputs whose layers are made of any layers of the models, as mergekit's `slices` say."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from hf_ext.merging import MergeConfig, merge
from hf_ext.merging._checkpoint import Checkpoint
from hf_ext.merging._layer_config import layered_config
from hf_ext.merging._slices import _AFTER, _BEFORE, layer_stack
from tests.conftest import ModelFactory
from tests.merging.models import equal, save_model, tensors_of
from tests.merging.test_partial import Interrupted, interrupt_after

HIDDEN, INNER, VOCABULARY = 16, 24, 32
LAYER = {
    "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (8, HIDDEN), "self_attn.v_proj": (8, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
}  # fmt: skip
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "head_dim": 4,
    "intermediate_size": INNER, "vocab_size": VOCABULARY, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


def llama_tensors(layers: int, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return the tensors of a Llama, with values that no generator makes."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "lm_head.weight": (VOCABULARY, HIDDEN),
    }
    for layer in range(layers):
        shapes.update({f"model.layers.{layer}.{name}.weight": shape for name, shape in LAYER.items()})
    found: dict[str, Tensor] = {}
    for number, (name, shape) in enumerate(sorted(shapes.items())):
        places = torch.arange(math.prod(shape), dtype=torch.float64)
        values = 0.2 * torch.sin(places * (1.3 + 0.7 * seed) + 0.9 * number + 3.1 * seed)
        found[name] = values.view(shape).to(dtype)
    return found


def llama(folder: Path, layers: int, seed: int, dtype: torch.dtype = torch.float32, **config: Any) -> Path:
    """Write a Llama."""
    return save_model(
        folder, llama_tensors(layers, seed, dtype), {**CONFIG, "num_hidden_layers": layers, **config}
    )


@pytest.fixture
def models(tmp_path: Path) -> dict[str, Path]:
    """Return models a and b of four layers and c of six."""
    return {n: llama(tmp_path / n, k, seed) for seed, (n, k) in enumerate({"a": 4, "b": 4, "c": 6}.items())}


def files(text: str, models: Mapping[str, Path]) -> dict[str, Any]:
    """Return a merge file's content, with folders in the place of names."""

    def named(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: named(v) for k, v in value.items()}
        if isinstance(value, list):
            return [named(item) for item in value]
        return str(models[value]) if isinstance(value, str) and value in models else value

    return named(yaml.safe_load(text))


# Equality with mergekit ---------------------------------------------------------------------------

FILES = {
    "passthrough": """
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources:
      - model: c
        layer_range: [2, 6]
        parameters:
          scale:
            - {filter: o_proj, value: 0.5}
            - {filter: layers.4., value: 2.0}   # the layer's number in c
            - {value: 1.0}
  - sources: [{model: a, layer_range: [1, 4]}]
""",
    "linear": """
merge_method: linear
parameters: {weight: 0.7}
slices:
  - sources:
      - {model: a, layer_range: [0, 2], parameters: {weight: [0.2, 0.9]}}
      - {model: c, layer_range: [3, 5]}
  - sources:
      - {model: b, layer_range: [1, 4]}
      - model: c
        layer_range: [0, 3]
        parameters:
          weight:
            - {filter: mlp, value: [0.0, 1.0]}
            - {filter: layers.1., value: 0.25}
            - {value: [1.0, 0.5, 0.2]}
    parameters:
      weight: [{filter: self_attn, value: [0.1, 3.0]}]   # the rest as at the top
""",
    "linear_sum": """
merge_method: linear
parameters: {weight: 0.7, normalize: false}
slices:
  - sources: [{model: a, layer_range: [0, 1]}, {model: b, layer_range: [3, 4]}]
  - sources: [{model: b, layer_range: [1, 4]}, {model: c, layer_range: [0, 3]}]
    parameters: {weight: 0.3}
""",
    "slerp": """
merge_method: slerp
base_model: a
parameters: {t: 0.5}
slices:
  - sources: [{model: a, layer_range: [0, 3]}, {model: c, layer_range: [3, 6]}]
    parameters:
      t:
        - {filter: mlp, value: [0, 0.7, 1]}
        - {filter: layers.1., value: 0.9}   # the layer's number in the output
  - sources: [{model: c, layer_range: [0, 2]}, {model: b, layer_range: [2, 4]}]
    base_model: b
    parameters: {t: [0.1, 0.6]}
""",
    "task_arithmetic": """
merge_method: task_arithmetic
base_model: a
parameters: {lambda: 1.2}
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [1, 3], parameters: {weight: 0.4}}
      - {model: c, layer_range: [4, 6], parameters: {weight: [0.3, 0.8]}}
  - sources:
      - {model: b, layer_range: [1, 4], parameters: {weight: 0.5}}
      - {model: a, layer_range: [1, 4]}
      - {model: c, layer_range: [0, 3], parameters: {weight: 0.2}}
    parameters: {lambda: [0.5, 1.0]}
""",
    "ties": """
merge_method: ties
base_model: a
parameters: {density: 0.6}
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [1, 3], parameters: {weight: 0.4}}
      - {model: c, layer_range: [4, 6], parameters: {weight: [0.3, 0.8], density: 0.3}}
  - sources:
      - {model: b, layer_range: [1, 4], parameters: {weight: 0.5}}
      - {model: a, layer_range: [1, 4]}
      - {model: c, layer_range: [0, 3], parameters: {weight: 0.2}}
""",
    "dare_ties": """
merge_method: dare_ties
base_model: a
parameters: {density: 1.0}
slices:
  - sources:
      - {model: a, layer_range: [2, 4]}
      - {model: b, layer_range: [0, 2], parameters: {weight: 0.4}}
  - sources:
      - {model: c, layer_range: [1, 2], parameters: {weight: 0.5}}
      - {model: a, layer_range: [0, 1]}
""",
}
# What `fingerprint` gives for the outputs of mergekit 0.1.5 of these files, in fp32.
MERGEKIT: dict[str, list[float]] = {
    "passthrough": [
        -0.8074924,
        -2.8419186,
        -1.847515,
        0.5620302,
        1.0051903,
        0.7758945,
        0.2415368,
        -0.5347951,
        0.4904768,
        -1.972907,
        -2.7498967,
    ],
    "linear": [-0.2612141, -1.0111097, -1.5779629, 1.0146597, -1.4550948, -1.8218584],
    "linear_sum": [-0.7463151, -1.0666722, 0.1414451, 0.8452692, 0.9533374],
    "slerp": [-0.9847655, -2.625993, -1.7533301, -0.388652, -2.2221605, -1.996832],
    "task_arithmetic": [-0.8402019, -1.1263875, 0.1015463, 1.6728578, -0.4867227, -1.9805957],
    "ties": [-1.1443117, 0.0243751, 0.0842649, -0.0113039, -2.0002923, -2.4551769],
    "dare_ties": [-0.6981832, 1.1071471, 2.1002836, -0.7008332],
}


def fingerprint(tensors: Mapping[str, Tensor]) -> list[float]:
    """Return a number for what is outside the layers, then one for each layer; every element has a share."""
    found: dict[int, float] = {}
    for number, name in enumerate(sorted(tensors)):
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else -1
        values = tensors[name].double().view(-1)
        share = torch.cos(torch.arange(values.numel(), dtype=torch.float64) * 1.7 + number)
        found[layer] = found.get(layer, 0.0) + float((values * share).sum())
    return [found[layer] for layer in sorted(found)]


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_mergekit_gives_its_result(name: str, models: dict[str, Path], tmp_path: Path) -> None:
    content = files(FILES[name], models)
    if name == "ties":
        content["parameters"]["compat"] = "mergekit"
    merge(content, tmp_path / "out", progress=False)
    found = fingerprint(tensors_of(tmp_path / "out"))
    assert found == pytest.approx(MERGEKIT[name], rel=0.0, abs=2e-6)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**CONFIG, "num_hidden_layers": len(found) - 1}


# Passthrough --------------------------------------------------------------------------------------


def test_layers_are_repeated_and_left_out_bit_for_bit_and_the_output_loads(
    tiny_llama: ModelFactory, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate("ab"):
        tiny_llama(seed=seed, dtype=torch.bfloat16, num_hidden_layers=3).save_pretrained(tmp_path / name)
    order = [("a", 0), ("a", 1), ("b", 1), ("b", 2), ("a", 1), ("a", 2), ("a", 2)]
    ranges = [("a", [0, 2]), ("b", [1, 3]), ("a", [1, 3]), ("a", [2, 3])]
    slices = [{"sources": [{"model": str(tmp_path / name), "layer_range": r}]} for name, r in ranges]
    result = merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out", progress=False)
    found, read = tensors_of(tmp_path / "out"), {name: tensors_of(tmp_path / name) for name in "ab"}
    wanted = {key: value for key, value in read["a"].items() if ".layers." not in key}
    for place, (name, layer) in enumerate(order):
        start = f"model.layers.{layer}."
        for key, value in read[name].items():
            if key.startswith(start):
                wanted[f"model.layers.{place}.{key.removeprefix(start)}"] = value
    assert equal(found, dict(sorted(wanted.items())))
    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.config.num_hidden_layers == 7
    with torch.no_grad():
        assert bool(torch.isfinite(model(torch.tensor([[1, 5, 9]])).logits).all())
    assert [model["name"] for model in result.manifest["models"]] == ["a", "b"]
    assert [one["sources"][0]["layer_range"] for one in result.manifest["config"]["slices"]] == [
        r for _, r in ranges
    ]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "2 models merged with **passthrough**: their layers put together as they are." in card
    assert "layer_range" in card
    assert str(tmp_path) not in card + json.dumps(result.manifest), "paths of this machine stay here"


def test_all_layers_of_one_model_are_the_model(tmp_path: Path) -> None:
    model = llama(tmp_path / "a", 4, 0, torch.bfloat16, rope_theta=5.0)
    content = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(model), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(model), "layer_range": [2, 4]}]},
        ],
    }
    merge(content, tmp_path / "out", progress=False)
    assert equal(tensors_of(tmp_path / "out"), tensors_of(model))
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {
        **json.loads((model / "config.json").read_text()),
        "dtype": "bfloat16",
    }


# What a slice may be ------------------------------------------------------------------------------


def twice(models: Mapping[str, Path], method: str = "linear", **more: Any) -> dict[str, Any]:
    """Return a merge of two slices of two sources."""
    sources = [
        [
            {"model": str(models["a"]), "layer_range": [0, 2]},
            {"model": str(models["b"]), "layer_range": [1, 3]},
        ],
        [
            {"model": str(models["a"]), "layer_range": [1, 4]},
            {"model": str(models["b"]), "layer_range": [0, 3]},
        ],
    ]
    return {"merge_method": method, "slices": [{"sources": one} for one in sources], **more}


def test_bits_do_not_depend_on_blocks_threads_shards_or_an_interruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed_tokens.weight": (300, 130), **{f"layers.{n}.w": (300, 130) for n in range(4)}}
    models = {
        name: save_model(
            tmp_path / name, {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()},
            {"num_hidden_layers": 4},
        )
        for name in "ab"
    }  # fmt: skip
    content = twice(
        models, "ties", base_model=str(models["a"]), parameters={"density": 0.3}, block_bytes=65536
    )
    merge({**content, "block_bytes": 1 << 26}, tmp_path / "whole", progress=False)
    merge({**content, "max_shard_size": "1MB", "threads": 3}, tmp_path / "shards", progress=False)
    assert equal(tensors_of(tmp_path / "shards"), tensors_of(tmp_path / "whole"))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(Interrupted):
            merge({**content, "threads": 1}, tmp_path / "out", progress=False)
    assert merge(content, tmp_path / "out", progress=False).resumed
    assert equal(tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole"))


def test_a_base_outside_the_sources_has_their_layers(models: dict[str, Path], tmp_path: Path) -> None:
    def slices(among: bool) -> list[dict[str, Any]]:
        base = [{"model": str(models["a"]), "layer_range": [1, 3]}] if among else []
        return [{"sources": [*base, {"model": str(models[n]), "layer_range": [1, 3]}]} for n in "bc"]

    found = []
    for among in (True, False):
        content = {
            "merge_method": "task_arithmetic", "base_model": str(models["a"]), "slices": slices(among),
            "parameters": {"weight": 0.5},
        }  # fmt: skip
        merge(content, tmp_path / str(among), progress=False)
        found.append(tensors_of(tmp_path / str(among)))
    assert equal(*found)
    a, c = tensors_of(models["a"]), tensors_of(models["c"])
    name = "self_attn.q_proj.weight"
    wanted = (a[f"model.layers.2.{name}"] + c[f"model.layers.2.{name}"]) / 2
    torch.testing.assert_close(found[0][f"model.layers.3.{name}"], wanted)


def test_settings_that_every_slice_gives_need_none_for_all(models: dict[str, Path], tmp_path: Path) -> None:
    content = twice(models, "slerp", base_model=str(models["a"]))
    with pytest.raises(ValueError, match="t must be given"):
        MergeConfig.from_mapping(content, "file")
    content["slices"][0]["parameters"] = {"t": 0.25}
    with pytest.raises(ValueError, match="t must be given"):
        MergeConfig.from_mapping(content, "file")
    content["slices"][1]["parameters"] = {"t": [{"filter": "layers", "value": 0.75}]}
    with pytest.raises(ValueError, match=r"t has no value for (lm_head|model\.norm)\.weight"):
        merge(content, tmp_path / "out", progress=False)
    content["slices"][1]["parameters"]["t"].append({"value": 1.0})
    merge(content, tmp_path / "out", progress=False)
    assert torch.equal(
        tensors_of(tmp_path / "out")["lm_head.weight"], tensors_of(models["b"])["lm_head.weight"]
    )


def test_what_cannot_differ_between_tensors_may_stand_in_all_slices(
    models: dict[str, Path], tmp_path: Path
) -> None:
    merge(twice(models, parameters={"normalize": False, "weight": 0.5}), tmp_path / "top", progress=False)
    content = twice(models, parameters={"weight": 0.5})
    for one in content["slices"]:
        one["parameters"] = {"normalize": False}
    merge(content, tmp_path / "slices", progress=False)
    assert equal(tensors_of(tmp_path / "top"), tensors_of(tmp_path / "slices"))
    content["slices"][1]["parameters"] = {}
    with pytest.raises(ValueError, match=r"normalize must be the same for all slices, got \[False, True\]"):
        merge(content, tmp_path / "other", progress=False)


def test_ties_ranks_entries_within_their_tensor(models: dict[str, Path], tmp_path: Path) -> None:
    base = {"base_model": str(models["a"])}
    for scope in ("auto", "tensor"):
        parameters = {"density": 0.5, "scope": scope}
        merge(twice(models, "ties", **base, parameters=parameters), tmp_path / scope, progress=False)
    assert equal(tensors_of(tmp_path / "auto"), tensors_of(tmp_path / "tensor"))
    with pytest.raises(ValueError, match="scope must be 'tensor' with slices, got 'global'"):
        merge(twice(models, "ties", **base, parameters={"scope": "global"}), tmp_path / "out", progress=False)


def test_slices_may_have_unlike_numbers_of_sources(models: dict[str, Path], tmp_path: Path) -> None:
    content = twice(models)
    del content["slices"][0]["sources"][1]
    merge(content, tmp_path / "out", progress=False)
    found, a, b = tensors_of(tmp_path / "out"), tensors_of(models["a"]), tensors_of(models["b"])
    assert torch.equal(found["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    for name in ("model.norm.weight", "lm_head.weight"):
        torch.testing.assert_close(found[name], (a[name] + b[name]) / 2)


def test_excluded_and_integer_tensors_are_the_bases(tmp_path: Path) -> None:
    models = {}
    for seed, name in enumerate("ab"):
        tensors = {**llama_tensors(4, seed), "model.rotary.inv_freq": torch.arange(3)}
        tensors |= {f"model.layers.{n}.order": torch.tensor([n % 2]) for n in range(4)}
        models[name] = save_model(tmp_path / name, tensors, {**CONFIG, "num_hidden_layers": 4})
    content = twice(models, exclude=["*.mlp.*"])
    content["slices"][0]["sources"][1]["layer_range"] = [2, 4]
    content["slices"][1]["sources"][1]["layer_range"] = [1, 4]
    merge(content, tmp_path / "out", progress=False)
    found, a = tensors_of(tmp_path / "out"), tensors_of(models["a"])
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], a["model.layers.1.mlp.up_proj.weight"])
    assert [int(found[f"model.layers.{n}.order"]) for n in range(5)] == [0, 1, 1, 0, 1]
    content["slices"][0]["sources"][1]["layer_range"] = [1, 3]
    with pytest.raises(
        ValueError, match=r"no floats must be equal in all models: model\.layers\.0\.order \(b\)"
    ):
        merge(content, tmp_path / "other", progress=False)


def test_a_tied_head_is_made_of_the_embeddings_where_the_output_has_one(tmp_path: Path) -> None:
    whole = llama_tensors(4, 1)
    tied = {key: value for key, value in whole.items() if key != "lm_head.weight"}
    models = {
        "a": llama(tmp_path / "a", 4, 0),
        "b": save_model(
            tmp_path / "b", tied, {**CONFIG, "num_hidden_layers": 4, "tie_word_embeddings": True}
        ),
    }
    merge(twice(models), tmp_path / "out", progress=False)
    wanted = (tensors_of(models["a"])["lm_head.weight"] + tied["model.embed_tokens.weight"]) / 2
    torch.testing.assert_close(tensors_of(tmp_path / "out")["lm_head.weight"], wanted)


# Refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"slices": [3]}, r"slices\[0\] must be a mapping with 'sources', got 3"),
        ({"slices": [{"sources": []}]}, r"slices\[0\]\.sources must be a list of at least one model"),
        ({"slices": [{"source": []}]}, r"slices\[0\]: unknown field 'source'; did you mean 'sources'"),
        ({"slices": [{"sources": ["a"]}]}, r"slices\[0\]\.sources\[0\] must be a name or a mapping"),
        ({"models": ["a"]}, r"models must be left out where slices are given"),
        ({"merge_method": "opcm"}, "merge_method must be one that merges by layer, with slices, got 'opcm'"),
        ({"merge_method": "passthrough"}, r"slices\[0\]\.sources must be a single one with passthrough"),
        (
            {"merge_method": "linear", "parameters": {"scale": 1, "weight": 1}},
            "weight must be left out beside",
        ),
    ],
)
def test_files_that_say_no_slices_are_refused_by_name(change: dict[str, Any], match: str) -> None:
    with pytest.raises((ValueError, TypeError), match=match):
        MergeConfig.from_mapping({**twice({"a": Path("a"), "b": Path("b")}), **change}, "file.yaml")


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ({"layer_range": None}, r"slices\[1\]\.sources\[1\]\.layer_range must be two whole numbers.*None"),
        (
            {"layer_range": [2, 2]},
            r"layer_range must be two whole numbers, the first layer and the one after",
        ),
        ({"layer_range": [-1, 2]}, "layer_range must be two whole numbers"),
        ({"layer_range": [0, 2, 3]}, "layer_range must be two whole numbers"),
        ({"layer_range": [0, 2]}, r"slices\[1\]\.sources must be of layer_ranges of one length.*\[0, 2\]\]"),
        (
            {"layer_range": [2, 5]},
            r"slices\[1\]\.sources\.layer_range must be within the layers of b, 0 to 4",
        ),
        ({"layers": [0, 3]}, r"slices\[1\]\.sources\[1\]: unknown field 'layers'"),
        ({"model": None}, r"slices\[1\]\.sources\[1\]\.model must be a folder or a name"),
        ({"parameters": {"weightt": 1}}, r"slices\[1\]\.sources: .*unknown parameter 'weightt'"),
        ({"parameters": {"normalize": True}}, "normalize must be set for all parents together"),
    ],
)
def test_sources_that_do_not_fit_are_refused_by_name_before_anything_is_written(
    source: dict[str, Any], match: str, models: dict[str, Path], tmp_path: Path
) -> None:
    content = twice(models)
    content["slices"][1]["sources"][1] |= source
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, TypeError), match=match):
        merge(content, tmp_path / "out", progress=False)
    assert sorted(tmp_path.iterdir()) == before


def test_bases_that_have_no_place_are_refused(models: dict[str, Path], tmp_path: Path) -> None:
    content = twice(models, "task_arithmetic")
    with pytest.raises(ValueError, match=r"slices\[0\]\.base_model must be given, since task_arithmetic"):
        merge(content, tmp_path / "out", progress=False)
    rule = r"slices\[0\]\.base_model must be once among the slice's sources, with its layer_range"
    with pytest.raises(ValueError, match=rule):
        merge({**content, "base_model": str(models["c"])}, tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match=r"slices\[0\]: models must be exactly two"):
        merge(
            {
                "merge_method": "slerp", "base_model": str(models["c"]), "parameters": {"t": 0.5},
                "slices": [{"sources": [{"model": str(models["c"]), "layer_range": [0, 1]}]}],
            },
            tmp_path / "out",
            progress=False,
        )  # fmt: skip


def test_models_that_cannot_be_put_together_are_refused_by_name(
    models: dict[str, Path], tmp_path: Path
) -> None:
    def refused(tensors: Mapping[str, Tensor], match: str, **config: Any) -> None:
        save_model(models["b"], tensors, {**CONFIG, "num_hidden_layers": 4, **config})
        middle = [{"sources": [{"model": str(models[n]), "layer_range": [1, 2]}]} for n in "aba"]
        with pytest.raises(ValueError, match=match):
            merge({"merge_method": "passthrough", "slices": middle}, tmp_path / "out", progress=False)
        assert not list(tmp_path.glob("*out*"))

    whole = llama_tensors(4, 1)
    wide = {**whole, "model.layers.1.mlp.up_proj.weight": torch.zeros(INNER + 1, HIDDEN)}
    refused(wide, r"layers\.1\.mlp\.up_proj\.weight \[25, 16\] instead of \[24, 16\]")
    half = {**whole, "model.layers.1.mlp.up_proj.weight": torch.zeros(INNER, HIDDEN).half()}
    refused(half, r"types differ from a \(layer 1\)'s in b \(layer 1\) \(set dtype")
    refused(
        {**whole, "model.layers.1.more": torch.zeros(1)}, r"only b \(layer 1\) has: model\.layers\.1\.more"
    )
    refused({**whole, "extra.weight": torch.zeros(1)}, r"only b has: extra\.weight")
    refused({**whole, "vision.layers.0.w": torch.zeros(1)}, r"one list of layers.*vision\.layers\.N.*\(b\)")
    refused({**whole, "model.layers.5.w": torch.zeros(1)}, r"layers from 0 on.*\[0, 1, 2, 3, 5\]")
    refused(whole, r"with as many layers as config\.json says, 5, got 4 \(b\)", num_hidden_layers=5)
    refused({f"other.{key}": value for key, value in whole.items()}, "name their layers alike")
    refused(whole, "model types differ: a is llama, b is qwen2", model_type="qwen2")


def test_a_tensor_of_unknown_place_is_refused_where_it_matters(tmp_path: Path) -> None:
    models = {}
    for seed, name in enumerate("ab"):
        tensors = {**llama_tensors(4, seed), "model.adapter.weight": torch.full((2,), float(seed))}
        models[name] = save_model(tmp_path / name, tensors, {**CONFIG, "num_hidden_layers": 4})
    slices = [{"sources": [{"model": str(models[n]), "layer_range": [0, 1]}]} for n in "ab"]
    content = {"merge_method": "passthrough", "slices": slices}
    with pytest.raises(
        ValueError, match=r"model\.adapter\.weight must be of one making in the first and the"
    ):
        merge(content, tmp_path / "out", progress=False)
    merge({**content, "slices": slices + slices[:1]}, tmp_path / "out", progress=False)
    assert tensors_of(tmp_path / "out")["model.adapter.weight"].tolist() == [0.0, 0.0]


def test_names_of_known_families_say_on_which_side_of_the_layers_they_stand() -> None:
    before = (
        "model.embed_tokens", "gpt_neox.embed_in", "transformer.wte", "transformer.wpe", "tok_embeddings",
        "transformer.word_embeddings_layernorm", "model.decoder.embed_positions", "backbone.embeddings",
    )  # fmt: skip
    after = (
        "lm_head", "embed_out", "output", "score", "model.norm", "transformer.ln_f", "backbone.norm_f",
        "model.decoder.final_layer_norm", "gpt_neox.final_layer_norm", "model.embedding_norm",
    )  # fmt: skip
    for names, first in ((before, True), (after, False)):
        assert [n for n in names if bool(_BEFORE.search(f"{n}.weight")) is not first] == []
        assert [n for n in names if bool(_AFTER.search(f"{n}.weight")) is first] == []


# The config ---------------------------------------------------------------------------------------


def stacked(
    tmp_path: Path, order: Sequence[str], configs: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any] | None:
    """Return the config of layers such as ["a0", "b3 a1"], of models with four layers."""
    found = {}
    for name, config in configs.items():
        tensors = {f"layers.{number}.w": torch.zeros(1) for number in range(4)}
        found[name] = Checkpoint(save_model(tmp_path / name, tensors, {"num_hidden_layers": 4, **config}))
    layers = [[(found[one[0]], int(one[1])) for one in layer.split()] for layer in order]
    return layered_config(next(iter(found.values())), 4, layers)


def test_lists_over_the_layers_follow_them(tmp_path: Path) -> None:
    full, sliding = "full_attention", "sliding_attention"
    a = {
        "layer_types": [sliding, full, sliding, full], "mlp_only_layers": [0, 3], "no_rope_layers": [],
        "hybrid_layer_ids": [1, 3],
        "eos_token_id": [1, 2, 3, 4], "intermediate_size": [8, 16, 8, 32], "num_attention_heads": 4,
    }  # fmt: skip
    found = stacked(tmp_path, ["a3", "a3", "a0"], {"a": a})
    assert found == {
        **a, "num_hidden_layers": 3, "layer_types": [full, full, sliding], "mlp_only_layers": [0, 1, 2],
        "hybrid_layer_ids": [0, 1],
        "intermediate_size": [32, 32, 8],
    }  # fmt: skip
    b = {**a, "layer_types": [full, full, sliding, sliding]}
    found = stacked(
        tmp_path, ["b3", "a1 b1"], {"a": {**a, "mlp_only_layers": []}, "b": {**b, "mlp_only_layers": []}}
    )
    assert found is not None
    assert found["layer_types"] == [sliding, full]
    types = {name: {"layer_types": config["layer_types"]} for name, config in (("a", a), ("b", b))}
    rule = r"layer_types must be the same in all sources of layer 1, got \['full_attention', 'sliding"
    with pytest.raises(ValueError, match=rule):
        stacked(tmp_path, ["b3", "a1 b2"], types)
    with pytest.raises(ValueError, match="mlp_only_layers must be the same in all sources of layer 0"):
        stacked(tmp_path, ["a0 a1"], {"a": {"mlp_only_layers": [0]}})
    with pytest.raises(ValueError, match=r"strange must be known to say something of each layer, or not to"):
        stacked(tmp_path, ["a1"], {"a": {"strange": [1, 2, 3, 4]}})


def test_the_text_models_part_of_a_config_is_changed(tmp_path: Path) -> None:
    a = {"num_hidden_layers": None, "text_config": {"n_layer": 4, "layer_types": ["x", "y", "y", "x"]}}
    found = stacked(tmp_path, ["a3", "a1"], {"a": a})
    assert found == {**a, "text_config": {"n_layer": 2, "layer_types": ["x", "y"]}}
    with pytest.raises(
        ValueError, match=r"num_hidden_layers must be given, to be changed, got None \(config"
    ):
        stacked(tmp_path, ["a3"], {"a": {"num_hidden_layers": None}})


def test_kinds_of_attention_that_the_class_derives_are_written(tmp_path: Path) -> None:
    # Gemma 2 alternates by the layer's number, which changes.
    found = stacked(tmp_path, ["a0", "a2", "a1"], {"a": {"model_type": "gemma2"}})
    assert found is not None
    assert found["layer_types"] == ["sliding_attention", "sliding_attention", "full_attention"]


@pytest.mark.parametrize(
    ("config", "good", "bad"),
    [
        ({"decoder_sparse_step": 2}, ["a2", "a3"], ["a1", "a2"]),
        ({"first_k_dense_replace": 1}, ["a0", "a3", "a2"], ["a0", "a0"]),
        ({"moe_layer_freq": 3}, ["a3", "a1"], ["a1"]),
        ({"attn_layer_period": 2, "attn_layer_offset": 1}, ["a2", "a1"], ["a1", "a2"]),
        ({"num_kv_shared_layers": 2}, ["a0", "a2", "a3"], ["a0", "a1", "a2"]),
        ({"sliding_window_pattern": 2}, ["a2", "a3"], ["a3", "a2"]),
        ({"use_sliding_window": True, "max_window_layers": 2}, ["a1", "a0", "a3"], ["a2", "a0"]),
    ],
)
def test_layers_that_a_number_would_make_of_another_kind_are_refused(
    config: dict[str, Any], good: list[str], bad: list[str], tmp_path: Path
) -> None:
    name = next(key for key in config if key != "use_sliding_window")
    stacked(tmp_path, good, {"a": config})
    with pytest.raises(
        ValueError, match=rf"{name} must be such that layer \d, made of layer \d, stays what it is"
    ):
        stacked(tmp_path, bad, {"a": config})


@pytest.mark.parametrize(("family", "first"), [("Lfm2Moe", 1), ("RecurrentGemma", 2)])
def test_layers_that_the_class_would_make_of_another_kind_are_refused(
    family: str, first: int, tmp_path: Path
) -> None:
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 6}
    own: dict[str, dict[str, Any]] = {
        "Lfm2Moe": {
            "moe_intermediate_size": 16,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "num_dense_layers": 2,
            "layer_types": ["conv", "full_attention"] * 3,
        },
        "RecurrentGemma": {"lru_width": 16, "attention_window_size": 8},  # each third layer attends
    }
    config = getattr(transformers, f"{family}Config")(**sizes, **own[family])
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path / "a")

    def put_together(*ranges: tuple[int, int]) -> None:
        slices = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": list(r)}]} for r in ranges]
        merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out", progress=False)

    rule = rf"slices must be such that layer 4 is of the kind that layer {first} of a is"
    with pytest.raises(ValueError, match=rule):
        put_together((0, 4), (first, 6))
    assert not (tmp_path / "out").exists()
    put_together((0, 3), (3, 6), (3, 6))
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    _, report = load(tmp_path / "out", output_loading_info=True)
    assert not report["missing_keys"] | report["unexpected_keys"]


def test_the_layers_of_other_families_are_found(tiny_gpt2: ModelFactory, tmp_path: Path) -> None:
    tiny_gpt2().save_pretrained(tmp_path / "a")
    stack = layer_stack(Checkpoint(tmp_path / "a"))
    assert stack.prefix == "transformer.h."
    slices = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": [1, 2]}]}] * 3
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out", progress=False)
    from transformers import AutoModelForCausalLM

    load: Any = AutoModelForCausalLM.from_pretrained
    model, report = load(tmp_path / "out", output_loading_info=True)
    assert model.config.num_hidden_layers == 3
    assert not report["missing_keys"] | report["unexpected_keys"]
