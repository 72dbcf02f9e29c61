"""What a model is (`ModelConfig`) and how to run it (`Compute`).

Everything that names or shapes a weight is in `ModelConfig`, and everything else is in `Compute`:
a checkpoint loads under any precision, kernel, remat policy or mesh. Fields carry Hugging Face's
names. This module imports neither JAX nor Flax, so that commands can validate before they start.
"""

import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Self

ROPE_TYPES = ("linear", "dynamic", "llama3", "yarn")
FLOAT_DTYPES = ("float32", "bfloat16", "float16")
CACHE_DTYPES = (*FLOAT_DTYPES, "int8")
REMAT_POLICIES = ("none", "dots", "full", "offload")  # from the cheapest to the smallest
ATTENTION_KERNELS = ("reference", "splash", "cudnn")
MOE_PRODUCTS = ("dense", "grouped", "megablox")

# Sanity ceilings: far above any published model, low enough that a corrupt config is refused
# before anything is allocated.
_CEILINGS = {
    "vocab_size": 10_000_000,
    "hidden_size": 1_000_000,
    "intermediate_size": 10_000_000,
    "num_hidden_layers": 10_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "head_dim": 100_000,
    "max_position_embeddings": 1_000_000_000,
}

# Rotary numbers between these keep every angle finite in float32.
ROPE_THETAS = (1e-6, 1e18)
_ROPE_NUMBERS = (1e-6, 1e6)

LogicalRules = tuple[tuple[str, str | tuple[str, ...] | None], ...]

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")

# Logical axis -> mesh axes. Weights shard `embed` over fsdp and their other dimension over tensor;
# the batch is spread over every axis that would otherwise compute the same thing twice, but for
# context, which divides the tokens of a row and, as fsdp does, the weights. So does expert, but for
# the weights of experts, which it deals out whole.
DEFAULT_RULES: LogicalRules = (
    ("batch", ("data", "fsdp", "expert")),
    ("length", "context"),
    ("embed", ("fsdp", "context", "expert")),
    ("expert_embed", ("fsdp", "context")),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("experts", "expert"),
    ("vocab", "tensor"),
    ("layers", None),
    ("rank", None),
)


def require_type(name: str, value: Any, kinds: type | tuple[type, ...], allowed: str) -> None:
    """Raises ValueError for an argument `name` of another type, saying what is `allowed`."""
    if not isinstance(value, kinds):
        raise ValueError(f"{name} is of type {type(value).__name__}; give {allowed}")


def _require_int(owner: str, name: str, value: Any, *, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(
            f"{owner}.{name} is {value!r}; it must be an integer between {low} and {high}"
        )


def is_finite_number(value: Any) -> bool:
    """No boolean, NaN or infinity, nor an integer beyond every float, of which isfinite raises."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and bool(abs(value) <= sys.float_info.max)


def _require_number(owner: str, name: str, value: Any, *, above: float) -> None:
    if not is_finite_number(value) or not value > above:
        raise ValueError(f"{owner}.{name} is {value!r}; it must be a finite number above {above}")


def _require_within(owner: str, name: str, value: Any, bounds: tuple[float, float]) -> None:
    low, high = bounds
    if not is_finite_number(value) or not low <= value <= high:
        raise ValueError(
            f"{owner}.{name} is {value!r}; it must be a finite number between {low} and {high}"
        )


def _require_choice(owner: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{owner}.{name} is {value!r}; allowed are {', '.join(choices)}")


@dataclass(frozen=True)
class RopeScaling:
    """Rotary frequency scaling, with the field names of HF's `rope_scaling`.

    `linear` and `dynamic` read `factor`; `llama3` reads the two frequency factors and the original
    length too; `yarn` reads `beta_fast`, `beta_slow`, `attention_factor`, `mscale`,
    `mscale_all_dim` and `truncate`. The formulas are in `model/rope.py`. A field that the chosen
    type does not read must be None.
    """

    rope_type: str
    factor: float
    original_max_position_embeddings: int | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    _READS: ClassVar[dict[str, tuple[str, ...]]] = {
        "linear": (),
        "dynamic": ("original_max_position_embeddings",),
        "llama3": ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
        "yarn": (
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        ),
    }

    def __post_init__(self) -> None:
        _require_choice("rope_scaling", "rope_type", self.rope_type, ROPE_TYPES)
        _require_within("rope_scaling", "factor", self.factor, _ROPE_NUMBERS)
        reads = self._READS[self.rope_type]
        for option in dataclasses.fields(self)[2:]:
            name, value = option.name, getattr(self, option.name)
            if value is None:
                continue
            if name not in reads:
                raise ValueError(
                    f"rope_scaling.{name} is {value!r}, but rope_type {self.rope_type!r} does not "
                    f"read it; remove it or choose another rope_type"
                )
            if name == "truncate":
                if not isinstance(value, bool):
                    raise ValueError(f"rope_scaling.truncate is {value!r}; it must be a boolean")
            elif name == "original_max_position_embeddings":
                _require_int("rope_scaling", name, value, low=1, high=1_000_000_000)
            else:
                _require_within("rope_scaling", name, value, _ROPE_NUMBERS)
        if self.rope_type == "llama3":
            for name in reads:
                if getattr(self, name) is None:
                    raise ValueError(f"rope_scaling.{name} is missing; rope_type llama3 needs it")
            assert self.low_freq_factor is not None and self.high_freq_factor is not None
            if self.low_freq_factor >= self.high_freq_factor:
                raise ValueError(
                    f"rope_scaling.low_freq_factor {self.low_freq_factor} must be below "
                    f"high_freq_factor {self.high_freq_factor}"
                )


@dataclass(frozen=True)
class MoeConfig:
    """A sparse mixture of experts in place of each MLP (Mixtral)."""

    num_local_experts: int
    num_experts_per_tok: int
    router_aux_loss_coef: float

    def __post_init__(self) -> None:
        _require_int("moe", "num_local_experts", self.num_local_experts, low=1, high=100_000)
        _require_int("moe", "num_experts_per_tok", self.num_experts_per_tok, low=1, high=100_000)
        if self.num_experts_per_tok > self.num_local_experts:
            raise ValueError(
                f"num_experts_per_tok is {self.num_experts_per_tok}, more than the "
                f"{self.num_local_experts} of num_local_experts"
            )
        coefficient = self.router_aux_loss_coef
        if not is_finite_number(coefficient) or coefficient < 0:
            raise ValueError(
                f"router_aux_loss_coef is {coefficient!r}; it must be a number of at least 0"
            )


@dataclass(frozen=True)
class ModelConfig:
    """The architecture, after Hugging Face's Llama, Mistral and Mixtral configurations.

    `model_type` names the HF family for import and export; no mathematics depends on it.
    `dtype` is the dtype of the weights as stored. `eos_token_id` holds every id that ends a
    generation. All sizes are counts of elements.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    moe: MoeConfig | None = None
    initializer_range: float = 0.02
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _require_choice("config", "model_type", self.model_type, ("llama", "mistral", "mixtral"))
        _require_choice("config", "dtype", self.dtype, FLOAT_DTYPES)
        for name, ceiling in _CEILINGS.items():
            _require_int("config", name, getattr(self, name), low=1, high=ceiling)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"config.num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"config.head_dim is {self.head_dim}; rotary embedding needs an even number"
            )
        for name in ("rms_norm_eps", "initializer_range"):
            _require_number("config", name, getattr(self, name), above=0.0)
        _require_within("config", "rope_theta", self.rope_theta, ROPE_THETAS)
        rope_type = None if self.rope_scaling is None else self.rope_scaling.rope_type
        if rope_type == "yarn" and self.rope_theta == 1:
            raise ValueError(
                f"config.rope_theta is {self.rope_theta}; rope_type 'yarn' divides by its "
                f"logarithm, so give another number"
            )
        if rope_type == "dynamic" and self.head_dim == 2:
            raise ValueError(
                "config.head_dim is 2; rope_type 'dynamic' divides by head_dim - 2, so give more "
                "or choose another rope_type"
            )
        for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"config.{name} is {getattr(self, name)!r}; it must be a boolean")
        if self.sliding_window is not None:
            _require_int("config", "sliding_window", self.sliding_window, low=1, high=2**31 - 1)
        if self.moe is not None and self.mlp_bias:
            raise ValueError("config.mlp_bias is true, but experts have no biases")
        for name in ("bos_token_id", "pad_token_id"):
            if getattr(self, name) is not None:
                _require_int("config", name, getattr(self, name), low=-1, high=2**31 - 1)
        if not isinstance(self.eos_token_id, tuple):
            raise ValueError(
                f"config.eos_token_id is {self.eos_token_id!r}; give a tuple of token ids"
            )
        for token in self.eos_token_id:
            _require_int("config", "eos_token_id", token, low=0, high=2**31 - 1)

    @property
    def num_query_groups(self) -> int:
        """Query heads that share one key/value head: G = N / K."""
        return self.num_attention_heads // self.num_key_value_heads

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready dictionary that `from_dict` turns back into an equal config."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """eos_token_id may be a list of ids or, as in Hugging Face's files, one id or null."""
        values = dict(values)
        for name, kind in (("rope_scaling", RopeScaling), ("moe", MoeConfig)):
            if values.get(name) is not None:
                values[name] = _from_mapping(f"config.{name}", kind, values[name])
        ends = values.get("eos_token_id")
        if isinstance(ends, list):
            values["eos_token_id"] = tuple(ends)
        elif ends is None or (isinstance(ends, int) and not isinstance(ends, bool)):
            values["eos_token_id"] = () if ends is None else (ends,)
        return _from_mapping("config", cls, values)


@dataclass(frozen=True)
class Compute:
    """How to run a model. No field changes the name or the shape of a weight.

    dtype: of activations and of the operands of products. Norms, softmax, rotary angles, router
      and loss are float32 whatever this says.
    param_dtype: of the trained parameters; None keeps the dtype they were loaded in.
    accumulation_dtype: of the sums inside products.
    gradient_dtype: of the gradients of the matrices of the layers and of a head that is not the
      embedding, when those are float32 and multiplied in bfloat16. bfloat16 rounds each once
      more, and takes half the memory.
    cache_dtype: of the keys and values kept while text is generated; None is `dtype`. int8 rounds
      each head of each token with a scale of its own.
    remat: what the backward pass recomputes: `none` keeps every activation, `full` keeps only the
      input of each layer, `dots` keeps the results of the weight products, `offload` does what
      `full` does and keeps the inputs in the host's memory.
    attention: `reference` is plain JAX and runs anywhere; `splash` is the TPU kernel and `cudnn`
      that of NVIDIA GPUs, for bfloat16 and float16, both for whole sequences (a step of decoding
      takes the reference).
    moe: `dense` multiplies every token by every expert (reference); `grouped` sorts tokens by
      expert and multiplies each once; `megablox` does so with the TPU kernel. None drops a token.
    moe_chunk_tokens: tokens that a device sends through its experts at one time, when `remat` is
      `full` or `offload` and `moe` is not `dense`.
    loss_chunk_tokens: tokens whose float32 logits exist at one time in the loss.
    rules: logical axis to mesh axes.
    """

    dtype: str = "float32"
    param_dtype: str | None = None
    accumulation_dtype: str = "float32"
    gradient_dtype: Literal["float32", "bfloat16"] = "float32"
    cache_dtype: str | None = None
    remat: Literal["none", "full", "dots", "offload"] = "none"
    attention: Literal["reference", "splash", "cudnn"] = "reference"
    moe: Literal["dense", "grouped", "megablox"] = "grouped"
    moe_chunk_tokens: int = 8192
    loss_chunk_tokens: int = 256
    rules: LogicalRules = field(default=DEFAULT_RULES)

    def __post_init__(self) -> None:
        _require_choice("compute", "dtype", self.dtype, FLOAT_DTYPES)
        if self.param_dtype is not None:
            _require_choice("compute", "param_dtype", self.param_dtype, FLOAT_DTYPES)
        _require_choice(
            "compute", "accumulation_dtype", self.accumulation_dtype, ("float32", "bfloat16")
        )
        _require_choice("compute", "gradient_dtype", self.gradient_dtype, ("float32", "bfloat16"))
        if self.cache_dtype is not None:
            _require_choice("compute", "cache_dtype", self.cache_dtype, CACHE_DTYPES)
        _require_choice("compute", "remat", self.remat, REMAT_POLICIES)
        _require_choice("compute", "attention", self.attention, ATTENTION_KERNELS)
        if self.attention == "cudnn" and self.dtype == "float32":
            raise ValueError(
                "compute.attention is cudnn, which computes in bfloat16 and float16, but "
                "compute.dtype is float32; change one of the two"
            )
        _require_choice("compute", "moe", self.moe, MOE_PRODUCTS)
        _require_int("compute", "moe_chunk_tokens", self.moe_chunk_tokens, low=1, high=2**31 - 1)
        _require_int("compute", "loss_chunk_tokens", self.loss_chunk_tokens, low=1, high=2**31 - 1)
        known = [name for name, _ in DEFAULT_RULES]
        check_keys("compute.rules", dict(self.rules), known)
        for name, axes in self.rules:
            targets = () if axes is None else (axes,) if isinstance(axes, str) else axes
            check_keys(f"compute.rules: {name}", dict.fromkeys(targets), list(MESH_AXES))
        missing = sorted(set(known) - set(dict(self.rules)))
        if missing:
            raise ValueError(
                f"compute.rules says nothing about {', '.join(missing)}; give every logical axis "
                f"its mesh axes, or null"
            )

    @property
    def cuts_experts(self) -> bool:
        """Whether tokens go through experts in chunks of `moe_chunk_tokens`."""
        return self.remat in ("full", "offload") and self.moe != "dense"

    @property
    def held_dtype(self) -> str:
        """What a cache of keys and values holds."""
        return self.dtype if self.cache_dtype is None else self.cache_dtype


def _from_mapping(owner: str, kind: type[Any], values: Any) -> Any:
    """A dataclass from a mapping of its fields."""
    if not isinstance(values, dict):
        raise ValueError(f"{owner} is {values!r}; give a mapping of fields to values")
    fields = dataclasses.fields(kind)
    check_keys(owner, values, [spec.name for spec in fields])
    missing = [
        spec.name
        for spec in fields
        if spec.default is dataclasses.MISSING and spec.name not in values
    ]
    if missing:
        raise ValueError(f"{owner} lacks {', '.join(missing)}, which have no default")
    return kind(**values)


def check_keys(owner: str, given: dict[str, Any], allowed: list[str]) -> None:
    """Raises ValueError for the first key of `given` that is not allowed, with the nearest name."""
    for key in given:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"{owner} has no field {key!r}{hint} (fields: {', '.join(sorted(allowed))})"
            )
