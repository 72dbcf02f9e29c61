"""The flags of commands that generate, and what they become."""

import argparse
import logging
from typing import TYPE_CHECKING

from llama_jax.config import CACHE_DTYPES, FLOAT_DTYPES

if TYPE_CHECKING:
    from infer.params import SamplingParams
    from llama_jax.config import Compute

logger = logging.getLogger(__name__)

DTYPES = FLOAT_DTYPES


def add_sampling_arguments(
    parser: argparse.ArgumentParser, *, temperature: float, top_p: float
) -> None:
    """Flags with the names and the meaning of `infer.params.SamplingParams`."""
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--max-tokens", type=int, metavar="N", help="new tokens at most (default: 256)"
    )
    group.add_argument(
        "--temperature",
        type=float,
        default=temperature,
        metavar="T",
        help="0 always takes the most likely token (default: %(default)s)",
    )
    group.add_argument(
        "--top-k", type=int, metavar="K", help="sample from the K most likely; 0: off (default)"
    )
    group.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"sample from the most likely that reach probability P; 1: off (default: {top_p})",
    )
    group.add_argument(
        "--min-p",
        type=float,
        metavar="P",
        help="leave out tokens below P times the largest probability; 0: off (default)",
    )
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="1: off")
    group.add_argument("--frequency-penalty", type=float, default=0.0, metavar="X", help="0: off")
    group.add_argument("--presence-penalty", type=float, default=0.0, metavar="X", help="0: off")
    group.add_argument(
        "--seed", type=int, metavar="N", help="the same seed gives the same text (default: fresh)"
    )
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the text before TEXT; may be given several times",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="float32",
        help="of the computation (default: %(default)s; bfloat16 is for accelerators)",
    )
    add_cache_argument(parser)


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="of the keys and values that are kept while generating (default: that of --dtype)",
    )


def to_sampling_params(
    args: argparse.Namespace, *, top_p: float, n: int = 1, logprobs: int | None = None
) -> "SamplingParams":
    """top_p: the command's own, where none is given. Raises ValueError for values out of range; of
    flags that choose among likely tokens where the likeliest is always taken it is only told, for
    scripts give them always."""
    from infer.params import GREEDY_BELOW, SamplingParams

    given = {
        name: value
        for name in ("top_k", "top_p", "min_p", "seed")
        if (value := getattr(args, name)) is not None
    }
    params = SamplingParams(
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        repetition_penalty=args.repetition_penalty,
        frequency_penalty=args.frequency_penalty,
        presence_penalty=args.presence_penalty,
        stop=tuple(args.stop),
        n=n,
        logprobs=logprobs,
        **{"top_p": top_p, **given},
    )
    if given and args.temperature < GREEDY_BELOW:
        flags = ", ".join("--" + name.replace("_", "-") for name in given)
        logger.warning(
            "%s: no effect at --temperature %g, which always takes the most likely token",
            flags,
            args.temperature,
        )
    return params


def to_compute(args: argparse.Namespace) -> "Compute":
    from llama_jax.config import Compute

    return Compute(dtype=args.dtype, cache_dtype=args.cache_dtype)
