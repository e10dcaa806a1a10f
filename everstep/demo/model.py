"""A byte-level GPT as a sequence of layers, so that it can be cut into pipeline stages."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes of the model; the vocabulary is the 256 bytes."""

    layers: int = 4
    width: int = 192
    heads: int = 6
    context: int = 128
    dropout: float = 0.1
    tied: bool = False
    vocabulary: int = 256


class Embedding(nn.Module):
    """Bytes of shape (batch, context) to vectors of shape (batch, context, width)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token = nn.Embedding(config.vocabulary, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.token.weight, std=0.02)
        nn.init.normal_(self.position.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        embedded: Tensor = self.dropout(self.token(tokens) + self.position(positions))
        return embedded


class TransformerLayer(nn.Module):
    """One pre-norm transformer block; shape (batch, context, width) to the same."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.rate = config.dropout
        self.norm_attention = nn.LayerNorm(config.width)
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)
        self.norm_mlp = nn.LayerNorm(config.width)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, context, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, context, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        rate = self.rate if self.training else 0.0
        mixed = functional.scaled_dot_product_attention(query, key, value, dropout_p=rate, is_causal=True)
        x = x + self.dropout(self.project(mixed.transpose(1, 2).reshape(batch, context, width)))
        fed: Tensor = x + self.dropout(self.down(functional.gelu(self.up(self.norm_mlp(x)))))
        return fed


class Head(nn.Module):
    """Vectors to logits over the next byte, shape (batch, context, 256)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.output.weight, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.output(self.norm(x))
        return logits


def gpt(config: GPTConfig) -> nn.Sequential:
    """`nn.Sequential(Embedding, Block x layers, Head)`; `tied` shares the token embedding with the head."""
    embedding, head = Embedding(config), Head(config)
    if config.tied:
        head.output.weight = embedding.token.weight
    return nn.Sequential(embedding, *(TransformerLayer(config) for _ in range(config.layers)), head)


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy, in nats per byte, of logits (batch, context, 256) against targets (batch, context)."""
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
