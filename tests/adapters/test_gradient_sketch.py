"""Singular triplets of gradients from sums over tokens: exactness, quality, what is held, what is refused."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_ext.adapters import _gradient_sketch as sketch_module
from hf_ext.adapters._data_start import StartData
from hf_ext.adapters._gradient_sketch import GradientSketches
from tests.contracts.test_layer_kinds import LAYERS
from tests.reference.lora_ga import best_of_rank, triplets

WIDE, TALL = 96, 128  # of a layer that is sketched: not the number of tokens of any batch here


class OneLayer(nn.Module):
    """y = x W^T, with the loss whose gradient at y is the batch's own."""

    def __init__(self, weight: Tensor, bias: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
        self.lin.weight.data = weight

    def forward(self, x: Tensor, gradient: Tensor, labels: Tensor | None = None) -> Tensor:
        return (self.lin(x) * gradient).sum()


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return model(**batch)


def sketches(
    batches: Iterable[Any],
    k: int,
    *,
    size: int | None = None,
    n_passes: int = 1,
    shape: tuple[int, int] | None = None,
    **options: Any,
) -> GradientSketches:
    batches = list(batches)
    m, n = shape or (batches[0]["gradient"].shape[-1], batches[0]["x"].shape[-1])
    model = OneLayer(torch.zeros(m, n))
    data = StartData(model, "default", {"lin": model.lin}, None, batches, loss_of, False)
    within = options.pop("within", nullcontext())
    settings: dict[str, Any] = {"n_samples": 10**6, "train_mode": False, "seed": 0, **options}
    with within:
        return GradientSketches(data, ranks={"lin": k}, size=size, n_passes=n_passes, **settings)


def low_rank_batches(rank: int, *, m: int = WIDE, n: int = TALL, count: int = 2) -> list[dict[str, Tensor]]:
    """Return batches whose mean gradient has a rank: as many tokens in all."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(rank, n, generator=generator)
    gradient = torch.randn(rank, m, generator=generator) * torch.arange(1.0, rank + 1)[:, None] ** -1
    return [{"x": a, "gradient": b} for a, b in zip(x.chunk(count), gradient.chunk(count), strict=True)]


def gradient_of(batches: Iterable[dict[str, Tensor]]) -> Tensor:
    batches = list(batches)
    return sum(b["gradient"].double().T @ b["x"].double() for b in batches) / len(batches)  # type: ignore[return-value]


def assert_triplets(found: tuple[Tensor, Tensor, Tensor], gradient: Tensor, tolerance: float = 1e-6) -> None:
    u, s, vh = found
    exact_u, exact_s, exact_v = triplets(gradient)
    k = len(s)
    size = float(exact_s[0])
    torch.testing.assert_close(s.double(), exact_s[:k], rtol=0, atol=tolerance * size)
    torch.testing.assert_close(u.double(), exact_u[:, :k], rtol=0, atol=20 * tolerance)
    torch.testing.assert_close(vh.double(), exact_v[:, :k].T, rtol=0, atol=20 * tolerance)


@pytest.mark.parametrize(("n_passes", "size"), [(1, 24), (2, 24), (3, 24), (1, 12), (2, 12)])
def test_gradient_of_low_rank_is_found_exactly(n_passes: int, size: int) -> None:
    batches = low_rank_batches(12)  # as many directions as the smaller sketch has
    found = sketches(batches, k=6, size=size, n_passes=n_passes)
    assert_triplets(found.leading("lin"), gradient_of(batches))


@pytest.mark.parametrize("n_passes", [1, 2, 3])
@pytest.mark.parametrize("shape", [(4, 4), (24, 16), (16, 24)])
def test_small_layers_have_their_gradient_summed_up(n_passes: int, shape: tuple[int, int]) -> None:
    m, n = shape
    batches = low_rank_batches(30, m=m, n=n, count=3)
    drawn = sketches(batches, k=min(shape) // 2, n_passes=n_passes)
    assert not drawn._drawn
    assert_triplets(drawn.leading("lin"), gradient_of(batches))


def flat_tail(seed: int = 0) -> Tensor:
    """Return a gradient whose singular values fall at first and then hardly: the hard case for a sketch."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(size, WIDE, generator=generator)).Q for size in (WIDE, TALL))
    s = 0.5 * torch.arange(1, WIDE + 1).float() ** -1.2
    return (u * s) @ v.T


@pytest.mark.parametrize(
    ("n_passes", "size", "bound"), [(1, 30, 1.6), (2, 24, 1.3), (2, 40, 1.1), (3, 24, 1.05), (3, 40, 1.01)]
)
def test_residual_of_the_approximation_is_near_the_best(n_passes: int, size: int, bound: float) -> None:
    k, ratios = 8, []
    for seed in range(3):
        gradient = flat_tail(seed)
        rows = torch.eye(TALL)
        found = sketches([{"x": rows, "gradient": gradient.T}], k=k, size=size, n_passes=n_passes, seed=seed)
        assert found._drawn  # sketched, not summed up
        u, _, vh = found.leading("lin")
        best = (gradient - best_of_rank(gradient, k).float()).norm()
        # The distance to the best approximation in the found row and column spaces.
        ratios.append(float((gradient - u @ (u.T @ gradient @ vh.T) @ vh).norm() / best))
    assert min(ratios) > 1.0 - 1e-5
    assert max(ratios) < bound


def test_batches_count_by_their_tokens(tiny_llama: Any) -> None:
    model = tiny_llama()
    ids = torch.arange(3 * 14).reshape(3, 14) * 5 % 256
    labels = ids.clone()
    labels[1, :9] = -100
    labels[2] = -100
    whole = {"input_ids": ids, "labels": labels}
    parts = [{"input_ids": ids[i : i + 1], "labels": labels[i : i + 1]} for i in range(3)]
    layers = {"q": model.model.layers[0].self_attn.q_proj}
    found = []
    for batches in ([whole], parts, parts[::-1]):
        data = StartData(model, "default", layers, None, batches, None, False)
        sketch = GradientSketches(
            data, ranks={"q": 4}, size=None, n_passes=1, n_samples=3, train_mode=False, seed=0
        )
        found.append(sketch.leading("q"))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(two, one, atol=1e-5, rtol=1e-4)


def test_order_and_split_do_not_matter() -> None:
    generator = torch.Generator().manual_seed(2)
    x, gradient = torch.randn(40, TALL, generator=generator), torch.randn(40, WIDE, generator=generator)
    x = x * torch.arange(1, TALL + 1) ** -1.0
    for n_passes in (1, 2, 3):
        found = []
        for split in ([40], [7, 1, 32]):
            parts = zip(x.split(split), gradient.split(split), strict=True)
            batches = [{"x": a, "gradient": b * len(split)} for a, b in parts]  # a mean over batches
            found.append(sketches(batches, k=2, size=24, n_passes=n_passes).leading("lin"))
        torch.testing.assert_close(found[0][0] * found[0][1], found[1][0] * found[1][1], atol=1e-4, rtol=1e-3)


def test_sketch_depends_on_its_seed_alone() -> None:
    gradient = flat_tail()
    found = []
    for seed, noise in ((1, 1), (1, 2), (2, 3)):
        torch.manual_seed(noise)
        batch = {"x": torch.eye(TALL), "gradient": gradient.T}
        found.append(sketches([batch], k=8, size=24, seed=seed).leading("lin")[2])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_whole_batches_until_there_are_enough_rows() -> None:
    batches = low_rank_batches(12, m=6, n=6, count=6)
    for wanted, used in ((1, 1), (2, 1), (3, 2), (12, 6), (99, 6)):
        found = sketches(batches, k=1, n_samples=wanted).leading("lin")[1]
        torch.testing.assert_close(
            found.double(), triplets(gradient_of(batches[:used]))[1][:1], rtol=1e-5, atol=0
        )


class Shapes(TorchDispatchMode):
    """Notes the shape of everything that is computed (views of the weights aside)."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.overloadpacket._qualified_op_name.split("::")[1] not in (
            "t",
            "transpose",
            "view",
            "detach",
            "alias",
        ):
            parts = out if isinstance(out, tuple | list) else (out,)
            self.seen |= {tuple(part.shape) for part in parts if isinstance(part, Tensor)}
        return out


@pytest.mark.parametrize("n_passes", [1, 2, 3])
def test_no_gradient_of_a_sketched_layer_is_ever_held(n_passes: int) -> None:
    batches = low_rank_batches(10)
    shapes = Shapes()
    sketches(batches, k=4, size=12, n_passes=n_passes, within=shapes)
    assert (WIDE, 12) in shapes.seen
    assert not {(WIDE, TALL), (TALL, WIDE)} & shapes.seen
    sketches(batches, k=48, n_passes=n_passes, within=shapes)  # a wide sketch takes more than the gradient
    assert (WIDE, TALL) in shapes.seen


def test_layers_nothing_reaches_have_no_gradient() -> None:
    batch = {"x": torch.randn(5, 6), "gradient": torch.zeros(5, 6)}
    assert float(sketches([batch], k=2).leading("lin")[1][0]) == 0.0
    for n_passes in (1, 2, 3):
        zero = {"x": torch.randn(5, TALL), "gradient": torch.zeros(5, WIDE)}
        u, s, vh = sketches([zero], k=2, size=12, n_passes=n_passes).leading("lin")
        assert float(s[0]) == 0.0
        assert bool(u.isfinite().all())
        assert bool(vh.isfinite().all())


@pytest.mark.parametrize(
    ("x", "gradient", "text"),
    [
        (float("nan"), 1.0, "the loss of a batch is nan"),
        (1.0, float("inf"), "the loss of a batch is (inf|nan)"),
    ],
)
def test_losses_that_are_not_finite_are_refused(x: float, gradient: float, text: str) -> None:
    batch = {"x": torch.full((5, 4), x), "gradient": torch.full((5, 4), gradient)}
    model_weight = torch.ones(4, 4)
    model = OneLayer(model_weight)
    data = StartData(model, "default", {"lin": model.lin}, None, [batch], loss_of, False)
    with pytest.raises(ValueError, match=text):
        GradientSketches(data, ranks={"lin": 1}, size=None, n_passes=1, n_samples=1, train_mode=False, seed=0)
    assert not model.lin._forward_hooks


def test_gradients_that_are_not_finite_are_refused() -> None:
    class Steep(OneLayer):
        def forward(self, x: Tensor, gradient: Tensor, labels: Tensor | None = None) -> Tensor:
            return self.lin(x).sqrt().sum()  # 0 has an infinite slope

    model = Steep(torch.zeros(4, 4))
    batch = {"x": torch.ones(5, 4), "gradient": torch.ones(5, 4)}
    data = StartData(model, "default", {"lin": model.lin}, None, [batch], loss_of, False)
    with pytest.raises(ValueError, match=r"gradient must be finite.*\(lin\)"):
        GradientSketches(data, ranks={"lin": 1}, size=None, n_passes=1, n_samples=1, train_mode=False, seed=0)


def test_data_without_a_label_that_counts_are_refused() -> None:
    batch = {"x": torch.ones(5, 4), "gradient": torch.ones(5, 4), "labels": torch.full((5, 4), -100)}
    with pytest.raises(ValueError, match="dataloader must be one with labels that count"):
        sketches([batch], k=1)


def test_layers_outside_the_loss_are_refused() -> None:
    class Apart(OneLayer):
        def forward(self, x: Tensor, gradient: Tensor, labels: Tensor | None = None) -> Tensor:
            return (self.lin(x).detach() * gradient).sum()

    model = Apart(torch.ones(4, 4))
    batch = {"x": torch.ones(5, 4), "gradient": torch.ones(5, 4)}
    data = StartData(model, "default", {"lin": model.lin}, None, [batch], loss_of, False)
    with pytest.raises(ValueError, match="no adapted layer has a part in the loss"):
        GradientSketches(data, ranks={"lin": 1}, size=None, n_passes=1, n_samples=1, train_mode=False, seed=0)


def test_layer_called_twice_and_by_keyword() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = Keyword(5, 5, bias=False)

        def forward(self, x: Tensor, gradient: Tensor) -> Tensor:
            return (self.lin(x=self.lin(x)) * gradient).sum()

    class Keyword(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Twice()
    batch = {"x": torch.randn(7, 5), "gradient": torch.randn(7, 5)}
    data = StartData(model, "default", {"lin": model.lin}, None, [batch], loss_of, False)
    found = GradientSketches(
        data, ranks={"lin": 5}, size=None, n_passes=1, n_samples=1, train_mode=False, seed=0
    )
    (exact,) = torch.autograd.grad(model(**batch), [model.lin.weight])
    u, s, vh = found.leading("lin")
    torch.testing.assert_close((u * s) @ vh, exact, atol=1e-5, rtol=1e-4)


class Around(nn.Module):
    """A model of one layer, with the loss whose gradient at its output is the batch's own."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, gradient: Tensor) -> Tensor:
        return (self.layer(x) * gradient).sum()


def of_layer(layer: nn.Module, x: Tensor, count: int = 2, **options: Any) -> tuple[Any, Tensor, Shapes]:
    """Return the sketches of a layer, its exact mean gradient as a matrix, and what was computed for them."""
    batches = [{"x": x, "gradient": torch.randn_like(layer(x))} for _ in range(count)]
    model = Around(layer)
    losses = torch.stack([model(**batch) for batch in batches])
    (exact,) = torch.autograd.grad(losses.mean(), [layer.weight])
    exact = exact.T if isinstance(layer, nn.Embedding) else exact.flatten(1)
    data = StartData(model, "default", {"layer": layer}, None, batches, loss_of, False)
    shapes = Shapes()
    settings: dict[str, Any] = {"n_samples": 99, "train_mode": False, "seed": 0, **options}
    with shapes:
        found = GradientSketches(data, **settings)
    return found, exact, shapes


@pytest.mark.parametrize("case", LAYERS)
def test_gradients_of_embeddings_and_convolutions_are_summed_up(case: str) -> None:
    torch.manual_seed(0)
    build, x = LAYERS[case]
    layer = build()
    k = min(layer.weight.shape[0], layer.weight[0].numel())
    found, exact, _ = of_layer(layer, x, ranks={"layer": k}, size=None, n_passes=1)
    assert not found._drawn
    u, s, vh = found.leading("layer")
    torch.testing.assert_close((u * s) @ vh, exact, atol=1e-5, rtol=1e-4)


WIDER: dict[str, tuple[Any, Tensor]] = {  # few positions: the gradients have no more than that rank
    "line": (lambda: nn.Conv1d(25, WIDE, 5, padding=1, padding_mode="circular"), torch.ones(1, 25, 7)),
    "plane": (lambda: nn.Conv2d(13, WIDE, (3, 3), stride=2, padding=1), torch.ones(1, 13, 3, 5)),
    "tokens": (lambda: nn.Embedding(TALL, WIDE, padding_idx=9), torch.tensor([[3, 9, 3], [125, 7, 64]])),
}


@pytest.mark.parametrize("n_passes", [1, 2, 3])
@pytest.mark.parametrize("case", WIDER)
def test_gradients_of_embeddings_and_convolutions_are_sketched(case: str, n_passes: int) -> None:
    torch.manual_seed(0)
    build, x = WIDER[case]
    layer, x = build(), x if case == "tokens" else torch.randn_like(x)
    found, exact, shapes = of_layer(layer, x, ranks={"layer": 4}, size=12, n_passes=n_passes)
    assert found._drawn
    assert_triplets(found.leading("layer"), exact)
    held = {tuple(layer.weight.shape), tuple(exact.shape), tuple(exact.T.shape)}
    assert not held & shapes.seen  # no gradient of the layer
    n, positions = exact.shape[1], layer(x).numel() // WIDE
    patches = {(positions, n), (n, positions), (1, n, positions), (1, positions, n)}
    assert not patches & shapes.seen  # nor copies of what each output sees
    if case == "tokens":
        assert not bool(found.leading("layer")[2][:, 9].any())  # the padding token's


def test_random_matrices_are_shared_by_layers_of_a_shape() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(TALL, WIDE), nn.Linear(TALL, WIDE)

        def forward(self, x: Tensor, gradient: Tensor) -> Tensor:
            return ((self.a(x) + self.b(x)) * gradient).sum()

    model = Two()
    data = StartData(
        model, "default", {"a": model.a, "b": model.b}, None, low_rank_batches(10), loss_of, False
    )
    found = GradientSketches(
        data, ranks={"a": 4, "b": 4}, size=12, n_passes=1, n_samples=99, train_mode=False, seed=0
    )
    assert len(found._drawn) == 2
    assert all(torch.equal(x, y) for x, y in zip(found.leading("a"), found.leading("b"), strict=True))


def test_sums_are_of_the_sketches_size(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = sketch_module._Sums.all_reduce

    def note(self: Any, *shapes: Any) -> None:
        kept.append(self)
        original(self, *shapes)

    monkeypatch.setattr(sketch_module._Sums, "all_reduce", note)
    sketches(low_rank_batches(10), k=4, size=12)
    (sums,) = kept
    assert (tuple(sums.y.shape), tuple(sums.z.shape)) == ((WIDE, 12), (25, TALL))
