"""The toy term adds the constant gradient 10 to every parameter of the watched modules."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer

from hf_ext.core.grad_terms import GradTerm, GroupOf

EXTRA = 10.0


@pytest.fixture
def term() -> Iterator[GradTerm]:
    made = GradTerm(_constant, title="the toy term")
    yield made
    made._watched.clear()  # without modules it does nothing


def _constant(modules: list[nn.Module], group_of: GroupOf) -> Iterator[tuple[nn.Parameter, Tensor]]:
    for module in modules:
        for parameter in module.parameters():
            if group_of(parameter) is not None:
                yield parameter, torch.full(parameter.shape, EXTRA)


class Toy(nn.Module):
    """One parameter that starts at 1."""

    def __init__(self, size: int = 1, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(size, dtype=dtype))

    def loss(self) -> Tensor:
        return (3.0 * self.w).sum()  # gradient 3


def test_sgd_steps_with_both_gradients(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    toy.loss().backward()
    optimizer.step()
    # The loss gives 3 and the term 10, so w = 1 - 0.1 * 13.
    assert toy.w.item() == pytest.approx(-0.3, abs=1e-6)


def test_adam_steps_as_with_the_term_in_the_loss(term: GradTerm) -> None:
    toy, twin = Toy(), Toy()
    term.watch(toy)
    for module in (toy, twin):
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            loss = (step + 1) * module.loss()
            (loss if module is toy else loss + EXTRA * module.w.sum()).backward()
            optimizer.step()
    assert torch.equal(toy.w, twin.w)


def test_a_module_that_is_not_watched_is_left_alone(term: GradTerm) -> None:
    watched, other = Toy(), Toy()
    term.watch(watched)
    optimizer = torch.optim.SGD([*watched.parameters(), *other.parameters()], lr=0.1)
    (watched.loss() + other.loss()).backward()
    optimizer.step()
    assert other.w.item() == pytest.approx(0.7, abs=1e-6)


def test_watching_twice_counts_once(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    term.watch(toy)
    assert term.modules() == [toy]
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    toy.loss().backward()
    optimizer.step()
    assert toy.w.item() == pytest.approx(-0.3, abs=1e-6)


def test_modules_come_in_the_order_of_watching(term: GradTerm) -> None:
    toys = [Toy() for _ in range(5)]
    for toy in reversed(toys):
        term.watch(toy)
    assert term.modules() == list(reversed(toys))


@pytest.mark.parametrize("as_keyword", [False, True])
def test_a_closure_that_clears_gradients_does_not_lose_the_term(term: GradTerm, as_keyword: bool) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = toy.loss()
        loss.backward()
        return loss

    loss: Any = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
    assert loss.item() == 3.0
    assert toy.w.item() == pytest.approx(-0.3, abs=1e-6)


def test_lbfgs_minimises_the_sum(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.LBFGS(toy.parameters(), lr=1.0, max_iter=20, tolerance_change=0.0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = 0.5 * (toy.w**2).sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    # w^2 / 2 + 10 w is least at -10.
    assert toy.w.item() == pytest.approx(-10.0, abs=1e-3)


@pytest.mark.parametrize("how", ["zero_grad", "set_none", "new_tensor"])
def test_each_step_applies_the_term_once(term: GradTerm, how: str) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    for _ in range(3):
        if how == "new_tensor":
            toy.w.grad = torch.full((1,), 3.0)
        else:
            optimizer.zero_grad(set_to_none=how == "set_none")
            toy.loss().backward()
        optimizer.step()
    assert toy.w.item() == pytest.approx(1.0 - 3 * 0.1 * 13.0, abs=1e-5)


def test_a_second_step_with_the_same_gradient_does_not_double_the_term(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    toy.loss().backward()
    optimizer.step()
    assert toy.w.grad is not None
    assert toy.w.grad.item() == 13.0
    optimizer.step()
    assert toy.w.grad.item() == 13.0
    assert toy.w.item() == pytest.approx(1.0 - 2 * 1.3, abs=1e-5)


def test_gradients_accumulated_after_a_step_get_the_term_anew(term: GradTerm) -> None:
    # A gradient that backward has written to since is a new one, even in the same tensor.
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.0)
    toy.loss().backward()
    optimizer.step()
    toy.loss().backward()
    optimizer.step()
    assert toy.w.grad is not None
    assert toy.w.grad.item() == 3.0 + 10.0 + 3.0 + 10.0


def test_accumulation_over_backward_passes_adds_the_term_once(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    for _ in range(4):
        (toy.loss() / 4).backward()
    optimizer.step()
    assert toy.w.item() == pytest.approx(-0.3, abs=1e-6)


def test_clipping_does_not_see_the_term(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    toy.loss().backward()
    norm = nn.utils.clip_grad_norm_(toy.parameters(), 1.0)
    optimizer.step()
    assert float(norm) == 3.0
    assert toy.w.item() == pytest.approx(1.0 - 0.1 * (1.0 + 10.0), abs=1e-5)


class Wrapper(Optimizer):
    """Steps another optimizer inside its own step, as Lookahead and schedule-free wrappers do."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner
        super().__init__(inner.param_groups, {})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.inner.step(closure)  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("with_closure", [False, True])
def test_a_wrapped_optimizer_applies_the_term_once(term: GradTerm, with_closure: bool) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = Wrapper(torch.optim.SGD(toy.parameters(), lr=0.1))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = toy.loss()
        loss.backward()
        return loss

    if with_closure:
        optimizer.step(closure)
    else:
        closure()
        optimizer.step()
    assert toy.w.item() == pytest.approx(-0.3, abs=1e-6)


def test_two_optimizers_each_apply_the_term_to_their_own_parameters(term: GradTerm) -> None:
    left, right = Toy(), Toy()
    for toy in (left, right):
        term.watch(toy)
    optimizers = [torch.optim.SGD(left.parameters(), lr=0.1), torch.optim.SGD(right.parameters(), lr=0.2)]
    (left.loss() + right.loss()).backward()
    for optimizer in optimizers:
        optimizer.step()
    assert left.w.item() == pytest.approx(-0.3, abs=1e-6)
    assert right.w.item() == pytest.approx(1.0 - 0.2 * 13.0, abs=1e-6)


def test_a_parameter_without_gradient_gets_the_term_alone(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    torch.optim.SGD(toy.parameters(), lr=0.1).step()
    assert toy.w.item() == pytest.approx(0.0, abs=1e-6)


def test_the_tensor_that_the_term_gives_is_not_made_the_gradient_itself() -> None:
    # A term may hand out a buffer of its own; the optimizer's clearing must not write to it.
    toy, buffer = Toy(), torch.full((1,), EXTRA)
    term = GradTerm(lambda modules, _: [(modules[0].w, buffer)], title="a buffer")  # pyright: ignore
    term.watch(toy)
    try:
        optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        assert buffer.item() == EXTRA
    finally:
        term._watched.clear()


def test_a_dead_module_is_forgotten(term: GradTerm) -> None:
    toy, kept = Toy(), Toy()
    term.watch(toy)
    term.watch(kept)
    del toy
    gc.collect()
    assert term.modules() == [kept]
    torch.optim.SGD(kept.parameters(), lr=0.1).step()
    assert kept.w.item() == pytest.approx(0.0, abs=1e-6)


def test_two_terms_add_up(term: GradTerm) -> None:
    second = GradTerm(_constant, title="another")
    toy = Toy()
    term.watch(toy)
    second.watch(toy)
    try:
        optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
        toy.loss().backward()
        optimizer.step()
        assert toy.w.item() == pytest.approx(1.0 - 0.1 * 23.0, abs=1e-6)
    finally:
        second._watched.clear()


def test_a_copied_module_is_not_the_watched_one(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    twin = copy.deepcopy(toy)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert twin.w.item() == 1.0


def test_low_precision_gradients_keep_their_dtype(term: GradTerm) -> None:
    toy = Toy(dtype=torch.bfloat16)
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    toy.loss().backward()
    optimizer.step()
    assert toy.w.grad is not None
    assert toy.w.grad.dtype == torch.bfloat16
    assert toy.w.grad.item() == 13.0


def test_a_low_precision_parameter_without_gradient_gets_one_of_its_dtype(term: GradTerm) -> None:
    toy = Toy(dtype=torch.bfloat16)
    term.watch(toy)
    torch.optim.SGD(toy.parameters(), lr=0.125).step()
    assert toy.w.item() == 1.0 - 0.125 * 10.0


def test_grad_scaler_unscales_first(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)  # pyright: ignore[reportPrivateImportUsage]
    scaler.scale(toy.loss()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert toy.w.item() == pytest.approx(-0.3, abs=1e-5)


def test_grad_scaler_skips_the_term_with_the_step(term: GradTerm) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)  # pyright: ignore[reportPrivateImportUsage]
    scaler.scale((float("inf") * toy.w).sum()).backward()
    scaler.step(optimizer)
    assert toy.w.item() == 1.0


def test_an_optimizer_that_unscales_by_itself_gets_a_scaled_term(term: GradTerm) -> None:
    # GradScaler hands fused optimizers `grad_scale` and leaves the gradients scaled.
    toy = Toy()
    term.watch(toy)
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1, fused=True)
    optimizer.grad_scale = torch.tensor(8.0)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer.found_inf = torch.tensor(0.0)  # pyright: ignore[reportAttributeAccessIssue]
    (8.0 * toy.loss()).backward()
    optimizer.step()
    assert toy.w.item() == pytest.approx(-0.3, abs=1e-6)


def test_fused_adam_under_a_scaler_steps_as_the_plain_one(term: GradTerm) -> None:
    found: list[Tensor] = []
    for scale in (None, 256.0):
        toy = Toy(4)
        term.watch(toy)
        optimizer = torch.optim.AdamW(toy.parameters(), lr=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)  # pyright: ignore
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale((step + 1) * toy.loss()).backward()
            scaler.step(optimizer)
            scaler.update()
        found.append(toy.w.detach().clone())
    # Powers of two scale without rounding; Adam's sums round differently by a unit or two.
    torch.testing.assert_close(found[0], found[1], rtol=1e-6, atol=0.0)


def flat_optimizer(toy: Toy, mark: str) -> Optimizer:
    flat = nn.Parameter(toy.w.detach().view(-1))  # FSDP1's flat parameter holds the others' storage
    if mark == "_is_flat_param":
        flat._is_flat_param = True  # pyright: ignore[reportAttributeAccessIssue]
    else:
        setattr(toy.w, mark, 0)
    return torch.optim.SGD([flat], lr=0.1)


@pytest.mark.parametrize("mark", ["_is_flat_param", "ds_id", "_hp_mapping"])
def test_engines_that_step_flat_copies_are_refused(term: GradTerm, mark: str) -> None:
    toy = Toy()
    term.watch(toy)
    optimizer = flat_optimizer(toy, mark)
    with pytest.raises(RuntimeError, match=r"the toy term: .*flattened copies.*use DDP or FSDP2"):
        optimizer.step()


def test_a_frozen_parameter_does_not_cause_the_refusal(term: GradTerm) -> None:
    toy = Toy()
    toy.w.requires_grad_(False)
    term.watch(toy)
    flat_optimizer(toy, "_is_flat_param").step()
    assert toy.w.item() == 1.0


def test_without_watched_modules_an_optimizer_is_as_before(term: GradTerm) -> None:
    toy = Toy()
    optimizer = torch.optim.SGD(toy.parameters(), lr=0.1)
    toy.loss().backward()
    optimizer.step()
    assert toy.w.item() == pytest.approx(0.7, abs=1e-6)
    assert term not in GradTerm.in_use
