"""Worlds of megatron-core on the CPU: processes over gloo, tiny GPT models, and their live tensors."""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.overrides import TorchFunctionMode

warnings.filterwarnings("ignore")
from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402
from megatron.core.num_microbatches_calculator import (  # noqa: E402
    destroy_num_microbatches_calculator,
    init_num_microbatches_calculator,
)
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

SEQUENCE, BATCH, VOCABULARY, PADDED = 8, 2, 60, 64


class OnCpu(TorchFunctionMode):
    """Every tensor that megatron-core would make on a GPU is made here; the types it asks for are a GPU's."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if function is torch.Tensor.cuda:
            return args[0]
        done = function(*args, **kwargs)
        if function is torch.Tensor.type and isinstance(done, str):
            return done.replace("torch.", "torch.cuda.")
        return done


@dataclass(frozen=True)
class Case:
    """One model and its world. `sharding`: of the distributed optimizer; "" for plain mixed precision."""

    name: str
    tp: int = 1
    pp: int = 1
    ep: int = 1
    experts: int = 0
    sharding: str = ""
    tied: bool = True
    bf16: bool = True
    swiglu: bool = True
    layers: int = 4
    bucket: int | None = None


def start(case: Case) -> None:
    """The process groups of a case, in the world that is there."""
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep,
        create_gloo_process_groups=True,
    )
    dp = parallel_state.get_data_parallel_world_size()
    init_num_microbatches_calculator(dist.get_rank(), None, BATCH * dp * 2, BATCH, dp)


def stop() -> None:
    destroy_num_microbatches_calculator()
    parallel_state.destroy_model_parallel()


def build(case: Case, seed: int) -> tuple[Any, Any, TransformerConfig]:
    """(model, optimizer, configuration) of this process."""
    torch.manual_seed(seed)
    tensor_parallel.random.initialize_rng_tracker(force_reset=True)
    config = TransformerConfig(
        num_layers=case.layers,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        expert_model_parallel_size=case.ep,
        num_moe_experts=case.experts or None,
        moe_router_topk=2,
        moe_token_dispatcher_type="allgather",
        sequence_parallel=bool(case.experts and case.tp > 1),
        gated_linear_unit=case.swiglu,
        add_bias_linear=not case.experts,
        activation_func=torch.nn.functional.silu if case.swiglu else torch.nn.functional.gelu,
        normalization="LayerNorm",
        bf16=case.bf16,
        params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        pipeline_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        perform_initialization=True,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
    )
    config.finalize_model_grads_func = finalize_model_grads
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=case.experts or None, moe_grouped_gemm=False, normalization="LayerNorm"),
        vocab_size=PADDED,
        max_sequence_length=SEQUENCE,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=case.tied,
    )
    if case.bf16:
        model = model.bfloat16()
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=bool(case.sharding),
        overlap_grad_reduce=case.bucket is not None,
        bucket_size=case.bucket,
        check_for_nan_in_grad=False,
    )
    model = DistributedDataParallel(config, settings, model, disable_bucketing=False)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-2,
            weight_decay=0.1,
            bf16=case.bf16,
            params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
            use_distributed_optimizer=bool(case.sharding),
            clip_grad=0.0,
        ),
        [model],
    )
    return model, optimizer, config


def train(case: Case, model: Any, optimizer: Any, steps: int) -> None:
    def forward(batches: Any, model: Any) -> tuple[Any, Any]:
        tokens = next(batches)
        positions = torch.arange(SEQUENCE).expand(BATCH, -1)
        mask = torch.triu(torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool), 1)[None, None]
        out = model(tokens, positions, mask, labels=tokens.roll(-1, 1))
        return out, lambda output: (output.float().mean(), {})

    for step in range(steps):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        made = torch.Generator().manual_seed(100 * step + parallel_state.get_data_parallel_rank())
        batches = (torch.randint(VOCABULARY, (BATCH, SEQUENCE), generator=made) for _ in range(2))
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=batches,
            model=[model],
            num_microbatches=2,
            seq_length=SEQUENCE,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        optimizer.step()


set_states = DistributedOptimizer._set_main_param_and_optimizer_states


def keep_step(self: Any, weight: Any, tensors: dict[str, Any]) -> None:
    """Keep the step of torch's own optimizer, which megatron-core 0.16 forgets."""
    group, order = self.model_param_group_index_map[weight]
    state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
    set_states(self, weight, {**tensors, "step": state["step"].clone()})


def one_process(rank: int, world: int, address: str, job: Callable[[], None]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK="0", WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    torch.cuda.current_device = lambda: "cpu"  # type: ignore[assignment,return-value]
    torch.cuda.synchronize = lambda *_: None  # type: ignore[assignment]
    moe_utils.te_general_gemm = None  # not defined without Transformer Engine
    tensor_parallel.random.CudaRNGStatesTracker.fork = lambda *_, **__: nullcontext()  # type: ignore[method-assign]
    filesystem_async._results_queue = mp.get_context("fork").Manager().Queue()  # spawned, it imports everything again
    DistributedOptimizer._set_main_param_and_optimizer_states = keep_step  # type: ignore[method-assign]
    dist.init_process_group("gloo", init_method=f"file://{address}", rank=rank, world_size=world)
    with OnCpu():
        job()
    dist.barrier()
    dist.destroy_process_group()


def launch(world: int, job: Callable[[], None]) -> None:
    """Run `job` in `world` processes, forked, so that the libraries are imported once."""
    with tempfile.TemporaryDirectory() as folder:
        context = mp.get_context("fork")
        processes = [
            context.Process(target=one_process, args=(rank, world, str(Path(folder, "store")), job))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        running = list(processes)
        while running and all(process.exitcode in (0, None) for process in processes):
            wait([process.sentinel for process in running])
            running = [process for process in running if process.exitcode is None]
        for process in running:
            process.terminate()  # waits for one that failed
        codes = [process.exitcode for process in processes]
        assert codes == [0] * world, f"exit codes {codes}"
