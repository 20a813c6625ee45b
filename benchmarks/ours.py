"""whet's side: `python -m benchmarks.ours WORK MODEL_FOLDER THREADS`."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from zlib import crc32

import torch

from benchmarks.limits import copy_bytes_per_s, decode_bytes, products_cpu_s, products_flops
from benchmarks.session import Session
from benchmarks.work import WORKS, Work
from whet.algorithms.policy import policy_gradient
from whet.algorithms.preference import objective_of as preference_objective
from whet.algorithms.preference import weigh_preferences
from whet.algorithms.reward_model import comparison, objective_of, weighed
from whet.algorithms.sft import CrossEntropy, weigh
from whet.algorithms.state import Setting
from whet.config import LossConfig, ModelConfig, PolicyConfig, RewardModelStage, TrainConfig
from whet.data.base import Comparison, Conversation, Origin
from whet.data.faults import Rejects
from whet.data.sources import Reading
from whet.envs.base import Attempt, SingleTurn, Task
from whet.models.device import keep_memory
from whet.models.language import LanguageModel
from whet.models.load import load_model, load_scalar_model
from whet.records import Atom, Completion, Message, Metric, Score, TokenRow
from whet.rollouts.feed import Feed
from whet.rollouts.play import Player
from whet.sampling.base import Request, SamplingParams, run
from whet.sampling.embedded import EmbeddedSampler
from whet.templates.jinja import JinjaTemplate
from whet.training.answers import Tokenised, tokenise_answers
from whet.training.base import Objective, OptimResult
from whet.training.engine import LocalTrainer
from whet.training.tokenize import tokenise

TRAIN = TrainConfig(lr=1e-6, betas=(0.9, 0.999), weight_decay=0.0, clip_norm=1.0)


@dataclass
class Forced:
    """A sampler whose answers have the lengths of the work: no stop token, and a budget for each request."""

    inner: EmbeddedSampler
    work: Work
    asked: int = 0

    @property
    def version(self) -> int:
        """Of the weights."""
        return self.inner.version

    async def sample(self, request: Request) -> Completion:
        """A completion of exactly its length; requests come in the order of the work."""
        step, place = divmod(self.asked, self.work.rows * self.work.group)
        self.asked += 1
        params = replace(request.params, max_tokens=self.work.lengths(step)[place], stop_ids=frozenset())
        return await self.inner.sample(replace(request, params=params))


class TimedTrainer(LocalTrainer):
    """The trainer, and the CPU seconds that its steps have taken since last asked."""

    _cpu_s = 0.0

    def forward_backward(self, atoms: Sequence[Atom], objective: Objective) -> dict[str, Metric]:
        """As it is, timed."""
        began = time.process_time()
        metrics = super().forward_backward(atoms, objective)
        self._cpu_s += time.process_time() - began
        return metrics

    def optim_step(self, lr_factor: float) -> OptimResult:
        """As it is, timed."""
        began = time.process_time()
        result = super().optim_step(lr_factor)
        self._cpu_s += time.process_time() - began
        return result

    def take_cpu_s(self) -> float:
        """The seconds since the last call."""
        taken, self._cpu_s = self._cpu_s, 0.0
        return taken


class MeanId:
    """Scores an answer by the mean of its token ids: differs within every group, costs nothing."""

    def score(self, attempts: Sequence[Attempt], *, step: int) -> list[Score]:
        """One score for each attempt."""
        return [Score(value=sum(a.completion_tokens) / len(a.completion_tokens)) for a in attempts]

    def close(self) -> None:
        """Nothing to release."""


def sft(work: Work, model: LanguageModel, session: Session) -> dict[str, float]:
    """Forward, backward, step; the loss falls on every token, as TRL's default has it. Tokenized before the clock."""
    template, trainer = JinjaTemplate(model.tokenizer), TimedTrainer(model, TRAIN)
    batches = [_rows(work, step, template) for step in range(work.steps + 1)]
    for rows in batches:
        if not session.wait():
            break
        trainer.forward_backward(weigh(rows), CrossEntropy())
        trainer.optim_step(1.0)
        session.done(tokens=sum(len(row.tokens) for row in rows), train_cpu_s=trainer.take_cpu_s())
    session.worked()
    return _products(model, sum(len(row.tokens) for row in rows), sum(row.trained_count for row in rows))


def reward(work: Work, model: LanguageModel, session: Session) -> dict[str, float]:
    """Forward, backward, step over pairs: each is one example, whose prompt is computed once."""
    template, trainer = JinjaTemplate(model.tokenizer), TimedTrainer(model, TRAIN)
    config = RewardModelStage.model_validate({"kind": "reward_model", "data": {"generate": "arithmetic"}})
    batches = [_pairs(work, step, template) for step in range(work.steps + 1)]
    for pairs in batches:
        if not session.wait():
            break
        trainer.forward_backward(weighed(pairs, config=config), objective_of(config))
        trainer.optim_step(1.0)
        read = sum(len(row.tokens) for atom in pairs for row in atom.rows)
        session.done(tokens=read, train_cpu_s=trainer.take_cpu_s())
    session.worked()
    return _products(model, sum(atom.cost for atom in pairs), 2 * len(pairs))


def dpo(work: Work, model: LanguageModel, session: Session) -> dict[str, float]:
    """Forward, backward, step over pairs; the reference's log-probabilities are there before the clock, as in TRL."""
    template, trainer = JinjaTemplate(model.tokenizer), TimedTrainer(model, TRAIN)
    loss = LossConfig.model_validate("dpo")
    batches = [_referred(_compared(work, step, template), trainer) for step in range(work.steps + 1)]
    for pairs in batches:
        if not session.wait():
            break
        trainer.forward_backward(weigh_preferences(pairs, loss=loss, trainer=trainer), preference_objective(loss))
        trainer.optim_step(1.0)
        read = sum(len(row.tokens) for atom in pairs for row in atom.rows)
        session.done(tokens=read, train_cpu_s=trainer.take_cpu_s())
    session.worked()
    trained = sum(row.trained_count for atom in pairs for row in atom.rows)
    return _products(model, sum(atom.cost for atom in pairs), trained)


def _referred(pairs: Sequence[Tokenised[Comparison]], trainer: LocalTrainer) -> list[Atom]:
    logps = iter(trainer.forward([row for each in pairs for row in each.atom.rows], "logp")["logp"])
    return [Atom(rows=tuple(row.with_columns(ref_logp=next(logps)) for row in each.atom.rows)) for each in pairs]


def _pairs(work: Work, step: int, template: JinjaTemplate) -> list[Atom]:
    """A step's comparisons for a reward model, tokenized."""
    return [comparison(each) for each in _compared(work, step, template)]


def _compared(work: Work, step: int, template: JinjaTemplate) -> list[Tokenised[Comparison]]:
    """A step's comparisons, tokenized."""
    answers = iter(work.answers(step))
    listed = [
        Comparison(
            origin=Origin(source="benchmark", line=line),
            prompt=(Message(role="user", content=question),),
            answers=tuple((Message(role="assistant", content=next(answers)),) for _ in range(work.group)),
        )
        for line, question in enumerate(work.questions(step), start=1)
    ]
    return tokenise_answers(listed, template, max_length=4096, on_bad_row="error")[0]


def grpo(work: Work, model: LanguageModel, session: Session) -> dict[str, float]:
    """Sample, score, forward, backward, step, as a recipe runs it."""
    template, trainer = JinjaTemplate(model.tokenizer), TimedTrainer(model, TRAIN)
    sampler = Forced(EmbeddedSampler(model), work)
    player = Player(
        sampler=sampler,
        template=template,
        environment=SingleTurn,
        rubric=MeanId(),
        params=SamplingParams(max_tokens=2 * work.answer, stop_ids=template.stop_ids),
        max_length=model.max_length,
    )
    questions = [text for step in range(work.steps + 1) for text in work.questions(step)]
    feed = Feed(
        player=player,
        tasks=[Task(id=str(i), messages=(Message(role="user", content=q),)) for i, q in enumerate(questions)],
        samples=work.group,
        steps=work.steps + 1,
        seed=0,
        hand_over=sampler.inner.publish,
    )
    setting = Setting(
        config=PolicyConfig(),
        train=TRAIN,
        steps=work.steps + 1,
        prompts_per_step=work.rows,
        temperature=1.0,
        max_tokens=2 * work.answer,
        max_gap=0.5,
        weights={},
    )
    steps = policy_gradient(trainer, feed, setting)
    prompts = answers = 0
    while session.wait():
        step = next(steps)
        answers = sum(episode.sampled_tokens for group in step.groups for episode in group.episodes)
        prompts = sum(len(group.episodes[0].turns[0].prompt) for group in step.groups)
        session.done(tokens=answers, train_cpu_s=trainer.take_cpu_s())
    session.worked()
    return _products(model, prompts + answers, answers)


def decode(work: Work, model: LanguageModel, session: Session) -> dict[str, float]:
    """Greedy decoding of prompts of random tokens."""
    sampler = EmbeddedSampler(model)
    for step in range(work.steps + 1):
        prompts, lengths = work.token_prompts(step, model.vocabulary), work.lengths(step)
        requests = [
            Request(prompt=tuple(prompt), seed=i, params=SamplingParams(max_tokens=length, temperature=0))
            for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
        ]
        if not session.wait():
            break
        completions = run(arriving(sampler, requests, work.arrivals or len(requests)))
        checks = [crc32(repr(c.tokens.tolist()).encode()) for c in completions]
        session.done(tokens=sum(lengths), checks=checks)
    session.worked()
    return {"copy_bytes_per_s": copy_bytes_per_s(), "bytes": decode_bytes(work, model)}


async def arriving(sampler: EmbeddedSampler, requests: Sequence[Request], at_once: int) -> list[Completion]:
    """The answers to requests that come so many at a time, the next ones once the engine has taken a step."""
    tasks: list[asyncio.Task[Completion]] = []
    for first in range(0, len(requests), at_once):
        tasks += [asyncio.create_task(sampler.sample(request)) for request in requests[first : first + at_once]]
        taken = sampler.engine.steps
        while sampler.engine.steps == taken and len(tasks) < len(requests):
            await asyncio.sleep(0)
    return await asyncio.gather(*tasks)


def _rows(work: Work, step: int, template: JinjaTemplate) -> Sequence[TokenRow]:
    texts = zip(work.questions(step), work.answers(step), strict=True)
    conversations = [
        Conversation(
            messages=(Message(role="user", content=question), Message(role="assistant", content=answer)),
            origin=Origin(source="benchmark", line=i),
        )
        for i, (question, answer) in enumerate(texts, 1)
    ]
    reading = Reading(examples=conversations, rejects=Rejects("error"), sources=["benchmark"])
    return tokenise(reading, template, loss_on="all", max_length=4096, on_bad_row="error").rows


def _products(model: LanguageModel, tokens: int, trained: int) -> dict[str, float]:
    return {"products_cpu_s": products_cpu_s(model, tokens, trained), "flops": products_flops(model, tokens, trained)}


def main(name: str, folder: str, threads: int) -> None:
    """Load, work as long as the driver asks, then measure this machine's limits on the same shapes."""
    session, work = Session(), WORKS[name]
    torch.set_num_threads(threads)
    keep_memory()  # as a run does
    torch.manual_seed(0)
    load = load_scalar_model if work.kind == "reward" else load_model
    model = load(ModelConfig(path=folder, device="cpu", dtype="float32"))
    session.ready(parameters=sum(p.numel() for p in model.module.parameters()))
    limits = {"sft": sft, "reward": reward, "dpo": dpo, "grpo": grpo, "decode": decode}[work.kind](work, model, session)
    session.finish(**limits)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
