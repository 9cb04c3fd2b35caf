"""Names and seams of TRL without a stability promise, checked on 1.16.

A trainer of ours that overrides a private method of TRL's has the method's parameters recorded in
`SIGNATURES`; `tests/test_compat.py` compares them with what is installed.
"""

from __future__ import annotations

from trl.data_utils import common_prefix_length, is_conversational
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.models.utils import (
    disable_gradient_checkpointing,
    prepare_deepspeed,
    prepare_fsdp,
    unwrap_model_for_generation,
)
from trl.trainer.utils import (
    add_fused_lm_head,
    create_model_from_path,
    disable_dropout_in_model,
    maybe_gather_lm_head_ctx,
    pad,
    use_adapter,
)

__all__ = [
    "SIGNATURES",
    "ChunkedDivergenceFunction",
    "VLLMGeneration",
    "add_fused_lm_head",
    "common_prefix_length",
    "create_model_from_path",
    "disable_dropout_in_model",
    "disable_gradient_checkpointing",
    "is_conversational",
    "is_vllm_available",
    "maybe_gather_lm_head_ctx",
    "pad",
    "prepare_deepspeed",
    "prepare_fsdp",
    "unwrap_model_for_generation",
    "use_adapter",
]

# Parameters, without `self`, of each private method that a trainer of ours overrides or calls.
SIGNATURES: dict[str, dict[str, tuple[str, ...]]] = {
    "DPOTrainer": {
        "_prepare_dataset": ("dataset", "processing_class", "args", "dataset_name"),
        "_set_signature_columns_if_needed": (),
        "_precompute_ref_logps": ("dataset", "name", "batch_size"),
        "_compute_loss": ("model", "inputs", "return_outputs"),
        "_save_checkpoint": ("model", "trial"),
        "_prepare_for_training": ("max_steps", "train_dataloader", "resume_from_checkpoint"),
        "_load_optimizer_and_scheduler": ("checkpoint",),
        "_get_output_dir": ("trial",),
    },
    "SFTTrainer": {
        "_prepare_dataset": (
            "dataset",
            "processing_class",
            "args",
            "packing",
            "formatting_func",
            "dataset_name",
        ),
        "_set_signature_columns_if_needed": (),
        "_save_checkpoint": ("model", "trial"),
    },
    "DistillationTrainer": {
        "_get_train_sampler": ("dataset",),
        "_tokenize_prompts": ("prompts",),
        "_generate_single_turn": ("prompt_ids", "images", "multimodal_fields", "has_tool_images"),
        "_generate_and_score_completions": ("inputs",),
        "_get_last_hidden_state": (
            *("unwrapped_model", "input_ids", "attention_mask", "logits_to_keep", "pixel_values"),
            *("image_grid_thw", "pixel_attention_mask", "spatial_shapes", "image_sizes", "token_type_ids"),
            *("mm_token_type_ids", "image_position_ids"),
        ),
        "_compute_loss": ("unwrapped_student", "inputs", "num_items_in_batch"),
        "_set_signature_columns_if_needed": (),
        "_save_checkpoint": ("model", "trial"),
    },
}
