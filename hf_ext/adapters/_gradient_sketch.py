"""Leading singular triplets of weight gradients, from sketches that are summed up while a model runs.

For y = W x the gradient is G = sum_t d_t x_t^T over tokens, with d_t the gradient of the loss at y_t
(embeddings and convolutions are such products too: `_layouts`).
Products of G with thin matrices are such sums too, so G (m, n) is never formed, and W needs no gradient:

- one pass: Y = G Omega (m, l) and Z = Psi G (2l + 1, n); with Q = orth(Y), G ~ Q (Psi Q)^+ Z (Tropp et al.
  2017, "Practical sketching algorithms for low-rank matrix approximation", arXiv 1609.00048, algorithm 4);
- two passes: Y = G Omega, Q = orth(Y), then Q^T G;
- three passes: besides, P = orth((Q^T G)^T), then G P (one more half step of power iteration).

Where the sketches would be larger than G, G is summed up instead.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check
from ..core.lowrank import seeded
from ._data_start import StartData
from ._layouts import KINDS, Layout, layout_of


class _Tap(torch.autograd.Function):
    """Identity whose backward hands a layer's input and the gradient of its output to a sink.

    The input is saved through autograd, so that gradient checkpointing recomputes it as it does the rest.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, sink: Any) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sink = sink
        return (
            y.clone()
        )  # a view could not be changed in place, as some models do (Falcon; ReLU(inplace=True))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (x,) = ctx.saved_tensors
        ctx.sink.add(x.float() if x.is_floating_point() else x, grad.float())
        return grad, None, None


class _Sums:
    """What is accumulated of one layer's gradient in one pass."""

    def __init__(self, layout: Layout, right: Tensor | None, left: Tensor | None) -> None:
        self.layout = layout
        self.right, self.left = right, left  # Omega (n, l) and Psi (k, m); both None for G itself
        self.y: Tensor | None = None  # G Omega (m, l), or G (m, n)
        self.z: Tensor | None = None  # Psi G (k, n)

    def add(self, x: Tensor, grad: Tensor) -> None:
        """Add one batch's tokens, or positions, from a layer's input and the gradient of its output."""
        layout = self.layout
        grad = layout.reaching(x, grad)
        if self.right is None and self.left is None:
            self.y = _plus(self.y, layout.weight_gradient(x, grad))
        if self.right is not None:
            right = layout.stored(self.right.to(x.device).T, inner=True)
            self.y = _plus(self.y, layout.rows(grad).T @ layout.rows(layout.project(x, right)))
        if self.left is not None:
            left = layout.stored(self.left.to(x.device), inner=False)
            self.z = _plus(self.z, layout.weight_gradient(x, layout.expand(grad, left)))

    def all_reduce(self, y_shape: tuple[int, int], z_shape: tuple[int, int]) -> None:
        """Add up over processes; a layer that was not reached counts as zero."""
        if self.right is not None or self.left is None:
            y = torch.zeros(y_shape) if self.y is None else self.y
            self.y = dist.all_reduce_sum_(y)
        if self.left is not None:
            z = torch.zeros(z_shape) if self.z is None else self.z
            self.z = dist.all_reduce_sum_(z)


class GradientSketches:
    """Sketches of the mean gradient of each layer of an adapter.

    Args:
        data: The layers and batches.
        ranks: Number of triplets wanted, by module path.
        size: Directions l of the sketch; None for 6 times the number of triplets in one pass, 2 times in
            several.
        n_passes: 1, 2 or 3.
        n_samples: Rows to use over all processes; whole batches are taken.
        train_mode: Whether dropout acts.
        seed: Seed of Omega and Psi.

    Raises:
        ValueError: The data give no loss, or a loss or gradient that is not finite.
    """

    def __init__(
        self,
        data: StartData,
        *,
        ranks: Mapping[str, int],
        size: int | None,
        n_passes: int,
        n_samples: int,
        train_mode: bool,
        seed: int,
    ) -> None:
        self.data, self.ranks, self.seed = data, ranks, seed
        self.train_mode = train_mode
        self._share = -(-n_samples // dist.world_size())
        layouts = {path: _layout(path, layer) for path, layer in data.layers.items()}
        shapes = {path: (layout.out_features, layout.in_features) for path, layout in layouts.items()}
        wide = 6 if n_passes == 1 else 2
        sizes = {path: size if size is not None else wide * ranks[path] for path in shapes}
        self._drawn: dict[tuple[str, torch.device], Tensor] = {}
        self._found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

        first: dict[str, _Sums] = {}
        for path, (m, n) in shapes.items():
            ell = sizes[path]
            numbers = (m * ell + (2 * ell + 1) * n) if n_passes == 1 else (m + n) * ell
            if ell >= min(m, n) or numbers >= m * n:
                first[path] = _Sums(layouts[path], None, None)
                continue
            device = next(data.layers[path].parameters()).device
            left = self._random(2 * ell + 1, m, "psi", device) if n_passes == 1 else None
            first[path] = _Sums(layouts[path], self._random(n, ell, "omega", device), left)
        dense = {path for path, sums in first.items() if sums.right is None}
        self._run(first, shapes, keep=n_passes > 1 and len(dense) < len(first), title="gradients")
        for path in dense:
            u, s, vh = torch.linalg.svd(_known(first[path].y).double(), full_matrices=False)
            self._keep(path, u, s, vh)
        rest = {path: sums for path, sums in first.items() if path not in dense}
        if not rest:
            return
        if n_passes == 1:
            for path, sums in rest.items():
                self._keep(path, *_one_pass(_known(sums.left), _known(sums.y), _known(sums.z)))
            return
        bases = {path: torch.linalg.qr(_known(sums.y).double()).Q for path, sums in rest.items()}
        second = {path: _Sums(layouts[path], None, q.T.float()) for path, q in bases.items()}
        self._run(second, shapes, keep=False, title="gradients, second pass", again=True)
        if n_passes == 2:
            for path, q in bases.items():
                u, s, vh = torch.linalg.svd(_known(second[path].z).double(), full_matrices=False)
                self._keep(path, q @ u, s, vh)
            return
        rows = {path: torch.linalg.qr(_known(second[path].z).double().T).Q for path in rest}
        third = {path: _Sums(layouts[path], p.float(), None) for path, p in rows.items()}
        self._run(third, shapes, keep=False, title="gradients, third pass", again=True)
        for path, p in rows.items():
            u, s, vh = torch.linalg.svd(_known(third[path].y).double(), full_matrices=False)
            self._keep(path, u, s, vh @ p.T)

    def leading(self, path: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return u (m, k), s (k,) and vh (k, n) of one layer's mean gradient, fp32, signs fixed."""
        return self._found[path]

    def _keep(self, path: str, u: Tensor, s: Tensor, vh: Tensor) -> None:
        k = self.ranks[path]
        u, s, vh = u[:, :k], s[:k], vh[:k]
        sign = torch.where(u.gather(0, u.abs().argmax(dim=0, keepdim=True)) < 0, -1.0, 1.0)
        self._found[path] = ((u * sign).float(), s.float(), (vh * sign.T).float())

    def _random(self, rows: int, columns: int, name: str, device: torch.device) -> Tensor:
        # One matrix for all layers of a shape; gradients do not depend on it.
        key = f"{name} {rows}x{columns}"
        if (key, device) not in self._drawn:
            drawn = torch.randn(rows, columns, generator=seeded(self.seed, key))
            self._drawn[key, device] = drawn.to(device)
        return self._drawn[key, device]

    def _run(
        self,
        sums: Mapping[str, _Sums],
        shapes: Mapping[str, tuple[int, int]],
        *,
        keep: bool,
        title: str,
        again: bool = False,
    ) -> None:
        data, seen = self.data, [0]

        def enough(batch: Mapping[str, Any]) -> bool:
            seen[0] += next(value.shape[0] for value in batch.values() if isinstance(value, Tensor))
            return seen[0] >= self._share

        handles = [
            data.layers[path].register_forward_hook(_hook(entry), with_kwargs=True)
            for path, entry in sums.items()
        ]
        embed = getattr(data.model, "get_input_embeddings", lambda: None)()
        if self.train_mode and embed is not None:
            # Reentrant checkpointing gives no gradient to blocks none of whose inputs needs one.
            handles.append(embed.register_forward_hook(_require_grad))
        count = 0
        try:
            with dist.together(), data.frozen(self.train_mode), torch.enable_grad():
                for batch in data.reread(title) if again else data.read(enough, keep=keep, title=title):
                    count += self._step(batch)
        finally:
            for handle in handles:
                handle.remove()
        total = dist.all_reduce_sum_(torch.tensor([float(count)], dtype=torch.float64))
        rule = "one with labels that count: all of them are -100"
        check(float(total) > 0.0, "dataloader", f"{seen[0]} rows", rule)
        for path, entry in sums.items():
            (m, n), right, left = shapes[path], entry.right, entry.left
            y_shape = (m, n if right is None else right.shape[1])
            entry.all_reduce(y_shape, (0 if left is None else left.shape[0], n))
            for name in ("y", "z"):
                tensor = getattr(entry, name)
                if tensor is not None:
                    check(bool(tensor.isfinite().all()), "gradient", "NaN or infinity", "finite", where=path)
                    setattr(entry, name, tensor / float(total))

    def _step(self, batch: Mapping[str, Any]) -> int:
        loss, count = self.data.mean_loss(batch)
        if count == 0:  # nothing in it has a label: its mean loss is 0 / 0, its share of the mean is nothing
            return 0
        if not bool(torch.isfinite(loss)):
            value = float(loss.detach())
            raise ValueError(f"the loss of a batch is {value}: no gradient can be estimated from it")
        if not loss.requires_grad:
            raise ValueError("batch: no adapted layer has a part in the loss")
        # The mean over all tokens, whatever batch they are in.
        (loss * count).backward()
        return count


def _layout(path: str, layer: Any) -> Layout:
    found = getattr(layer, "layout", None)  # an adapted layer's; else a plain one
    return found if found is not None else layout_of(layer, KINDS, path, quantized=False, linear=False)


def _hook(sums: _Sums) -> Any:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor | None:
        if not torch.is_grad_enabled():  # reentrant checkpointing runs the layer again with gradients
            return None
        if not output.requires_grad:  # the first layers: nothing before them is differentiated
            output = output.detach().requires_grad_()
        x = args[0] if args else kwargs["x"]
        return _Tap.apply(output, x.detach(), sums)  # pyright: ignore[reportReturnType]

    return hook


def _require_grad(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


def _plus(total: Tensor | None, term: Tensor) -> Tensor:
    return term if total is None else total.add_(term)


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    return tensor


def _one_pass(psi: Tensor, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q = torch.linalg.qr(y.double()).Q  # (m, l)
    core = torch.linalg.lstsq(psi.to(q) @ q, z.double()).solution  # (l, n)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return q @ u, s, vh
