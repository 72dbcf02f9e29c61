"""From sources to batches, as a run config says."""

import json

import numpy as np
import pytest

from tests.train.tiny_data import byte_tokenizer, chat_row, write_rows
from train.config import RunConfig
from train.data.build import build_data
from train.data.row_set import read_run_rows

TOKENIZER = byte_tokenizer()


def run_config(method="full", **data) -> RunConfig:
    return RunConfig.from_dict(
        {
            "model": {"name": "m"},
            "method": method,
            "data": data,
            "train": {"steps": 3, "batch_size": 4, "sequence_length": 64},
            "output": "o",
        }
    )


def build(run: RunConfig):
    return build_data(run, *read_run_rows(run), TOKENIZER)


def texts(folder, name: str, count: int) -> str:
    return write_rows(folder / name, [{"text": f"{name[0]}{n:02}"} for n in range(count)])


def text_of(plan, number: int) -> str:
    return TOKENIZER.decode(plan.samples[number].ids.tolist())


def test_sources_of_every_form_are_one_lot(tmp_path):
    a, b = texts(tmp_path, "a.jsonl", 5), tmp_path / "b.csv"
    b.write_text("article\nb00\nb01\n")
    run = run_config(train=[a, {"path": str(b), "columns": {"text": "article"}}], shuffle=False)
    assert RunConfig.from_dict(json.loads(json.dumps(run.to_dict()))) == run
    data = build(run)
    assert [text_of(data.train, i)[0] for i in range(7)] == list("aaaaabb")
    counts = data.train_report.sources
    assert [(c.rows, c.samples, c.weight) for c in counts.values()] == [(5, 5, None), (2, 2, None)]
    lines = "\n".join(data.train_report.lines("train"))
    assert f"from {b}: 2 rows, 2 samples, 8 tokens" in lines
    assert len(data.train.shares) == 1


def test_one_source_may_stand_without_a_list(tmp_path):
    path = texts(tmp_path, "a.jsonl", 3)
    assert len(build(run_config(train={"path": path})).train.samples) == 3
    assert len(build(run_config(train=path)).train.samples) == 3


def test_weights_set_what_batches_hold(tmp_path):
    sources = [
        {"path": texts(tmp_path, "a.jsonl", 4), "weight": 3},
        {"path": texts(tmp_path, "b.jsonl", 40), "weight": 1},
    ]
    run = run_config(train=sources)
    data = build(run)
    batches = data.batches(run)
    seen = []
    for _ in range(10):
        next(batches)
        seen += [text_of(data.train, number)[0] for number in batches.samples]
    assert (seen.count("a"), seen.count("b")) == (30, 10)
    progress = batches.progress()
    assert progress[sources[0]["path"]] == {"items": 30, "epochs": 7.5}
    counts = data.train_report.to_dict()["sources"][sources[1]["path"]]
    assert counts == {"rows": 40, "samples": 40, "tokens": 160, "weight": 1.0, "sequences": 40}


def test_a_weighted_source_with_nothing_left_is_named(tmp_path):
    long = write_rows(tmp_path / "long.jsonl", [chat_row("q" * 200, "a")])
    sources = [
        {"path": texts(tmp_path, "a.jsonl", 4), "weight": 1},
        {"path": long, "weight": 1},
    ]
    with pytest.raises(ValueError, match=r"long.jsonl: none of 1 rows is left"):
        build(run_config(train=sources))


def test_rows_held_out_of_weighted_sources_may_be_of_some_alone(tmp_path):
    sources = [
        {"path": texts(tmp_path, "a.jsonl", 200), "weight": 1},
        {"path": texts(tmp_path, "b.jsonl", 2), "weight": 1},
    ]
    for packing in (False, True):
        data = build(run_config(train=sources, eval_fraction=0.05, packing=packing))
        held = data.eval_report.sources[sources[1]["path"]]
        assert (held.rows, held.sequences) == (0, 0) and len(data.eval.samples) == 10
    sources[1]["path"] = texts(tmp_path, "c.jsonl", 1)
    with pytest.raises(ValueError, match=r"c.jsonl: data.eval_fraction holds out every row"):
        build(run_config(train=sources, eval_fraction=0.99))


def test_the_same_source_twice_is_told_apart(tmp_path):
    path = texts(tmp_path, "a.jsonl", 2)
    sources = [{"path": path, "weight": 1}, {"path": path, "weight": 2}]
    data = build(run_config(train=sources))
    assert list(data.train_report.sources) == [f"{path} #1", f"{path} #2"]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"train": [{"path": "a", "weight": 1}, "b"]},
            r"data.train\[1\] has no weight, but other sources have",
        ),
        ({"train": ["a"], "eval": [{"path": "a", "weight": 1}]}, r"data.eval\[0\].weight means"),
        ({"train": [{"path": "a", "weigth": 1}]}, r"data.train\[0\] has no field 'weigth'.*weight"),
        ({"train": [{"path": 3}]}, r"data.train\[0\].path is 3"),
        ({"train": ["a"], "prefetch": -1}, "data.prefetch is -1"),
        ({"train": ["a"], "num_workers": 0}, "data.num_workers is 0"),
    ],
)
def test_config_mistakes_are_named(data, message):
    with pytest.raises(ValueError, match=message):
        run_config(**data)


def test_held_out_rows_are_of_all_sources_and_in_no_training_sample(tmp_path):
    sources = [texts(tmp_path, "a.jsonl", 30), texts(tmp_path, "b.jsonl", 30)]
    data = build(run_config(train=sources, eval_fraction=0.3))
    train = {text_of(data.train, i) for i in range(len(data.train.samples))}
    held = {text_of(data.eval, i) for i in range(len(data.eval.samples))}
    assert len(held) == 18 and len(train) == 42 and not train & held
    assert {text[0] for text in held} == {"a", "b"}


def test_prefetch_and_workers_are_read_and_change_nothing(tmp_path, monkeypatch):
    path, seen, options = texts(tmp_path, "a.jsonl", 11), [], []
    import grain

    make = grain.ReadOptions
    monkeypatch.setattr(grain, "ReadOptions", lambda **kw: options.append(kw) or make(**kw))
    for changes in ({"prefetch": 0}, {"prefetch": 3, "num_workers": 2}):
        run = run_config(train=path, **changes)
        batches = build(run).batches(run)
        tokens = [next(batches).tokens for _ in range(8)]
        seen.append(np.stack(tokens))
    np.testing.assert_array_equal(*seen)
    assert [o["prefetch_buffer_size"] for o in options] == [0, 3]
    assert [o["num_threads"] for o in options] == [0, 2]


def test_the_report_gives_the_fill_of_packed_rows(tmp_path):
    rng = np.random.default_rng(0)
    rows = [{"text": "x" * int(n)} for n in np.clip(rng.lognormal(2.5, 0.8, 400), 1, 60)]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    packed = build(run_config(train=path, packing=True)).train_report
    apart = build(run_config(train=path)).train_report
    assert packed.tokens == apart.tokens == sum(len(row["text"]) + 1 for row in rows)
    assert packed.fill >= 0.97 > apart.fill
    assert packed.to_dict()["fill"] == round(packed.tokens / (packed.packed_rows * 64), 4)
    assert packed.padding_tokens == packed.packed_rows * 64 - packed.tokens
    assert f"filled to {packed.fill:.1%}" in packed.lines("train")[1]


def test_rows_that_change_between_reading_them_are_noticed(tmp_path):
    path = texts(tmp_path, "a.jsonl", 4)
    run = run_config(train=path)
    rows = read_run_rows(run)
    texts(tmp_path, "a.jsonl", 5)
    with pytest.raises(ValueError, match=r"a.jsonl had 4 rows a moment ago and has 5 now"):
        build_data(run, *rows, TOKENIZER)


PAIR = {"prompt": "p", "chosen": "good", "rejected": "bad"}


def test_pairs_become_two_samples_with_only_the_last_answer_trained(tmp_path):
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "bad"},
        {"role": "user", "content": "two"},
    ]
    path = write_rows(tmp_path / "p.jsonl", [PAIR, {**PAIR, "prompt": turns}])
    run = run_config("dpo", train=path, shuffle=False).replace(
        train=run_config(train=path).train.replace(sequence_length=128, batch_size=1)
    )
    data = build(run)
    trained = [
        TOKENIZER.decode(sample.ids[sample.mask.astype(bool)].tolist(), skip_special_tokens=False)
        for sample in data.train.samples
    ]
    assert trained == ["good<|im_end|>", "bad<|im_end|>"] * 2
    batches = data.batches(run)
    assert next(batches).tokens.shape == (2, 128) and batches.samples == [0, 1]


def test_long_equal_or_cut_pairs_are_left_out_together_and_counted(tmp_path):
    rows = [
        PAIR,
        {**PAIR, "rejected": "x" * 60},
        {**PAIR, "rejected": "good"},
        {**PAIR, "prompt": "x" * 80},
    ]
    path = write_rows(tmp_path / "p.jsonl", rows)
    dropped = build(run_config("dpo", train=path)).train_report
    assert dropped.samples == 2
    assert dropped.dropped == {"longer than sequence_length": 2, "chosen equals rejected": 1}
    cut = build(run_config("dpo", train=path, long_rows="cut")).train_report
    assert (cut.samples, cut.cut) == (4, 2)
    assert cut.dropped == {"chosen equals rejected": 1, "no answer left after cutting": 1}
    with pytest.raises(ValueError, match=r"p.jsonl, line 2: the row has \d+ tokens"):
        build(run_config("dpo", train=path, long_rows="refuse"))
