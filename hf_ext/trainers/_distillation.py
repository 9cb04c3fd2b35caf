"""TRL's distillation with completions from the data, a target made of several teachers, and weights.

Generation batches, buffers, accumulation, metrics and completion tables stay TRL's. Completions of the data
take the place of sampled ones in the two methods that tokenize and sample. A loss that is neither weighted
nor composed is computed by TRL's method itself; one that is weighted by TRL's kernel, which gives a
divergence for each token.

A composed target, such as z_1 + w (z_1 - z_2) with a w of each token, is computed from the logits of a piece
of the positions at a time, in fp32, and again for the backward pass. The same target could be given to TRL's
kernel as hidden states and heads side by side; but in bf16 the scaled hidden states are rounded before the
projection, an error that the extrapolation multiplies, and both heads are copied for each micro-batch.

Evaluation leaves the random state of the training as it was, and a resumed run goes on with the order of rows
of its epoch; TRL's starts again with that of the first.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Sampler
from trl import DistillationTrainer  # pyright: ignore[reportPrivateImportUsage]

from .._compat.trl import (
    ChunkedDivergenceFunction,
    common_prefix_length,
    create_model_from_path,
    disable_gradient_checkpointing,
    is_conversational,
    maybe_gather_lm_head_ctx,
    prepare_deepspeed,
    use_adapter,
)
from ..core import dist
from ..core.checks import check
from ._base import check_columns, check_filled, check_vocabulary, own_args, refuse_trained_reference
from ._reference import evaluation_mode
from ._token_loss import Head

logger = logging.getLogger(__name__)

# Columns that may hold a row's completion, the first one found is taken.
COMPLETIONS = ("completion", "chosen")
# Column with what the teacher is shown in the place of the prompt, such as the prompt with a solution.
TEACHER_PROMPT = "teacher_prompt"
# Column with the number of a training row, in the order in which the rows were given.
ROW = "row_id"
# Logits of one model in one piece of the positions.
_PIECE = 1 << 25
_MULTIMODAL = (
    *("pixel_values", "image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes"),
    *("token_type_ids", "mm_token_type_ids", "image_position_ids"),
)


@dataclass(frozen=True)
class States:
    """What a model says at some positions: its head's input (..., H), and the head."""

    hidden: Tensor
    head: Head


@dataclass(frozen=True)
class Target:
    """What the student is to match at n positions.

    Args:
        logits: (n, V) fp32, before the temperature.
        token_weights: (n,) factors of the divergence; None for 1.
        metrics: Values (n,) by name, which are averaged over the completion tokens and logged.
    """

    logits: Tensor
    token_weights: Tensor | None
    metrics: Mapping[str, Tensor]


class TargetDistillationTrainer(DistillationTrainer):
    """TRL's DistillationTrainer with hooks for a method; base of the methods, after `MethodTrainer`.

    Args:
        model: As TRL's.
        teacher_model: As TRL's; or the name of a frozen adapter of `model`, a PeftModel; or None for the base
            under the adapter that is trained.
        args: The trainer's own config.
        train_dataset: Rows with `prompt`, and with `completion` or `chosen` where completions come from it;
            with `teacher_prompt` the teachers are shown that in its place.
        eval_dataset: As `train_dataset`, or several by name.
        *positional: TRL's further arguments.
        more_teachers: Further teachers by argument name; None where one is left out.
        teacher_field: What errors call `teacher_model`.
        **keywords: TRL's further arguments.

    Raises:
        TypeError: `args` is not the trainer's own config.
        ValueError: A column is missing, a text is empty, or a teacher is trained or of another vocabulary.
    """

    # Wider than upstream has them: some are None before or without training.
    args: Any
    model: Any
    optimizer: Any
    processing_class: Any
    train_dataset: Any
    eval_dataset: Any

    def __init__(
        self,
        model: Any,
        teacher_model: Any = None,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *positional: Any,
        more_teachers: Mapping[str, Any] | None = None,
        teacher_field: str = "teacher_model",
        **keywords: Any,
    ) -> None:
        args = own_args(self, args)
        given = {teacher_field: teacher_model, **(more_teachers or {})}
        adapters = _adapters_among(given, model)
        _check_teachers(given, model)
        wanted = "dataset" in self.completion_sources(args)
        for field, rows in _named(train_dataset, eval_dataset):
            check_rows(rows, field, completions=wanted)
        self._teacher_prompts = shows_teacher_more(train_dataset)
        for field, rows in _named(train_dataset, eval_dataset) if self._teacher_prompts else ():
            check_columns(rows, (TEACHER_PROMPT,), field)
            check_filled(rows, (TEACHER_PROMPT,), field)
        first = None if teacher_field in adapters else teacher_model
        self._from_rows: list[dict[str, Any]] | None = None
        self._completion_ids: list[list[int]] | None = None
        self._warned_of_prefix = False
        self._noted: dict[str, Tensor] = {}
        super().__init__(model, first, args, train_dataset, eval_dataset, *positional, **keywords)
        if wanted:
            check(not self._is_vlm, "processing_class", "a processor", "a tokenizer: completions are text")
            check(not self.tools, "tools", self.tools, "left out: completions come from the data")
        self._teachers: list[Any] = []
        for field, teacher in given.items():
            if field in adapters:
                _freeze(self.accelerator.unwrap_model(self.model), teacher)
                self._teachers.append(teacher)
            elif field == teacher_field and teacher is None:
                adapted = isinstance(self.accelerator.unwrap_model(self.model), PeftModel)
                rule = "given where no adapter is trained: the same model once more, or its name"
                check(adapted, field, None, rule)
                self._teachers.append(None)
            elif field == teacher_field:
                self._check_loaded(self.teacher_model, field)
                self._teachers.append(self.teacher_model)
            elif teacher is not None:
                self._teachers.append(self._prepared(teacher, field))
        if self._teacher_prompts:
            check(not self._is_vlm, "processing_class", "a processor", f"a tokenizer, for {TEACHER_PROMPT}")
            for field, rows in _named(train_dataset, eval_dataset):
                self._check_teacher_room(rows, field)

    def _prepared(self, teacher: Any, field: str) -> Any:
        """Return a further teacher as TRL prepares the first."""
        if isinstance(teacher, str):
            settings = dict(self.args.teacher_model_init_kwargs or {})
            dtype = settings.get("dtype")
            settings["dtype"] = dtype if dtype in ("auto", None) else getattr(torch, dtype)
            settings.setdefault("trust_remote_code", self.args.trust_remote_code)
            if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                settings["device_map"] = None
            teacher = create_model_from_path(teacher, **settings)
        self._check_loaded(teacher, field)
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _check_loaded(self, teacher: Any, field: str) -> None:
        check_vocabulary(
            self.accelerator.unwrap_model(self.model), self.accelerator.unwrap_model(teacher), field
        )

    # What a method overrides ----------------------------------------------------------------------

    @classmethod
    def completion_sources(cls, args: Any) -> tuple[str, ...]:
        """Return where completions come from in a run: "student" (sampled), "dataset", or both."""
        return ("student",)

    def completion_source(self) -> str:
        """Return where the coming generation batch's completions come from."""
        return self.completion_sources(self.args)[0]

    def divergence(self) -> float:
        """Return TRL's `beta` for the coming loss: 0 is KL(teacher || student), 1 KL(student || teacher)."""
        return self.args.beta

    def loss_reduction(self) -> str:
        """Return "token", the mean over tokens, or "sequence", the mean over completions of their means."""
        return "token"

    def composes(self) -> bool:
        """Return whether `target` is used; if not, the target is the first teacher."""
        return False

    @abstractmethod
    def target(self, teachers: Sequence[Tensor], student: Tensor) -> Target:
        """Return the target of n positions, for the KL(student || target).

        Args:
            teachers: Logits (n, V) of each, fp32.
            student: Log-probabilities (n, V) at the run's temperature, fp32, without gradients.
        """

    def row_weights(self, rows: Sequence[Mapping[str, Any]]) -> Tensor | None:
        """Return the factors (B,) of the rows' divergences, or None for 1."""
        return None

    # Completions ----------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        self._from_rows = inputs if self.completion_source() == "dataset" else None
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self._from_rows = self._completion_ids = None
        if self._teacher_prompts:
            output |= self._padded_teacher_prompts([row[TEACHER_PROMPT] for row in inputs])
        weights = self.row_weights(inputs)
        if weights is not None:
            output["row_weights"] = weights.to(self.accelerator.device, torch.float32)
        if self.loss_reduction() == "sequence":
            filled = (_loss_mask(output).sum(dim=1) > 0).sum()
            gathered: Any = self.accelerator.gather(filled)
            output["num_rows_in_batch"] = gathered.sum()
        return output

    def _check_teacher_room(self, rows: Any, field: str) -> None:
        """Raise if a teacher's prompt leaves no room for a completion; a stream is not read."""
        models = [self.model if one is None or isinstance(one, str) else one for one in self._teachers]
        configs = [self.accelerator.unwrap_model(model).config.get_text_config() for model in models]
        limits = [getattr(config, "max_position_embeddings", None) for config in configs]
        limit = min((value for value in limits if value is not None), default=None)
        longest = self.args.max_completion_length
        if limit is None or longest is None or not hasattr(rows, "__len__"):
            return
        for row, ids in enumerate(super()._tokenize_prompts(list(rows[TEACHER_PROMPT]))[0]):
            if len(ids) + longest > limit:
                raise ValueError(
                    f"{field}: {TEACHER_PROMPT!r} of row {row} has {len(ids)} tokens; with "
                    f"max_completion_length={longest} the teacher's {limit} positions leave room for "
                    f"{limit - longest}"
                )

    def _padded_teacher_prompts(self, prompts: list[Any]) -> dict[str, Tensor]:
        """Return token ids (B, P) and mask (B, P) of the teachers' prompts, padded on the left."""
        ids = super()._tokenize_prompts(prompts)[0]
        width, device = max(map(len, ids)), self.accelerator.device
        padding = self._tokenizer.pad_token_id
        return {
            "teacher_prompt_ids": torch.tensor(
                [[padding] * (width - len(row)) + list(row) for row in ids], device=device
            ),
            "teacher_prompt_mask": torch.tensor(
                [[0] * (width - len(row)) + [1] * len(row) for row in ids], device=device
            ),
        }

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        prompt_ids, images, multimodal = super()._tokenize_prompts(prompts)
        if self._from_rows is None:
            return prompt_ids, images, multimodal
        pairs = [self._tokenized(row, ids) for row, ids in zip(self._from_rows, prompt_ids, strict=True)]
        self._completion_ids = [completion for _, completion in pairs]
        return [prompt for prompt, _ in pairs], images, multimodal

    def _tokenized(self, row: Mapping[str, Any], prompt_ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Return prompt and completion of a row as TRL's SFT and DPO cut them: where their tokens part."""
        completion: Any = next((row[name] for name in COMPLETIONS if row.get(name)), None)
        check(
            completion is not None, "a row's completion", completion, "filled", where=repr(row["prompt"])[:80]
        )
        if is_conversational({"prompt": row["prompt"]}):
            template: Any = self.chat_template_kwargs
            whole = self.processing_class.apply_chat_template(
                row["prompt"] + completion,
                tokenize=True,
                return_dict=True,
                chat_template=self.chat_template,
                **template,
            )["input_ids"]
        else:
            end = str(self._tokenizer.eos_token)
            text = row["prompt"] + completion.removesuffix(end) + end
            whole = self.processing_class(text=text)["input_ids"]
        shared = common_prefix_length(list(prompt_ids), whole)
        if shared < len(prompt_ids) and not self._warned_of_prefix:
            self._warned_of_prefix = True
            logger.warning(
                "the tokens of a prompt are not the first ones of prompt and completion together; the "
                "completion starts where they part, and this end of the prompt is left out: %r",
                self._tokenizer.decode(list(prompt_ids[shared:])),
            )
        rest = list(whole[shared:])[: self.args.max_completion_length]
        check(
            shared > 0 and bool(rest), "a row's completion", row, "at least one token after one of a prompt"
        )
        return list(whole[:shared]), rest

    def _generate_single_turn(
        self, prompt_ids: Any, images: Any, multimodal_fields: Any, has_tool_images: bool = False
    ) -> Any:
        if self._completion_ids is not None:
            return self._completion_ids
        return super()._generate_single_turn(prompt_ids, images, multimodal_fields, has_tool_images)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        kept = [*(self._signature_columns or [])]
        self._signature_columns = kept + [
            name for name in (*COMPLETIONS, TEACHER_PROMPT, ROW) if name not in kept
        ]

    # Order and random state -----------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return EpochSampler(super()._get_train_sampler(dataset), lambda: self.state.global_step)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate as TRL does, and leave the random state as it was."""
        device = self.accelerator.device
        forked = [] if device.type in ("cpu", "mps") else [device]
        with torch.random.fork_rng(forked, device_type=device.type if forked else "cuda"):
            return super().evaluate(*args, **kwargs)

    # The loss -------------------------------------------------------------------------------------

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return TRL's loss, with the method's target and weights, and record its metrics."""
        self.beta, self._noted = self.divergence(), {}
        if self.model.training and "num_rows_in_batch" in inputs:
            rows = inputs["num_rows_in_batch"].clamp(min=1) / self.accelerator.num_processes
            inputs = {**inputs, "rows_per_process": rows}
        done = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # Here, as a collective within the wrapped forward could hang.
        self.record(self._noted)  # type: ignore[attr-defined]  # of MethodTrainer
        return done

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        plain = not self.composes() and "row_weights" not in inputs and self.loss_reduction() == "token"
        own_teacher = self._teachers[0] is None or isinstance(self._teachers[0], str)
        if plain and not own_teacher and "teacher_prompt_ids" not in inputs:
            return super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        # The teachers first: an adapter among them is made active, which touches the student's parameters.
        used = self._teachers if self.composes() else self._teachers[:1]
        teachers = [self._teacher_states(teacher, unwrapped_student, inputs) for teacher in used]
        student = States(self._hidden(unwrapped_student, inputs), _whole_head(unwrapped_student))
        device = student.head.weight.device
        mask = _loss_mask(inputs).to(device) != 0  # (B, T)
        places = mask.nonzero()[:, 0]  # the row of each completion token
        own, *others = [States(s.hidden.to(device)[mask], s.head) for s in (student, *teachers)]
        for other in others:
            rule = f"on {device}, where the student's is"
            check(other.head.weight.device == device, "a teacher's lm_head", other.head.weight.device, rule)
        if self.composes():
            divergence, entropy = self._composed(own, others)
        else:
            divergence, entropy = _by_kernel(own, others[0], self.beta, self.temperature)
        if "row_weights" in inputs:
            divergence = divergence * inputs["row_weights"].to(device)[places]
        lengths = mask.sum(dim=1)
        if self.loss_reduction() == "sequence":
            divergence = divergence / lengths[places]
            total = inputs.get("rows_per_process", (lengths > 0).sum().clamp(min=1))
        else:
            total = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        total = total.to(device) if isinstance(total, Tensor) else total
        return divergence.sum() / total, entropy.detach().sum(), mask.sum()

    def _hidden(self, model: Any, inputs: Mapping[str, Any]) -> Tensor:
        """Return the head's inputs (B, T, H) at the completion tokens."""
        return self._get_last_hidden_state(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            **{name: inputs[name] for name in _MULTIMODAL if name in inputs},
        )

    def _teacher_states(self, teacher: Any, student: Any, inputs: Mapping[str, Any]) -> States:
        if "teacher_prompt_ids" in inputs:
            shown = {f"prompt_{name}": inputs[f"teacher_prompt_{name}"] for name in ("ids", "mask")}
            inputs = {**inputs, **shown}
        if teacher is None or isinstance(teacher, str):
            kept = disable_gradient_checkpointing(student, self.args.gradient_checkpointing_kwargs)
            with torch.no_grad(), kept, use_adapter(student, teacher), evaluation_mode(student):
                return States(self._hidden(student, inputs), _whole_head(student, detach=True))
        teacher.eval()
        unwrapped = self.accelerator.unwrap_model(teacher)
        with torch.no_grad():
            # Through the wrapper, which brings sharded parameters together.
            hidden = self._forward_redirection(teacher, unwrapped, self._hidden, unwrapped, inputs)
            return States(hidden, _whole_head(unwrapped, detach=True))

    def _composed(self, student: States, teachers: Sequence[States]) -> tuple[Tensor, Tensor]:
        """Return the weighted KL(student || target) and the student's entropy, (N,) each."""
        models = (student, *teachers)
        sharded: Any = [x for one in models for x in (one.head.weight, one.head.bias)]
        # By DeepSpeed's stage 3; what is gathered here stays for as long as an operand refers to it.
        with maybe_gather_lm_head_ctx(*sharded):
            heads = [Projection.of(states) for states in models]
        stored: dict[str, Tensor] = {}
        count = len(student.hidden)

        def piece(hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            log_p = F.log_softmax(heads[0](hidden) / self.temperature, dim=-1)
            with torch.no_grad():
                logits = [head(states.hidden[rows]) for head, states in zip(heads[1:], teachers, strict=True)]
                wanted = self.target(logits, log_p.detach())
                for name, values in wanted.metrics.items():
                    stored.setdefault(name, values.new_zeros(count))[rows] = values
                log_t = F.log_softmax(wanted.logits / self.temperature, dim=-1)
            divergence = (log_p.exp() * (log_p - log_t)).sum(-1)
            if wanted.token_weights is not None:
                divergence = divergence * wanted.token_weights
            return divergence, -(log_p.detach().exp() * log_p.detach()).sum(-1)

        size = max(1, _PIECE // student.head.weight.size(0))
        parts = []
        device_type = student.hidden.device.type
        with torch.autocast(device_type, enabled=False):
            for start in range(0, max(count, 1), size):  # also once without tokens: for the gradients of DDP
                rows = slice(start, min(start + size, count))
                parts.append(checkpoint(piece, student.hidden[rows], rows, use_reentrant=False))
        self._noted = {name: _summary(name, values) for name, values in stored.items()}
        found = [torch.cat(values) for values in zip(*parts, strict=True)]
        return found[0], found[1]


class EpochSampler(Sampler):
    """Orders rows as TRL's sampler does, and in a resumed run as in the epoch that it goes on with.

    Args:
        inner: TRL's sampler, whose permutations follow each other.
        step: Gives the optimizer step.
    """

    def __init__(self, inner: Any, step: Callable[[], int]) -> None:
        self.inner, self.step = inner, step

    def __iter__(self) -> Iterator[int]:
        per_epoch = max(len(self.inner) // (self.inner.batch_size * self.inner.repeat_count), 1)
        if self.inner.shuffle:
            self.inner.generator.manual_seed(self.inner.seed)
            for _ in range(self.step() // per_epoch):
                torch.randperm(self.inner.num_samples, generator=self.inner.generator)
        return iter(self.inner)

    def __len__(self) -> int:
        return len(self.inner)


# Logits -----------------------------------------------------------------------------------------------------


class Projection:
    """A head that gives logits in fp32, whatever the precision of its operands.

    Args:
        head: The head.
        dtype: Of the operands.
    """

    def __init__(self, head: Head, dtype: torch.dtype) -> None:
        self.head = head
        self.operand = head.weight.detach().to(dtype)  # once, not for each piece
        self.bias = None if head.bias is None else head.bias.detach().float()

    @classmethod
    def of(cls, states: States) -> Projection:
        """Return the head of a model as it computes: in autocast's precision, or in that of its states."""
        kind = states.hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else states.hidden.dtype
        return cls(states.head, dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return logits (n, V) for hidden states (n, H)."""
        given = (self.head.weight, self.head.bias, self.operand, self.bias)
        logits: Any = _Project.apply(hidden, *given)
        logits = logits * self.head.scale
        if self.head.softcap is not None:
            logits = self.head.softcap * torch.tanh(logits / self.head.softcap)
        return logits


class _Project(torch.autograd.Function):
    """hidden (n, H) times weight (V, H) transposed, plus bias (V,) if any, in fp32.

    `weight` and `bias` take the gradients alone; what is computed with are `operand`, the weight in another
    precision, and `added`, the bias in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, operand: Tensor, added: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(hidden, operand)
        ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
        logits = _product(hidden.to(operand.dtype), operand.t())
        return logits if added is None else logits + added

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, operand = ctx.saved_tensors
        of_weight = of_bias = None
        if ctx.needs_input_grad[2]:
            of_bias = grad.sum(0).to(ctx.dtypes[1])
        grad = grad.to(operand.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = _product(grad.t(), hidden.to(operand.dtype)).to(ctx.dtypes[0])
        return _product(grad, operand).to(hidden.dtype), of_weight, of_bias, None, None


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.is_cuda and a.dtype in (torch.float16, torch.bfloat16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.mm(a.float(), b.float())


def _by_kernel(student: States, teacher: States, beta: float, temperature: float) -> tuple[Tensor, Tensor]:
    """Return TRL's divergence and the student's entropy, (N,) each, for hidden states (N, H)."""
    own, other = student.head, teacher.head
    # Its parameters are named in TRL's order, as an autograd function takes no names.
    found: Any = ChunkedDivergenceFunction.apply(
        student.hidden,
        own.weight,
        own.bias,
        teacher.hidden,
        other.weight,
        other.bias,
        beta,
        temperature,
        own.scale,
        own.softcap,
        other.scale,
        other.softcap,
    )
    return found


def _whole_head(model: Any, *, detach: bool = False) -> Head:
    """Return a model's head, with FSDP's shards brought together."""
    head = Head.of(model, detach=detach)
    bias = None if head.bias is None else dist.full_tensor(head.bias)
    return Head(dist.full_tensor(head.weight), bias, head.scale, head.softcap)


def _loss_mask(inputs: Mapping[str, Any]) -> Tensor:
    mask = inputs["completion_mask"]
    return mask if inputs.get("tool_mask") is None else mask * inputs["tool_mask"]


def _summary(name: str, values: Tensor) -> Tensor:
    if not len(values):
        return values.new_tensor(torch.nan)
    return values.amax() if name.endswith("_max") else values.mean()


# Adapters and data ------------------------------------------------------------------------------------------


def _adapters_among(given: Mapping[str, Any], model: Any) -> set[str]:
    """Return the arguments that name an adapter of the model."""
    if not isinstance(model, PeftModel):
        return set()
    return {field for field, one in given.items() if isinstance(one, str) and one in model.peft_config}


def _check_teachers(given: Mapping[str, Any], model: Any) -> None:
    """Raise if a teacher is trained too, or has another vocabulary; what is a path is checked once loaded."""
    for field in _adapters_among(given, model):
        unused = given[field] not in model.active_adapters
        check(unused, field, given[field], "another adapter than the one that is trained")
    for field, teacher in given.items():
        if isinstance(teacher, nn.Module) and isinstance(model, nn.Module):
            check_vocabulary(model, teacher, field)
            refuse_trained_reference(model, teacher, field)


def _freeze(model: Any, adapter: str) -> None:
    for name, parameter in model.named_parameters():
        if adapter in name.split("."):
            parameter.requires_grad_(False)


def shows_teacher_more(dataset: Any) -> bool:
    """Return whether rows say what the teacher is shown; by the first one where they stream."""
    names = getattr(dataset, "column_names", None)
    if names is None:
        names = next(iter(dataset), None) or () if dataset is not None else ()
    return TEACHER_PROMPT in names


def _named(train_dataset: Any, eval_dataset: Any) -> list[tuple[str, Any]]:
    """Return the data sets that are given, with the names that errors use."""
    found = [("train_dataset", train_dataset)]
    if isinstance(eval_dataset, dict):
        found += [(f"eval_dataset[{name!r}]", rows) for name, rows in eval_dataset.items()]
    else:
        found.append(("eval_dataset", eval_dataset))
    return [(name, rows) for name, rows in found if rows is not None]


def check_rows(dataset: Any, field: str, *, completions: bool) -> None:
    """Raise unless the rows have prompts, and completions where they are wanted, none of them empty.

    Raises:
        ValueError: A column is missing, or a text is empty; the text names column and row.
    """
    check_columns(dataset, ("prompt",), field)
    check_filled(dataset, ("prompt",), field)
    if not completions:
        return
    first = next(iter(dataset))
    column = next((name for name in COMPLETIONS if name in first), None)
    if column is None:
        raise ValueError(
            f"{field} lacks the column 'completion' or 'chosen', which completions are taken from; it has: "
            f"{', '.join(map(repr, first))}"
        )
    check_filled(dataset, (column,), field)
