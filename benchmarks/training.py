"""A training step of one engine on the same tokens: one RESULT line, losses included.

usage: python benchmarks/training.py ENGINE FOLDER [--mode lora|full] [--remat]
ENGINE: llama-jax, or peft (transformers with peft for lora). Batch 4 x 256, float32, AdamW without
decay, LoRA rank 16 on all linear layers. The losses of the first step must agree; adapters start
from different random numbers, so later ones differ in the third digit.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from workload import emit, median, prompts

BATCH, LENGTH = 4, 256


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=["llama-jax", "peft"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mode", choices=["lora", "full"], default="lora")
    parser.add_argument("--remat", action="store_true")
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    step = (llama_jax if args.engine == "llama-jax" else peft)(args)
    losses, seconds = [step()], []
    for _ in range(args.steps):
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    emit(
        engine=args.engine,
        mode=args.mode,
        remat=args.remat,
        tokens_per_second=round(BATCH * LENGTH / median(seconds), 1),
        losses=[round(loss, 4) for loss in losses],
    )


def llama_jax(args: argparse.Namespace) -> Callable[[], float]:
    os.environ["JAX_PLATFORMS"] = "cpu"
    import jax
    import numpy as np

    import llama_jax as lj
    from llama_jax.model.losses import Batch
    from train.config import RunConfig
    from train.setup import make_setup, make_state, open_mesh

    values = {
        "model": {"name": str(args.folder / "hf"), "dtype": "float32"},
        "method": args.mode,
        "data": {"train": "unused.jsonl"},
        "optimizer": {"learning_rate": 1e-4, "weight_decay": 0.0, "max_grad_norm": None},
        "schedule": {"name": "constant"},
        "compute": {"remat": "full" if args.remat else "none"},
        "train": {"steps": 1000, "batch_size": BATCH, "sequence_length": LENGTH},
        "output": "unused",
    }
    if args.mode == "lora":
        values["lora"] = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    run = RunConfig.from_dict(values)
    model = lj.load(args.folder / "hf", dtype="float32")
    ids = np.asarray(prompts(args.folder / "hf", BATCH, LENGTH), np.int32)
    mask = np.ones(ids.shape, np.float32)
    mask[:, -1] = 0
    places = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), ids.shape)
    batch = Batch(ids, np.roll(ids, -1, axis=1), mask, np.ones_like(ids), places)
    setup = make_setup(run, model.config, model.params, open_mesh(run.mesh))
    state = make_state(setup, model.params)
    del model
    holder = [state]
    del state

    def step() -> float:
        with jax.set_mesh(setup.mesh):
            holder[0], metrics = setup.step(holder[0], setup.place(batch))
        return float(metrics["loss"])

    return step


def peft(args: argparse.Namespace) -> Callable[[], float]:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(args.folder / "hf", dtype=torch.float32).train()
    if args.mode == "lora":
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", lora_dropout=0.0)
        )
    if args.remat:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)
    ids = torch.tensor(prompts(args.folder / "hf", BATCH, LENGTH))

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss)

    return step


if __name__ == "__main__":
    main()
