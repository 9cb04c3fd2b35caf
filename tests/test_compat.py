"""Every upstream name without a stability promise is there, with the parameters that we pass."""

from __future__ import annotations

import ast
import importlib
import inspect
from enum import Enum
from pathlib import Path

import pytest
import torch
import trl
from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.peft_types import PeftType
from torch import nn

from hf_ext._compat import generation
from hf_ext._compat import peft as compat
from hf_ext._compat import torch as torch_compat
from hf_ext._compat import trl as trl_compat

FOLDER = Path(compat.__file__).parent


UPSTREAM = {"peft", "transformers", "trl", "accelerate", "datasets", "huggingface_hub", "torch"}


def upstream_imports() -> list[tuple[str, str]]:
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.py"))]
    nodes = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in nodes if str(node.module).split(".")[0] in UPSTREAM]
    return [(str(node.module), alias.name) for node in ours for alias in node.names]


@pytest.mark.parametrize(("module", "name"), upstream_imports())
def test_every_imported_name_exists(module: str, name: str) -> None:
    assert hasattr(importlib.import_module(module), name)


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (compat.in_out_features, ("module",)),
        (compat.check_adapters_to_merge, ("module", "adapter_names")),
        (compat.get_pattern_key, ("pattern_keys", "key_to_match")),
        (compat.register_peft_method, ("name", "config_cls", "model_cls", "prefix", "is_mixed_compatible")),
        (compat.resolve_quantization_backend, ("base_layer",)),
        (compat.get_quantization_kwargs, ("model",)),
        (compat.gather_params_ctx, ("param",)),
        (BaseTuner.inject_adapter, ("self", "model", "adapter_name")),
        (BaseTuner._check_new_adapter_config, ("self", "config")),
        (BaseTuner._cast_adapter_dtype, ("self", "adapter_name", "autocast_adapter_dtype")),
        (BaseTuner._replace_module, ("self", "parent", "child_name", "new_module", "child")),
        (
            BaseTuner._create_and_replace,
            ("self", "peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
        ),
        (BaseTunerLayer._get_base_layer_device_and_dtype, ("self", "base_layer")),
        (BaseTunerLayer._move_adapter_to_device_of_base_layer, ("self", "adapter_name", "device")),
        (BaseTunerLayer.delete_adapter, ("self", "adapter_name")),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_parameters_start_as_we_pass_them(function: object, parameters: tuple[str, ...]) -> None:
    names = tuple(inspect.signature(function).parameters)  # pyright: ignore[reportArgumentType]
    assert names[: len(parameters)] == parameters


@pytest.mark.parametrize(
    "name",
    [
        "get_base_layer",
        "get_base_weight",
        "set_base_weight",
        "_cast_input_dtype",
        "active_adapters",
        "merged",
    ],
)
def test_the_layer_methods_that_we_call_exist_upstream(name: str) -> None:
    assert hasattr(BaseTunerLayer, name)


def test_every_private_method_of_ours_is_called_by_us_or_by_peft() -> None:
    # A renamed upstream hook would leave ours uncalled without any error.
    from peft import peft_model
    from peft.tuners import tuners_utils
    from peft.utils import save_and_load

    from hf_ext.adapters import _base, _biases

    ours = (_base, _biases)
    sources = [inspect.getsource(module) for module in (*ours, peft_model, tuners_utils, save_and_load)]
    called = {name for source in sources for name in _attributes_but_of_super(source)}
    for cls in (_base.AdapterModel, _base.AdapterLinear, _biases.TrainsBiases, _biases.HasBiases):
        functions = {name for name, value in vars(cls).items() if callable(getattr(value, "__func__", value))}
        private = {name for name in functions if name.startswith("_") and not name.endswith("__")}
        assert private - called == set()


def _attributes_but_of_super(source: str) -> set[str]:
    attributes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)]
    return {node.attr for node in attributes if ast.unparse(node.value) != "super()"}


class Colour(str, Enum):
    RED = "red"


def test_a_new_enum_member_behaves_as_a_native_one() -> None:
    blue = compat.extend_enum(Colour, "BLUE", "blue")
    assert Colour("blue") is blue is Colour["BLUE"] is Colour.BLUE  # pyright: ignore[reportAttributeAccessIssue]
    assert isinstance(blue, Colour)
    assert isinstance(blue, str)
    assert (blue.name, blue.value, blue == "blue") == ("BLUE", "blue", True)
    assert list(Colour) == [Colour.RED, blue]
    assert hash(blue) == hash(Colour("blue"))


def test_a_member_copies_and_pickles_to_itself() -> None:
    import copy
    import pickle

    member = compat.extend_enum(PeftType, "SORSA", "SORSA")
    assert copy.deepcopy(member) is member
    assert pickle.loads(pickle.dumps(member)) is member


def test_an_existing_member_is_returned_and_not_doubled() -> None:
    before = list(PeftType)
    assert compat.extend_enum(PeftType, "LORA", "LORA") is PeftType.LORA
    assert list(PeftType) == before


def test_a_type_that_peft_ships_stays_in_place() -> None:
    own = compat.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA]
    assert compat.add_peft_type("lora", compat.PeftConfig, compat.BaseTuner) is False
    assert compat.PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.LORA] is own


def test_the_prefix_of_a_type_is_its_tuners() -> None:
    import hf_ext.adapters  # noqa: F401

    assert compat.PEFT_TYPE_TO_PREFIX_MAPPING[PeftType("SORSA")] == "sorsa_"


def test_buffers_of_a_buffer_dict_are_saved() -> None:
    import torch

    held = BufferDict(persistent=True)
    held["default"] = torch.ones(2)
    assert list(held.state_dict()) == ["default"]


def test_a_snapshot_brings_back_the_layer_that_a_backend_replaced() -> None:
    class Layer(nn.Module, BaseTunerLayer):
        def __init__(self, base: nn.Module) -> None:
            super().__init__()
            self.base_layer = base

    base = nn.Linear(2, 2)
    weight, values = base.weight, base.weight.detach().clone()
    weight.quant_state = "original"  # pyright: ignore[reportAttributeAccessIssue]
    layer = Layer(base)
    snapshot = compat.ModuleSnapshot.take(base)
    base.weight = nn.Parameter(values + 1.0)
    weight.quant_state = "overwritten"  # pyright: ignore[reportAttributeAccessIssue]
    layer.base_layer = nn.Linear(2, 2)
    snapshot.restore(layer)
    assert layer.base_layer is base
    assert base.weight is weight
    assert base.weight.equal(values)
    assert weight.quant_state == "original"  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("trainer", "method", "parameters"),
    [
        (trainer, method, parameters)
        for trainer, methods in trl_compat.SIGNATURES.items()
        for method, parameters in methods.items()
    ],
)
def test_private_methods_of_trl_take_what_we_pass(
    trainer: str, method: str, parameters: tuple[str, ...]
) -> None:
    found = tuple(inspect.signature(getattr(getattr(trl, trainer), method)).parameters)[1:]
    assert found == parameters, f"trl {trl.__version__}: {trainer}.{method} takes {found}"


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("strides", ["rows", "columns"])
def test_the_product_for_few_rows_is_the_plain_one(onednn: bool, strides: str) -> None:
    rows, matrix = torch.randn(5, 33), torch.randn(17, 33)
    stored = matrix if strides == "rows" else matrix.T.contiguous().T
    with torch.backends.mkldnn.flags(enabled=onednn):
        product = torch_compat.rows_times_transposed(rows, stored)
    exact = rows.double() @ matrix.double().T
    assert (product - exact).abs().max() < 1e-5
    assert torch.equal(
        torch_compat.rows_times_transposed(rows.double(), stored.double()), rows.double() @ stored.double().T
    )


@pytest.mark.parametrize("name", ["GRPOTrainer", "RLOOTrainer", "DistillationTrainer"])
def test_weights_are_handed_over_by_the_step_that_the_trainer_remembers(name: str) -> None:
    module = importlib.import_module(getattr(trl, name).__module__)
    source = inspect.getsource(module)
    assert f"self.{generation.LAST_LOADED} = -1" in source
    assert f"if self.state.global_step != self.{generation.LAST_LOADED}:" in source
