"""A GPT of megatron-core, in stages: `everstep run --nproc-per-node 4 --es-stages 2 docs/examples/megatron_gpt.py`."""

import argparse

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import TransformerConfig

import everstep
from everstep.integrations import megatron

VOCABULARY, LENGTH = 256, 64

parser = argparse.ArgumentParser()
parser.add_argument("--layers", type=int, default=4)
parser.add_argument("--width", type=int, default=128)
parser.add_argument("--dropout", type=float, default=0.1)
parser.add_argument("--rope", action="store_true", help="rotary positions, in place of learned ones")
parser.add_argument("--untied", action="store_true", help="an output matrix of its own, in place of the embedding")
parser.add_argument("--save", help="a file for the final state")


class Sequences(torch.utils.data.Dataset):
    """Tokens that a model can learn to continue: each is the one before it, plus a small number that a sample keeps."""

    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        first = torch.randint(VOCABULARY, (1,), generator=generator)
        stride = torch.randint(1, 5, (1,), generator=generator)
        tokens = (first + stride * torch.arange(LENGTH + 1)) % VOCABULARY
        return tokens[:-1], tokens[1:]


def gpt(options):
    """The whole model, as in any script of Megatron-core with one rank."""
    config = TransformerConfig(
        num_layers=options.layers,
        hidden_size=options.width,
        num_attention_heads=4,
        hidden_dropout=options.dropout,
        attention_dropout=options.dropout,
        use_cpu_initialization=True,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(),
        vocab_size=VOCABULARY,
        max_sequence_length=LENGTH,
        position_embedding_type="rope" if options.rope else "learned_absolute",
        share_embeddings_and_output_weights=not options.untied,
    )


@everstep.elastic(steps=2000, global_batch_size=16, micro_batch_size=2, seed=0)
def train(run, options):
    megatron.initialize()
    model = megatron.staged(gpt(options).to(run.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)
    data = torch.utils.data.DataLoader(Sequences(), batch_size=16)

    def loss_fn(logits, labels):
        return model.compute_language_model_loss(labels, logits).mean()

    for step in run.steps(model, optimizer, data, loss_fn=loss_fn):
        if run.rank == 0:
            print(f"step {step.index}: loss {step.loss:.7f}", flush=True)
    if options.save and run.rank == 0:
        torch.save(run.full_state_dict(), options.save)


if __name__ == "__main__":
    train(parser.parse_args())
