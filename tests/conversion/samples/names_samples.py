"""The same model in Hugging Face transformers and in megatron-core: run by the peers' interpreter.

names_samples.py save OUT       tiny transformers models: OUT/<model>.pt, {"state": ..., "logits": ...}
names_samples.py compare OUT    OUT/<model>-megatron.pt in a GPTModel: prints how far its logits are from those
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import gelu, silu

TOKENS = torch.arange(12).reshape(2, 6) * 5 % 32
LAYERS, HIDDEN, HEADS, GROUPS, INNER, VOCABULARY, LENGTH = 2, 16, 4, 2, 24, 32, 8


def models() -> dict[str, Any]:
    from transformers import (
        GPT2Config,
        GPT2LMHeadModel,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen2Config,
        Qwen2ForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": LENGTH,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    small = GPT2Config(vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS)
    return {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**shape)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**shape)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=HIDDEN // HEADS)),
        "gpt2": lambda: GPT2LMHeadModel(small),
    }


def save(out: Path) -> None:
    for name, make in models().items():
        torch.manual_seed(3)
        model = make().eval()
        for parameter in model.parameters():  # norms and biases too: what starts at 1 or 0 would hide a mistake
            torch.nn.init.normal_(parameter, std=0.3)
        with torch.no_grad():
            logits = model(TOKENS).logits
        torch.save({"state": model.state_dict(), "logits": logits}, out / f"{name}.pt")


def gpt(name: str) -> Any:
    """The GPTModel of one process that should compute the same."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.transformer_config import TransformerConfig

    old = name == "gpt2"
    norm = "LayerNorm" if old else "RMSNorm"
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=HIDDEN,
        num_attention_heads=HEADS,
        num_query_groups=HEADS if old else GROUPS,
        ffn_hidden_size=4 * HIDDEN if old else INNER,
        gated_linear_unit=not old,
        activation_func=partial(gelu, approximate="tanh") if old else silu,
        add_bias_linear=old,
        add_qkv_bias=name == "qwen2",
        qk_layernorm=name == "qwen3",
        normalization=norm,
        layernorm_epsilon=1e-5,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        apply_rope_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=norm, qk_layernorm=name == "qwen3"),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="learned_absolute" if old else "rope",
        share_embeddings_and_output_weights=False,
    ).eval()


def local(name: str) -> str:
    """The name in a model without Transformer Engine, where norms are modules of their own."""
    name = name.replace("self_attention.linear_qkv.layer_norm_", "input_layernorm.")
    return name.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")


def compare(out: Path) -> None:
    import torch.distributed as dist
    from megatron.core import parallel_state, tensor_parallel

    sys.path.insert(0, str(Path(__file__).parent))
    from megatron_world import OnCpu

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    torch.cuda.current_device = lambda: "cpu"
    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()
    far = {}
    with OnCpu():
        parallel_state.initialize_model_parallel()
        tensor_parallel.random.initialize_rng_tracker(force_reset=True)
        for name in models():
            model = gpt(name)
            state = torch.load(out / f"{name}-megatron.pt", weights_only=True)
            missing, unexpected = model.load_state_dict(
                {local(key): value for key, value in state.items()}, strict=False
            )
            assert not unexpected, unexpected
            assert not [key for key in missing if not key.endswith("_extra_state")], missing
            mask = torch.triu(torch.ones(TOKENS.shape[1], TOKENS.shape[1], dtype=torch.bool), 1)[None, None]
            with torch.no_grad():
                logits = model(TOKENS, torch.arange(TOKENS.shape[1]).expand(2, -1), mask)
            wanted = torch.load(out / f"{name}.pt", weights_only=True)["logits"]
            far[name] = [float((logits - wanted).abs().max()), float(wanted.abs().max())]
    print(json.dumps(far))
    dist.destroy_process_group()


if __name__ == "__main__":
    {"save": save, "compare": compare}[sys.argv[1]](Path(sys.argv[2]))
