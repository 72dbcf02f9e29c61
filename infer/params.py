"""What a request may ask of the sampler, checked when it is built.

No JAX here: commands and servers validate before a device is touched. Names are OpenAI's and
Hugging Face's. How each parameter acts on the logits, and in which order, is in `sampling.py`.
"""

import dataclasses
import numbers
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from llama_jax.config import check_keys

DEFAULT_MAX_TOKENS = 256

# Ceilings that keep one request from allocating without bound; OpenAI's where it publishes one.
MAX_CHOICES = 128
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARACTERS = 1024
MAX_BIAS_ENTRIES = 1024

# A temperature below this is greedy: the division would only amplify rounding.
GREEDY_BELOW = 1e-5

# Beyond these, logits in float32 become infinite or NaN, of which no token can be chosen.
MAX_TEMPERATURE = 1e30
MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY = 1e-3, 1e3


@dataclass(frozen=True)
class SamplingParams:
    """One request's wishes. The defaults sample from the model's own distribution.

    max_tokens: new tokens at most. None is 256 (`DEFAULT_MAX_TOKENS`); both are capped by what the
      context has left. 0 gives an empty completion, which with `echo` and `logprobs` scores a text.
    temperature: 0 (and anything below 1e-5) is greedy; among equal logits the lowest id wins. At
      most 1e30.
    top_k: the k most likely tokens; 0, -1 and anything from the vocabulary's size up is off, 1 is
      greedy.
    top_p: the most likely tokens until their probabilities reach p; 1 is off, 0 leaves one token.
    min_p: tokens of at least this fraction of the largest probability; 0 is off.
    repetition_penalty: divides positive and multiplies negative logits of every token seen in the
      prompt or the output; 1 is off, 0.001 to 1000 are allowed.
    frequency_penalty, presence_penalty: subtracted per occurrence, and once, of a token in the
      output; the prompt does not count.
    seed: same prompt, seed and choice give the same tokens, whatever else is in the batch. None
      draws a fresh one.
    stop: strings that end the text just before them.
    n: choices per prompt. Choice 0 equals the only choice of n = 1.
    logprobs: None, or how many alternatives to report beside each token's log probability, 0 to 20.
      Values are of the model's own distribution, before any of the above.
    echo: the prompt is part of the text, and its tokens of the log probabilities.
    logit_bias: token id to a number in [-100, 100], added to its logit; -100 forbids the token.
    ignore_eos: end tokens do not end the generation; for measurements.
    min_tokens: end tokens are forbidden, and stop strings not looked for, before this many tokens.
    """

    max_tokens: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    n: int = 1
    logprobs: int | None = None
    echo: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)
    ignore_eos: bool = False
    min_tokens: int = 0

    def __post_init__(self) -> None:
        for name, low, high in _INTEGERS:
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                object.__setattr__(self, name, checked_int(name, value, low=low, high=high))
        for name, least, most in _NUMBERS:
            value = checked_number(name, getattr(self, name), low=least, high=most)
            object.__setattr__(self, name, value)
        for name in ("echo", "ignore_eos"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(
                f"min_tokens is {self.min_tokens}, more than max_tokens {self.max_tokens}"
            )
        object.__setattr__(self, "stop", _checked_stop(self.stop))
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises ValueError for a name that is none of the fields."""
        check_keys("sampling", dict(values), [f.name for f in dataclasses.fields(cls)])
        return cls(**values)

    def replace(self, **changes: Any) -> Self:
        return dataclasses.replace(self, **changes)

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def edits_logits(self) -> bool:
        """Whether anything changes the logits before the temperature does."""
        return (
            self.repetition_penalty != 1
            or self.frequency_penalty != 0
            or self.presence_penalty != 0
            or bool(self.logit_bias)
            or self.min_tokens > 0
        )

    def limit_tokens(self, prompt_tokens: int, context: int) -> int:
        """New tokens this request may have after a prompt of `prompt_tokens`."""
        wanted = DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if self.max_tokens is None:
            wanted = max(wanted, self.min_tokens)
        return max(0, min(wanted, context - prompt_tokens))


# Names with the least and the greatest value.
_INTEGERS: tuple[tuple[str, int, int | None], ...] = (
    ("max_tokens", 0, None),
    ("top_k", -1, None),
    ("seed", -(2**63), 2**64 - 1),
    ("n", 1, MAX_CHOICES),
    ("logprobs", 0, MAX_TOP_LOGPROBS),
    ("min_tokens", 0, None),
)
_OPTIONAL = ("max_tokens", "seed", "logprobs")
_NUMBERS = (
    ("temperature", 0.0, MAX_TEMPERATURE),
    ("top_p", 0.0, 1.0),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", MIN_REPETITION_PENALTY, MAX_REPETITION_PENALTY),
    ("frequency_penalty", -2.0, 2.0),
    ("presence_penalty", -2.0, 2.0),
)


def checked_int(name: str, value: Any, *, low: int, high: int | None) -> int:
    """An integer of Python or NumPy, but no truth value, as Python's. Raises ValueError."""
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is None or number < low or (high is not None and number > high):
        allowed = f"of at least {low}" if high is None else f"between {low} and {high}"
        raise ValueError(f"{name} is {value!r}; it must be an integer {allowed}")
    return number


def checked_number(name: str, value: Any, *, low: float, high: float) -> float:
    """The same for numbers, NumPy's among them."""
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; it must be a finite number in [{low:g}, {high:g}]")
    return float(value)


def _checked_stop(stop: Any) -> tuple[str, ...]:
    if not isinstance(stop, str | Sequence) or isinstance(stop, bytes | bytearray):
        raise ValueError(f"stop is {stop!r}; it must be a string or a list of strings")
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOP_STRINGS:
        raise ValueError(f"stop has {len(stops)} strings; at most {MAX_STOP_STRINGS} are allowed")
    for each in stops:
        if not isinstance(each, str) or not 1 <= len(each) <= MAX_STOP_CHARACTERS:
            raise ValueError(
                f"stop contains {each if not isinstance(each, str) else each[:40]!r}; each must be "
                f"a string of 1 to {MAX_STOP_CHARACTERS} characters"
            )
    return stops


def _checked_bias(bias: Any) -> Mapping[int, float]:
    if not isinstance(bias, Mapping):
        raise ValueError(f"logit_bias is {bias!r}; it must map token ids to numbers")
    if len(bias) > MAX_BIAS_ENTRIES:
        raise ValueError(
            f"logit_bias has {len(bias)} entries; at most {MAX_BIAS_ENTRIES} are allowed"
        )
    return {
        checked_int("logit_bias: a token id", token, low=0, high=2**31 - 1): checked_number(
            f"logit_bias of token {token}", value, low=-100.0, high=100.0
        )
        for token, value in bias.items()
    }
