"""Fine-tuning a causal language model of Hugging Face with a LoRA of PEFT; only the adapter is saved."""

import json
import math
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM, get_linear_schedule_with_warmup

out, epochs = Path(sys.argv[1]), 5
torch.manual_seed(22)
texts = [[(start + stride * i) % 30 + 2 for i in range(5 + start % 4)] for start in range(32) for stride in (1, 2, 3)]


def collate(batch):
    longest = max(map(len, batch))
    input_ids = torch.tensor([text + [0] * (longest - len(text)) for text in batch])
    mask = (input_ids != 0).long()
    return {"input_ids": input_ids, "attention_mask": mask, "labels": input_ids.masked_fill(mask == 0, -100)}


train_loader = DataLoader(texts[:80], batch_size=16, shuffle=True, collate_fn=collate)
eval_loader = DataLoader(texts[80:], batch_size=16, collate_fn=collate)
model = LlamaForCausalLM(
    LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16,
    )
)  # fmt: skip
model = get_peft_model(
    model, LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"])
)
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
lr_scheduler = get_linear_schedule_with_warmup(optimizer, 5, epochs * len(train_loader))
history = []
for epoch in range(epochs):
    model.train()
    for batch in train_loader:
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in eval_loader]
    history.append({"epoch": epoch, "perplexity": math.exp(sum(losses) / len(losses))})
(out / "history.json").write_text(json.dumps(history))
torch.save(get_peft_model_state_dict(model), out / "adapter.pt")
