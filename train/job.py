"""What the parts of the loop share while a run goes on."""

from collections import Counter
from dataclasses import dataclass, field

import jax

from llama_jax import tree
from llama_jax.formats.checkpoint_saver import Saver
from llama_jax.mesh.distributed import Share
from train.data.build import RunData
from train.data.pipeline import TrainingBatches
from train.generations import Sampler
from train.goodput import Goodput
from train.run_dir import RunDir
from train.setup import Setup
from train.start import Start


@dataclass
class Job:
    """share: the rows that this process brings. beside: the teacher's weights, where a step takes
    them. counters: what was skipped, by reason."""

    start: Start
    setup: Setup
    data: RunData
    batches: TrainingBatches
    folder: RunDir
    share: Share
    saver: Saver
    goodput: Goodput
    sampler: Sampler | None = None
    beside: tuple[tree.Tree, ...] = ()
    counters: Counter[str] = field(default_factory=Counter)

    def is_evaluated(self, number: int) -> bool:
        """Whether the evaluation rows are scored behind step `number`."""
        every = self.setup.run.train.eval_every_steps
        return self.data.eval is not None and self._is_due(number, every)

    def is_sampled(self, number: int) -> bool:
        """Whether the model goes on with the run's prompts behind step `number`."""
        train = self.setup.run.train
        return bool(train.sample_prompts) and self._is_due(number, train.eval_every_steps)

    def is_saved(self, number: int) -> bool:
        """Whether the state is saved behind step `number`."""
        return self._is_due(number, self.setup.run.train.checkpoint_every_steps)

    def _is_due(self, number: int, every: int | None) -> bool:
        is_last = number == self.setup.run.train.steps
        return is_last or (every is not None and number % every == 0)


@dataclass(frozen=True)
class RunningStep:
    """A step that was dispatched: its numbers are still on the devices."""

    number: int
    metrics: dict[str, jax.Array]
    samples: list[int]


def to_numbers(metrics: dict[str, jax.Array]) -> dict[str, float]:
    """Waits for the devices."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}
