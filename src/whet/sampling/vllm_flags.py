"""How a vLLM server is started to take the weights of a run (`sampling.vllm_server`)."""

EXTENSION, FILES = "whet.sampling.vllm_worker.Extension", "whet_files"
"""What reads weights in its workers, and the name of that room in vLLM's own list of them."""
SERVER_FLAGS = (
    "--tokens-only", "--logprobs-mode", "processed_logprobs",
    "--worker-extension-cls", EXTENSION, "--weight-transfer-config.backend", FILES,
)  # fmt: skip
