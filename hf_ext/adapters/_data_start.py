"""What starts that are computed from data stand on: layers that wait, batches, and the model held still."""

from __future__ import annotations

import contextlib
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..core import dist
from ..core.checks import check

Batch = Mapping[str, Any]
LossFunction = Callable[[nn.Module, Batch], Tensor]


class StartsFromData:
    """What a layer needs so that its adapters can wait for data; mixed into adapter layers."""

    module_name: str
    training: bool
    awaiting: set[str]  # names of adapters that were empty when they were last looked at
    adapter_tensors: Callable[[str], dict[str, Tensor]]  # one adapter's tensors by attribute name

    def watch(self) -> None:
        """Begin to keep track of adapters that wait; for the layer's construction."""
        self.awaiting = set()
        # At once, so that no compiled forward has to look at the tensors.
        cast(nn.Module, self).register_load_state_dict_post_hook(_look_again)

    def train(self, mode: bool = True) -> Any:
        """Set the mode; looks at what waits, which transformers' `load_adapter` may have filled unseen."""
        _look_again(self, None)
        return cast(Any, super()).train(mode)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove one adapter, which then waits for nothing."""
        self.awaiting.discard(adapter_name)
        cast(Any, super()).delete_adapter(adapter_name)

    @classmethod
    @abstractmethod
    def start_from_data(cls, data: StartData) -> None:
        """Compute the start of one adapter from data and put it in place."""

    def empty_tensors(self, name: str) -> Iterable[Tensor]:
        """Return those of one adapter's tensors that are 0 for as long as it waits."""
        return self.adapter_tensors(name).values()

    def awaits(self, name: str) -> bool:
        """Return whether one adapter is still empty."""
        if name in self.awaiting and any(
            bool(tensor.any()) for tensor in self.empty_tensors(name) if not tensor.is_meta
        ):
            self.awaiting.discard(name)  # a checkpoint has filled it
        return name in self.awaiting

    def check_started(self, active: Iterable[str]) -> None:
        """Refuse to train an empty adapter: nothing would move it.

        Raises:
            RuntimeError: An active adapter has not had its start.
        """
        if not self.awaiting or not self.training or not torch.is_grad_enabled():
            return
        for name in active:
            if name in self.awaiting and self.awaits(name):
                raise RuntimeError(
                    f"adapter {name!r} starts from data and has seen none ({self.module_name}): call "
                    "hf_ext.adapters.initialize_from_data(model, dataloader) before training, or set "
                    "init_weights=False for a random start"
                )


def _look_again(layer: Any, _: object) -> None:
    for name in tuple(layer.awaiting):
        layer.awaits(name)


def awaits_data(model: nn.Module) -> list[str]:
    """Return the names of a model's adapters that wait for `initialize_from_data`, sorted."""
    return sorted(
        {
            name
            for layer in model.modules()
            if isinstance(layer, StartsFromData)
            for name in tuple(layer.awaiting)
            if layer.awaits(name)
        }
    )


@runtime_checkable
class _HasLoss(Protocol):
    loss: Tensor | None


class StartData:
    """One adapter's layers and the batches to start them from, as a method's `start_from_data` sees them.

    Args:
        model: The model that carries the adapter.
        adapter_name: Which adapter.
        layers: Its layers by module path, in module order.
        config: Its settings.
        batches: This process's batches of model inputs.
        loss_function: Mean loss of a batch; None for the model's own.
        show_progress: Whether to show a progress bar on the first process.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter_name: str,
        layers: Mapping[str, Any],
        config: Any,
        batches: Iterable[Batch],
        loss_function: LossFunction | None,
        show_progress: bool,
    ) -> None:
        self.model, self.adapter_name, self.layers, self.config = model, adapter_name, layers, config
        self.loss_function = loss_function
        self._batches = iter(batches)
        self._total = _length(batches)
        self._kept: list[Batch] = []
        self._show = show_progress and dist.is_main()

    def read(self, enough: Callable[[Batch], bool], *, keep: bool, title: str) -> Iterator[Batch]:
        """Yield batches on the model's device until the data end or `enough`, asked after each, says so.

        Args:
            enough: Takes the batch that was just used; True ends the pass.
            keep: Whether to hold the batches (inputs of the model, not activations) for `reread`.
            title: What the progress bar says.

        Raises:
            ValueError: A batch is not a mapping of tensors, or there is none.
        """
        count = 0
        with tqdm(total=self._total, desc=title, unit="batch", disable=not self._show, leave=False) as bar:
            for batch in self._batches:
                count += 1
                held = _as_inputs(batch)
                if keep:
                    self._kept.append(held)
                yield _to_device(held, self.device)
                bar.update()
                if enough(held):
                    break
        check(count > 0, "dataloader", "no batch", "one that gives at least one batch on every process")

    def reread(self, title: str) -> Iterator[Batch]:
        """Yield the batches that were kept, in the same order."""
        yield from (
            _to_device(batch, self.device)
            for batch in tqdm(self._kept, desc=title, unit="batch", disable=not self._show, leave=False)
        )

    @property
    def device(self) -> torch.device:
        """Where the model takes its inputs."""
        return next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))

    @property
    def is_encoder_decoder(self) -> bool:
        """Whether the labels are a decoder's and the attention mask its encoder's."""
        return bool(getattr(getattr(self.model, "config", None), "is_encoder_decoder", False))

    def encoder_modules(self) -> set[nn.Module]:
        """Return the modules of an encoder-decoder's encoder; none where the model does not tell it."""
        model: Any = self.model
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        encoder = base.get_encoder() if hasattr(base, "get_encoder") else None
        found = set(encoder.modules()) if isinstance(encoder, nn.Module) else set()
        return set() if base in found else found

    def mean_loss(self, batch: Batch) -> tuple[Tensor, int]:
        """Return the mean loss of a batch, and over how many terms it is a mean.

        Raises:
            ValueError: The model gives no loss for this batch.
        """
        count = _label_count(batch, shifts=not self.is_encoder_decoder)
        if self.loss_function is not None:
            return self.loss_function(self.model, batch), count
        check("labels" in batch, "batch", sorted(batch), "a mapping with 'labels': this start needs a loss")
        output = self.model(**batch)
        loss = output.loss if isinstance(output, _HasLoss) else None
        check(loss is not None, "batch", sorted(batch), "one for which the model returns a loss")
        return cast(Tensor, loss), count

    @contextlib.contextmanager
    def frozen(self, train_mode: bool = False) -> Iterator[None]:
        """Run the body on the base model: adapters off, nothing trainable, every flag restored after."""
        modes = {module: module.training for module in self.model.modules()}
        trainable = {p: p.requires_grad for p in self.model.parameters()}
        switched: list[Any] = [
            m for m in self.model.modules() if hasattr(m, "disable_adapters") and not m.disable_adapters
        ]
        cache = getattr(getattr(self.model, "config", None), "use_cache", None)
        try:
            for layer in switched:
                layer._disable_adapters = True
            if cache is not None:
                self.model.config.use_cache = False  # type: ignore[union-attr]
            for parameter in trainable:
                parameter.requires_grad_(False)
            self.model.train(train_mode)
            yield
        finally:
            for layer in switched:
                layer._disable_adapters = False
            for parameter, flag in trainable.items():
                parameter.requires_grad_(flag)
            for module, mode in modes.items():
                module.training = mode
            if cache is not None:
                self.model.config.use_cache = cache  # type: ignore[union-attr]


def _length(batches: Iterable[Batch]) -> int | None:
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader over an IterableDataset has a __len__ that raises
        return None


def token_mask(batch: Batch, *, use_labels: bool, ignored: int = -100) -> Tensor | None:
    """Return which positions of a batch count: True for (batch, length) positions that hold real tokens.

    Args:
        batch: Model inputs.
        use_labels: Whether positions whose label is `ignored` are left out.
        ignored: That label.

    Returns:
        None where the batch says nothing about positions: all count. Labels of another shape than the
        attention mask (a decoder's beside its encoder's) say nothing about its positions.
    """
    mask = batch.get("attention_mask")
    mask = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    labels = batch.get("labels")
    fits = isinstance(labels, Tensor) and labels.dim() == 2 and (mask is None or mask.shape == labels.shape)
    if use_labels and fits:
        real = cast(Tensor, labels) != ignored
        mask = real if mask is None else mask & real.to(mask.device)
    return mask


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return a layer's input as rows (tokens, features), without positions that do not count.

    A layer that does not see the batch's positions (an expert sees the tokens routed to it) gives all rows.
    """
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device)]
    rows = x.reshape(-1, x.shape[-1])
    if mask is not None and x.dim() == 2 and len(rows) == mask.numel():
        return rows[mask.to(x.device).reshape(-1)]
    return rows


# Batches ----------------------------------------------------------------------------------------------------


def batches_of(data: Any, batch_size: int) -> Iterable[Batch]:
    columns = getattr(data, "column_names", None)
    if columns is None or not hasattr(data, "select"):
        check(isinstance(data, Iterable), "dataloader", type(data).__name__, "iterable")
        return data
    check(
        "input_ids" in columns,
        "dataloader",
        list(columns),
        "a data set with a column 'input_ids' (tokenize it first)",
    )
    known = [name for name in ("input_ids", "attention_mask", "labels") if name in columns]
    return _DatasetBatches(data, known, batch_size)


class _DatasetBatches:
    """Batches of a tokenized data set: rows padded to the longest, every process its own share."""

    def __init__(self, data: Any, columns: Sequence[str], batch_size: int) -> None:
        self.data, self.columns, self.batch_size = data, columns, batch_size
        self.mine = range(dist.rank(), len(data), dist.world_size())

    def __len__(self) -> int:
        return -(-len(self.mine) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.mine), self.batch_size):
            rows = [self.data[i] for i in self.mine[start : start + self.batch_size]]
            width = max(len(row["input_ids"]) for row in rows)
            batch = {}
            for name, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100)):
                if name in self.columns or name == "attention_mask":
                    values = [
                        list(row[name]) if name in self.columns else [1] * len(row["input_ids"])
                        for row in rows
                    ]
                    padded = [value + [filler] * (width - len(value)) for value in values]
                    batch[name] = torch.tensor(padded)
            yield batch


def _as_inputs(batch: Any) -> dict[str, Any]:
    check(
        isinstance(batch, Mapping) and any(isinstance(value, Tensor) for value in batch.values()),
        "dataloader",
        type(batch).__name__,
        "an iterable of mappings from the model's argument names to tensors",
    )
    return {str(name): value for name, value in batch.items()}


def _to_device(batch: Batch, device: torch.device) -> Batch:
    return {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}


def _label_count(batch: Batch, *, shifts: bool) -> int:
    labels, ids = batch.get("labels"), batch.get("input_ids")
    if not isinstance(labels, Tensor):
        return 1
    if labels.dim() < 2 or labels.is_floating_point():
        return labels.shape[0]
    real = labels != -100
    # A causal model predicts each token from those before it: the first label of a row is not used.
    is_causal = shifts and isinstance(ids, Tensor) and ids.shape == labels.shape
    return int((real[:, 1:] if is_causal else real).sum())
