"""The teacher of a distillation: found, checked against the student's tokenizer, and loaded."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp

from llama_jax import tree
from llama_jax.config import ModelConfig
from llama_jax.formats.json_fields import read_json
from llama_jax.load import check_architecture, load, load_abstract
from llama_jax.mesh.distributed import run_on_main
from llama_jax.mesh.sharding import replicated, shardings
from llama_jax.presets import presets
from llama_jax.weights.table import abstract_params
from train.config import RunConfig
from train.distill import Teacher
from train.run_dir import run_dir
from train.sections.distill import DistillSection
from train.setup import Setup

_SHOWN = 3


def read_teacher(run: RunConfig, tokenizer: Any) -> Teacher | None:
    """The teacher on shapes; None for other methods.

    Raises ValueError for a teacher whose tokenizer is another than the student's, or that brings
    none, for one of another shape than `distill.teacher_architecture`, and for one that reads fewer
    positions than the rows have.
    """
    section = run.distill
    if section is None:
        return None
    stored = load_abstract(section.teacher)
    check_architecture(
        section.teacher_architecture,
        section.teacher,
        stored.config,
        field="distill.teacher_architecture",
    )
    _check_tokenizer(section.teacher, stored.tokenizer, tokenizer)
    config, params = _held(section, stored.config, stored.params)
    _check_length(run, config)
    if section.top_k is not None and section.top_k > tokenizer.vocab_size:
        raise ValueError(
            f"distill.top_k is {section.top_k}, but the tokenizer has {tokenizer.vocab_size} ids; "
            f"give at most that many"
        )
    return Teacher(config, params, tokenizer.vocab_size)


def read_teacher_shape(run: RunConfig, student: ModelConfig) -> Teacher | None:
    """As `read_teacher`, of `distill.teacher_architecture` if it is given, so that the teacher need
    not be there. Without tokenizers every id that both models have is taken for a token."""
    section = run.distill
    if section is None:
        return None
    if section.teacher_architecture is None:
        stored = load_abstract(section.teacher)
        config, params = _held(section, stored.config, stored.params)
    else:
        config = presets[section.teacher_architecture]
        config, params = _held(section, config, abstract_params(config))
    _check_length(run, config)
    return Teacher(config, params, min(student.vocab_size, config.vocab_size))


def load_teacher(setup: Setup) -> tuple[tree.Tree, ...]:
    """What stands beside the state: the teacher's parameters, on the mesh, or nothing.

    Raises ValueError where the run was begun with other weights. Must run in all processes.
    """
    section = setup.run.distill
    if section is None:
        return ()
    if section.top_k is not None:  # its outputs are in the batches
        return setup.beside
    rules = setup.compute.rules
    loaded = load(section.teacher, mesh=setup.mesh, rules=rules, dtype=section.teacher_dtype)
    _check_unchanged(setup, section.teacher, loaded.params)
    places = jax.tree.map(lambda struct: struct.sharding, setup.beside[0])
    return (jax.device_put(loaded.params, places),)


def _check_unchanged(setup: Setup, teacher: str, params: tree.Tree) -> None:
    """Compares the weights with those that the run folder notes; a new run notes them."""
    folder, found = run_dir(setup.run), {"weights": _fingerprint(setup, params)}

    def check() -> None:
        # Without a config the run has not begun: the note is of a start that was ended.
        if not (folder.config.is_file() and folder.teacher.is_file()):
            folder.path.mkdir(parents=True, exist_ok=True)
            folder.teacher.write_text(json.dumps(found) + "\n", encoding="utf-8")
        elif read_json(folder.teacher) != found:
            raise ValueError(
                f"distill.teacher {teacher} has other weights than when the run in {folder.path} "
                f"began; bring them back, or start a new run in another output folder"
            )

    run_on_main("compare the teacher", check)


def _fingerprint(setup: Setup, params: tree.Tree) -> str:
    """Of every bit of the weights, however they are dealt out to devices."""
    arrays = tree.flatten_arrays(params)
    sums = jax.jit(lambda arrays: jax.tree.map(_sum, arrays), out_shardings=replicated(setup.mesh))
    what = {name: int(found) for name, found in sums(arrays).items()}
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()


def _sum(array: jax.Array) -> jax.Array:
    """The bits as integers, each times an odd number of its place; sums wrap alike in any order."""
    if jnp.issubdtype(array.dtype, jnp.floating):
        kind = f"uint{jnp.finfo(array.dtype).bits}"
        array = jax.lax.bitcast_convert_type(array, kind)
    place = jnp.zeros(array.shape, jnp.uint32)
    for axis, size in enumerate(array.shape):
        place = place * size + jax.lax.broadcasted_iota(jnp.uint32, array.shape, axis)
    values = array.astype(jnp.int32).astype(jnp.uint32)
    return jnp.sum(values * (place * 1_640_531_526 + 1), dtype=jnp.uint32)


def teacher_params(setup: Setup, teacher: Teacher) -> tree.Tree:
    """The teacher's parameters on the mesh, for outputs that are kept."""
    section, rules = setup.run.distill, setup.compute.rules
    assert section is not None
    loaded = load(section.teacher, mesh=setup.mesh, rules=rules, dtype=section.teacher_dtype)
    return jax.device_put(
        loaded.params, shardings(teacher.config, loaded.params, setup.mesh, rules)
    )


def _held(
    section: DistillSection, config: ModelConfig, params: tree.Tree
) -> tuple[ModelConfig, tree.Tree]:
    if section.teacher_dtype is None or section.teacher_dtype == config.dtype:
        return config, params
    if not all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in tree.flatten(params).values()):
        raise ValueError(
            f"distill.teacher_dtype is {section.teacher_dtype}, but {section.teacher} holds "
            f"quantized or adapted weights, whose numbers have types of their own; leave it out"
        )
    config = config.replace(dtype=section.teacher_dtype)
    return config, abstract_params(config)


def _check_length(run: RunConfig, config: ModelConfig) -> None:
    assert run.distill is not None
    length, limit = run.train.sequence_length, config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"train.sequence_length is {length}, but the teacher {run.distill.teacher} reads at "
            f"most {limit} positions (max_position_embeddings)"
        )


def _check_tokenizer(teacher: str, theirs: Any, ours: Any) -> None:
    """The teacher must know every token of the student under the same id; it may know more."""
    if theirs is None:
        raise ValueError(
            f"distill.teacher {teacher} brings no tokenizer, so it cannot be told whether its ids "
            f"mean what the student's do; put the tokenizer's files into its folder"
        )
    student, found = (
        {i: token for token, i in each.backend.get_vocab(with_added_tokens=True).items()}
        for each in (ours, theirs)
    )
    different = [i for i in sorted(student) if student[i] != found.get(i)]
    if different:
        shown = ", ".join(
            f"{i} is {student[i]!r} to the student and {found.get(i)!r} to the teacher"
            for i in different[:_SHOWN]
        )
        raise ValueError(
            f"the student and distill.teacher {teacher} have different tokenizers: of "
            f"{len(student)} ids {len(different)} differ ({shown}). Their distributions are over "
            f"different texts and cannot be compared; choose a teacher with the student's "
            f"tokenizer, or set model.tokenizer to the teacher's and train a student for it"
        )
