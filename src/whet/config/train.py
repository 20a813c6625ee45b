"""How to train and how to sample: the sections that a recipe may also have at its top, for all its stages."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, model_validator

from whet.config.strict import Strict

THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


Role = Literal["answer", "reasoning", "call"]
Mark = tuple[Annotated[str, Field(min_length=1)], Annotated[str, Field(min_length=1)]]


class MarksConfig(Strict):
    """Between what thinking and calls stand: by that a token has its role.

    It has the role of what precedes it: an opening mark is the answer's, a closing one is of what it closes.
    """

    reasoning: Mark = ("<think>", "</think>")
    """What opens thinking, and what closes it."""
    call: Mark = ("<tool_call>", "</tool_call>")
    """The same of calls: the marks of the model's dialect, or the tags of a tool."""

    @property
    def marks(self) -> dict[str, tuple[str, str]]:
        """By the role's name."""
        return {"reasoning": self.reasoning, "call": self.call}


class RolesConfig(MarksConfig):
    """Roles of an RL stage's tokens: each is measured by itself."""

    only: list[Role] | None = Field(None, min_length=1)
    """The roles that are trained; None: all. `roles: [call]` is short for this key."""
    angle: bool = False
    """Measure the angle between the gradients of calls and of everything else, at the cost of two more passes."""


class LoraConfig(Strict):
    """Low-rank adapters through peft. `alpha` is divided by `rank` (by its root with `rslora`)."""

    rank: int = Field(16, ge=1)
    alpha: int = Field(32, ge=1)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: list[str] | Literal["all-linear"] = "all-linear"
    modules_to_save: list[str] | None = None
    """Modules that are trained whole beside the adapter: `[embed_tokens, lm_head]`."""
    rslora: bool = False
    dora: bool = False
    """DoRA (2402.09353): the adapter turns a weight, and a trained length scales it."""
    routed: MarksConfig | None = None
    """Two adapters (DART, 2602.00994): tokens of calls pass through one, all others through the other, in training and
    in the embedded sampler. What comes of it keeps them apart, and no other engine computes it. `routed: {}` for the
    usual marks."""

    @model_validator(mode="after")
    def _check_routed(self) -> Self:
        if self.routed is not None and (self.dora or self.modules_to_save):
            raise ValueError("routed sends tokens through plain adapters; leave dora and modules_to_save out")
        return self


class TrainConfig(Strict):
    """Optimizer steps: how many, how large, on what schedule."""

    free: ClassVar[frozenset[str]] = frozenset({"microbatch_tokens", "gradient_checkpointing", "offload"})

    lr: float = Field(1e-5, ge=0)
    steps: int | None = Field(None, ge=1)
    """SFT: optimizer steps, None: as many as `epochs` take. RL (required): batches of rollouts, each of which is
    `algorithm.minibatches` optimizer steps."""
    epochs: float = Field(1.0, gt=0)
    batch_size: int = Field(32, ge=1)
    """SFT: sequences of one optimizer step, over all micro-batches and ranks."""
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """muon: Newton-Schulz updates (in float32) for the layers' matrices, AdamW for everything else. adamw8bit: AdamW
    with its two moments in eight bits, a quarter of the memory (`pip install 'whet[quant]'`)."""
    muon_lr: float = Field(0.02, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = Field(0.0, ge=0)
    """Steps of linear warm-up; below 1 it is a share of all steps."""
    min_lr_ratio: float = Field(0.0, ge=0, le=1)
    """Where linear and cosine end, as a share of `lr`."""
    clip_norm: float | None = Field(1.0, gt=0)
    max_length: int | None = Field(None, ge=2)
    """Longest row in tokens; None: the model's own limit. A longer row is an error or dropped, never cut silently."""
    microbatch_tokens: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Most tokens computed at once. Changes memory and speed, never the gradient. auto: 2,048 on a CPU, where they stay
    in its cache; on a GPU as many as half of its free memory holds. A resumed stage keeps what `auto` chose."""
    gradient_checkpointing: bool = False
    compile: bool = False
    """Compile the decoder's layers (torch.compile), around attention. Takes ten seconds or more at the start, and a C++
    compiler on a CPU; sums may differ in the last bit. For plain layers: no lora, no gradient_checkpointing."""
    lora: LoraConfig | None = None
    quantize: Literal["nf4"] | None = None
    """nf4: the base model's matrices in four bits, which only an adapter can be trained over (QLoRA; `pip install
    'whet[quant]'`). The exported model is dequantised and merged."""
    offload: list[Literal["optimizer", "reference", "teacher"]] = []
    """What rests in the host's memory and is moved to the GPU when it is needed: the optimizer's state, a part at a
    time for the step; the frozen reference or teacher (of stages that have one) for its pass. Same numbers; needs a
    GPU."""
    loss_on: Literal["assistant", "completion", "all"] = "assistant"
    """SFT: assistant turns; only the last one (the completion); or every token."""
    neftune: float | None = Field(None, gt=0)
    """SFT: noise on the embeddings while it trains, of this size (alpha of NEFTune, 2310.05914; 5 is common)."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.quantize is not None and self.lora is None:
            raise ValueError("quantize freezes the weights, so there is nothing to train; add lora: {rank: 16}")
        if self.compile and (self.lora is not None or self.gradient_checkpointing):
            raise ValueError("compile: checked with plain layers only; leave lora and gradient_checkpointing out")
        if "reference" in self.offload and self.lora is not None:
            raise ValueError("offload: with lora the reference is the model itself, adapter off; leave reference out")
        if "optimizer" in self.offload and self.optimizer == "adamw8bit":
            raise ValueError("offload: bitsandbytes' state cannot be moved part by part; use adamw, or no offload")
        return self


class RLTrainConfig(TrainConfig):
    """The same keys with RL's default: an update from samples is noisier than one from demonstrations."""

    lr: float = Field(1e-6, ge=0)
    roles: Annotated[RolesConfig | None, BeforeValidator(lambda v: {"only": v} if isinstance(v, list) else v)] = None
    """Roles of tokens, which are then measured apart; None: all are alike."""

    @model_validator(mode="after")
    def _check_roles(self) -> Self:
        routed = None if self.lora is None else self.lora.routed
        if self.roles is not None and routed is not None and self.roles.marks != routed.marks:
            raise ValueError("roles and lora.routed are told apart by the same marks; give both the same")
        return self


class SaveConfig(Strict):
    """Checkpoints. Whatever the interval, Ctrl-C and SIGTERM save before they leave."""

    every: int | None = Field(None, ge=1)
    """Steps between checkpoints; None: as often as costs at most `overhead` of the time."""
    overhead: float = Field(0.05, gt=0, le=1)
    keep: int = Field(2, ge=2)
    """Generations kept; a damaged newest one falls back to the one before."""


class SamplingConfig(Strict):
    """How the policy is sampled."""

    free: ClassVar[frozenset[str]] = frozenset({"max_running", "server", "server_folder", "cache_gib"})

    max_tokens: int = Field(256, ge=1)
    """Most tokens of one completion, the stop token included."""
    temperature: float = Field(1.0, ge=0)
    """0: greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = []
    """Stop strings (`["</answer>"]`): an answer ends with the token that completes one. Its tokens are kept and trained
    as sampled, and the string stays in the text (`include_stop_str_in_output` of vLLM)."""
    max_running: int = Field(256, ge=1)
    """Most sequences decoded side by side."""
    engine: Literal["embedded", "vllm"] = "embedded"
    """embedded: whet's own, on the trainer's weights. vllm: a vLLM engine in this process, which the weights are copied
    to after every step (`pip install 'whet[vllm]'`), or at `server`."""
    server: str | Annotated[list[str], Field(min_length=1)] | None = None
    """With vllm: the address of a running vLLM server, `http://host:port`, which then belongs to this run; or a list of
    such addresses, which share the requests."""
    server_folder: Path | None = None
    """With server: a folder that this process and the server both see under this path, for weights on their way. None:
    the machine's own folder for temporary files, for a server on the same machine."""
    cache_gib: float = Field(4.0, gt=0)
    """GiB for the keys and values of running sequences and shared prompts. The embedded engine takes what it needs and
    runs fewer sequences side by side where that would be more; vllm takes it all, at the start."""

    @model_validator(mode="after")
    def _check_server(self) -> Self:
        if self.server is None:
            if self.server_folder is not None:
                raise ValueError("server_folder is for the weights that go to a vLLM server; name it too: server")
            return self
        if self.engine != "vllm":
            raise ValueError(f"server is a vLLM server, and engine is {self.engine}; add engine: vllm")
        for given in self.servers:
            address = urlsplit(given)
            if address.scheme not in ("http", "https") or not address.hostname:
                raise ValueError(f"server is {given!r}; write it in full, like http://127.0.0.1:8000")
            if self.servers.count(given) > 1:
                raise ValueError(f"server names {given} twice; give each server once")
            if address.hostname not in THIS_MACHINE and self.server_folder is None:
                raise ValueError(
                    f"server is on {address.hostname}, which reads the weights from a folder that both machines see; "
                    "name it: server_folder"
                )
        return self

    @property
    def servers(self) -> list[str]:
        """The addresses of vLLM servers."""
        return [self.server] if isinstance(self.server, str) else self.server or []
