"""Whether all processes of a run were told the same; else each would compute something else."""

import json

import jax

from llama_jax import __version__
from llama_jax.mesh.distributed import gather
from train.config import RunConfig
from train.data.build import RunData
from train.run_dir import differences


def check_agreement(run: RunConfig, data: RunData) -> None:
    """Raises ValueError, in all processes alike, where one differs from process 0."""
    mine = {
        "config": run.to_dict(),
        "the training rows": data.train.fingerprint,
        "the evaluation rows": None if data.eval is None else data.eval.fingerprint,
        "llama-jax": __version__,
        "jax": jax.__version__,
    }
    first, *others = map(json.loads, gather("agree on the run", json.dumps(mine)))
    for number, other in enumerate(others, start=1):
        said = f"{{}} is {{!r}} in process 0 and {{!r}} in process {number}"
        if found := differences(first, other, free=(), said=said):
            raise ValueError(
                f"the processes were not started alike: {'; '.join(found)}. Give all of them the "
                f"same config, files and versions"
            )
