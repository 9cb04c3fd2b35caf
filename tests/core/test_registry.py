from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest

from hf_ext.core import registry
from hf_ext.core.registry import MethodInfo


def row(name: str, kind: str = "adapter") -> MethodInfo:
    return MethodInfo(name=name, kind=kind, summary="for a test", paper=None, target=object)


@pytest.fixture(autouse=True)
def _leave_as_found() -> Iterator[None]:
    before = {(info.kind, info.name) for info in registry.methods()}
    yield
    for info in registry.methods():
        if (info.kind, info.name) not in before:
            registry.forget(info.kind, info.name)


def test_a_registered_row_is_found_by_kind_and_name() -> None:
    info = row("zeta_test")
    registry.register(info)
    assert registry.get("adapter", "zeta_test") is info
    assert "zeta_test" in registry.names("adapter")
    assert "zeta_test" not in registry.names("callback")


def test_a_name_is_taken_for_every_kind() -> None:
    registry.register(row("zeta_test"))
    with pytest.raises(ValueError, match=r"adapter 'zeta_test' is already registered"):
        registry.register(row("zeta_test"))
    with pytest.raises(
        ValueError, match=r"callback 'zeta_test' is already registered \(as adapter 'zeta_test'\)"
    ):
        registry.register(row("zeta_test", "callback"))
    assert registry.names("callback").count("zeta_test") == 0


@pytest.mark.parametrize("name", ["", "Zeta", "zeta-test", "1zeta", "zeta test", "zeta_"])
def test_a_name_that_cannot_be_a_file_and_a_prefix_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="lower-case identifier"):
        registry.register(row(name))


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"kind must be one of 'adapter'.*got 'adaptor'.*did you mean 'adapter'"
    ):
        registry.register(row("zeta_test", "adaptor"))
    with pytest.raises(ValueError, match="got 'adaptor'"):
        registry.get("adaptor", "zeta_test")


def test_an_unknown_name_offers_close_matches() -> None:
    registry.register(row("zeta_test"))
    with pytest.raises(ValueError, match=r"adapter 'zeta_tset' is unknown; did you mean 'zeta_test'\?"):
        registry.get("adapter", "zeta_tset")


def test_rows_come_sorted_by_kind_then_name_whatever_the_order_of_registration() -> None:
    for info in (row("zz_b", "merge"), row("zz_c"), row("zz_a"), row("zz_d", "callback")):
        registry.register(info)
    found = [(info.kind, info.name) for info in registry.methods() if info.name.startswith("zz_")]
    assert found == [("adapter", "zz_a"), ("adapter", "zz_c"), ("callback", "zz_d"), ("merge", "zz_b")]
    assert [info.name for info in registry.methods("merge")] == registry.names("merge")
    assert [name for name in registry.names("adapter") if name.startswith("zz_")] == ["zz_a", "zz_c"]


def test_a_row_is_frozen_and_its_default_settings_are_read_only() -> None:
    info = row("zeta_test")
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.name = "other"  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        info.test_kwargs["r"] = 1  # pyright: ignore[reportIndexIssue]
