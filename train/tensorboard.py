"""TensorBoard's events, written by tensorboardX, which is asked for nothing but scalars.

tensorboardX imports PyTorch, boto3 and Google Cloud Storage if they are installed, for tensors and
for folders that no run has. It is imported as if they were not there, so that no start waits for
them.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def _absent(*names: str) -> Iterator[None]:
    """Inside, importing a module of `names` fails, unless it has been imported before."""
    hidden = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]  # None: not to be found
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


with _absent("torch", "boto3", "google.cloud.storage"):
    from tensorboardX import SummaryWriter


def scalar_writer(folder: Path, *, purge_step: int) -> SummaryWriter:
    """Writes into `folder`; what earlier files there say of `purge_step` and later is void."""
    return SummaryWriter(str(folder), purge_step=purge_step, flush_secs=10)
