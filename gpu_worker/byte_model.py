"""What the runners without a model announce: a vocabulary of bytes, EOS and BOS, and sizes from the settings."""

from __future__ import annotations

from hashlib import blake2b

from gpu_worker.errors import LoadError
from gpu_worker.runner import Description
from gpu_worker.settings import WorkerSettings
from protocol.messages import Geometry
from protocol.tokenizer_files import bundle_hash, byte_bundle

EOS = 256
BOS = 257
VOCAB = 258


def byte_geometry(settings: WorkerSettings) -> Geometry:
    """The sizes of a worker without a model: the settings', with 4,096 blocks and tokens where they name none."""
    return Geometry(
        block_size=settings.block_size,
        blocks=settings.num_gpu_blocks or 4096,
        host_blocks=settings.num_cpu_blocks,
        slots=settings.max_num_seqs,
        max_model_len=settings.max_model_len or 4096,
        max_step_tokens=settings.step_tokens(),
        vocab_size=VOCAB,
    )


def check_room(settings: WorkerSettings) -> None:
    """Raise LoadError if the blocks of a worker without a model hold no sequence of max_model_len."""
    geometry = byte_geometry(settings)
    if geometry.blocks < geometry.table_width:
        raise LoadError(
            f"{geometry.blocks} blocks hold no sequence of max_model_len, which needs {geometry.table_width}: "
            "lower --max-model-len or raise --num-gpu-blocks"
        )


def describe_bytes(settings: WorkerSettings, kind: str) -> Description:
    """The description of a worker without a model. Workers of one `kind` (oracle, simulated) form one model."""
    bundle = byte_bundle()
    return Description(
        model=settings.served_model_name or kind,
        fingerprint=blake2b(f"pagewire {kind} 1".encode(), digest_size=16).digest(),
        geometry=byte_geometry(settings),
        attention="none",
        eos=[EOS],
        bos=BOS,
        tokenizer=bundle_hash(bundle),
        bundle=bundle,
    )
