"""Names that are no keys of a recipe, and the keys that do what they ask for: former keys, and those of other tools.

`problems` answers an unknown key from these tables; nothing is an alias. `docs/coming-from.md` is the second table by
tool, and its test holds both to the keys that there are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

RENAMED: Mapping[str, tuple[str, ...]] = {
    "aggregate": ("reduction",),
    "positives": ("positive_nll",),
    "keep": ("ema_decay",),
    "renew_every": ("update_every", "update_reference_every"),
    "rows": ("batch_size",),
    "sees": ("visible",),
    "by": ("order_by", "model"),
    "pools": ("buckets",),
    "rest_above": ("skip_above",),
    "rest_below": ("skip_below",),
    "rest_steps": ("skip_steps",),
    "start": ("initial_multiplier",),
    "most": ("max_multiplier",),
    "wishes": ("style_instructions",),
    "judges": ("verifies",),
}
"""A former key, and the new one in each section that had it: the section at hand has the one that is meant."""


@dataclass(frozen=True, slots=True)
class KnownKeys:
    """What another tool's name is here."""

    keys: tuple[str, ...]
    """Keys below a stage (or, `out`, of the recipe): the first that the stage at hand has is meant."""
    note: str = ""
    """What else must change, or why there is no key."""


def _known(note: str, *keys: str) -> KnownKeys:
    return KnownKeys(keys, note)


_BATCH = _known("sequences (RL: prompts) of an optimizer step in all", "prompts_per_step", "train.batch_size")
_PACKED = _known("rows are always packed, up to train.microbatch_tokens; delete it")
_LONGEST = _known("a longer row is an error or dropped, never cut", "train.max_length")
_DATA = _known("", "data.path", "tasks.path")
_ANSWER = _known("", "sampling.max_tokens", "max_tokens")
_BETA = _known("", "loss.dpo.beta", "algorithm.kl.coefficient")
_KL = _known("with place: loss or reward", "algorithm.kl.coefficient")
_MODEL = _known("", "model.path")
_LORA_RANK = _known("", "train.lora.rank")
_LORA_TARGETS = _known("a list, or all-linear", "train.lora.targets")
_LOSS_ON = _known("assistant, completion or all", "train.loss_on")
_MICRO = _known("sequences are packed by tokens", "train.microbatch_tokens")
_WARMUP = _known("steps; below 1 a share of all steps", "train.warmup")
_EVAL_SHARE = _known("", "hold_out", "eval_data")
_ATTENTION = _known("attention is chosen for the device; delete it")
_UPDATES = _known("a number of optimizer steps for each batch of rollouts, not a size", "algorithm.minibatches")
_PASSES = _known("a batch of rollouts is passed once, in algorithm.minibatches optimizer steps; delete it")
_PRESET = _known("the name of a preset", "algorithm")
_SHARDED = _known("several ranks are always sharded by FSDP2", "machine.trainer.gpus")
_CONTEXT = _known("", "machine.trainer.context")

OTHER_TOOLS: Mapping[str, KnownKeys] = {
    # optimizer steps
    "learning_rate": _known("", "train.lr"),
    "num_train_epochs": _known("", "train.epochs"),
    "num_epochs": _known("", "train.epochs"),
    "total_epochs": _known("", "train.epochs"),
    "max_steps": _known("", "train.steps"),
    "total_training_steps": _known("", "train.steps"),
    "per_device_train_batch_size": _BATCH,
    "micro_batch_size": _BATCH,
    "train_batch_size": _BATCH,
    "gradient_accumulation_steps": _known(
        "gradient accumulation follows from train.batch_size (an optimizer step) and train.microbatch_tokens (a "
        "micro-batch); delete it"
    ),
    "per_device_eval_batch_size": _known("evaluation packs up to train.microbatch_tokens; delete it"),
    "ppo_micro_batch_size_per_gpu": _MICRO,
    "ppo_max_token_len_per_gpu": _MICRO,
    "packing": _PACKED,
    "sample_packing": _PACKED,
    "pad_to_sequence_len": _known("nothing is padded; delete it"),
    "max_seq_length": _LONGEST,
    "sequence_len": _LONGEST,
    "cutoff_len": _LONGEST,
    "warmup_ratio": _WARMUP,
    "warmup_steps": _WARMUP,
    "lr_scheduler_type": _known("constant, linear or cosine", "train.schedule"),
    "lr_scheduler": _known("constant, linear or cosine", "train.schedule"),
    "max_grad_norm": _known("", "train.clip_norm"),
    "grad_clip": _known("", "train.clip_norm"),
    "optim": _known("adamw, adamw8bit or muon", "train.optimizer"),
    "adam_beta1": _known("both in a list", "train.betas"),
    "adam_beta2": _known("both in a list", "train.betas"),
    "adam_epsilon": _known("", "train.eps"),
    "assistant_only_loss": _LOSS_ON,
    "completion_only_loss": _LOSS_ON,
    "train_on_inputs": _LOSS_ON,
    "train_on_prompt": _LOSS_ON,
    "use_liger_kernel": _known("log-probabilities are always computed in chunks; delete it"),
    "attn_implementation": _ATTENTION,
    "flash_attention": _ATTENTION,
    "flash_attn": _ATTENTION,
    # model and adapters
    "model_name_or_path": _MODEL,
    "base_model": _MODEL,
    "model_name": _MODEL,
    "template": _known("a Jinja file; without it the tokenizer's own", "model.chat_template"),
    "bf16": _known("bfloat16; auto is that on a GPU", "model.dtype"),
    "fp16": _known("bfloat16; there is no float16", "model.dtype"),
    "torch_dtype": _known("auto, float32 or bfloat16", "model.dtype"),
    "load_in_4bit": _known("nf4", "train.quantize"),
    "quantization_bit": _known("nf4", "train.quantize"),
    "use_peft": _known("{rank: 16}", "train.lora"),
    "adapter": _known("{rank: 16}", "train.lora"),
    "finetuning_type": _known("{rank: 16}", "train.lora"),
    "lora_r": _LORA_RANK,
    "lora_rank": _LORA_RANK,
    "lora_alpha": _known("", "train.lora.alpha"),
    "lora_dropout": _known("", "train.lora.dropout"),
    "lora_target_modules": _LORA_TARGETS,
    "lora_target": _LORA_TARGETS,
    "target_modules": _LORA_TARGETS,
    "use_rslora": _known("", "train.lora.rslora"),
    "use_dora": _known("", "train.lora.dora"),
    "lmbda": _known("", "on_policy"),
    # machine
    "n_gpus_per_node": _known("ranks of the trainer on each node", "machine.trainer.gpus"),
    "nnodes": _known("", "machine.trainer.nodes"),
    "fsdp": _SHARDED,
    "deepspeed": _SHARDED,
    "ulysses_sequence_parallel_size": _CONTEXT,
    "context_parallel_size": _CONTEXT,
    # data, runs
    "dataset_name": _DATA,
    "dataset": _DATA,
    "datasets": _DATA,
    "train_files": _DATA,
    "dataset_config": _known("", "data.subset", "tasks.subset"),
    "dataset_train_split": _known("", "data.split", "tasks.split"),
    "dataset_text_field": _known("{text: COLUMN}", "data.columns"),
    "field_messages": _known("{messages: COLUMN}", "data.columns"),
    "val_set_size": _EVAL_SHARE,
    "val_size": _EVAL_SHARE,
    "eval_dataset": _known("rows", "eval_data"),
    "val_files": _known("held-out tasks, on the way", "evaluation.tasks"),
    "val_kwargs": _known("", "evaluation.sampling"),
    "eval_steps": _known("", "eval_every"),
    "eval_strategy": _known("steps", "eval_every"),
    "test_freq": _known("", "eval_every"),
    "val_before_train": _known("tasks are evaluated before the first step; delete it"),
    "eval_on_start": _known("tasks are evaluated before the first step; delete it"),
    "load_best_model_at_end": _known("the best is @stage/best, beside the last", "best.metric"),
    "metric_for_best_model": _known("", "best.metric"),
    "greater_is_better": _known("min or max", "best.goal"),
    "early_stopping_patience": _known("", "best.patience"),
    "early_stopping_threshold": _known("", "best.min_delta"),
    "output_dir": _known("", "out"),
    "run_name": _known("", "name"),
    "experiment_name": _known("", "name"),
    "report_to": _known("a list", "trackers"),
    "save_steps": _known("", "save.every"),
    "save_freq": _known("", "save.every"),
    "save_total_limit": _known("", "save.keep"),
    "logging_steps": _known("every step is logged; delete it"),
    "resume_from_checkpoint": _known("the same whet run goes on where it stopped; delete it"),
    "stage": _known("", "kind"),
    "rl": _known("", "kind"),
    # preferences, reward models
    "beta": _BETA,
    "pref_beta": _BETA,
    "rl_beta": _BETA,
    "loss_type": _known("", "loss", "algorithm"),
    "pref_loss": _known("", "loss"),
    "label_smoothing": _known("", "loss.dpo.smoothing"),
    "rpo_alpha": _known("", "loss.nll.weight"),
    "simpo_gamma": _known("", "loss.simpo.gamma"),
    "desirable_weight": _known("", "loss.kto.desirable"),
    "undesirable_weight": _known("", "loss.kto.undesirable"),
    "precompute_ref_log_probs": _known("the reference's log-probabilities are always computed once; delete it"),
    "center_rewards_coefficient": _known("", "centring"),
    # rollouts and policy gradients
    "num_generations": _known("", "rollouts_per_prompt", "samples"),
    "environment_factory": _known("file.py:Class", "environment"),
    "max_tool_calling_iterations": _known("", "environment.limits.turns"),
    "max_assistant_turns": _known("", "environment.limits.turns"),
    "actor_rollout_ref.rollout.n": _known("", "rollouts_per_prompt"),
    "actor_rollout_ref.actor.optim.lr": _known("", "train.lr"),
    "actor_rollout_ref.model.path": _MODEL,
    "actor_rollout_ref.rollout.temperature": _known("", "sampling.temperature"),
    "max_completion_length": _ANSWER,
    "stop_strings": _known("a list", "sampling.stop"),
    "max_new_tokens": _ANSWER,
    "max_response_length": _ANSWER,
    "max_prompt_length": _known(
        "a prompt that leaves no room in the model's window is an error; drop leaves it out", "tasks.on_bad_row"
    ),
    "reward_funcs": _known("[{kind: function, path: FILE.py:FUNCTION}]", "rewards"),
    "custom_reward_function.path": _known("[{kind: function, path: FILE.py:FUNCTION}]", "rewards"),
    "reward_model_path": _known("[{kind: model, path: MODEL}]", "rewards"),
    "reward_weights": _known("weight in each of them", "rewards"),
    "epsilon": _known("", "algorithm.clip.low"),
    "epsilon_high": _known("", "algorithm.clip.high"),
    "clip_ratio_low": _known("", "algorithm.clip.low"),
    "clip_ratio_high": _known("", "algorithm.clip.high"),
    "kl_coef": _KL,
    "ref_model": _known("a model", "reference", "algorithm.kl.reference"),
    "ref_model_path": _known("a model", "reference", "algorithm.kl.reference"),
    "kl_loss_coef": _KL,
    "use_kl_loss": _known("loss", "algorithm.kl.place"),
    "use_kl_in_reward": _known("reward", "algorithm.kl.place"),
    "kl_loss_type": _known("k2 or k3", "algorithm.kl.estimator"),
    "ref_model_sync_steps": _known("", "algorithm.kl.update_every"),
    "ref_model_mixup_alpha": _known("1 - alpha", "algorithm.kl.ema_decay"),
    "entropy_coeff": _known("", "algorithm.entropy.coefficient"),
    "ppo_mini_batch_size": _UPDATES,
    "steps_per_generation": _UPDATES,
    "num_iterations": _PASSES,
    "ppo_epochs": _PASSES,
    "num_ppo_epochs": _PASSES,
    "adv_estimator": _PRESET,
    "scale_rewards": _known("group_std, batch_std or none", "algorithm.scale"),
    "loss_agg_mode": _known("token_mean, sequence_mean ...", "algorithm.reduction"),
    "importance_sampling_level": _known("", "algorithm.ratio.level"),
    "mask_truncated_completions": _known("", "algorithm.overlong_filter"),
    "filter_groups": _known("{rounds: 10}", "algorithm.dynamic_sampling"),
    "vllm_importance_sampling_correction": _known("{}", "algorithm.correction"),
    "use_vllm": _known("vllm", "sampling.engine"),
    "vllm_server_base_url": _known("", "sampling.server"),
    "gpu_memory_utilization": _known("GiB, not a share", "sampling.cache_gib"),
    "vllm_gpu_memory_utilization": _known("GiB, not a share", "sampling.cache_gib"),
    "max_num_seqs": _known("", "sampling.max_running"),
    "lam": _known("", "algorithm.critic.lam_policy"),
    "cliprange_value": _known("", "algorithm.critic.clip"),
}
"""Names of TRL, axolotl, LLaMA-Factory, Unsloth and verl, but for those that are the same here."""

OTHER_KINDS: Mapping[str, str] = {
    "reward": "reward_model",
    "rm": "reward_model",
    "pretrain": "sft, and train.loss_on: all",
    "pt": "sft, and train.loss_on: all",
    "online_dpo": "online_preference",
    "gkd": "distill",
}
"""Kinds by other names; those of presets (`dpo`, `grpo`) are found in the presets."""


def same_name(name: str) -> str:
    """A name as the tables spell it: `--learning-rate` is `learning_rate`."""
    return name.replace("-", "_")
