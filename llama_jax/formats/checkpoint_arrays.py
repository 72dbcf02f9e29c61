"""Groups of arrays in folders, written while the program goes on. The only file that knows orbax
and the store beneath it. Orbax is imported where it is used: it takes as long as reading a model.

Every process writes the parts of arrays that lie on its devices, once each; process 0 joins them.
"""

import asyncio
import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from etils import epath  # the kind of path that orbax wants

from llama_jax.formats.checkpoint_files import CheckpointError


@contextlib.contextmanager
def _errors_of_the_system() -> Iterator[None]:
    """The store raises a ValueError for a full disk, too, which is no wrong argument."""
    try:
        yield
    except ValueError as error:
        number = re.search(r"\[os_error_code='(\d+)'", str(error))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, os.strerror(code)) from error


class ArrayWriter:
    """The arrays of one group on their way into a folder that exists.

    Making one returns as soon as everything is copied to the host: the arrays may change or be
    given away then. `wait` returns when this process has written its parts, `finish` makes the
    folder readable, in one process and when all have written.
    """

    def __init__(self, folder: Path, arrays: Mapping[str, Any]):
        import orbax.checkpoint as ocp

        self._folder = epath.Path(folder.absolute())
        self._handler = ocp.PyTreeCheckpointHandler()
        args = ocp.args.PyTreeSave(dict(arrays))

        def copy() -> Any:
            return asyncio.run(self._handler.async_save(self._folder, args=args))

        # In a thread of its own: in a notebook this one has a running event loop.
        with _errors_of_the_system(), ThreadPoolExecutor(1) as pool:
            self._writing = pool.submit(copy).result() or []

    def wait(self) -> None:
        # For all of them, also where one fails: they write into what is then removed.
        with _errors_of_the_system(), contextlib.ExitStack() as waiting:
            for part in self._writing:
                waiting.callback(part.result)

    def finish(self) -> None:
        with _errors_of_the_system():
            self._handler.finalize(self._folder)

    def close(self) -> None:
        self._handler.close()


class PieceWriter:
    """The arrays of one group, of which no one need exist whole: they are written piece by piece.

    structs: shape structs by path. pieces: the shape of the pieces of each array, which divide it
    but for the last ones. `read_group` reads the folder like any other.
    """

    def __init__(
        self,
        folder: Path,
        structs: Mapping[str, Any],
        pieces: Mapping[str, tuple[int, ...]],
    ):
        self._describe(folder, structs)
        context = ts.Context()
        self._arrays = {
            path: ts.open(
                {
                    "driver": "zarr",
                    "kvstore": {
                        "driver": "ocdbt",
                        "base": folder.absolute().as_uri() + "/",
                        "path": f"{path}/",
                    },
                    "metadata": {
                        "shape": list(struct.shape),
                        "chunks": list(pieces[path]),
                        "compressor": {"id": "zstd", "level": 1},
                    },
                },
                dtype=str(struct.dtype),
                create=True,
                context=context,
            ).result()
            for path, struct in structs.items()
        }

    def _describe(self, folder: Path, structs: Mapping[str, Any]) -> None:
        """Orbax's own description of the group, which says nothing of shapes: it saves arrays of
        one element, whose bytes are then taken away."""
        stand_ins = {
            path: np.zeros((1,) * len(struct.shape), struct.dtype)
            for path, struct in structs.items()
        }
        writer = ArrayWriter(folder, stand_ins)
        writer.wait()
        writer.finish()
        writer.close()
        for name in ("manifest.ocdbt", "d", *(p.name for p in folder.glob("ocdbt.process_*"))):
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def write(self, path: str, index: tuple[slice | int, ...], values: np.ndarray) -> None:
        with _errors_of_the_system():
            self._arrays[path][index].write(values).result()


def owned_files(names: list[str], process: int, count: int) -> Iterator[str]:
    """Those files of a saved folder that process `process` of `count` has written or, where
    process 0 did, may as well look after."""
    for name in names:
        owner = next((part for part in name.split("/") if part.startswith("ocdbt.process_")), None)
        number = int(owner.removeprefix("ocdbt.process_")) if owner else 0
        if (number if number < count else 0) == process:
            yield name


def read_group(
    folder: Path, manifest: Mapping[str, Any], group: str, wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """The `wanted` arrays of a group, each straight to the place its shape struct names; a process
    reads what its devices hold."""
    import orbax.checkpoint as ocp

    if not wanted:
        return {}
    for path, struct in wanted.items():
        entry = manifest["groups"][group][path]
        if tuple(entry["shape"]) != struct.shape or entry["dtype"] != str(struct.dtype):
            raise CheckpointError(
                f"{folder}: {path} is {entry['dtype']} {tuple(entry['shape'])}, but this run needs "
                f"{struct.dtype} {struct.shape}"
            )
    how = {
        path: ocp.ArrayRestoreArgs(
            sharding=struct.sharding, dtype=struct.dtype, global_shape=struct.shape
        )
        for path, struct in wanted.items()
    }
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
        args = ocp.args.PyTreeRestore(item=dict(wanted), restore_args=how, partial_restore=True)
        return reader.restore((folder / group).absolute(), args=args)
