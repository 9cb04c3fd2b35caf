"""What makes models unfit to be merged, each named; heads that are tied in some."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hf_ext.merging import merge
from tests.merging.models import CONFIG, merged, one_tensor, random_models, save_model, tensors_of


def test_all_differences_come_in_one_error(tmp_path: Path) -> None:
    a, b, c = random_models(tmp_path, 3)
    tensors = tensors_of(b)
    del tensors["model.scale"]
    save_model(b, {**tensors, "one": torch.zeros(1), "two": torch.zeros(1)})
    tensors = tensors_of(c)
    tensors["model.layers.0.norm.weight"] = tensors["model.layers.0.norm.weight"].float()
    tensors["model.layers.1.norm.weight"] = torch.zeros(63).bfloat16()
    save_model(c, tensors)
    with pytest.raises(ValueError, match="cannot be merged") as caught:
        merged(tmp_path, "linear", [a, b, c])
    text = str(caught.value)
    assert "m1 lacks: model.scale" in text
    assert "only m1 has: one, two" in text
    assert "types differ from m0's in m2 (set dtype to merge different float types)" in text
    assert "model.layers.0.norm.weight F32 instead of BF16" in text
    assert "model.layers.1.norm.weight [63] instead of [64]" in text
    assert not list(tmp_path.glob("*out*"))


def test_float_types_may_differ_once_the_output_type_is_given(tmp_path: Path) -> None:
    (a,), (b,) = (
        one_tensor(tmp_path / "a", [1.0, 2.0]),
        one_tensor(tmp_path / "b", [3.0, 4.0], dtype=torch.float16),
    )
    found = merged(tmp_path, "linear", [a, b], options={"dtype": "bfloat16"})
    assert found["w"].dtype == torch.bfloat16
    assert found["w"].tolist() == [2.0, 3.0]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_other_tensors_are_copied_and_must_be_equal(tmp_path: Path) -> None:
    def model(name: str, count: int, mask: bool) -> Path:
        tensors = {
            "w": torch.ones(2), "steps": torch.tensor(count), "mask": torch.tensor([mask, False]),
            "wide": torch.tensor([2**60 + 1]),
        }  # fmt: skip
        return save_model(tmp_path / name, tensors)

    a, same = model("a", 5, True), model("same", 5, True)
    found = merged(tmp_path, "linear", [a, same])
    assert found["steps"].item() == 5
    assert found["wide"].item() == 2**60 + 1
    assert found["mask"].tolist() == [True, False]
    with pytest.raises(ValueError, match=r"no floats must be equal in all models: mask \(b\), steps \(b\)"):
        merged(tmp_path, "linear", [a, model("b", 6, False)], out="other")


def test_double_precision_is_not_stored(tmp_path: Path) -> None:
    (a,) = one_tensor(tmp_path, [1.0], dtype=torch.float64)
    with pytest.raises(ValueError, match="dtype must be another type: arithmetic is fp32"):
        merged(tmp_path, "linear", [a])
    assert merged(tmp_path, "linear", [a], options={"dtype": "float32"})["w"].tolist() == [1.0]


def test_excluded_tensors_are_those_of_the_reference(tmp_path: Path) -> None:
    a, b = random_models(tmp_path, 2)
    found = merged(tmp_path, "linear", [a, b], options={"exclude": ["lm_head.*", "*.norm.weight"]})
    first = tensors_of(a)
    same = [name for name in found if torch.equal(found[name], first[name])]
    kept = ["lm_head.weight", "model.layers.0.norm.weight", "model.layers.1.norm.weight", "rest"]
    assert sorted(same) == kept


def test_quantized_models_and_other_kinds_are_refused(tmp_path: Path) -> None:
    a, b = random_models(tmp_path, 2)
    (b / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match="m1 is quantized"):
        merged(tmp_path, "linear", [a, b])
    (b / "config.json").write_text(json.dumps({**CONFIG, "model_type": "mistral"}))
    with pytest.raises(ValueError, match="model types differ: m0 is llama, m1 is mistral"):
        merged(tmp_path, "linear", [a, b])


# Vocabularies -------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, tokens: dict[str, int]) -> None:
    content = {"model": {"type": "BPE", "vocab": tokens}, "added_tokens": [{"id": 9, "content": "<end>"}]}
    (folder / "tokenizer.json").write_text(json.dumps(content))


def test_vocabularies_must_be_equal(tmp_path: Path) -> None:
    a, b = random_models(tmp_path, 2)
    write_tokenizer(a, {"x": 0, "y": 1, "z": 2})
    write_tokenizer(b, {"x": 0, "y": 2, "z": 1})
    with pytest.raises(ValueError, match=r"vocabularies of m0 and m1 differ in 2 tokens.*'y' \(1 and 2\)"):
        merged(tmp_path, "linear", [a, b])
    write_tokenizer(b, {"z": 2, "y": 1, "x": 0})
    merged(tmp_path, "linear", [a, b])
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()


def test_the_tokenizer_comes_from_where_it_is_asked_for(tmp_path: Path) -> None:
    a, b = random_models(tmp_path, 2)
    (b / "chat_template.jinja").write_text("{{ messages }}")
    options = {"tokenizer_source": str(b)}
    merged(tmp_path, "linear", [a, b], options=options)
    assert (tmp_path / "out" / "chat_template.jinja").exists()
    with pytest.raises(ValueError, match="tokenizer_source must be a model, where there is no base_model"):
        merged(tmp_path, "linear", [a, b], options={"tokenizer_source": "base"})


# Tied heads ---------------------------------------------------------------------------------------


def pair(tmp_path: Path, *, tied_first: bool, equal_head: bool = False) -> list[Path]:
    embedding = torch.ones(4, 2)
    head = embedding if equal_head else 3.0 * embedding
    untied = {"model.embed_tokens.weight": embedding, "lm_head.weight": head.clone()}
    tied = {"model.embed_tokens.weight": 5.0 * embedding}
    a = save_model(tmp_path / "untied", untied)
    b = save_model(tmp_path / "tied", tied, {**CONFIG, "tie_word_embeddings": True})
    return [b, a] if tied_first else [a, b]


def test_a_tied_head_is_untied_where_the_output_has_one(tmp_path: Path) -> None:
    found = merged(tmp_path, "linear", pair(tmp_path, tied_first=False))
    assert found["lm_head.weight"].tolist() == [[4.0, 4.0]] * 4
    assert found["model.embed_tokens.weight"].tolist() == [[3.0, 3.0]] * 4
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_head_that_would_be_lost_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"untied has a lm_head\.weight of its own, which the output would tie"
    ):
        merged(tmp_path, "linear", pair(tmp_path, tied_first=True))
    found = merged(tmp_path / "b", "linear", pair(tmp_path / "b", tied_first=True, equal_head=True))
    assert list(found) == ["model.embed_tokens.weight"]


# Side files ---------------------------------------------------------------------------------------


def test_side_files_are_carried_over(tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    names = ["generation_config.json", "special_tokens_map.json", "preprocessor_config.json", "merges.txt"]
    names += [
        "tokenizer.model",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
        "modeling_own.py",
    ]
    for name in names:
        (model / name).parent.mkdir(exist_ok=True)
        (model / name).write_text('{"of": "' + name + '"}')
    config = {
        **CONFIG,
        "auto_map": {"AutoModel": "modeling_own.Own"},
        "torch_dtype": "float32",
        "dtype": "float32",
    }
    (model / "config.json").write_text(json.dumps(config))
    (model / "optimizer.pt").write_bytes(b"x")
    (model / "training_args.bin").write_bytes(b"x")
    merge(
        {"merge_method": "linear", "models": [str(model)], "dtype": "float16"},
        tmp_path / "out",
        progress=False,
    )
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (model / name).read_bytes()
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written == {**config, "torch_dtype": "float16", "dtype": "float16"}
    assert not (tmp_path / "out" / "optimizer.pt").exists()
    assert not (tmp_path / "out" / "training_args.bin").exists()


@pytest.mark.parametrize("module", ["../evil.Own", "a/b.Own", "missing.Own"])
def test_code_named_outside_the_folder_is_refused(module: str, tmp_path: Path) -> None:
    (model,) = random_models(tmp_path, 1)
    (model / "config.json").write_text(json.dumps({**CONFIG, "auto_map": {"AutoModel": module}}))
    with pytest.raises((ValueError, FileNotFoundError), match=r"auto_map names|missing\.py is missing"):
        merged(tmp_path, "linear", [model])
    assert not list(tmp_path.glob("*out*"))
