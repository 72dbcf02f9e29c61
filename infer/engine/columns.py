"""What tokens ask of sampling: columns of numbers, one for each token that is taken, and which of
the compiled variants can do it."""

from collections.abc import Sequence

from infer.engine.scheduler import Choice
from infer.params import MAX_TOP_LOGPROBS, SamplingParams
from infer.sampling import Needs, Rows

# The variants of choosing tokens that are compiled, the cheapest first; each can do what those
# before it can.
VARIANTS = (
    Needs(sample=False, edit=False, top_logprobs=None),
    Needs(sample=True, edit=False, top_logprobs=None),
    Needs(sample=True, edit=True, top_logprobs=MAX_TOP_LOGPROBS),
)

_FILLER = SamplingParams(temperature=0)


def variant(params: Sequence[SamplingParams], *, structured: bool) -> Needs:
    """The cheapest that does what these want."""
    wanted = Needs.of(params)
    if structured or wanted.edit or wanted.top_logprobs is not None:
        return VARIANTS[2]
    return VARIANTS[1] if wanted.sample else VARIANTS[0]


def equal_columns(choice: Choice, count: int, vocab_size: int) -> Rows:
    """Of one choice, so many times."""
    row = choice.row
    return _columns([row.params] * count, [row.seed] * count, [row.index] * count, vocab_size)


def filling_columns(count: int, vocab_size: int) -> Rows:
    """Of tokens that are nobody's."""
    zeros = [0] * count
    return _columns([_FILLER] * count, zeros, zeros, vocab_size)


def most_demanding_columns(count: int, vocab_size: int) -> tuple[Rows, Needs]:
    """Arguments of `steps.take` for so many tokens, in the variant that does most."""
    return filling_columns(count, vocab_size), VARIANTS[-1]


class Columns:
    """Those of the steps of a runner, made anew only when others run."""

    def __init__(self, vocab_size: int):
        self._vocab_size = vocab_size
        # By tokens a row: whose they are, by arrival.
        self._made: dict[int, tuple[tuple[int, ...], Rows]] = {}

    def of(self, choices: Sequence[Choice], rows: int, length: int) -> Rows:
        """What `length` tokens of each of so many rows ask."""
        ordered: list[Choice | None] = [None] * rows
        for choice in choices:
            assert choice.slot is not None
            ordered[choice.slot] = choice
        key = tuple(-1 if choice is None else choice.arrival for choice in ordered)
        if length not in self._made or self._made[length][0] != key:
            each = [choice for choice in ordered for _ in range(length)]
            columns = _columns(
                [_FILLER if choice is None else choice.row.params for choice in each],
                [0 if choice is None else choice.row.seed for choice in each],
                [0 if choice is None else choice.row.index for choice in each],
                self._vocab_size,
            )
            self._made[length] = (key, columns)
        return self._made[length][1]


def _columns(
    params: Sequence[SamplingParams], seeds: Sequence[int], choices: Sequence[int], vocab_size: int
) -> Rows:
    """Without biases: those stay on the device."""
    return Rows.of(params, seeds=seeds, choices=choices, vocab_size=vocab_size, needs=VARIANTS[0])
