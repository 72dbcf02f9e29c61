"""Checkpoints: every leaf type bit for bit, any mesh, whole or not at all."""

import json
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llama_jax.formats import checkpoint, checkpoint_saver, checkpoint_write
from llama_jax.formats.checkpoint import CheckpointError
from llama_jax.formats.checkpoint_arrays import ArrayWriter
from llama_jax.formats.checkpoint_saver import SaveError, Saver
from llama_jax.formats.tokenizer import load_tokenizer
from llama_jax.mesh.sharding import make_mesh, shardings
from llama_jax.weights.lora import add_lora
from llama_jax.weights.lora_config import LoraConfig
from llama_jax.weights.quantize import quantize
from llama_jax.weights.select import trainable_mask
from tests.tiny import FAMILIES, tiny_params
from tests.train.tiny_data import byte_tokenizer

pytestmark = pytest.mark.compiled_quickly

CONFIG = FAMILIES["llama-gqa"]


def same(a, b) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def model(kind: str):
    params = tiny_params(CONFIG)
    if kind == "bfloat16":
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    if kind in ("int8", "fp8", "nf4", "int4", "qlora"):
        params = quantize(CONFIG, params, scheme="nf4" if kind == "qlora" else kind)
    if kind in ("lora", "qlora"):
        lora = LoraConfig(
            r=4, use_rslora=True, layers_to_transform=(1,), modules_to_save=("lm_head",)
        )
        params = add_lora(CONFIG, params, lora, jax.random.key(0))
    return params


@pytest.mark.parametrize(
    "kind", ["plain", "bfloat16", "int8", "fp8", "nf4", "int4", "lora", "qlora"]
)
def test_a_model_comes_back_bit_for_bit(tmp_path, kind):
    params = model(kind)
    folder = checkpoint.save_model(tmp_path / "m", CONFIG, params, byte_tokenizer())
    assert checkpoint.is_checkpoint(folder)
    config, loaded = checkpoint.load_model(folder)
    assert config == CONFIG
    same(loaded, params)
    assert load_tokenizer(folder).encode("hi") == byte_tokenizer().encode("hi")
    abstract_config, abstract = checkpoint.read_abstract(folder)
    assert abstract_config == CONFIG
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    assert [x.shape for x in jax.tree.leaves(abstract)] == [
        x.shape for x in jax.tree.leaves(params)
    ]


def test_an_existing_folder_is_kept_unless_overwriting_is_allowed(tmp_path):
    params = model("plain")
    folder = checkpoint.save_model(tmp_path / "m", CONFIG, params, None)
    with pytest.raises(ValueError, match="not empty"):
        checkpoint.save_model(folder, CONFIG, params, None)
    half = jax.tree.map(lambda x: x / 2, params)
    same(
        checkpoint.load_model(checkpoint.save_model(folder, CONFIG, half, None, overwrite=True))[1],
        half,
    )


def test_unstacked_layers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="stacked layers"):
        params = {**model("plain"), "layers": ()}
        checkpoint.save_model(tmp_path / "m", CONFIG, params, None)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("kind", ["plain", "qlora"])
def test_r63_saved_on_one_mesh_and_read_on_others(tmp_path, kind):
    params = model(kind)
    saved_on = make_mesh({"fsdp": 4, "tensor": 2})
    placed = jax.device_put(params, shardings(CONFIG, params, saved_on))
    folder = checkpoint.save_model(tmp_path / "m", CONFIG, placed, None)
    same(checkpoint.load_model(folder)[1], params)
    mesh = make_mesh({"data": 2, "tensor": 2}, devices=jax.devices()[:4])
    loaded = checkpoint.load_model(folder, mesh=mesh)[1]
    same(loaded, params)
    places = shardings(CONFIG, params, mesh)
    for array, place in zip(jax.tree.leaves(loaded), jax.tree.leaves(places), strict=True):
        assert array.sharding == place


class Training:
    """A state of training to save, with adapters trained and the rest frozen."""

    def __init__(self):
        self.params = model("lora")
        self.mask = trainable_mask(CONFIG, self.params, None, method="lora")
        self.optimizer = {"moments": {"a": jnp.arange(6.0)}, "step": jnp.int32(3)}

    def saver(self, root, **options):
        return Saver(
            root,
            config=CONFIG,
            mask=self.mask,
            tokenizer=byte_tokenizer(),
            **{"keep": 2, **options},
        )

    def save(self, root, step, *, extra=None, score=None, **options):
        saver = self.saver(root, **options)
        self.save_with(saver, step, extra=extra, score=score)
        folder = saver.wait()
        saver.close()
        return folder

    def save_with(self, saver, step, *, extra=None, score=None):
        saver.save(
            step, params=self.params, optimizer=self.optimizer, extra=extra or {}, score=score
        )

    def restore(self, folder, **changes):
        place = jax.sharding.SingleDeviceSharding(jax.devices()[0])

        def struct(x):
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)

        wanted = {"params": self.params, "optimizer": self.optimizer, **changes}
        return checkpoint.restore_train_state(
            folder, **{name: jax.tree.map(struct, part) for name, part in wanted.items()}
        )


@pytest.fixture(scope="module")
def training():
    return Training()


@pytest.fixture(scope="module")
def finished(training, tmp_path_factory):
    """A folder with one checkpoint, to be copied and damaged."""
    root = tmp_path_factory.mktemp("finished")
    training.save(root, 3, extra={"data": {"next_index": 3}})
    return root


@pytest.fixture
def root(finished, tmp_path):
    return shutil.copytree(finished, tmp_path / "copy")


def test_a_training_state_comes_back_and_is_a_model(root, training):
    folder = checkpoint.step_folder(root, 3)
    params, optimizer, extra = training.restore(folder)
    same(params, training.params)
    same(optimizer, training.optimizer)
    assert extra == {"data": {"next_index": 3}, "step": 3, "score": None}
    same(checkpoint.load_model(folder)[1], training.params)


def test_a_state_of_another_run_is_refused_by_name(root, training):
    folder = checkpoint.step_folder(root, 3)
    with pytest.raises(CheckpointError, match=r"other parameters.*not needed: .*lora_a"):
        training.restore(folder, params=model("plain"))
    with pytest.raises(CheckpointError, match="another optimizer state.*missing: moments.b"):
        training.restore(folder, optimizer={"moments": {"b": jnp.zeros(1)}, "step": jnp.int32(0)})
    with pytest.raises(CheckpointError, match=r"moments.a is float32 \(6,\), but .*\(7,\)"):
        training.restore(folder, optimizer={"moments": {"a": jnp.zeros(7)}, "step": jnp.int32(0)})


def inodes(folder, group="frozen"):
    return {path.stat().st_ino for path in (folder / group).rglob("*") if path.is_file()}


def test_frozen_arrays_are_linked_but_never_between_the_two_latest(root, training):
    first = checkpoint.step_folder(root, 3)
    before = inodes(first)
    second = training.save(root, 6)
    assert not before & inodes(second)
    third = training.save(root, 9)
    assert not first.exists() and inodes(third) == before
    fourth = training.save(root, 12)
    assert inodes(fourth) == inodes(checkpoint.step_folder(root, 12)) and not second.exists()
    for folder in (third, fourth):
        same(training.restore(folder)[0], training.params)
    assert not inodes(third) & inodes(fourth)
    assert not inodes(third, "trained") & inodes(fourth, "trained")


def test_a_single_checkpoint_that_is_kept_links_to_the_one_before(root, training):
    before = inodes(checkpoint.step_folder(root, 3))
    second = training.save(root, 6, keep=1)
    assert checkpoint.list_steps(root) == [6] and inodes(second) == before
    same(training.restore(second)[0], training.params)


def test_only_the_latest_are_kept(root, training):
    for step in (4, 12, 100_000_001):
        training.save(root, step, keep=2)
    assert checkpoint.list_steps(root) == [12, 100_000_001]
    assert checkpoint.latest_step(root) == 100_000_001
    assert checkpoint.latest_step(root / "nothing") is None


def test_the_best_are_kept_besides_the_latest(tmp_path, training):
    scores = {1: 2.0, 2: 1.0, 3: float("nan"), 4: 3.0, 5: None, 6: 1.0, 7: 4.0}
    kept = []
    for step, score in scores.items():
        folder = training.save(tmp_path, step, keep=1, keep_best=2, score=score)
        assert folder == checkpoint.step_folder(tmp_path, step)
        kept.append(checkpoint.list_steps(tmp_path))
    # Of equal scores the newer is better; without a score a checkpoint is never among the best.
    assert kept == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 5], [2, 6], [2, 6, 7]]
    for step in kept[-1]:
        same(training.restore(checkpoint.step_folder(tmp_path, step))[0], training.params)


def test_a_save_goes_on_while_the_arrays_are_given_away(tmp_path, training, monkeypatch):
    """The next step takes over the memory of what is saved, before a byte of it is written."""
    before = jax.tree.map(np.array, training.params)
    go_on = threading.Event()
    wait = ArrayWriter.wait

    def waiting(writer):
        assert go_on.wait(60)
        wait(writer)

    monkeypatch.setattr(ArrayWriter, "wait", waiting)
    saver = training.saver(tmp_path)
    params = jax.tree.map(lambda x: x + 0, training.params)
    saver.save(5, params=params, optimizer=training.optimizer, extra={})
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    zeros = jax.block_until_ready(step(params))
    assert checkpoint.list_steps(tmp_path) == [] and saver.last is None
    go_on.set()
    assert saver.wait() == checkpoint.step_folder(tmp_path, 5)
    same(training.restore(saver.last)[0], before)
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(zeros))
    saver.close()


@pytest.mark.parametrize("surfaces", ["at the next save", "at the end"])
def test_an_error_in_the_background_is_never_lost(root, training, monkeypatch, surfaces):
    def full(folder, manifest):
        raise OSError(28, "No space left on device")

    saver = training.saver(root)
    monkeypatch.setattr(checkpoint_write, "write_manifest", full)
    training.save_with(saver, 5)
    message = r"step 5 could not be written: .*No space left.*The latest complete one is none"
    with pytest.raises(SaveError, match=message):
        training.save_with(saver, 6) if surfaces == "at the next save" else saver.close()
    assert [path.name for path in root.iterdir()] == ["step_00000003"]
    monkeypatch.undo()
    if surfaces == "at the next save":
        training.save_with(saver, 7)
        assert saver.wait() == checkpoint.step_folder(root, 7)
        saver.close()


def test_a_failing_copy_leaves_nothing_behind(root, training, monkeypatch):
    def fail(*args):
        raise RuntimeError("no memory")

    saver = training.saver(root)
    monkeypatch.setattr(checkpoint_saver, "ArrayWriter", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        training.save_with(saver, 5)
    assert [path.name for path in root.iterdir()] == ["step_00000003"]
    saver.close()


def biggest(folder, pattern="*"):
    files = [path for path in folder.rglob(pattern) if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("group", ["trained", "frozen", "optimizer"])
def test_r65_a_flipped_byte_is_found(root, training, group):
    folder = checkpoint.step_folder(root, 3)
    path = biggest(folder / group)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    for read in (training.restore, checkpoint.load_model):
        with pytest.raises(CheckpointError, match=f"step_00000003 is damaged: {group}/"):
            read(folder)


def test_r65_a_missing_file_is_found(root, training):
    folder = checkpoint.step_folder(root, 3)
    biggest(folder / "trained").unlink()
    with pytest.raises(CheckpointError, match="step_00000003 is damaged: the file .* is missing"):
        training.restore(folder)


def test_r65_a_changed_marker_is_found(root):
    folder = checkpoint.step_folder(root, 3)
    path = folder / checkpoint.MARKER
    path.write_bytes(path.read_bytes().replace(b"{", b"\xff"))
    with pytest.raises(checkpoint.DamagedCheckpointError, match="complete.json does not fit"):
        checkpoint.load_model(folder)


def test_r65_a_missing_description_is_found(root, training):
    folder = checkpoint.step_folder(root, 3)
    (folder / checkpoint.MANIFEST).unlink()
    with pytest.raises(checkpoint.DamagedCheckpointError, match=r"checkpoint\.json is missing"):
        training.restore(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"version": 1}'])
def test_a_description_that_cannot_be_read_is_named(root, text):
    folder = checkpoint.step_folder(root, 3)
    (folder / checkpoint.MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        checkpoint.load_model(folder)
    with pytest.raises(CheckpointError, match=r"damaged: checkpoint\.json"):
        checkpoint.read_abstract(folder)


def test_another_version_of_the_format_is_refused(root):
    folder = checkpoint.step_folder(root, 3)
    path = folder / checkpoint.MANIFEST
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 99}))
    (folder / checkpoint.MARKER).unlink()
    checkpoint_error = pytest.raises(CheckpointError, match="version 99.*reads version 1")
    with checkpoint_error:
        checkpoint.accept(folder)


def test_r62_without_its_marker_a_folder_is_untouched_and_can_be_accepted(root, training):
    folder = checkpoint.step_folder(root, 3)
    (folder / checkpoint.MARKER).unlink()
    before = sorted(path.name for path in folder.rglob("*"))
    assert checkpoint.list_steps(root) == []
    with pytest.raises(CheckpointError, match="Nothing was changed.*accept"):
        training.restore(folder)
    checkpoint.remove_unfinished(root)
    assert sorted(path.name for path in folder.rglob("*")) == before
    checkpoint.accept(folder)
    same(training.restore(folder)[0], training.params)


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        checkpoint.load_model(tmp_path)
    assert not checkpoint.is_checkpoint(tmp_path)


def newest(root, **options):
    found = checkpoint.find_newest(root, **{"allow_older": False, **options})
    return found and found[0].name


def damage(folder, group="trained"):
    path = biggest(folder / group)
    path.write_bytes(path.read_bytes()[:-1] + b"!")


def test_the_newest_checkpoint_is_found(root, training):
    assert newest(root / "nothing") is None
    training.save(root, 5)
    assert newest(root) == "step_00000005"


@pytest.mark.parametrize("group", ["trained", "frozen", "optimizer"])
def test_r65_an_older_one_is_taken_only_on_request_and_nothing_is_deleted(root, training, group):
    """Whatever file is damaged, the checkpoint before is whole: they share none."""
    training.save(root, 5)
    training.save(root, 7)
    damage(checkpoint.step_folder(root, 7), group)
    with pytest.raises(checkpoint.DamagedCheckpointError, match="step_00000007 is damaged"):
        newest(root)
    assert newest(root, allow_older=True) == "step_00000005"
    assert (root / "step_00000007.damaged-0").is_dir() and checkpoint.list_steps(root) == [5]


def test_r65_where_none_is_whole_none_is_touched(root, training):
    training.save(root, 5)
    for step in (3, 5):
        damage(checkpoint.step_folder(root, step))
    message = "no checkpoint is whole: .*step_00000005 is damaged.*step_00000003 is damaged"
    with pytest.raises(checkpoint.DamagedCheckpointError, match=message):
        newest(root, allow_older=True)
    assert checkpoint.list_steps(root) == [3, 5]


def test_r62_training_does_not_start_over_beside_a_folder_without_its_marker(root, training):
    training.save(root, 5)
    (checkpoint.step_folder(root, 5) / checkpoint.MARKER).unlink()
    with pytest.raises(CheckpointError, match=r"step_00000005 has no complete\.json.*accept"):
        newest(root)
    assert sorted(path.name for path in root.iterdir()) == ["step_00000003", "step_00000005"]
    training.save(root, 7)
    assert newest(root) == "step_00000007"
    assert checkpoint.step_folder(root, 5).is_dir()


def test_set_aside_finds_a_free_name(root, training):
    assert checkpoint.set_aside(root, 3).name == "step_00000003.damaged-0"
    training.save(root, 3)
    assert checkpoint.set_aside(root, 3).name == "step_00000003.damaged-1"
    assert checkpoint.list_steps(root) == []


KILLED = """
import os, signal, sys
import tests.conftest
from tests.formats.test_checkpoint import Training
from llama_jax.formats import checkpoint_files, checkpoint_saver
training, root, last = Training(), *sys.argv[1:]
marker = checkpoint_files.marker
def die(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)
def killing(folder):
    if last == "complete.json":
        (folder / last).write_bytes(marker(folder))
    die()
if last == "arrays":
    checkpoint_saver.write_rest = die
elif last == "retired":
    checkpoint_saver.shutil.rmtree = die
else:
    checkpoint_files.marker = killing
training.save(root, 5, keep=1)
"""


@pytest.mark.parametrize("after", ["arrays", "checkpoint.json", "complete.json"])
def test_r61_a_save_that_is_killed_leaves_the_one_before(root, training, after):
    """Killed before the folder takes its name, once before and once after the marker is there."""
    arguments = [sys.executable, "-c", KILLED, str(root), after]
    process = subprocess.run(arguments, check=False, capture_output=True)
    assert process.returncode == -9, process.stderr.decode()
    left = [path.name for path in root.iterdir() if path.name.startswith(".step_")]
    assert len(left) == 1 and checkpoint.latest_step(root) == 3
    same(training.restore(checkpoint.step_folder(root, 3))[0], training.params)
    checkpoint.remove_unfinished(root)
    assert [path.name for path in root.iterdir()] == ["step_00000003"]
    training.save(root, 5)
    assert checkpoint.list_steps(root) == [3, 5]


def test_r61_a_deletion_that_is_killed_leaves_no_half_checkpoint(root, training):
    arguments = [sys.executable, "-c", KILLED, str(root), "retired"]
    process = subprocess.run(arguments, check=False, capture_output=True)
    assert process.returncode == -9, process.stderr.decode()
    assert checkpoint.list_steps(root) == [5]
    assert newest(root) == "step_00000005"
    assert [path.name for path in root.iterdir()] == ["step_00000005"]
