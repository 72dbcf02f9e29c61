"""Tokenized rows on disk: used when nothing changed, made anew when something did."""

import json
import os

import numpy as np
import pytest

from tests.train.data.test_build import TOKENIZER, build, run_config, texts
from train.data import build as build_module
from train.data.cache import SampleCache, tokenizer_fingerprint
from train.data.row_set import read_run_rows
from train.data.samples import Sample, Samples


@pytest.fixture
def made(monkeypatch) -> list[str]:
    """The sources that were rendered."""
    rendered, render = [], build_module.render_rows

    def counted(rows, *args, **options):
        rendered.append("rendered")
        return render(rows, *args, **options)

    monkeypatch.setattr(build_module, "render_rows", counted)
    return rendered


def same(one, other) -> None:
    for a, b in ((one.train, other.train), (one.eval, other.eval)):
        assert a.fingerprint == b.fingerprint
        assert [s.ids.tolist() for s in a.samples] == [s.ids.tolist() for s in b.samples]
        assert [s.mask.tolist() for s in a.samples] == [s.mask.tolist() for s in b.samples]
    assert one.train_report.to_dict() == other.train_report.to_dict()
    assert one.eval_report.to_dict() == other.eval_report.to_dict()


def test_the_second_start_reads_no_rows_and_gets_the_same(tmp_path, made, monkeypatch):
    source = {"path": texts(tmp_path, "a.jsonl", 30), "weight": 1}
    plain = build(run_config(train=[source], eval_fraction=0.2))
    run = run_config(train=[source], eval_fraction=0.2, cache=str(tmp_path / "cache"))
    first = build(run)
    same(first, plain)
    made.clear()
    monkeypatch.setattr("train.data.row_set.read_source", None)  # not to be called
    second = build(run)
    assert not made
    same(second, plain)
    assert isinstance(second.train.samples._ids, np.memmap)
    batch, expected = next(second.batches(run)), next(plain.batches(run))
    np.testing.assert_array_equal(batch.tokens, expected.tokens)
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [SampleCache(run).folder.name]


@pytest.mark.parametrize(
    "change", ["content", "time", "length", "policy", "method", "split", "columns", "day"]
)
def test_whatever_decides_the_samples_makes_them_anew(tmp_path, made, change):
    path, cache = texts(tmp_path, "a.jsonl", 30), str(tmp_path / "cache")
    data = {"train": [{"path": path}], "eval_fraction": 0.2, "cache": cache}
    run = run_config(**data)
    build(run)
    made.clear()
    if change == "content":
        texts(tmp_path, "a.jsonl", 31)
    elif change == "time":
        os.utime(path, ns=(1, 1))
    elif change == "length":
        run = run.replace(train=run.train.replace(sequence_length=32))
    elif change == "policy":
        run = run_config(**data, long_texts="drop")
    elif change == "day":
        run = run_config(**data, template_date="2026-11-30")
    elif change == "method":
        run = run_config("pretrain", **data)
    elif change == "split":
        run = run.replace(train=run.train.replace(seed=9))
    else:
        run = run_config(**{**data, "train": [{"path": path, "columns": {"text": "text"}}]})
    build(run)
    assert len(made) == 2
    made.clear()
    build(run_config(**data, packing=True, shuffle=False) if change == "policy" else run)
    assert not made, "arranging rows is not making them"


def test_another_tokenizer_under_the_same_name_is_refused(tmp_path):
    run = run_config(train=texts(tmp_path, "a.jsonl", 5), cache=str(tmp_path / "cache"))
    build(run)
    manifest = SampleCache(run).folder / "manifest.json"
    values = json.loads(manifest.read_text())
    assert values["tokenizer"] == tokenizer_fingerprint(TOKENIZER)
    manifest.write_text(json.dumps({**values, "tokenizer": "other"}))
    with pytest.raises(ValueError, match="made with another tokenizer or chat template"):
        build(run)


def test_an_entry_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    run = run_config(train=texts(tmp_path, "a.jsonl", 5), cache=str(tmp_path / "cache"))

    def broken(rows, *args, **options):
        yield from list(render(rows, *args, **options))[:2]
        raise KeyboardInterrupt

    render = build_module.render_rows
    monkeypatch.setattr(build_module, "render_rows", broken)
    with pytest.raises(KeyboardInterrupt):
        build(run)
    assert not SampleCache(run).exists() and not list((tmp_path / "cache").iterdir())


def test_who_comes_second_takes_the_entry_of_the_first(tmp_path):
    run = run_config(train=texts(tmp_path, "a.jsonl", 5), cache=str(tmp_path / "cache"))
    rows = read_run_rows(run)  # both processes found no entry
    first = build(run)
    cache, made = SampleCache(run), SampleCache(run).new()
    Samples.stored([], made / "train")
    cache.keep(made, TOKENIZER, {})
    assert not made.exists()
    second = build_module.build_data(run, *rows, TOKENIZER)
    assert second.train.fingerprint == first.train.fingerprint


@pytest.mark.parametrize(
    "name",
    ["train/ids.bin", "train/masks.bin", "train/ends.npy", "train/fingerprint", "reports.json"],
)
def test_a_damaged_file_is_named_with_what_to_delete(tmp_path, name):
    run = run_config(train=texts(tmp_path, "a.jsonl", 5), cache=str(tmp_path / "cache"))
    build(run)
    folder = SampleCache(run).folder
    path = folder / name
    content = path.read_bytes()
    for damaged in (content[:-4], bytes([content[0] ^ 1]) + content[1:], None):
        path.unlink() if damaged is None else path.write_bytes(damaged)
        with pytest.raises(ValueError, match=f"{path} is not as it was written; delete {folder} "):
            build(run)
    path.write_bytes(content)
    build(run)


@pytest.mark.parametrize("text", ["{", "{}", "[]", '{"tokenizer": "x", "files": {}}'])
def test_a_damaged_manifest_is_named_with_what_to_delete(tmp_path, text):
    run = run_config(train=texts(tmp_path, "a.jsonl", 5), cache=str(tmp_path / "cache"))
    build(run)
    folder = SampleCache(run).folder
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ValueError, match=f"{folder}/manifest.json .*; delete {folder} "):
        build(run)


def test_sources_that_cannot_be_watched_and_remote_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="data.cache is gs://bucket/x; it must be a local folder"):
        SampleCache(run_config(train="a.jsonl", cache="gs://bucket/x"))
    source = {"datasets": "somebody/rows", "split": "train"}
    with pytest.raises(ValueError, match=r"cannot tell whether datasets somebody/rows\[train\]"):
        SampleCache(run_config(train=source, cache=str(tmp_path)))


@pytest.mark.parametrize(("place", "message"), [("f", "is a file"), ("f/c", "lies in .*/f, which")])
def test_a_file_in_the_place_of_the_cache_is_named(tmp_path, place, message):
    (tmp_path / "f").write_text("x")
    with pytest.raises(ValueError, match=message):
        SampleCache(run_config(train="a.jsonl", cache=str(tmp_path / place)))


def test_stored_samples_equal_those_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    samples = [
        Sample(rng.integers(0, 99, n, np.int32), rng.integers(0, 2, n).astype(np.uint8))
        for n in (3, 1, 7)
    ]
    held, stored = Samples(samples), Samples.stored(iter(samples), tmp_path / "some")
    assert held.fingerprint == stored.fingerprint == Samples.load(tmp_path / "some").fingerprint
    for one, other, given in zip(held, stored, samples, strict=True):
        np.testing.assert_array_equal(one.ids, given.ids)
        np.testing.assert_array_equal(other.ids, given.ids)
        np.testing.assert_array_equal(other.mask, given.mask)
    assert len(Samples.stored([], tmp_path / "none")) == 0
