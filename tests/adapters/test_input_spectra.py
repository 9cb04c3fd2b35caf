"""Principal components from sums over tokens: exactness, sketches, sharing, masks, refusals."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_ext.adapters import _input_spectra as spectra_module
from hf_ext.adapters._data_start import StartData, rows_of, token_mask
from hf_ext.adapters._input_spectra import Components, InputSpectra
from tests.reference.eva import pca

DEFAULTS: dict[str, Any] = {
    "method": "gram",
    "oversample": None,
    "n_passes": 2,
    "n_tokens": 10**6,
    "use_label_mask": True,
    "label_mask_value": -100,
    "seed": 0,
}


class Layers(nn.Module):
    """Hands one tensor to `a` and `b`, a copy of it to `c`, and never calls `unused`."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.a, self.b, self.c, self.unused = (nn.Linear(width, 2, bias=False) for _ in range(4))

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None
    ) -> Tensor:
        return self.a(x) + self.b(x) + self.c(x.clone())


def spectra(
    batches: Iterable[Any],
    *names: str,
    width: int = 0,
    k: int = 2,
    model: nn.Module | None = None,
    **options: Any,
) -> InputSpectra:
    batches = [batch if isinstance(batch, dict) else {"x": batch} for batch in batches]
    model = Layers(width or batches[0]["x"].shape[-1]).to(batches[0]["x"].dtype) if model is None else model
    names = names or ("a",)
    layers = {name: model.get_submodule(name) for name in names}
    data = StartData(model, "default", layers, None, batches, None, False)
    return InputSpectra(data, layers, dict.fromkeys(names, k), **{**DEFAULTS, **options})


def components(batches: Iterable[Any], **options: Any) -> Components:
    found = spectra(batches, **options).of("a")
    assert found is not None
    return found


def decaying(tokens: int, width: int, power: float = 0.7, seed: int = 0) -> Tensor:
    """Return rows (1, tokens, width), fp64: standard deviations fall as i^-power, mixed by a rotation."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.arange(1, width + 1, dtype=torch.float64) ** -power
    mix = torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64)).Q
    rows = torch.randn(tokens, width, generator=generator, dtype=torch.float64) * scales @ mix + 0.3
    return rows[None]


# Values known by hand and by a full decomposition ---------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 5.0])
def test_four_points(shift: float) -> None:
    x = torch.tensor([[[2.0, 0.0], [-2.0, 0.0], [0.0, 1.0], [0.0, -1.0]]], dtype=torch.float64)
    found = components([x + shift])
    torch.testing.assert_close(found.vectors, torch.eye(2))
    torch.testing.assert_close(found.singular_values, torch.tensor([8.0, 2.0]).double().sqrt())
    torch.testing.assert_close(found.ratios, torch.tensor([0.8, 0.2]).double())
    assert found.count == 4


@pytest.mark.parametrize(
    ("width", "k"), [(24, 6), (300, 5), (300, 90)]
)  # 300: above and below a Krylov space
def test_gram_equals_the_svd_of_the_centred_rows(width: int, k: int) -> None:
    x = decaying(700, width)
    found, exact = components([x], k=k), pca(x[0])
    tolerance = 1e-8 if width <= spectra_module.EXACT_LIMIT or k > width // 4 else 1e-5  # fp32 products
    torch.testing.assert_close(found.singular_values, exact.s[:k], rtol=tolerance, atol=0)
    torch.testing.assert_close(found.ratios, exact.e[:k], rtol=2 * tolerance, atol=0)
    torch.testing.assert_close(found.vectors, exact.v[:k].float(), rtol=0, atol=max(1e-6, 100 * tolerance))


def test_gram_in_blocks_is_gram(monkeypatch: pytest.MonkeyPatch) -> None:
    x = decaying(200, 30)
    whole = components([x], k=5)
    monkeypatch.setattr(spectra_module, "_BLOCK", 7)
    blocks = components([x], k=5)
    torch.testing.assert_close(blocks.singular_values, whole.singular_values, rtol=1e-12, atol=0)


def test_fp32_rows_keep_the_leading_components() -> None:
    x = decaying(500, 24)
    exact, found = components([x], k=6), components([x.float()], k=6)
    torch.testing.assert_close(found.vectors, exact.vectors, rtol=0, atol=1e-5)


def test_a_large_mean_does_not_drown_fp32_rows() -> None:
    x = decaying(500, 24)
    found = components([(x + 20.0).float()], k=3)
    exact = pca(x[0])
    assert (found.vectors.double() * exact.v[:3]).sum(1).abs().min() > 1 - 1e-4


@pytest.mark.parametrize("method", ["gram", "sketch"])
@pytest.mark.parametrize("n_passes", [1, 2])
def test_order_and_split_do_not_matter(method: str, n_passes: int) -> None:
    x = decaying(240, 20)
    options: dict[str, Any] = {"method": method, "n_passes": n_passes, "k": 4}
    whole = components([x], **options)
    parts = list(x.split([50, 1, 89, 100], dim=1))
    for batches in (parts, parts[::-1], list(x.reshape(8, 1, 30, 20))):
        found = components(batches, **options)
        torch.testing.assert_close(found.vectors, whole.vectors, rtol=0, atol=1e-6)
        torch.testing.assert_close(found.ratios, whole.ratios, rtol=1e-9, atol=1e-12)


def test_largest_entry_of_each_component_is_positive() -> None:
    vectors = components([decaying(100, 12)], k=6).vectors
    assert (vectors.gather(1, vectors.abs().argmax(1, keepdim=True)) > 0).all()
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(6), rtol=0, atol=1e-6)


# Sketches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_passes", [1, 2])
def test_sketch_with_all_directions_is_gram(n_passes: int) -> None:
    x = decaying(300, 16)
    gram = components([x], k=4)
    sketch = components([x], k=4, method="sketch", oversample=12, n_passes=n_passes)
    # One pass: the shift of the Nystrom form is 1e-12 of the whole, and its root counts in a Cholesky factor.
    tolerance = 1e-9 if n_passes == 2 else 1e-6
    torch.testing.assert_close(sketch.singular_values, gram.singular_values, rtol=tolerance, atol=0)
    torch.testing.assert_close(sketch.vectors, gram.vectors, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("n_passes", "oversample", "values", "cosine"),
    [(2, 18, 6e-2, 0.89), (2, 34, 1.1e-2, 0.98), (1, 18, 0.19, 0.64), (1, 34, 0.09, 0.86)],
)
def test_sketch_comes_close(n_passes: int, oversample: int, values: float, cosine: float) -> None:
    # The worst of ten seeds; in the middle 2e-2, 5e-3, 0.12 and 0.04 in the values.
    x = decaying(4096, 64)
    exact = pca(x[0])
    found = components([x], k=8, method="sketch", oversample=oversample, n_passes=n_passes)
    assert ((found.singular_values - exact.s[:8]).abs() / exact.s[:8]).max() < values
    overlap = torch.linalg.svdvals(found.vectors.double() @ exact.v[:8].T)
    assert overlap.min() > cosine


def test_sketch_depends_on_its_seed_alone() -> None:
    x = decaying(300, 40)
    found = []
    for seed, noise in ((1, 1), (1, 2), (2, 3)):
        torch.manual_seed(noise)
        found.append(components([x], k=2, method="sketch", oversample=2, seed=seed).vectors)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


@pytest.mark.parametrize("n_passes", [1, 2])
def test_ratios_of_a_sketch_are_of_the_exact_variance(n_passes: int) -> None:
    x = decaying(500, 40)
    found = components([x], k=3, method="sketch", n_passes=n_passes)
    total = (x[0] - x[0].mean(0)).square().sum()
    torch.testing.assert_close(found.ratios, found.singular_values.square() / total, rtol=1e-10, atol=0)


def test_rank_deficient_rows_in_one_pass() -> None:
    x = decaying(300, 30)
    x[..., 3:] = 0.0  # three directions, a sketch of fourteen
    exact = pca(x[0])
    found = components([x], k=2, method="sketch", n_passes=1)
    torch.testing.assert_close(found.singular_values, exact.s[:2], rtol=1e-5, atol=0)
    torch.testing.assert_close(found.vectors, exact.v[:2].float(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["gram", "sketch"])
@pytest.mark.parametrize("n_passes", [1, 2])
def test_inputs_without_variance_explain_nothing(method: str, n_passes: int) -> None:
    for x in (torch.zeros(1, 50, 12), torch.full((1, 50, 12), 0.5)):
        found = components([x], method=method, n_passes=n_passes)
        assert torch.isfinite(found.vectors).all()
        assert torch.equal(found.ratios, torch.zeros(len(found.ratios), dtype=torch.float64))


def test_auto_takes_gram_where_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = spectra_module._gram_paths
    assert choose({"a": 4096, "b": 4097}, "auto") == {"a"}
    assert choose({"a": 4096, "b": 4097}, "gram") == {"a", "b"}
    assert choose({"a": 8}, "sketch") == set()
    many = {str(i): 4096 for i in range(33)}  # 33 x 128 MiB
    assert choose(many, "auto") == set()
    many.popitem()
    assert choose(many, "auto") == set(many)


# Which layers share, which positions count ------------------------------------------------------------


def test_layers_given_one_tensor_share_one_sum() -> None:
    found = spectra([decaying(60, 6), decaying(30, 6, seed=1)], "a", "b", "c")
    assert list(found._sums) == ["a", "c"]  # c is given equal values in another tensor
    assert found._owner == {"a": "a", "b": "a", "c": "c"}
    assert found.of("b") is found.of("a")
    torch.testing.assert_close(found.of("c").vectors, found.of("a").vectors)  # type: ignore[union-attr]


def test_group_is_decomposed_to_its_largest_wish() -> None:
    x = decaying(60, 6)
    model = Layers(6).double()
    layers = {"a": model.a, "b": model.b}
    data = StartData(model, "default", layers, None, [{"x": x}], None, False)
    found = InputSpectra(data, layers, {"a": 1, "b": 5}, **DEFAULTS)
    assert found.of("a").vectors.shape == (5, 6)  # type: ignore[union-attr]


def test_layer_that_changes_its_tensor_in_place_shares_nothing() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone()
            first = self.a(x)
            return first + self.b(x.mul_(torch.arange(1.0, 5.0)))

    x = torch.randn(1, 40, 4)
    found = spectra([x], "a", "b", model=InPlace())
    assert list(found._sums) == ["a", "b"]
    torch.testing.assert_close(
        found.of("b").vectors,  # type: ignore[union-attr]
        pca((x * torch.arange(1.0, 5.0))[0]).v[:2].float(),
        rtol=0,
        atol=1e-5,
    )


def test_layers_that_stop_sharing_are_refused() -> None:
    class Fickle(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.calls = nn.Linear(4, 4), nn.Linear(4, 4), 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.a(x) + self.b(x if self.calls == 1 else x * 2.0)

    with pytest.raises(ValueError, match="b and a had one input in an earlier batch"):
        spectra([torch.randn(1, 40, 4)] * 2, "a", "b", model=Fickle())


def test_layer_called_twice_in_a_forward_counts_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x) + self.b(x)
            return self.a(y) + self.b(y)

    model, x = Twice(), torch.randn(1, 30, 4)
    found = spectra([x, x], "a", "b", model=model)
    assert list(found._sums) == ["a"]
    assert found.of("a").count == 120  # type: ignore[union-attr]


def test_layer_called_by_keyword() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(input=x)

    x = decaying(40, 4).float()
    torch.testing.assert_close(components([x], model=Keyword()).vectors, components([x]).vectors)


def test_unused_layer_has_no_components() -> None:
    found = spectra([torch.randn(1, 30, 4)], "a", "unused")
    assert found.of("unused") is None
    assert found.of("a") is not None


@pytest.mark.parametrize("n_passes", [1, 2])
@pytest.mark.parametrize("method", ["gram", "sketch"])
def test_masked_positions_are_left_out(method: str, n_passes: int) -> None:
    x = decaying(48, 6).reshape(4, 12, 6)
    attention = torch.ones(4, 12, dtype=torch.long)
    attention[0, :7] = 0  # left padding
    labels = torch.ones(4, 12, dtype=torch.long)
    labels[1, 3:9] = -100
    options: dict[str, Any] = {"method": method, "n_passes": n_passes}
    batch = {"x": x, "attention_mask": attention, "labels": labels}
    kept = x[attention.bool() & (labels != -100)]
    found = components([batch], **options)
    assert found.count == 48 - 7 - 6 == len(kept)
    torch.testing.assert_close(found.vectors, components([kept[None]], **options).vectors)
    assert components([batch], use_label_mask=False, **options).count == 48 - 7
    other = components([{**batch, "labels": labels.masked_fill(labels == -100, 5)}], label_mask_value=5)
    assert other.count == 48 - 7 - 6


def test_token_mask_of_labels_with_a_shape_of_their_own() -> None:
    attention = torch.tensor([[1, 1, 0]])
    batch = {"attention_mask": attention, "labels": torch.tensor([[3, -100]])}
    assert torch.equal(token_mask(batch, use_labels=True), attention.bool())  # type: ignore[arg-type]
    assert token_mask({"labels": torch.tensor([1, 0])}, use_labels=True) is None  # classes
    assert token_mask({"attention_mask": torch.ones(1, 1, 3, 3)}, use_labels=True) is None


def test_rows_of_inputs_that_are_not_by_position() -> None:
    x, mask = torch.arange(24.0).reshape(2, 3, 4), torch.tensor([[1, 0, 1], [0, 1, 1]]).bool()
    assert torch.equal(rows_of(x, mask), x[mask])
    assert torch.equal(rows_of(x.reshape(6, 4), mask), x[mask])  # flattened by a mixture of experts
    assert torch.equal(rows_of(x[:, :2], mask), x[:, :2].reshape(4, 4))  # routed: nothing known, all count
    assert torch.equal(rows_of(x, None), x.reshape(6, 4))


# How much is read ---------------------------------------------------------------------------------


def test_whole_batches_until_there_are_enough_tokens() -> None:
    batches = [decaying(10, 6, seed=i) for i in range(6)]
    assert components(batches, n_tokens=21).count == 30
    assert components(batches, n_tokens=20).count == 20
    assert components(batches, n_tokens=10**6).count == 60
    masked = [{"x": x, "attention_mask": torch.tensor([[1] * 5 + [0] * 5])} for x in batches]
    assert components(masked, n_tokens=11).count == 15


def test_second_pass_takes_the_batches_of_the_first() -> None:
    calls = []

    def read_once() -> Iterable[dict[str, Tensor]]:
        for i in range(3):
            calls.append(i)
            yield {"x": decaying(20, 6, seed=i)}

    model = Layers(6).double()
    layers = {"a": model.a}
    data = StartData(model, "default", layers, None, read_once(), None, False)
    found = InputSpectra(data, layers, {"a": 2}, **{**DEFAULTS, "method": "sketch", "oversample": 4})
    assert calls == [0, 1, 2]
    exact = components([decaying(20, 6, seed=i) for i in range(3)])
    torch.testing.assert_close(found.of("a").vectors, exact.vectors, rtol=0, atol=1e-6)  # type: ignore[union-attr]


def test_gram_alone_keeps_no_batches() -> None:
    model = Layers(6).double()
    for method, kept in (("gram", 0), ("sketch", 2)):
        data = StartData(model, "d", {"a": model.a}, None, [{"x": decaying(20, 6)}] * 2, None, False)
        InputSpectra(data, {"a": model.a}, {"a": 2}, **{**DEFAULTS, "method": method})
        assert len(data._kept) == kept


def test_too_few_tokens_name_the_layer_and_leave_no_hooks() -> None:
    model = Layers(6)
    with pytest.raises(ValueError, match=r"dataloader must be .* at least 4 tokens.*got '3 tokens' \(a\)"):
        spectra([torch.randn(1, 3, 6)], k=4, model=model)
    assert not model.a._forward_pre_hooks


def test_hooks_go_when_the_model_fails() -> None:
    model = Layers(6)
    with pytest.raises(RuntimeError, match="size of tensor"):
        spectra([torch.randn(1, 3, 5)], model=model, width=6)
    assert not model.a._forward_pre_hooks
