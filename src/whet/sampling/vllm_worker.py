"""What a vLLM server has of whet in its workers: weights come as files, and are compared before vLLM is touched.

A server is started with it by `vllm_flags.SERVER_FLAGS`. `whet_read` comes first, while the server still answers: it
reads a file and compares the digest of its tensors with that of the trainer's. Then come the official phases (start,
update, finish), which load what was read, and nothing that was not. Between start and finish vLLM's layers have no
memory, so an error there would be the end of the engine.
"""

from __future__ import annotations

from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from whet.sampling.vllm import compare, repack_tied_head
from whet.sampling.vllm_flags import FILES
from whet.sampling.weight_sync import weights_digest


class FileEngine(WeightTransferEngine):  # type: ignore[misc]  # vLLM is not there where types are checked
    """vLLM's room for weights on their way, of a worker."""

    ready: tuple[str, dict[str, Tensor]] = "", {}
    """The digest of what was read, and the tensors; the file is mapped, so they take no memory of their own."""

    def start_weight_update(self) -> None:
        """Phase 1."""
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Phase 2: load what was read. Raises `RuntimeError` where that is something else."""
        if update_info != {"digest": self.ready[0]}:
            raise RuntimeError(f"weights {update_info} were not read before; {self.ready[0]} were")
        self.model.load_weights(self.ready[1].items())

    def finish_weight_update(self) -> None:
        """Phase 3. Raises `SamplerError` where the model then has other weights."""
        finalize_layerwise_reload(self.model, self.model_config)
        repack_tied_head(self.model)
        compare(self.model, self.ready[1])
        self.ready = "", {}

    def init_transfer_engine(self, init_info: Any) -> None:
        """Nothing: there is no connection."""

    def receive_weights(self, update_info: Any) -> None:
        """Never called: `update_weights` reads no record of its own."""

    def shutdown(self) -> None:
        """Nothing is held but what was read."""
        self.ready = "", {}


class Extension:
    """What vLLM adds to its worker class."""

    weight_transfer_engine: FileEngine

    def whet_read(self, path: str, digest: str) -> str:
        """Read weights that are about to be handed over. Returns what is wrong with them, or nothing."""
        try:
            read = load_file(path)
        except (OSError, SafetensorError) as error:
            return f"{path}: cannot be read ({error})"
        if (found := weights_digest(read)) != digest:
            return f"{path}: the digest of the weights is {found[:12]}, and that of those handed over {digest[:12]}"
        self.weight_transfer_engine.ready = digest, read
        return ""


WeightTransferEngineFactory.register_engine(FILES, FileEngine)
