"""Hugging Face models: saved with their library, and loaded by it from converted checkpoints.

Usage: transformers_samples.py save FOLDER, or: transformers_samples.py load FOLDER.
Makes FOLDER/<case>/{model, truth.pt}; loads FOLDER/<case>/<form> for the forms below and writes <form>.pt.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

warnings.filterwarnings("ignore")
from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

FORMS = ("converted", "half")


def llama(*, tied: bool) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 61}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied)
    )


MODELS = {
    "sharded": lambda: llama(tied=False).to(torch.bfloat16),
    "tied": lambda: llama(tied=True),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=61, n_positions=16)),
    "pickled": lambda: llama(tied=True),
}


def main(what: str, root: Path) -> None:
    torch.manual_seed(0)
    for case, make in MODELS.items():
        folder = root / case
        if what == "save":
            model = make()
            if case == "pickled":  # as transformers wrote them until its fifth version
                model.config.save_pretrained(folder / "model")
                torch.save(model.state_dict(), folder / "model" / "pytorch_model.bin")
            else:
                model.save_pretrained(folder / "model", max_shard_size="20KB" if case == "sharded" else "5GB")
            torch.save(model.state_dict(), folder / "truth.pt")
            continue
        for form in FORMS:
            if (folder / form).exists():
                model = AutoModelForCausalLM.from_pretrained(folder / form, dtype="auto")
                torch.save(dict(model.state_dict()), folder / f"{form}.pt")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
