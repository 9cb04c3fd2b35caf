"""Online iterative DPO: rounds of sampling, scoring, pairing and DPO, on fresh prompts.

Source: "RLHF Workflow: From Reward Modeling to Online RLHF" (arXiv:2405.07863), Algorithm 1 and section 4:
from the policy of round t, n completions of each of the round's prompts are scored by a reward; the best and
the worst are a pair; DPO on the pairs gives the next policy. The pool of n completions stands for the paper's
enhancer, whose distance from the policy is bounded by KL(best of n || policy) <= log n - (n - 1) / n.

Differs from the paper as its published scripts do: a round trains on its own pairs (`accumulate_rounds` takes
all so far), and the DPO reference is the policy that the round begins with (`reference="initial"` keeps the
first one, as the theory has it). `label_smoothing`, which TRL's "sigmoid" loss ignores, is honored:
conservative DPO is written as a sum of two of TRL's losses. The length penalty counts tokens, not characters.
Completions are kept as token ids and are never tokenized again.
"""

from __future__ import annotations

from dataclasses import dataclass

from ._base import Inputs, register_trainer
from ._pairs import Pairs, best_of_n_kl, select_pairs
from ._rounds import RoundsConfig, RoundsTrainer

__all__ = ["OnlineIterativeDPOConfig", "OnlineIterativeDPOTrainer", "Pairs", "best_of_n_kl", "select_pairs"]


@dataclass
class OnlineIterativeDPOConfig(RoundsConfig):
    """Settings of `OnlineIterativeDPOTrainer`: those of TRL's DPO, for each round, and those of rounds.

    The paper's scripts use learning_rate 5e-7, two epochs, a cosine schedule and batches of 128.
    """


@register_trainer(
    "online_iterative_dpo",
    summary="rounds of sample, score, pair and DPO on fresh prompts, resumable anywhere",
    title="RLHF Workflow: From Reward Modeling to Online RLHF",
    paper="arXiv:2405.07863",
    config=OnlineIterativeDPOConfig,
    inputs=Inputs(columns=(("prompt",),), reward=True, test_columns=(("prompt", "chosen", "rejected"),)),
    neutral=None,
    supports={"generates", "rounds"},
    test_kwargs={"num_rounds": 2, "num_candidates": 3, "kl_prompts": 2},
    bad_kwargs=(
        {"num_rounds": 0},
        {"num_candidates": 1},
        {"pair_selection": "best"},
        {"length_penalty": 0.1},
        {"min_margin": -1.0},
        {"missing_eos_penalty": -0.5},
        {"temperatures": []},
        {"temperatures": [1.0, 0.0]},
        {"mix_previous_policy": 1.0},
        {"reference": "last"},
        {"prompts_per_round": 0},
        {"min_pairs": 0},
        {"reward_weights": [1.0, 2.0]},
        {"kl_prompts": -1},
        {"sampling_top_p": 0.0},
        {"sync_ref_model": True},
        {"label_smoothing": 0.5},
    ),
)
class OnlineIterativeDPOTrainer(RoundsTrainer):
    """TRL's DPOTrainer in rounds on pairs that it makes itself; arguments as `RoundsTrainer`.

    Example:
        >>> from hf_ext.data import load_prompts, reward_function
        >>> from hf_ext.trainers import OnlineIterativeDPOConfig, OnlineIterativeDPOTrainer
        >>> trainer = OnlineIterativeDPOTrainer(
        ...     model="Qwen/Qwen2.5-0.5B-Instruct",
        ...     args=OnlineIterativeDPOConfig("out", num_rounds=3, num_candidates=8),
        ...     train_dataset=load_prompts("addition"),
        ...     reward_funcs=reward_function("addition"),
        ... )
        >>> trainer.train()
    """
