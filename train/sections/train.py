"""The key `train` of a run config."""

from dataclasses import dataclass

from train.typed import Section, option


@dataclass(frozen=True)
class TrainSection(Section):
    """How long, in what pieces, and what is written on the way."""

    steps: int = option("batches to train on", low=1)
    batch_size: int = option("rows of one update, over all devices and micro-batches", low=1)
    sequence_length: int = option("tokens of one row", low=2)
    gradient_accumulation_steps: int = option(
        "micro-batches that one batch is split into, to save memory", default=1, low=1
    )
    seed: int = option(
        "of random weights, adapters and the order of rows", default=0, low=0, high=2**32 - 1
    )
    trainable: tuple[str, ...] | None = option(
        "patterns of weights to train, such as q_proj or !role:norm; null: all the method trains",
        default=None,
    )
    eval_every_steps: int | None = option("null: only at the end", default=None, low=1)
    sample_prompts: tuple[str, ...] = option(
        "at each evaluation the model goes on with these texts, greedily; what it says is in "
        "generations.jsonl and the report",
        default=(),
    )
    sample_max_tokens: int = option("the longest such continuation", default=64, low=1)
    checkpoint_every_steps: int | None = option("null: only at the end", default=None, low=1)
    keep_checkpoints: int = option("the latest ones to keep", default=2, low=1)
    keep_best: int = option(
        "besides the latest, the checkpoints to keep whose evaluation loss was lowest",
        default=0,
        low=0,
    )
    grace_seconds: float | None = option(
        "after SIGTERM the process saves and ends with exit code 75, at the latest this long "
        "afterwards; a spot TPU VM leaves 30 seconds. null: it takes as long as it takes",
        default=25.0,
        above=0.0,
    )
    resume_older: bool = option(
        "when the latest checkpoint is damaged, go on from the latest good one", default=False
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.gradient_accumulation_steps:
            raise ValueError(
                f"train.batch_size {self.batch_size} is not a multiple of "
                f"train.gradient_accumulation_steps {self.gradient_accumulation_steps}"
            )
        if not all(self.sample_prompts):
            raise ValueError("train.sample_prompts holds an empty prompt; remove it")
        longest = self.sample_max_tokens
        if longest != TrainSection.sample_max_tokens and not self.sample_prompts:
            raise ValueError(
                f"train.sample_max_tokens is {longest}, but train.sample_prompts is empty; give "
                f"prompts, or leave it out"
            )
