"""Checkpoints that DeepSpeed wrote, each with the state of its engines: run by the peers' interpreter.

    deepspeed_samples.py OUT WORLD VARIANT...

Every variant trains a tiny model for three steps in OUT/<variant>/, saves it, and leaves truth_<rank>.pt: the full
fp32 parameters, both moments, the step, buffers and frozen parameters, as gathered from the live engine. Those named
load-... load the universal checkpoint that is in their folder, and leave the truth of the engine that did. With a
world of 0, DeepSpeed's own converter makes a universal checkpoint of each variant.

There is no fp16: DeepSpeed has none on CPU. Its files differ from bf16's in their names' prefix and one type only.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import nn

sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # or it compiles one, half a minute
STEPS = 3
UNIVERSAL = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}


class Net(nn.Module):
    """Odd sizes, so that parameters straddle ranks; a tied head, a frozen linear, a buffer, two optimizer groups."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(13, 7)
        self.frozen = nn.Linear(7, 7)
        self.frozen.requires_grad_(False)
        self.norm = nn.BatchNorm1d(7)
        self.layers = nn.ModuleList(nn.Linear(7, 7) for _ in range(3))
        self.scale = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(7, 13, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("inv_freq", torch.rand(3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embedding(tokens))
        hidden = self.norm(hidden.transpose(1, 2)).transpose(1, 2)
        for layer in self.layers:
            hidden = hidden + torch.relu(layer(hidden))
        return self.head(hidden * self.scale.to(hidden.dtype))


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        from deepspeed.moe.layer import MoE

        self.embedding = nn.Embedding(13, 7)
        expert = nn.Sequential(nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 7))
        self.moe = MoE(7, expert, num_experts=4, ep_size=2, k=1, min_capacity=8)
        self.head = nn.Linear(7, 13)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(tokens)
        return self.head(hidden + self.moe(hidden)[0])


def groups(model: nn.Module) -> list[dict]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    dims = {id(p): len(getattr(p, "ds_shape", p.shape)) for p in trained}
    return [
        {"params": [p for p in trained if dims[id(p)] > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if dims[id(p)] <= 1], "weight_decay": 0.0},
    ]


def config(stage: int, dtype: str, **more) -> dict:
    made = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": stage, **more.pop("zero", {})},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10, "warmup_max_lr": 0.01}},
        "steps_per_print": 10000,
        **more,
    }
    if dtype == "bfloat16":
        made["bf16"] = {"enabled": True}
    return made


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(0, 13, (2, 5), generator=generator), torch.randint(0, 13, (2, 5), generator=generator)


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1))


def train(engine: deepspeed.DeepSpeedEngine, rank: int, steps: int = STEPS) -> None:
    for step in range(steps):
        tokens, labels = batch(rank, step)
        loss = loss_of(engine(tokens), labels)
        engine.backward(loss)
        engine.step()


def masters(engine: deepspeed.DeepSpeedEngine) -> dict[nn.Parameter, torch.Tensor]:
    """Without ZeRO: of each parameter the one that the optimizer steps."""
    pairs = zip(
        getattr(engine.optimizer, "fp16_groups", [engine.module.parameters()]),
        getattr(engine.optimizer, "fp32_groups", [engine.module.parameters()]),
        strict=True,
    )
    return {ours: master for low, high in pairs for ours, master in zip(low, high, strict=True)}


def truth(engine: deepspeed.DeepSpeedEngine) -> dict:
    """The tensors of this rank's engine, by the names of its module."""
    if engine.zero_optimization() and engine.zero_optimization_stage() < 3:  # fp32 engines link the moments too early
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict = {"fp32": {}, "exp_avg": {}, "exp_avg_sq": {}, "frozen": {}, "buffers": {}, "dtype": {}, "tied": {}}
    found["module"] = {}
    seen: dict[int, str] = {}
    for name, parameter in engine.module.named_parameters(remove_duplicate=False):
        if id(parameter) in seen:
            found["tied"][name] = seen[id(parameter)]
            continue
        seen[id(parameter)] = name
        found["dtype"][name] = str(parameter.dtype).removeprefix("torch.")
        if not parameter.requires_grad:
            with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
                found["frozen"][name] = parameter.data.clone()
            continue
        found["module"][name] = parameter.data.clone() if not hasattr(parameter, "ds_id") else None
        if hasattr(engine.optimizer, "fp32_groups_flat_partition"):  # BF16_Optimizer
            found["fp32"][name] = safe_get_full_fp32_param(parameter).clone()
            continue
        if not engine.zero_optimization():
            master = masters(engine)[parameter]
            state = getattr(engine.optimizer, "optimizer", engine.optimizer).state[master]
            found["fp32"][name] = master.data.clone()
            found["exp_avg"][name], found["exp_avg_sq"][name] = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
            continue
        found["fp32"][name] = safe_get_full_fp32_param(parameter).clone()
        for key in ("exp_avg", "exp_avg_sq"):
            found[key][name] = safe_get_full_optimizer_state(parameter, key).clone()
    persistent = {name for name, _ in engine.module.named_buffers()} & engine.module.state_dict().keys()
    found["buffers"] = {name: buffer.clone() for name, buffer in engine.module.named_buffers() if name in persistent}
    found["step"] = engine.global_steps
    return found


def save(engine: deepspeed.DeepSpeedEngine, out: Path, rank: int) -> None:
    known = {} if engine.has_moe_layers else UNIVERSAL  # with experts it is a reserved key
    engine.save_checkpoint(str(out), client_state={**known, "epoch": 2, "note": {"seed": 5}})
    torch.save(truth(engine), out / f"truth_{rank}.pt")


def zero(out: Path, rank: int, stage: int, dtype: str, **more) -> None:
    torch.manual_seed(1)
    if stage == 3 and dtype != "float32":  # zero.Init makes bfloat16 of anything on CPU
        with deepspeed.zero.Init(config_dict_or_path=config(stage, dtype, **more), dtype=getattr(torch, dtype)):
            model = Net()
    else:
        model = Net().to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(groups(model), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, dtype, **more))
    train(engine, rank)
    save(engine, out, rank)


def loaded(out: Path, rank: int, stage: int, dtype: str, universal: bool = True, **more) -> None:
    """An engine at this world size that loads the checkpoint in OUT/<variant>/, universal or not."""
    torch.manual_seed(7)
    model = Net().to(getattr(torch, dtype))
    optimizer = torch.optim.AdamW(groups(model), lr=0.5)
    settings = {**config(stage, dtype, **more), "checkpoint": {"load_universal": universal}}
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    path, client = engine.load_checkpoint(str(out))
    assert path is not None
    assert client["note"] == {"seed": 5}
    found = truth(engine)
    found["lr"] = engine.get_lr()
    found["scheduler"] = engine.lr_scheduler.state_dict()
    torch.save(found, out / f"truth_{rank}.pt")
    train(engine, rank, 1)


class Embed(nn.Embedding):
    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return super().forward(tokens)


def unembed(layer: Embed, hidden: torch.Tensor) -> torch.Tensor:
    return hidden @ layer.weight.T


def pipeline(out: Path, rank: int, stages: int, dtype: str, stage: int = 1, *, tied: bool = True) -> None:
    torch.manual_seed(1)
    layers = [
        TiedLayerSpec("embed", Embed, 13, 7, tied_weight_attr="weight"),
        LayerSpec(nn.Linear, 7, 7),
        nn.functional.relu,
        LayerSpec(nn.LayerNorm, 7),
        LayerSpec(nn.Linear, 7, 7),
        TiedLayerSpec("embed", Embed, 13, 7, forward_fn=unembed, tied_weight_attr="weight"),
    ]
    if not tied:
        layers[0], layers[-1] = LayerSpec(Embed, 13, 7), LayerSpec(nn.Linear, 7, 13)
    model = PipelineModule(layers, num_stages=stages, loss_fn=loss_of, partition_method="uniform")
    made = config(stage, dtype)
    made["gradient_accumulation_steps"] = 2
    engine, *_ = deepspeed.initialize(
        model=model, optimizer=torch.optim.AdamW(model.parameters(), lr=0.01), config=made
    )
    place = rank % (dist.get_world_size() // stages)
    for step in range(STEPS):
        engine.train_batch(iter([batch(place, 2 * step), batch(place, 2 * step + 1)]))
    save(engine, out, rank)


def experts(out: Path, rank: int, stage: int, dtype: str) -> None:
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

    torch.manual_seed(1)
    model = Experts()
    torch.manual_seed(100 + rank % 2)  # experts differ between the ranks of an expert group
    for name, parameter in model.named_parameters():
        if "deepspeed_experts" in name:
            nn.init.normal_(parameter)
    model = model.to(getattr(torch, dtype))
    parameters = {"params": list(model.parameters()), "name": "all"}
    optimizer = torch.optim.AdamW(split_params_into_different_moe_groups_for_optimizer(parameters), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(stage, dtype))
    train(engine, rank)
    save(engine, out, rank)


def autotp(out: Path, rank: int, stage: int, dtype: str) -> None:
    """A Llama whose linears DeepSpeed cuts over two ranks; the reader gathers the truth from each rank's slices."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    made = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    model = LlamaForCausalLM(made).to(getattr(torch, dtype))
    whole = {name: parameter.data.clone() for name, parameter in model.named_parameters()}
    settings = config(stage, dtype)
    settings["tensor_parallel"] = {"autotp_size": 2}
    model = deepspeed.tp_model_init(model, tp_size=2, dtype=getattr(torch, dtype))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    for step in range(STEPS):
        tokens, _ = batch(rank // 2, step)
        engine.backward(engine(input_ids=tokens, labels=tokens).loss)
        engine.step()
    engine.save_checkpoint(str(out), client_state={"epoch": 2})
    found = truth(engine)
    found["whole shapes"] = {name: tuple(tensor.shape) for name, tensor in whole.items()}
    torch.save(found, out / f"truth_{rank}.pt")


VARIANTS = {
    "z0-fp32": lambda out, rank: zero(out, rank, 0, "float32"),
    "z0-bf16": lambda out, rank: zero(out, rank, 0, "bfloat16"),
    "z1-fp32": lambda out, rank: zero(out, rank, 1, "float32"),
    "z1-bf16": lambda out, rank: zero(out, rank, 1, "bfloat16"),
    "z2-bf16": lambda out, rank: zero(out, rank, 2, "bfloat16"),
    "z3-fp32": lambda out, rank: zero(out, rank, 3, "float32"),
    "z3-bf16": lambda out, rank: zero(out, rank, 3, "bfloat16", zero={"sub_group_size": 60}),
    "z1-bf16-grads": lambda out, rank: zero(out, rank, 1, "bfloat16", data_types={"grad_accum_dtype": "fp32"}),
    "z1-robin-bf16": lambda out, rank: zero(out, rank, 1, "bfloat16", zero={"round_robin_gradients": True}),
    "z2-elastic-bf16": lambda out, rank: zero(out, rank, 2, "bfloat16", zero={"elastic_checkpoint": True}),
    "pp2-z0-fp32": lambda out, rank: pipeline(out, rank, 2, "float32", 0, tied=False),
    "pp2-bf16": lambda out, rank: pipeline(out, rank, 2, "bfloat16"),
    "pp2-dp2-bf16": lambda out, rank: pipeline(out, rank, 2, "bfloat16"),
    "moe-z1-bf16": lambda out, rank: experts(out, rank, 1, "bfloat16"),
    "tp2-z1-bf16": lambda out, rank: autotp(out, rank, 1, "bfloat16"),
    "tp2-z3-bf16": lambda out, rank: autotp(out, rank, 3, "bfloat16"),
}


LOADS = {
    f"load-z{stage}-{dtype}": lambda out, rank, stage=stage, dtype=dtype: loaded(
        out, rank, stage, {"fp32": "float32", "bf16": "bfloat16"}[dtype]
    )
    for stage in (1, 2, 3)
    for dtype in ("fp32", "bf16")
} | {
    "resume-z1-fp32": lambda out, rank: loaded(out, rank, 1, "float32", universal=False),
    "resume-robin-bf16": lambda out, rank: loaded(
        out, rank, 1, "bfloat16", universal=False, zero={"round_robin_gradients": True}
    ),
    "resume-z2-bf16": lambda out, rank: loaded(out, rank, 2, "bfloat16", universal=False),
}


def to_universal(out: Path) -> None:
    """DeepSpeed's own conversion, beside the checkpoint."""
    from argparse import Namespace

    from deepspeed.checkpoint.ds_to_universal import main

    tag = out / (out / "latest").read_text()
    main(
        Namespace(
            input_folder=str(tag), output_folder=f"{tag}_universal", num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=False,
        )
    )  # fmt: skip


def worker(rank: int, world: int, out: Path, names: list[str]) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1",
        MASTER_PORT=os.environ["SAMPLES_PORT"], CROSS_SIZE="1", LOCAL_SIZE=str(world),
    )  # fmt: skip
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False)
    for name in names:
        folder = out / name
        folder.mkdir(parents=True, exist_ok=True)
        try:
            {**VARIANTS, **LOADS}[name](folder, rank)
        except BaseException as error:
            raise RuntimeError(f"{name} on rank {rank}: {error!r}") from error
        dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    import socket

    out, world, names = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if not world:
        for name in names:
            to_universal(out / name)
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        os.environ["SAMPLES_PORT"] = str(free.getsockname()[1])
    context = mp.get_context("fork")
    workers = [context.Process(target=worker, args=(rank, world, out, names)) for rank in range(world)]
    for process in workers:
        process.start()
    for process in workers:
        process.join()
    sys.exit(max(abs(process.exitcode or 0) for process in workers))


if __name__ == "__main__":
    main()
