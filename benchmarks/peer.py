"""The peers' side: `python -m benchmarks.peer PEER WORK MODEL_FOLDER THREADS` with PEER one of PEERS below."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from zlib import crc32

os.environ.update(HF_HUB_OFFLINE="1", TRL_EXPERIMENTAL_SILENCE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")

import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
)

from benchmarks.session import Session
from benchmarks.work import WORKS, Work

CACHE = ContinuousBatchingConfig(page_size=32, num_blocks=1024, max_batch_tokens=512, use_cuda_graph=False)
"""Set by hand: by default transformers sizes the cache by free memory, and takes most of a machine."""


class _ForcedLength(transformers.LogitsProcessor):
    """Forbids the end of text before a row's length and forces it there, so answers are as long as the work says."""

    def __init__(self, lengths: Sequence[int], prompt: int, eos: int) -> None:
        self.last = torch.tensor(lengths) - 1 + prompt
        self.eos = eos

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        ends = input_ids.shape[1] >= self.last
        scores[:, self.eos] = torch.where(ends, 0.0, float("-inf"))
        scores[ends] = torch.where(torch.arange(scores.shape[1]) == self.eos, 0.0, float("-inf"))
        return scores


def trl(work: Work, folder: str, session: Session, *, continuous: bool = False) -> None:
    """TRL's trainer for the kind of work, paused between steps."""
    import trl as library
    from datasets import Dataset

    tokenizer = AutoTokenizer.from_pretrained(folder)
    kind, named = (AutoModelForCausalLM, {})
    if work.kind == "reward":
        kind, named = (AutoModelForSequenceClassification, {"num_labels": 1})
    model = kind.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa", **named)
    usual = {
        "output_dir": "runs/bench-trl", "max_steps": work.steps + 1, "learning_rate": 1e-6,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0, "max_grad_norm": 1.0,
        "per_device_train_batch_size": work.rows * (work.group if work.kind == "grpo" else 1),
        "gradient_accumulation_steps": 1, "gradient_checkpointing": False, "bf16": False, "use_cpu": True,
        "logging_strategy": "no", "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }  # fmt: skip
    whole = {"max_length": 4096}
    kinds = {
        "sft": (library.SFTTrainer, library.SFTConfig, whole),
        "reward": (library.RewardTrainer, library.RewardConfig, whole),
        "dpo": (library.DPOTrainer, library.DPOConfig, {**whole, "beta": 0.1, "precompute_ref_log_probs": True}),
        "grpo": (partial(library.GRPOTrainer, reward_funcs=_mean_id), library.GRPOConfig, {
            "num_generations": work.group, "max_completion_length": max(work.lengths(0)), "temperature": 1.0,
            "top_p": 1.0, "top_k": 0, "beta": 0.0, "num_iterations": 1, "steps_per_generation": 1,
            "shuffle_dataset": False, "use_transformers_continuous_batching": continuous,
        }),
    }  # fmt: skip
    make, configure, settings = kinds[work.kind]
    trainer = make(
        model,
        args=configure(**usual, **settings),
        train_dataset=Dataset.from_list(_rows(work)),
        processing_class=tokenizer,
    )
    if work.kind == "grpo":
        _force_lengths(model, work, tokenizer.eos_token_id)
    tokens = _count_tokens(trainer, work)
    trainer.add_callback(_pauses(session, tokens))
    session.ready(parameters=sum(p.numel() for p in model.parameters()))
    if session.wait():
        trainer.train()


def decoding(work: Work, folder: str, session: Session, *, continuous: bool = False) -> None:
    """`generate` on one left-padded batch, or transformers' continuous batching; greedy, no end of text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    session.ready(parameters=sum(p.numel() for p in model.parameters()))
    for step in range(work.steps + 1):
        prompts, lengths = work.token_prompts(step, model.config.vocab_size), work.lengths(step)
        if not session.wait():
            return
        with torch.no_grad():
            answers = (_batched if continuous else _generated)(model, prompts, lengths)
        session.done(tokens=sum(lengths), checks=[crc32(repr(answer).encode()) for answer in answers])


def _generated(model: Any, prompts: Sequence[list[int]], lengths: Sequence[int]) -> list[list[int]]:
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    setting = GenerationConfig(max_new_tokens=max(lengths), do_sample=False, eos_token_id=None, pad_token_id=0)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=setting)[:, longest:]
    return [row[:length].tolist() for row, length in zip(out, lengths, strict=True)]


def _batched(
    model: Any, prompts: Sequence[list[int]], lengths: Sequence[int], setting: GenerationConfig | None = None
) -> list[list[int]]:
    setting = setting or GenerationConfig(max_new_tokens=max(lengths), do_sample=False, eos_token_id=-1, pad_token_id=0)
    with model.continuous_batching_context_manager(
        generation_config=setting, continuous_batching_config=CACHE
    ) as manager:
        names = [
            manager.add_request(list(prompt), max_new_tokens=length, eos_token_id=-1)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        found: dict[str, list[int]] = {}
        while len(found) < len(names):
            result = manager.get_result(timeout=60)
            assert result is not None, "continuous batching gave no result for a minute"
            if result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
    return [found[name] for name in names]


# --------------------------------------------------------------------------------------------- inside TRL


def _rows(work: Work) -> list[dict[str, Any]]:
    """The texts of all steps, as TRL reads them for this kind of work."""
    steps = range(work.steps + 2)
    asked = [[{"role": "user", "content": question}] for step in steps for question in work.questions(step)]
    said = iter([[{"role": "assistant", "content": answer}] for step in steps for answer in work.answers(step)])
    pair = ("chosen", "rejected")
    if work.kind == "sft":
        return [{"messages": prompt + next(said)} for prompt in asked]
    if work.kind == "reward":
        return [{name: prompt + next(said) for name in pair} for prompt in asked]
    if work.kind == "dpo":
        return [{"prompt": prompt, **{name: next(said) for name in pair}} for prompt in asked]
    return [{"prompt": prompt} for prompt in asked]


def _mean_id(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """The same score as on our side."""
    return [sum(ids) / len(ids) for ids in completion_ids]


def _force_lengths(model: Any, work: Work, eos: int) -> None:
    """Answers of the lengths of the work, in both ways in which TRL generates."""
    generate, step = model.generate, iter(range(10**6))

    def generate_forced(input_ids: torch.Tensor, **settings: Any) -> Any:
        force = _ForcedLength(work.lengths(next(step)), input_ids.shape[1], eos)
        return generate(input_ids=input_ids, logits_processor=transformers.LogitsProcessorList([force]), **settings)

    def batch_forced(prompts: Sequence[list[int]], generation_config: GenerationConfig, **_: Any) -> dict[str, Any]:
        outputs = _batched(model, prompts, work.lengths(next(step)), generation_config)
        return {str(i): _Output(tokens) for i, tokens in enumerate(outputs)}

    model.generate, model.generate_batch = generate_forced, batch_forced


class _Output:
    """What TRL reads of a result."""

    def __init__(self, tokens: list[int]) -> None:
        self.generated_tokens = tokens


def _count_tokens(trainer: Any, work: Work) -> list[int]:
    """A list whose last entry is the tokens of the last step: those of answers for GRPO, else all of a row."""
    seen = [0]
    compute: Callable[..., Any] = trainer.compute_loss

    def counting(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
        seen.append(int(inputs["completion_mask" if work.kind == "grpo" else "attention_mask"].sum()))
        return compute(model, inputs, *rest, **named)

    trainer.compute_loss = counting
    return seen


def _pauses(session: Session, tokens: Sequence[int]) -> transformers.TrainerCallback:
    class Pauses(transformers.TrainerCallback):  # type: ignore[misc]
        """Reports each step when it ends and waits for the driver's word before the next."""

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            session.done(tokens=tokens[-1])
            control.should_training_stop = not session.wait()

    return Pauses()


PEERS: dict[str, Callable[[Work, str, Session], None]] = {
    "trl": trl,
    "trl-cb": lambda work, folder, session: trl(work, folder, session, continuous=True),
    "generate": decoding,
    "cb": lambda work, folder, session: decoding(work, folder, session, continuous=True),
}


def main(peer: str, name: str, folder: str, threads: int) -> None:
    """Load, and work as long as the driver asks."""
    session = Session()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    PEERS[peer](WORKS[name], folder, session)
    session.worked()
    session.finish()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
