"""Models of megatron-core in an elastic job: its process groups, its random numbers, and a GPT as pipeline layers.

Each rank is a world of its own for Megatron: every group of `parallel_state` has one rank, and stages, data parallelism
and sharding of the optimizer are Everstep's.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore

from everstep.elastic.contract.errors import UsageError

ONLY = {  # setting of TransformerConfig -> the values that work, and what to do instead of others
    "tensor_model_parallel_size": ((1,), "tensor parallelism is not supported yet"),
    "pipeline_model_parallel_size": ((1,), "stages are the runtime's: @everstep.elastic(stages=...)"),
    "virtual_pipeline_model_parallel_size": ((None, 1), "stages are the runtime's: @everstep.elastic(stages=...)"),
    "context_parallel_size": ((1,), "context parallelism is not supported"),
    "expert_model_parallel_size": ((1,), "expert parallelism is not supported"),
    "num_moe_experts": ((None,), "routers keep state from forward to forward that the runtime does not know"),
    "mtp_num_layers": ((None,), "multi-token prediction uses the embedding and the output in the same layer"),
    "multi_latent_attention": ((False,), "it needs Transformer Engine, with which nothing is tested"),
    "fp8": ((None, False), "its scaling factors are kept from forward to forward"),
    "fp4": ((None, False), "its scaling factors are kept from forward to forward"),
    "gradient_accumulation_fusion": ((False,), "the runtime adds gradients up itself, in a fixed order"),
    "defer_embedding_wgrad_compute": ((False,), "the runtime needs a micro-batch's gradients after its backward"),
    "cuda_graph_impl": (("none",), "the runtime runs layers one by one"),
    "cpu_offloading": ((False,), "it spans layers, which may be on several stages"),
    "fine_grained_activation_offloading": ((False,), "it spans layers, which may be on several stages"),
}
POSITIONS = ("learned_absolute", "rope", "none")


def initialize() -> None:
    """Initialise `parallel_state` with groups of one rank, and tie Megatron's random numbers to the runtime's.

    Call it in the training function, before the model is built; again, it does nothing. On a host without CUDA it also
    makes the CPU the device on which Megatron allocates. Raises UsageError if megatron-core is not installed, or if the
    script has made process groups of several ranks.
    """
    try:
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import random
    except ImportError as error:
        raise UsageError(f"megatron-core cannot be imported ({error}): pip install 'everstep[megatron]'") from None
    if dist.is_initialized() and dist.get_world_size() > 1:
        raise UsageError(
            f"there is a process group of {dist.get_world_size()} ranks already: leave out what makes one, since in an "
            "elastic job each rank is a world of its own for Megatron"
        )
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    if not torch.cuda.is_available():
        torch.cuda.current_device = _host  # type: ignore[assignment]
    # The runtime seeds torch's generators before each layer's forward. With a group of one rank no region needs numbers
    # of its own, so the tracker that leaves these generators as they are is right; Megatron has it for inference.
    random.initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def _host() -> str:
    """Where Megatron allocates without CUDA: `torch.empty(..., device=torch.cuda.current_device())`."""
    return "cpu"


def staged(model: nn.Module) -> nn.Module:
    """Give a GPTModel the layers by which the runtime cuts it into stages; returns the model.

    The first takes tokens, of shape (batch, sequence), the last returns logits, (sequence, batch, vocabulary), for
    `model.compute_language_model_loss(labels, logits)`. Between them are hidden states, (sequence, batch, width).
    Positions count from 0, and attention is causal. Parameters keep their names. Raises UsageError for a model that
    cannot be cut.
    """
    _check(model)
    model.pipeline_layers = functools.partial(_layers, model)  # type: ignore[assignment]
    return model


def _check(model: Any) -> None:
    from megatron.core.models.gpt import GPTModel

    if not isinstance(model, GPTModel):
        raise UsageError(f"staged() takes a GPTModel of megatron.core.models.gpt, got {type(model).__name__}")
    for name, (values, reason) in ONLY.items():
        value = getattr(model.config, name, values[0])
        if value not in values:
            raise UsageError(f"{name}={value!r} of a Megatron model: {reason}; use {values[0]!r}")
    if not (model.pre_process and model.post_process):
        raise UsageError("the GPTModel is a part of one (pre_process, post_process): build the whole model")
    if model.position_embedding_type not in POSITIONS:
        raise UsageError(
            f"position_embedding_type={model.position_embedding_type!r} of a Megatron model cannot be cut into "
            f"layers: use one of {', '.join(POSITIONS)}"
        )
    if model.config.recompute_granularity == "selective" and not torch.cuda.is_available():
        raise UsageError("recompute_granularity='selective' of a Megatron model needs CUDA: use 'full', or None")


def _layers(model: Any) -> list[nn.Module]:
    rotary = model.rotary_pos_emb if model.position_embedding_type == "rope" else None
    decoder = [_DecoderLayer(layer, rotary, _recomputes(model.config, layer)) for layer in model.decoder.layers]
    return [_EmbeddingLayer(model.embedding), *decoder, _OutputLayer(model)]


def _recomputes(config: Any, layer: Any) -> bool:
    """Whether a layer's activations are computed again in its backward."""
    if config.recompute_granularity != "full":
        return False
    return bool(config.recompute_method != "block" or layer.layer_number <= config.recompute_num_layers)


class _EmbeddingLayer(nn.Module):
    """Tokens, (batch, sequence) -> hidden states, (sequence, batch, width)."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        hidden: Tensor = self.embedding(tokens, positions)
        return hidden


class _DecoderLayer(nn.Module):
    """Hidden states -> hidden states, both (sequence, batch, width)."""

    def __init__(self, layer: nn.Module, rotary: nn.Module | None, recompute: bool) -> None:
        super().__init__()
        self.layer = layer
        self.rotary = rotary
        self.recompute = recompute

    def forward(self, hidden: Tensor) -> Tensor:
        if self.recompute and self.layer.training:
            done: Tensor = torch.utils.checkpoint.checkpoint(self._run, hidden, use_reentrant=False)
            return done
        return self._run(hidden)

    def _run(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[0]
        rotary = self.rotary(length) if self.rotary is not None else None
        done: Tensor
        done, _ = self.layer(hidden, attention_mask=_causal(length, hidden.device), rotary_pos_emb=rotary)
        return done


class _OutputLayer(nn.Module):
    """Hidden states -> logits, (sequence, batch, vocabulary): the last norm and the output layer."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm = model.decoder.final_layernorm
        self.output = model.output_layer
        tied = model.share_embeddings_and_output_weights
        self.weight = model.shared_embedding_or_output_weight() if tied else None

    def forward(self, hidden: Tensor) -> Tensor:
        if self.norm is not None:
            hidden = self.norm(hidden)
        logits: Tensor
        logits, _ = self.output(hidden, weight=self.weight)
        return logits


@functools.lru_cache(8)
def _causal(length: int, device: torch.device) -> Tensor:
    """True where a position may not look: at those after it. Of shape (1, 1, length, length)."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)[None, None]
