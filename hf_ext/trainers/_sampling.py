"""Completions of the policy in training, by transformers or vLLM.

With transformers a draw depends on `seed`, on the prompt's place in the list and on the completion's number
alone: each has a generator of its own, from which one uniform number for each token picks the token by the
inverse of the cumulative distribution. Batches are made of the whole list and then dealt to the processes, so
that their number changes nothing, to the bit. The global random state is neither read nor moved. (Another
`batch_size` pads otherwise, which changes probabilities by rounding, and a token once in some million.)

vLLM draws from the random state of its engines, which `seed` does not set: its draws differ from run to run.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .._compat.trl import (
    VLLMGeneration,
    is_conversational,
    is_vllm_available,
    unwrap_model_for_generation,
)
from ..core import dist
from ..core.checks import check, check_choice
from ._base import place_for_deepspeed, zero_stage
from ._reference import evaluation_mode

Prompt = str | list[dict[str, Any]]

# Generation settings that this module owns: given in `generation_kwargs` they would be silently overruled.
_OWN = frozenset(
    {
        *(
            "do_sample",
            "num_beams",
            "num_return_sequences",
            "max_new_tokens",
            "max_length",
            "max_tokens",
            "n",
        ),
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "logits_processor"),
        *("pad_token_id", "eos_token_id", "cache_implementation", "return_dict_in_generate"),
    }
)


@dataclass(kw_only=True)
class VLLMArguments:
    """The fields of a config that have completions made by vLLM, named as TRL's trainers name them.

    Args:
        use_vllm: Sample with vLLM instead of transformers.
        vllm_mode: "colocate" for an engine in each training process, or "server".
        vllm_model_impl: vLLM's implementation of the model, "vllm" or "transformers".
        vllm_enable_sleep_mode: Free the engine's memory between calls (colocate).
        vllm_structured_outputs_regex: Expression that completions must match.
        vllm_server_base_url: Address of the server; takes the place of host and port.
        vllm_server_host: Host of the server.
        vllm_server_port: Port of the server.
        vllm_server_timeout: Seconds to wait for the server.
        vllm_group_port: Port over which weights are sent to the server.
        vllm_gpu_memory_utilization: Share of a GPU's memory for the engine (colocate).
        vllm_max_model_length: Longest prompt with its completion, in tokens.
        vllm_tensor_parallel_size: GPUs for an engine (colocate).
    """

    use_vllm: bool = field(default=False, metadata={"help": "Sample with vLLM instead of transformers."})
    vllm_mode: str = field(default="colocate", metadata={"help": "'colocate' or 'server'."})
    vllm_model_impl: str = field(default="vllm", metadata={"help": "'vllm' or 'transformers'."})
    vllm_enable_sleep_mode: bool = field(
        default=False, metadata={"help": "Free the engine's memory between calls (colocate)."}
    )
    vllm_structured_outputs_regex: str | None = field(
        default=None, metadata={"help": "Expression that completions must match."}
    )
    vllm_server_base_url: str | None = field(default=None, metadata={"help": "Address of the server."})
    vllm_server_host: str = field(default="0.0.0.0", metadata={"help": "Host of the server."})
    vllm_server_port: int = field(default=8000, metadata={"help": "Port of the server."})
    vllm_server_timeout: float = field(default=240.0, metadata={"help": "Seconds to wait for the server."})
    vllm_group_port: int = field(
        default=51216, metadata={"help": "Port over which weights are sent to the server."}
    )
    vllm_gpu_memory_utilization: float = field(
        default=0.3, metadata={"help": "Share of a GPU's memory for the engine (colocate)."}
    )
    vllm_max_model_length: int | None = field(
        default=None, metadata={"help": "Longest prompt with its completion, in tokens."}
    )
    vllm_tensor_parallel_size: int = field(default=1, metadata={"help": "GPUs for an engine (colocate)."})


@dataclass(kw_only=True)
class SamplingSettings(VLLMArguments):
    """How completions are drawn; the fields on vLLM are those of `VLLMArguments`.

    Args:
        max_new_tokens: Longest completion, in tokens, at least 1.
        temperature: Divides the logits; 0 takes the most likely token each time.
        top_p: Keep the likeliest tokens up to this total probability, in (0, 1].
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        min_p: Keep tokens with at least this share of the likeliest one's probability, or None.
        repetition_penalty: Divides the logit of a token already seen (multiplies a negative one); 1 for none.
        batch_size: Completions drawn at once on a process.
        cache_implementation: transformers' cache of keys and values, or None for the model's own.
        generation_kwargs: More settings for transformers' `GenerationConfig`, or vLLM's `SamplingParams`.

    Raises:
        ValueError: A field is outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0
    batch_size: int = 32
    cache_implementation: str | None = None
    generation_kwargs: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        check(self.max_new_tokens >= 1, "max_new_tokens", self.max_new_tokens, "at least 1")
        check(self.temperature >= 0, "temperature", self.temperature, "at least 0")
        check(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        check(self.top_k >= 0, "top_k", self.top_k, "at least 0 (0 keeps all tokens)")
        check(self.min_p is None or 0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 to 1, or None")
        check(self.repetition_penalty > 0, "repetition_penalty", self.repetition_penalty, "positive")
        check(self.batch_size >= 1, "batch_size", self.batch_size, "at least 1")
        check_choice("vllm_mode", self.vllm_mode, ("colocate", "server"))
        own = sorted(_OWN & set(self.generation_kwargs or {}))
        check(not own, "generation_kwargs", own, "settings that have no field of their own")

    @classmethod
    def of(cls, args: Any, **settings: Any) -> SamplingSettings:
        """Return settings with the vLLM fields of a config that has them.

        Args:
            args: A trainer's config.
            **settings: The other fields.
        """
        vllm = {
            name.name: getattr(args, name.name) for name in fields(VLLMArguments) if hasattr(args, name.name)
        }
        return cls(**{**vllm, **settings})


class Sampler:
    """Draws completions from a trainer's current policy.

    Made after the trainer's own construction. With vLLM the engine is made here.

    Args:
        trainer: A transformers Trainer of a causal language model, with a tokenizer.
        settings: How to draw.

    Raises:
        ImportError: vLLM is asked for and not installed.
        TypeError: The trainer's processing class is not a tokenizer.
    """

    def __init__(self, trainer: Any, settings: SamplingSettings) -> None:
        self.trainer, self.settings = trainer, settings
        self.tokenizer = tokenizer_of(trainer)
        self.pad_token_id = self.tokenizer.pad_token_id
        if self.pad_token_id is None:
            self.pad_token_id = self.tokenizer.eos_token_id
        self.vllm: Any = None
        if settings.use_vllm:
            if not is_vllm_available():
                raise ImportError(
                    "use_vllm=True needs vLLM, which is not installed; install it with pip install "
                    "'trl[vllm]', or set use_vllm=False to sample with transformers"
                )
            self.vllm = self._engine()

    def completions(
        self,
        prompt_ids: Sequence[Sequence[int]],
        n: int,
        *,
        temperature: float | None = None,
        seed: int | None = None,
        model: nn.Module | None = None,
        names: Sequence[str] | None = None,
    ) -> list[list[list[int]]]:
        """Return n completions for each prompt, on every process all of them (a collective).

        Args:
            prompt_ids: Prompts as token ids; equal on all processes.
            n: Completions for each prompt, at least 1.
            temperature: In place of the settings'.
            seed: Draws are a function of it, of the prompt's place and of the completion's number. None for
                one made of the run's seed and of the optimizer step. Not used by vLLM.
            model: Another model than the trainer's to draw from, such as its reference; not with vLLM.
            names: What errors call the prompts; None for "prompt 0" and so on.

        Returns:
            For each prompt n lists of token ids: the end-of-text token last where the model wrote it, nothing
            after it, and no padding.

        Raises:
            ValueError: A prompt is empty, or too long for the model; or the logits are not finite.
        """
        check(n >= 1, "the number of completions", n, "at least 1")
        settings = self.settings
        temperature = settings.temperature if temperature is None else temperature
        check(temperature >= 0, "temperature", temperature, "at least 0")
        prompts = [list(ids) for ids in prompt_ids]
        # DeepSpeed's wrapper has a `config` of its own.
        bare = self.trainer.accelerator.unwrap_model(self.trainer.model if model is None else model)
        self._check_prompts(prompts, bare, names)
        if not prompts:
            return []
        if self.vllm is not None:
            check(model is None, "model", type(model).__name__, "left out with use_vllm")
            return self._with_vllm(prompts, n, temperature)
        if seed is None:
            seed = seed_of(self.trainer.args.seed, self.trainer.state.global_step)
        return self._with_transformers(prompts, n, temperature, seed, model)

    # transformers ---------------------------------------------------------------------------------

    def _with_transformers(
        self, prompts: list[list[int]], n: int, temperature: float, seed: int, model: nn.Module | None
    ) -> list[list[list[int]]]:
        rows = [(prompt, number) for prompt in range(len(prompts)) for number in range(n)]
        rows.sort(key=lambda row: len(prompts[row[0]]))  # stable: little padding, and one order everywhere
        size = self.settings.batch_size
        batches = [rows[start : start + size] for start in range(0, len(rows), size)]
        mine = range(dist.rank(), len(batches), dist.world_size())
        rounds = -(-len(batches) // dist.world_size())
        drawn: dict[tuple[int, int], list[int]] = {}
        with dist.together(), self._model(model) as (policy, synced):
            for turn in range(rounds):
                # Sharded weights are gathered within each call: processes without a batch repeat one.
                batch = batches[mine[turn] if turn < len(mine) else 0]
                if turn >= len(mine) and not synced:
                    continue
                seeds = [seed_of(seed, *row) for row in batch]
                found = self._generate(policy, [prompts[p] for p, _ in batch], seeds, temperature, synced)
                if turn < len(mine):
                    drawn.update(zip(batch, found, strict=True))
        everything: dict[tuple[int, int], list[int]] = {}
        for part in dist.gather_objects(drawn):
            everything.update(part)
        return [[everything[prompt, number] for number in range(n)] for prompt in range(len(prompts))]

    @contextlib.contextmanager
    def _model(self, model: nn.Module | None) -> Generator[tuple[Any, bool]]:
        """Yield the bare model in evaluation mode, and whether processes have to call it together."""
        trainer, args = self.trainer, self.trainer.args
        place_for_deepspeed(trainer)
        wrapped = trainer.model_wrapped if model is None else model
        # Stage 3 has collectives in a forward of gathered weights too, until it knows the order of modules.
        synced = dist.is_distributed() and (trainer.is_fsdp_enabled or zero_stage(trainer) == 3)
        summoned: Any = contextlib.nullcontext()
        if isinstance(wrapped, FullyShardedDataParallel):  # generation does not enter the root's own forward
            summoned = FullyShardedDataParallel.summon_full_params(wrapped, recurse=False)
        with (
            unwrap_model_for_generation(
                wrapped,  # pyright: ignore[reportArgumentType]
                trainer.accelerator,
                gather_deepspeed3_params=getattr(args, "ds3_gather_for_generation", True),
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
            ) as policy,
            torch.no_grad(),
            summoned,
            evaluation_mode(policy),
        ):
            yield policy, synced

    def _generate(
        self, model: Any, prompts: list[list[int]], seeds: list[int], temperature: float, synced: bool
    ) -> list[list[int]]:
        longest = max(map(len, prompts))
        device = next(model.parameters()).device
        padded = [[self.pad_token_id] * (longest - len(ids)) + ids for ids in prompts]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts]
        attention_mask = torch.tensor(mask, device=device)
        ends = end_tokens(model, self.tokenizer)
        settings = self.settings
        draw = _Draw(settings, temperature, seeds, attention_mask)
        config = GenerationConfig(
            # The draw itself is a logits processor that leaves one token. Each of these is stated, as what is
            # not is taken from the model's own generation config.
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            temperature=1.0,
            top_p=1.0,
            top_k=50,  # the default, as any other would be warned of
            repetition_penalty=1.0,
            max_new_tokens=settings.max_new_tokens,
            pad_token_id=self.pad_token_id,
            bos_token_id=self.tokenizer.bos_token_id,
            eos_token_id=ends,
            cache_implementation=settings.cache_implementation,
            disable_compile=True,
            **(settings.generation_kwargs or {}),
        )
        out = model.generate(
            input_ids=torch.tensor(padded, device=device),
            attention_mask=attention_mask,
            generation_config=config,
            logits_processor=LogitsProcessorList([draw]),
            synced_gpus=synced,
        )
        return [_up_to_end(ids, ends) for ids in out[:, longest:].tolist()]

    # vLLM -----------------------------------------------------------------------------------------

    def _engine(self) -> Any:
        trainer, settings = self.trainer, self.settings
        return VLLMGeneration(
            model=trainer.model,
            accelerator=trainer.accelerator,
            processing_class=trainer.processing_class,
            mode=settings.vllm_mode,
            structured_outputs_regex=settings.vllm_structured_outputs_regex,
            server_base_url=settings.vllm_server_base_url,
            server_host=settings.vllm_server_host,
            server_port=settings.vllm_server_port,
            group_port=settings.vllm_group_port,
            server_timeout=settings.vllm_server_timeout,
            tensor_parallel_size=settings.vllm_tensor_parallel_size,
            gpu_memory_utilization=settings.vllm_gpu_memory_utilization,
            max_model_length=settings.vllm_max_model_length,
            max_num_seqs=settings.batch_size * settings.vllm_tensor_parallel_size,
            enable_sleep_mode=settings.vllm_enable_sleep_mode,
            model_impl=settings.vllm_model_impl,
            trust_remote_code=getattr(trainer.args, "trust_remote_code", False),
            repetition_penalty=settings.repetition_penalty,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,  # pyright: ignore[reportArgumentType] - None is turned into 0
            max_completion_length=settings.max_new_tokens,
            logprobs=None,
            generation_kwargs=None
            if settings.generation_kwargs is None
            else dict(settings.generation_kwargs),
        )

    def _with_vllm(self, prompts: list[list[int]], n: int, temperature: float) -> list[list[list[int]]]:
        # Contiguous shares of one size: a server cuts its answer by it, and engines of a group meet in it.
        share = -(-len(prompts) // dist.world_size())
        start = dist.rank() * share
        mine = [prompts[min(place, len(prompts) - 1)] for place in range(start, start + share)]
        self.vllm.sync_weights()
        self.vllm.temperature = temperature
        try:
            # A server takes each n-th row and answers n times; an engine in the process answers row by row.
            _, found, _, _ = self.vllm.generate(
                prompts=[ids for ids in mine for _ in range(n)], images=None, num_generations=n
            )
        finally:
            self.vllm.temperature = self.settings.temperature
        check(len(found) == share * n, "vLLM's answer", len(found), f"of {share * n} completions")
        ends = end_tokens(self.trainer.model, self.tokenizer)
        rows = [_up_to_end(list(ids), ends) for ids in found]
        parts = dist.gather_objects([rows[place * n : (place + 1) * n] for place in range(share)])
        return [group for part in parts for group in part][: len(prompts)]

    # Checks ---------------------------------------------------------------------------------------

    def _check_prompts(self, prompts: list[list[int]], model: Any, names: Sequence[str] | None) -> None:
        positions = getattr(_text_config(model), "max_position_embeddings", None)
        longest = None if positions is None else positions - self.settings.max_new_tokens
        for row, ids in enumerate(prompts):
            name = f"prompt {row}" if names is None else names[row]
            check(len(ids) > 0, name, ids, "at least one token long; it is empty")
            if longest is not None and len(ids) > longest:
                raise ValueError(
                    f"{name} has {len(ids)} tokens; with max_new_tokens={self.settings.max_new_tokens} "
                    f"the model's {positions} positions leave room for {longest}"
                )


class _Draw(LogitsProcessor):
    """Draws one token for each row, and leaves it as the only one that can be taken."""

    def __init__(
        self, settings: SamplingSettings, temperature: float, seeds: list[int], prompt_mask: Tensor
    ) -> None:
        self.penalty, self.prompt_mask = settings.repetition_penalty, prompt_mask
        self.greedy = temperature == 0
        self.warpers = LogitsProcessorList()
        if not self.greedy:
            if temperature != 1.0:
                self.warpers.append(TemperatureLogitsWarper(float(temperature)))
            if settings.top_k > 0:
                self.warpers.append(TopKLogitsWarper(settings.top_k))
            if settings.top_p < 1.0:
                self.warpers.append(TopPLogitsWarper(settings.top_p))
            if settings.min_p:
                self.warpers.append(MinPLogitsWarper(settings.min_p))
        # MPS has no fp64.
        self.dtype = torch.float32 if prompt_mask.device.type == "mps" else torch.float64
        self.uniform = torch.stack([_uniform(seed, settings.max_new_tokens) for seed in seeds])
        self.uniform = self.uniform.to(prompt_mask.device, self.dtype)  # (rows, max_new_tokens)

    # Further parameters would be demanded of each call.
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # pyright: ignore
        scores = scores.float()
        step = input_ids.size(1) - self.prompt_mask.size(1)
        if self.penalty != 1.0:
            scores = self._penalized(input_ids, scores, step)
        if self.greedy:
            chosen = scores.argmax(dim=-1, keepdim=True)
            sound = scores.amax(dim=-1)
        else:
            warped: Tensor = self.warpers(input_ids, scores)  # pyright: ignore[reportArgumentType]
            cumulative = torch.softmax(warped.to(self.dtype), dim=-1).cumsum(dim=-1)
            sound = cumulative[:, -1]
            # The first token whose cumulative probability exceeds the number: never one of probability 0.
            at = self.uniform[:, step, None] * cumulative[:, -1:]
            chosen = torch.searchsorted(cumulative, at, right=True).clamp(max=scores.size(-1) - 1)
        if not torch.isfinite(sound).all():
            raise ValueError("the model's logits are not finite; nothing can be drawn from it")
        return torch.full_like(scores, -torch.inf).scatter_(1, chosen, 0.0)

    def _penalized(self, input_ids: Tensor, scores: Tensor, step: int) -> Tensor:
        # transformers' own penalty would count the padding before short prompts as seen.
        real = torch.cat([self.prompt_mask, self.prompt_mask.new_ones(len(scores), step)], dim=1)
        seen = torch.zeros_like(scores).scatter_add_(1, input_ids, real.to(scores.dtype)) > 0
        penalized = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(seen, penalized, scores)


def _uniform(seed: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, generator=generator, dtype=torch.float64)


def seed_of(*numbers: int) -> int:
    """Return a seed of 63 bits made of whole numbers: neighbors give unrelated ones."""
    text = "/".join(map(str, numbers)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def _up_to_end(ids: list[int], ends: Iterable[int]) -> list[int]:
    stop = set(ends)
    return ids[: next((place + 1 for place, token in enumerate(ids) if token in stop), len(ids))]


def _text_config(model: Any) -> Any:
    return model.config.get_text_config()


def tokenizer_of(trainer: Any) -> Any:
    """Return a trainer's tokenizer.

    Raises:
        TypeError: It has a processor of images or sound.
    """
    tokenizer = trainer.processing_class
    if hasattr(tokenizer, "tokenizer"):
        raise TypeError(
            f"processing_class is a {type(tokenizer).__name__}; completions are drawn for text alone, give a "
            "tokenizer"
        )
    return tokenizer


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """Return every token that ends a completion: the tokenizer's, and those that the model declares."""
    declared = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    found = [declared] if isinstance(declared, int) else list(declared or [])
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in found:
        found.insert(0, tokenizer.eos_token_id)
    return found


# Prompts and completions as text ----------------------------------------------------------------------------


def tokenize_prompts(
    tokenizer: Any,
    prompts: Iterable[Prompt],
    *,
    tools: Any = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[list[int]]:
    """Return the token ids of prompts as TRL's DPO makes them: a chat's with the start of an answer.

    Args:
        tokenizer: The tokenizer.
        prompts: Texts, or lists of messages.
        tools: Tools for the chat template.
        chat_template_kwargs: More settings for the chat template.
    """
    found: list[list[int]] = []
    for prompt in prompts:
        if isinstance(prompt, str):
            found.append(list(tokenizer(text=prompt)["input_ids"]))
        else:
            settings = {"tools": tools, **(chat_template_kwargs or {})}
            encoded = tokenizer.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True, **settings
            )
            found.append(list(encoded["input_ids"]))
    return found


def decode_completions(
    tokenizer: Any, prompts: Sequence[Prompt], completion_ids: Sequence[Sequence[Sequence[int]]]
) -> list[list[Any]]:
    """Return completions as reward functions and data sets take them.

    Args:
        tokenizer: The tokenizer.
        prompts: The prompts (P), texts or lists of messages.
        completion_ids: (P, n) lists of token ids.

    Returns:
        (P, n) texts without special tokens; for a chat, one message of the assistant in a list for each.
    """
    texts = [
        [tokenizer.decode(list(ids), skip_special_tokens=True) for ids in group] for group in completion_ids
    ]
    return [
        [[{"role": "assistant", "content": text}] for text in group]
        if is_conversational({"prompt": prompt})
        else list(group)
        for prompt, group in zip(prompts, texts, strict=True)
    ]
