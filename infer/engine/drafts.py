"""Guesses of the tokens to come, checked all at once by the model. No JAX here.

A guess is taken only where it is the very token that the model's own choice, with the request's
seed, comes to. So what is guessed changes the speed and never the answer, sampled or greedy.
"""

from collections.abc import Sequence

# The longest run of last tokens that is looked up, and the shortest.
_LONGEST_RUN, _SHORTEST_RUN = 4, 2


def look_up(tokens: Sequence[int], num: int) -> list[int]:
    """Up to `num` tokens that followed the last ones when they last came up ("prompt lookup",
    Saxena 2023): answers often repeat what their prompts say."""
    tokens = list(tokens)
    for length in range(_LONGEST_RUN, _SHORTEST_RUN - 1, -1):
        run = tokens[-length:]
        if len(run) < length:
            continue
        for begin in range(len(tokens) - length - 1, -1, -1):
            if tokens[begin : begin + length] == run:
                return tokens[begin + length : begin + length + num]
    return []
