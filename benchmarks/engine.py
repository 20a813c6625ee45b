"""vLLM's side, in the environment of `make test-vllm`: `python -m benchmarks.engine vllm WORK MODEL_FOLDER THREADS`."""

from __future__ import annotations

import os
import sys
from zlib import crc32

os.environ.update(
    HF_HUB_OFFLINE="1", VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR"
)

import torch
import vllm

from benchmarks.session import Session
from benchmarks.work import WORKS

CACHE_BYTES = 2**30


def main(name: str, folder: str, threads: int) -> None:
    """Greedy decoding without an end of text; everything is left as vLLM has it, except for compiling (minutes)."""
    session, work = Session(), WORKS[name]
    set_threads = torch.set_num_threads
    engine = vllm.LLM(
        model=folder,
        dtype="float32",
        max_model_len=4096,
        max_num_seqs=work.rows,
        enforce_eager=True,
        kv_cache_memory_bytes=CACHE_BYTES,
        gpu_memory_utilization=0.01,
        skip_tokenizer_init=True,
        seed=0,
    )
    set_threads(threads)
    config = engine.llm_engine.model_config
    session.ready(parameters=0)
    for step in range(work.steps + 1):
        prompts, lengths = work.token_prompts(step, config.get_vocab_size()), work.lengths(step)
        settings = [
            vllm.SamplingParams(max_tokens=length, temperature=0, ignore_eos=True, detokenize=False)
            for length in lengths
        ]
        if not session.wait():
            break
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], settings, use_tqdm=False)
        checks = [crc32(repr(list(output.outputs[0].token_ids)).encode()) for output in outputs]
        session.done(tokens=sum(lengths), checks=checks)
    session.worked()
    session.finish()


if __name__ == "__main__":
    main(sys.argv[2], sys.argv[3], int(sys.argv[4]))
