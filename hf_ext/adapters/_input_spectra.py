"""Principal components of the inputs of a model's layers, from sums over tokens.

For the inputs X (tokens, d) of a layer the centred covariance is C = X^T X - N mu mu^T. N, the sum of rows,
the sum of squares and X^T X (or its product with a thin matrix) are sums over tokens: they need memory that
does not grow with the data, do not depend on the order of batches, and add up over processes.

Layers that are given the same tensor (q, k and v of one attention; gate and up) share one set of sums.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..core import dist
from ..core.checks import check
from ..core.lowrank import seeded, truncated_svd
from ._data_start import Batch, StartData, rows_of, token_mask

GRAM_LIMIT = 4096  # widest input whose (d, d) matrix is accumulated by default
GRAM_BYTES = 4 * 2**30  # and how much all of those matrices may take
_BLOCK = 256  # columns of X^T X that are computed at a time
EXACT_LIMIT = 256  # widest input whose covariance is decomposed in full


@dataclass(frozen=True)
class Components:
    """Leading principal components of one layer's inputs.

    Args:
        vectors: (k, d), orthonormal rows, the largest entry of each positive; fp32.
        singular_values: (k,), falling: square roots of the eigenvalues of C; fp64.
        ratios: (k,), shares of the total variance; 0 where there is none; fp64.
        count: Tokens seen.
    """

    vectors: Tensor
    singular_values: Tensor
    ratios: Tensor
    count: int


class _Sums:
    """What is accumulated of the inputs of one group of layers."""

    def __init__(self, width: int, sketch: Tensor | None, device: torch.device) -> None:
        self.sketch = sketch  # (d, l) with orthonormal columns; None for the whole of X^T X
        columns = width if sketch is None else sketch.shape[1]
        self.moment = torch.zeros(width, columns, dtype=torch.float64)  # X^T X, or X^T X Omega
        self.total = torch.zeros(width, dtype=torch.float64)
        self.scalars = torch.zeros(2, dtype=torch.float64)  # tokens; sum of squares beside a sketch
        self._to(device)

    def add(self, rows: Tensor) -> None:
        """Add rows (tokens, d)."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.moment.device != rows.device:
            self._to(rows.device)
        if self.sketch is None:
            for start in range(0, rows.shape[1], _BLOCK):  # X^T X is symmetric: its upper blocks tell it
                now = slice(start, start + _BLOCK)
                self.moment[now, start:] += rows[:, now].T @ rows[:, start:]
        else:
            self.moment += rows.T @ (rows @ self.sketch.to(rows.dtype))
            self.scalars[1] += rows.square().sum()
        # Each batch is summed up in fp32, as in the products above, and batches in fp64.
        self.total += rows.sum(0)
        self.scalars[0] += len(rows)

    def _to(self, device: torch.device) -> None:
        for name in ("moment", "total", "scalars", "sketch"):
            tensor = getattr(self, name)
            setattr(self, name, None if tensor is None else tensor.to(device))

    def all_reduce(self) -> None:
        """Add up over processes."""
        for tensor in (self.moment, self.total, self.scalars):
            dist.all_reduce_sum_(tensor)

    @property
    def count(self) -> int:
        return int(self.scalars[0])

    @property
    def variance(self) -> float:
        """Trace of C."""
        count, square = self.scalars.tolist()
        if self.sketch is None:
            square = float(self.moment.diagonal().sum())
        return max(0.0, square - float(self.total.square().sum()) / count) if count else 0.0

    def centred(self) -> Tensor:
        """Return C, or C Omega."""
        mean = self.total / max(self.count, 1)
        if self.sketch is None:
            upper = self.moment.triu()
            return upper.add_(upper.triu(1).T).addr_(mean, self.total, alpha=-1.0)
        return self.moment - torch.outer(mean, self.total @ self.sketch.double())


class InputSpectra:
    """Principal components of the inputs of an adapter's layers.

    Args:
        data: Batches, and the model.
        layers: The layers by module path, in module order; anything with a forward hook and `in_features`.
        components: How many components of each.
        method: "gram", "sketch" or "auto" (gram up to 4096 features and 4 GiB in all).
        oversample: Columns of a sketch beyond the number of components; None for that number + 10.
        n_passes: Passes over the data of a sketch, 1 or 2.
        n_tokens: Tokens to read, over all processes; whole batches are used.
        use_label_mask: Whether to leave out tokens whose label is `label_mask_value`.
        label_mask_value: That label.
        seed: Seed of the sketches.

    Raises:
        ValueError: A layer saw too few tokens for its components, or the batches are unfit.
    """

    def __init__(
        self,
        data: StartData,
        layers: Mapping[str, nn.Module],
        components: Mapping[str, int],
        *,
        method: str,
        oversample: int | None,
        n_passes: int,
        n_tokens: int,
        use_label_mask: bool,
        label_mask_value: int,
        seed: int,
    ) -> None:
        self.data, self.layers, self.wanted = data, layers, components
        # In an encoder-decoder labels are the decoder's and the mask is the encoder's, whatever the lengths.
        self._is_masked = set(layers)
        if data.is_encoder_decoder:
            encoder = data.encoder_modules()
            self._is_masked = {path for path, layer in layers.items() if layer in encoder}
        use_labels = use_label_mask and not data.is_encoder_decoder
        self._mask_options = {"use_labels": use_labels, "ignored": label_mask_value}
        self._share = -(-n_tokens // dist.world_size())
        self._owner: dict[str, str] = {}  # module path -> path of the layer whose sums it shares
        self._now: dict[str, tuple[weakref.ref[Tensor], int]] = {}
        self._mask: Tensor | None = None
        self._most_rows = 0  # of any layer in the batch at hand
        widths = {path: int(layer.in_features) for path, layer in layers.items()}  # type: ignore[arg-type]
        gram = _gram_paths(widths, method)
        sketches = {
            path: None
            if path in gram
            else _orthonormal(widths[path], self._columns(path, oversample), seed, path)
            for path in layers
        }
        self._sums: dict[str, _Sums] = {}
        self._pass(widths, sketches, keep=n_passes == 2 and len(gram) < len(layers), title="inputs")
        self._agree_on_owners(widths, sketches)
        self._reduce()
        self.components = {}
        again = {}
        for path, sums in self._sums.items():
            if sums.sketch is None:
                self.components[path] = self._from_gram(path, sums)
            elif n_passes == 1:
                self.components[path] = self._from_one_pass(path, sums)
            else:
                again[path] = dist.broadcast_(torch.linalg.qr(sums.centred()).Q.contiguous())
        if again:
            # A process whose batches miss a layer (an expert) still takes part in its sums.
            self._sums = {path: _Sums(widths[path], q, data.device) for path, q in again.items()}
            self._pass(widths, again, keep=False, title="inputs, second pass", again=True)
            self._reduce()
            for path, q in again.items():
                self.components[path] = self._from_basis(path, self._sums[path], q)

    def of(self, path: str) -> Components | None:
        """Return one layer's components; None where no token reached it."""
        return self.components.get(self._owner.get(path, path))

    # Accumulation -----------------------------------------------------------------------------------

    def _columns(self, path: str, oversample: int | None) -> int:
        k = self.wanted[path]
        return k + (k + 10 if oversample is None else oversample)

    def _pass(
        self,
        widths: Mapping[str, int],
        sketches: Mapping[str, Tensor | None],
        *,
        keep: bool,
        title: str,
        again: bool = False,
    ) -> None:
        data = self.data
        first = not again

        def hook_of(path: str) -> Any:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                x = args[0] if args else next(iter(kwargs.values()))
                owner = self._find_owner(path, x, first)
                if owner != path:
                    return
                if path not in self._sums:
                    self._sums[path] = _Sums(widths[path], sketches[path], x.device)
                rows = rows_of(x, self._mask if path in self._is_masked else None)
                self._most_rows = max(self._most_rows, len(rows))
                self._sums[path].add(rows)

            return hook

        seen = [0]

        def enough(batch: Batch) -> bool:
            mask = token_mask(batch, **self._mask_options)
            if mask is None or data.is_encoder_decoder:
                seen[0] += self._most_rows
            else:
                seen[0] += int(mask.sum())
            return seen[0] >= self._share

        paths = list(self.layers) if first else list(sketches)
        handles = [
            self.layers[path].register_forward_pre_hook(hook_of(path), with_kwargs=True) for path in paths
        ]
        try:
            with dist.together(), data.frozen(), torch.no_grad():
                inputs = data.reread(title) if again else data.read(enough, keep=keep, title=title)
                for batch in inputs:
                    self._mask = token_mask(batch, **self._mask_options)
                    self._now, self._most_rows = {}, 0
                    data.model(**_without_head(data.model, self.layers.values(), batch))
        finally:
            for handle in handles:
                handle.remove()
            self._now = {}

    def _find_owner(self, path: str, x: Tensor, first: bool) -> str:
        """Return the path whose sums stand for this layer's, which is its own where no other saw this tensor.

        The tensor itself is compared, not its values: a weak reference holds no memory.
        """
        known = self._owner.get(path)
        if known == path:
            self._now[path] = (weakref.ref(x), x._version)
            return path
        for owner in (known,) if known is not None else tuple(self._now):
            reference, version = self._now.get(owner, (None, -1))
            if reference is not None and reference() is x and version == x._version:
                self._owner[path] = owner
                return owner
        if known is not None or not first:
            raise ValueError(
                f"{path} and {known} had one input in an earlier batch and no longer do: "
                "their components cannot be told apart"
            )
        self._owner[path] = path
        self._now[path] = (weakref.ref(x), x._version)
        return path

    def _agree_on_owners(self, widths: Mapping[str, int], sketches: Mapping[str, Tensor | None]) -> None:
        # A process whose batches missed a layer (an expert) still takes part in its sums.
        everywhere: dict[str, str] = {}
        for owners in dist.gather_objects(self._owner):
            for path, owner in owners.items():
                everywhere.setdefault(path, owner)
                if everywhere[path] != owner:
                    raise ValueError(f"{path} shares its input with {owner} on some processes only")
        order = [path for path in self.layers if path in everywhere]
        self._owner = {path: everywhere[path] for path in order}
        for path in order:
            if everywhere[path] == path and path not in self._sums:
                self._sums[path] = _Sums(widths[path], sketches[path], self.data.device)

    def _reduce(self) -> None:
        self._sums = {path: self._sums[path] for path in self.layers if path in self._sums}
        for path, sums in self._sums.items():
            sums.all_reduce()
            wanted = max(self.wanted[other] for other, owner in self._owner.items() if owner == path)
            check(
                sums.count >= wanted,
                "dataloader",
                f"{sums.count} tokens",
                f"one with at least {wanted} tokens, as many as components are sought",
                where=path,
            )

    # Decomposition -----------------------------------------------------------------------------------

    def _group_size(self, path: str) -> int:
        return max(self.wanted[other] for other, owner in self._owner.items() if owner == path)

    def _finish(self, path: str, sums: _Sums, vectors: Tensor, values: Tensor) -> Components:
        k = min(self._group_size(path), vectors.shape[1])
        vectors, values = vectors[:, :k].T.double(), values[:k].double().clamp_min(0.0)
        pivot = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True))
        vectors = vectors * torch.where(pivot < 0, -1.0, 1.0)
        total = sums.variance
        ratios = values / total if total > 0.0 else torch.zeros_like(values)
        return Components(vectors.float(), values.sqrt(), ratios, sums.count)

    def _from_gram(self, path: str, sums: _Sums) -> Components:
        covariance = sums.centred()
        if len(covariance) <= EXACT_LIMIT or self._group_size(path) > len(covariance) // 4:
            values, vectors = torch.linalg.eigh(covariance)
            return self._finish(path, sums, vectors.flip(1), values.flip(0))
        svd = truncated_svd(covariance, self._group_size(path), name=path)
        return self._finish(path, sums, svd.u, svd.s)

    def _from_basis(self, path: str, sums: _Sums, q: Tensor) -> Components:
        small = q.T @ sums.centred()  # Q^T C Q, with the basis as the sketch
        values, vectors = torch.linalg.eigh((small + small.T) / 2)
        return self._finish(path, sums, q @ vectors.flip(1), values.flip(0))

    def _from_one_pass(self, path: str, sums: _Sums) -> Components:
        # Nystrom: C ~ Y (Omega^T Y)^-1 Y^T, shifted so that the Cholesky factor exists.
        omega, y = sums.sketch, sums.centred()
        assert omega is not None
        omega = omega.double()
        shift = 1e-12 * float(y.norm())
        y = y + shift * omega
        inner = omega.T @ y
        factor, bad = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        if int(bad):  # no variance at all, or less than rounding: fewer directions than the sketch has
            values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
            kept = values > 1e-10 * values[-1].abs().clamp_min(1e-300)
            root = vectors[:, kept] * values[kept].rsqrt()
            u, s, _ = torch.linalg.svd(y @ root, full_matrices=False)
        else:
            half = torch.linalg.solve_triangular(factor, y.T, upper=False).T
            u, s, _ = torch.linalg.svd(half, full_matrices=False)
        return self._finish(path, sums, u, (s.square() - shift).clamp_min(0.0))


def _gram_paths(widths: Mapping[str, int], method: str) -> set[str]:
    if method == "sketch":
        return set()
    if method == "gram":
        return set(widths)
    small = {path for path, width in widths.items() if width <= GRAM_LIMIT}
    fits = sum(8 * widths[path] ** 2 for path in small) <= GRAM_BYTES
    return small if fits else set()


def _orthonormal(width: int, columns: int, seed: int, path: str) -> Tensor:
    drawn = torch.randn(width, min(columns, width), generator=seeded(seed, path), dtype=torch.float64)
    return torch.linalg.qr(drawn).Q


def _without_head(model: nn.Module, layers: Any, batch: Batch) -> dict[str, Any]:
    """Return the batch without what only the loss needs, and with no more logits than the model must give."""
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if getattr(getattr(base, "config", None), "is_encoder_decoder", False):
        return dict(batch)  # the decoder's inputs are made from the labels
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    adapted = {layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer for layer in layers}
    if head is None or head in adapted or isinstance(getattr(head, "base_layer", None), nn.Module):
        return inputs
    if "logits_to_keep" in inspect.signature(base.forward).parameters:
        inputs.setdefault("logits_to_keep", 1)
    return inputs
