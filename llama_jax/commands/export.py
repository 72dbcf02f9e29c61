"""Writes a model in another program's format.

hf: a Hugging Face folder that transformers loads. compressed-tensors: such a folder with the
quantized weights of MODEL as they are, which vLLM and transformers load. gguf: one file for
llama.cpp. peft: the adapter on MODEL (a checkpoint of a LoRA run, or --adapter) as a folder that
peft loads. stablehlo: a folder with the forward pass as a portable program and the arrays it takes.
Adapters and quantized weights go into hf, gguf and stablehlo only as the full matrices they stand
for, with --merge. An adapter trained on a quantized base is merged onto the dequantized base, which
it was trained on; --onto merges it onto another model, such as the one from before quantization."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_jax.load import Model

HELP = "write a model as a Hugging Face folder, a PEFT adapter, a GGUF file or StableHLO"
EXAMPLE = "llama-jax export smollm2-135m models/smollm2-hf --format hf --dtype bfloat16"

FORMATS = ("hf", "peft", "gguf", "compressed-tensors", "stablehlo")
HF_DTYPES = ("float32", "bfloat16", "float16")
GGUF_DTYPES = {
    "float32": "f32",
    "float16": "f16",
    "bfloat16": "bf16",
    **{name: name for name in ("q8_0", "q4_0", "q4_1")},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from llama_jax.commands.adapted import add_adapter_arguments

    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT", help="the folder to write, or the file for gguf")
    parser.add_argument("--format", required=True, choices=FORMATS)
    parser.add_argument(
        "--dtype",
        choices=tuple(GGUF_DTYPES),
        help="of the weights; q8_0, q4_0 and q4_1 are for gguf (default: as they are, for gguf "
        "float32)",
    )
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="of one file of a folder, such as 2GB (default: 5GB)",
    )
    add_adapter_arguments(parser)
    parser.add_argument(
        "--merge", action="store_true", help="write full matrices for adapted or quantized weights"
    )
    parser.add_argument(
        "--onto",
        metavar="MODEL",
        help="with --merge: the full-precision model to merge onto instead of the dequantized base",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that OUT holds")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from llama_jax.commands.output import check_out, num_bytes
    from llama_jax.commands.startup import start_jax

    out = check_out(args.out, args.model)
    _check_flags(args)
    start_jax()
    from llama_jax.commands.adapted import load_adapted
    from llama_jax.formats.atomic import check_target
    from llama_jax.formats.gguf_writer import check_file_target

    # Before the model is loaded, which may take long.
    check = check_file_target if args.format == "gguf" else check_target
    check(out, overwrite=args.overwrite)
    model = load_adapted(args)
    merged, report = _merged(args, model) if args.merge else (model, {})
    files = _write(args, out, merged)
    return {"files": [str(file) for file in files], "bytes": num_bytes(files), **report}


def _merged(args: argparse.Namespace, model: "Model") -> "tuple[Model, dict[str, Any]]":
    """The model to write, and how far its rounded matrices are from those that MODEL stands for."""
    import dataclasses

    from llama_jax.load import load
    from llama_jax.weights.drift import drift, rebased

    merged = model
    if args.onto is not None:
        other = load(args.onto, dtype=model.config.dtype)
        merged = dataclasses.replace(model, params=rebased(model.params, other.params))
    fallback = "float32" if args.format == "gguf" else model.config.dtype
    dtype = args.dtype if args.dtype in HF_DTYPES else fallback
    return merged, {"drift": drift(model.params, merged.params, dtype=dtype)}


def _check_flags(args: argparse.Namespace) -> None:
    """Raises ValueError for a flag that the format does not read."""
    reads = {
        "hf": ("dtype", "max_shard_size", "merge", "onto"),
        "gguf": ("dtype", "merge", "onto"),
        "stablehlo": ("dtype", "merge", "onto"),
        "peft": (),
        "compressed-tensors": ("max_shard_size",),
    }[args.format]
    for name in ("dtype", "max_shard_size", "merge", "onto"):
        if getattr(args, name) and name not in reads:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(f"--format {args.format} does not read {flag}; leave it out")
    if args.onto is not None and not args.merge:
        raise ValueError("--onto says what to merge onto; it needs --merge")
    if args.format != "gguf" and args.dtype is not None and args.dtype not in HF_DTYPES:
        raise ValueError(
            f"--dtype {args.dtype} is for --format gguf; {args.format} writes "
            f"{', '.join(HF_DTYPES)}"
        )
    if args.max_shard_size is not None:
        from llama_jax.formats.safetensors import parse_bytes

        parse_bytes(args.max_shard_size)


def _write(args: argparse.Namespace, out: Path, model: "Model") -> list[Path]:
    if args.format == "peft":
        from llama_jax.formats.peft import save_adapter

        return save_adapter(
            out,
            model.config,
            model.params,
            **_origin(args),
            overwrite=args.overwrite,
        )
    if args.format == "compressed-tensors":
        from llama_jax.formats.compressed_tensors import save_compressed

        return save_compressed(
            out,
            model.config,
            model.params,
            tokenizer=model.tokenizer,
            max_shard_size=args.max_shard_size or "5GB",
            overwrite=args.overwrite,
        )
    if args.format == "gguf":
        from llama_jax.formats.gguf import save_gguf

        path = save_gguf(
            out,
            model.config,
            model.params,
            model.tokenizer,
            dtype=GGUF_DTYPES[args.dtype or "float32"],
            merge=args.merge,
            overwrite=args.overwrite,
        )
        return [path]
    if args.format == "stablehlo":
        from llama_jax.formats.stablehlo import save_stablehlo

        return save_stablehlo(
            out,
            model.config,
            model.params,
            tokenizer=model.tokenizer,
            dtype=args.dtype,
            merge=args.merge,
            overwrite=args.overwrite,
        )
    from llama_jax.load import save_hf

    return save_hf(
        model,
        out,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size or "5GB",
        merge=args.merge,
        overwrite=args.overwrite,
    )


def _origin(args: argparse.Namespace) -> dict[str, Any]:
    """What an adapter's arrays do not say: the base it is for, and the dropout it was trained with.
    A run notes both."""
    from llama_jax.formats.json_fields import read_json
    from llama_jax.formats.peft_config import read_adapter_config
    from llama_jax.load import find_model
    from train.run_dir import RunDir

    base, lora = args.model, {}
    if args.adapter is not None:
        lora = read_adapter_config(Path(args.adapter))
    else:
        folder = find_model(args.model).resolve().parent
        run = RunDir(folder.parent)
        if folder == run.checkpoints and run.config.is_file():
            noted = read_json(run.config)
            try:
                lora, model = noted["lora"] or {}, noted["model"]
                # Random weights, and slices of others, are nowhere but in the checkpoint.
                base = model["name"] if model["init"] == "weights" else base
            except (KeyError, TypeError) as error:
                raise ValueError(f"{run.config} is not as a run writes it: {error!r}") from error
    return {"base_model_name_or_path": base, "lora_dropout": lora.get("lora_dropout") or 0.0}


def show(report: dict[str, Any], args: argparse.Namespace) -> None:
    from llama_jax.commands.report import to_size

    for file in report["files"]:
        print(file)
    print(f"{to_size(report['bytes'])} in {args.out}")
    if "drift" in report:
        onto = args.onto or "what was trained"
        print(f"merged onto {onto}: weights moved by {report['drift']:.2e} (relative, rms)")
