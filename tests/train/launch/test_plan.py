"""What is checked before anything is rented: names, places, secrets, packages."""

import dataclasses
from pathlib import Path

import pytest

from llama_jax import __version__
from llama_jax.commands.run_config import find_config
from llama_jax.mesh.slices import slice_named
from train.config import load_run_config
from train.launch import package
from train.launch.gcloud import Answer, CommandError, DryRun, Shell
from train.launch.package import build_wheel, read_package
from train.launch.places import place
from train.launch.plan import (
    Machines,
    Target,
    check_fits_slice,
    check_name,
    default_name,
    runtime_version,
    slice_of,
    to_seconds,
)
from train.launch.secrets import Redactor, read_environment
from train.launch.staging import Cargo


def config(*overrides):
    return load_run_config(find_config("tiny-lora-cpu.yaml"), overrides)


def test_names_come_from_the_config():
    assert default_name(Path("a/llama3.1-8b-full-v5e-16.yaml")) == "llama3-1-8b-full-v5e-16"
    assert default_name(Path("My Run__2.yaml")) == "my-run-2"
    long = default_name(Path("a" * 47 + "-b.yaml"))
    assert long == "a" * 47
    for stem in ("123", "___"):
        with pytest.raises(ValueError, match="give --name"):
            default_name(Path(f"{stem}.yaml"))


@pytest.mark.parametrize("name", ["", "A", "1a", "a-", "a" * 49, "a_b", "a b", "a;rm"])
def test_names_that_cloud_refuses(name):
    with pytest.raises(ValueError, match="--name"):
        check_name(name)


@pytest.mark.parametrize(
    ("project", "zone", "complaint"),
    [
        ("p", "us-west4-a", "--project 'p'"),
        ("my-project", "us-west4", "--zone 'us-west4'"),
        ("my-project", "us-west4-a; ls", "--zone"),
    ],
)
def test_targets_that_cannot_be(project, zone, complaint):
    with pytest.raises(ValueError, match=complaint):
        Target("a", project, zone)


def test_a_project_of_a_domain():
    assert (
        Target("a", "example.com:my-project", "us-central2-b").project == "example.com:my-project"
    )


def test_durations():
    assert [to_seconds(text) for text in ("90s", "15m", "6h", "2d")] == [90, 900, 21600, 172800]
    for text in ("", "6", "0h", "-1h", "h", "1.5h", "6 h"):
        with pytest.raises(ValueError, match="such as 90s, 15m, 6h or 2d"):
            to_seconds(text)


def test_each_generation_boots_its_own_software():
    versions = {name: runtime_version(slice_named(f"{name}-4")) for name in ("v4", "v5e", "v5p")}
    assert versions == {
        "v4": "tpu-ubuntu2204-base",
        "v5e": "v2-alpha-tpuv5-lite",
        "v5p": "v2-alpha-tpuv5",
    }
    with pytest.raises(ValueError, match="tpu7x is offered on GKE only"):
        runtime_version(slice_named("tpu7x-64"))


def test_machines_count_workers_and_name_nodes():
    target = Target("job", "my-project", "us-west4-a")
    two = Machines(target, slice_named("2xv5p-64"), "spot", "v", 60)
    assert (two.num_workers, two.nodes) == (32, ("job-0", "job-1"))
    assert Machines(target, slice_named("v6e-8"), "spot", "v", 60).nodes == ("job",)
    with pytest.raises(ValueError, match="tier"):
        Machines(target, slice_named("v6e-8"), "free", "v", 60)
    with pytest.raises(ValueError, match="--wait"):
        Machines(target, slice_named("v6e-8"), "spot", "v", 0)


def test_the_slice_is_named_or_the_configs_own_and_never_another():
    made = config("mesh.slice=v5e-16")
    assert slice_of(made, None) == slice_of(made, "v5litepod-16") == slice_named("v5e-16")
    assert slice_of(config(), "2xv5e-8") == slice_named("2xv5e-8")
    with pytest.raises(ValueError, match="--slice is missing, and mesh.slice is not set"):
        slice_of(config(), None)
    with pytest.raises(ValueError, match=r"made for v5e-16; override that with mesh.slice=v5e-8"):
        slice_of(made, "v5e-8")


def test_a_mesh_that_the_slice_cannot_form():
    check_fits_slice(config("mesh.tensor=8"), slice_named("v5e-16"))
    check_fits_slice(config("mesh.fsdp=16", "train.batch_size=16"), slice_named("v5e-16"))
    # A v4 chip is one device, a tpu7x chip two.
    check_fits_slice(config("mesh.fsdp=16", "train.batch_size=16"), slice_named("v4-16"))
    check_fits_slice(config("mesh.fsdp=32", "train.batch_size=32"), slice_named("tpu7x-16"))
    for mesh in ("mesh.fsdp=8", "mesh.tensor=3"):
        with pytest.raises(ValueError, match="cannot be formed by the 16 devices of v5e-16"):
            check_fits_slice(config(mesh), slice_named("v5e-16"))
    with pytest.raises(ValueError, match=r"mesh\.cpu_devices is 8: this config emulates"):
        check_fits_slice(config("mesh.cpu_devices=8"), slice_named("v5e-16"))


def test_a_batch_that_the_mesh_cannot_share():
    check_fits_slice(config("train.batch_size=32"), slice_named("v5e-16"))
    with pytest.raises(ValueError, match="batch size 8 .* is not a multiple of 16"):
        check_fits_slice(config(), slice_named("v5e-16"))
    halves = ("train.batch_size=16", "train.gradient_accumulation_steps=2")
    with pytest.raises(ValueError, match="batch size 8 .* is not a multiple of 16"):
        check_fits_slice(config(*halves), slice_named("v5e-16"))
    divided = ("mesh.context=4", "train.batch_size=4", "train.sequence_length=100")
    with pytest.raises(ValueError, match="train.sequence_length 100 is not a multiple of 8"):
        check_fits_slice(config(*divided), slice_named("v5e-16"))


def test_buckets_are_mounted_wherever_they_are_named():
    run = config(
        "output=gs://one/runs/a/",
        "model.name=gs://two/llama",
        "model.tokenizer=gs://one/tokenizer",
        "data.train=[gs://two/r-*.jsonl, {array_record: gs://three/x}, package:demo/train.jsonl]",
        "data.eval=[{path: 'https://example.org/a.jsonl'}]",
    )
    placed = place(run, may_copy=True)
    assert placed.buckets == ["one", "two", "three"]
    assert placed.output == "/mnt/gcs/one/runs/a"
    assert placed.config["model"]["name"] == "/mnt/gcs/two/llama"
    assert placed.config["model"]["tokenizer"] == "/mnt/gcs/one/tokenizer"
    train = placed.config["data"]["train"]
    assert train[0] == "/mnt/gcs/two/r-*.jsonl" and train[2] == "package:demo/train.jsonl"
    assert train[1]["array_record"] == "/mnt/gcs/three/x"
    assert placed.config["data"]["eval"][0]["path"] == "https://example.org/a.jsonl"
    assert not placed.copies
    # What the workers read is a config, and only the paths differ.
    again = type(run).from_dict(placed.config)
    assert again.train == run.train and again.optimizer == run.optimizer


@pytest.mark.parametrize(
    ("override", "complaint"),
    [
        ("output=runs/a", r"go away with them; override it with output=gs://BUCKET/runs/a"),
        ("output=./../runs/a/", "override it with output=gs://BUCKET/runs/a, or with"),
        ("output='~'", "override it with output=gs://BUCKET/runs/first, or with"),
        ("output=s3://bucket/a", "is in no bucket; override it with output=gs://BUCKET/PATH"),
        ("output=gs://bucket", "whole bucket; name a folder in it: gs://bucket/runs/first"),
        ("output=gs://bucket//", "whole bucket; name a folder in it: gs://bucket/runs/first"),
        ("output=gs:///a", "not of the form gs://BUCKET/PATH"),
        ("output=gs://b/../a", "not of the form"),
        ("data.train=missing.jsonl", "data.train.0. missing.jsonl does not exist here"),
        ("data.train=missing", "data.train.0. missing does not exist here"),
        ("data.train=[{array_record: missing}]", "array_record missing does not exist here"),
        ("data.train=[{tfds: a, split: b, data_dir: missing}]", "data_dir missing does not exist"),
        ("data.train=file:///a.jsonl", "a.jsonl is a URL of a file of this machine; write its"),
        ("model.name=./missing", "model.name ./missing does not exist here"),
    ],
)
def test_places_that_cannot_be(override, complaint):
    with pytest.raises(ValueError, match=complaint):
        place(config("output=gs://b/r", override), may_copy=True)


def test_local_files_are_copied_small_and_refused_large(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("x" * 100)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    run = config(
        "output=gs://b/r",
        "data.train=rows.jsonl",
        "data.eval=package:demo/heldout.jsonl",
        "model.name=./model",
    )
    placed = place(run, may_copy=True)
    assert placed.config["model"]["name"] == "./copied/0-model"
    assert placed.config["data"]["train"] == ["./copied/1-rows.jsonl"]
    assert set(placed.copies) == {"copied/0-model", "copied/1-rows.jsonl"}
    with pytest.raises(ValueError, match="which pods do not see; copy it to a bucket"):
        place(run, may_copy=False)
    monkeypatch.setattr("train.launch.places.COPY_LIMIT_BYTES", 101)
    with pytest.raises(ValueError, match=r"data.train.0. rows.jsonl: copying more than"):
        place(run, may_copy=True)
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="pattern of local files"):
        place(config("output=gs://b/r", "data.train=row*.jsonl"), may_copy=True)
    # A folder that shares the name of something elsewhere, and one that is no file of rows.
    for override in ("model.name=model", "model.tokenizer=model", "data.train=[{datasets: model}]"):
        with pytest.raises(ValueError, match="is a folder here and may be a name of .* ./model"):
            place(config("output=gs://b/r", override), may_copy=True)
    for folder in ("model", "./model"):
        with pytest.raises(ValueError, match="model is a folder; name its files one by one"):
            place(config("output=gs://b/r", f"data.train={folder}"), may_copy=True)
    (tmp_path / "rows").write_text("")
    placed = place(config("output=gs://b/r", "data.train=[{array_record: rows}]"), may_copy=True)
    assert placed.copies == {"copied/0-rows": Path("rows")}


def test_a_teacher_is_placed_as_a_model_is(tmp_path):
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher/config.json").write_text("{}")
    run = load_run_config(
        find_config("tiny-distill-cpu.yaml"),
        ["output=gs://b/r", f"distill.teacher={tmp_path}/teacher"],
    )
    placed = place(run, may_copy=True)
    assert placed.config["distill"]["teacher"] == "./copied/0-teacher"
    distill = dataclasses.replace(run.distill, teacher="gs://models/teacher")
    placed = place(dataclasses.replace(run, distill=distill), may_copy=False)
    assert placed.config["distill"]["teacher"] == "/mnt/gcs/models/teacher"
    assert "models" in placed.buckets
    distill = dataclasses.replace(run.distill, teacher="./nothere")
    with pytest.raises(ValueError, match=r"distill.teacher ./nothere does not exist here"):
        place(dataclasses.replace(run, distill=distill), may_copy=True)


@pytest.mark.parametrize(
    ("plain", "is_secret"),
    [
        ("TOKENIZERS_PARALLELISM=false", False),
        ("MAX_NEW_TOKENS=5", False),
        ("HF_TOKEN=x", True),
        ("OPENAI_KEY=x", True),
        ("AWS_KEY=AKIA", True),
        ("DB_PASS=hunter22", True),
        ("A=AKIA" + "A1B2" * 4, True),
        ("A=sk-" + "ab12" * 6, True),
    ],
)
def test_what_sounds_like_a_secret_is_not_said_aloud(plain, is_secret):
    def read():
        return read_environment(plain=[plain], secrets=[], forward=[], local={}).plain

    if not is_secret:
        assert read() == dict([plain.split("=")])
        return
    with pytest.raises(ValueError, match="looks like a secret") as raised:
        read()
    assert plain.partition("=")[2] not in str(raised.value) or plain.endswith("=x")


def test_a_variable_is_set_once():
    with pytest.raises(ValueError, match="A is set twice, by --env"):
        read_environment(plain=["A=b", "A=c"], secrets=[], forward=[], local={})


def test_secrets_that_are_given_as_values_are_refused_without_repeating_them():
    token = "hf_" + "a" * 34
    for options in (
        {"plain": [f"HF_TOKEN={token}"]},
        {"plain": [f"HARMLESS={token}"]},
        {"secrets": [f"HF_TOKEN={token}"]},
        {"secrets": [token]},
        {"secrets": ["HF_TOKEN=a/b"]},
        {"secrets": ["HF_TOKEN=a:newest"]},
        {"forward": [f"HF_TOKEN={token}"]},
    ):
        given = {"plain": [], "secrets": [], "forward": [], "local": {}} | options
        with pytest.raises(ValueError) as error:
            read_environment(**given)
        assert token not in str(error.value)


def test_variables_that_are_missing_or_set_twice():
    with pytest.raises(ValueError, match="--forward HF_TOKEN: it is not set"):
        read_environment(plain=[], secrets=[], forward=["HF_TOKEN"], local={"HF_TOKEN": ""})
    with pytest.raises(ValueError, match="A is set twice"):
        read_environment(plain=["A=1"], secrets=["A=b"], forward=[], local={})
    with pytest.raises(ValueError, match="--env must be NAME=VALUE"):
        read_environment(plain=["A"], secrets=[], forward=[], local={})


def test_the_script_of_the_environment_holds_names_of_secrets_only():
    environment = read_environment(
        plain=["A=x y"], secrets=["B=id:3"], forward=["C"], local={"C": "it's secret"}
    )
    assert environment.script("my-project") == (
        "export A='x y'\n"
        'B="$(gcloud secrets versions access 3 --secret=id --project=my-project)"\n'
        "export B\n"
    )
    assert environment.forwarded_script() == "export C='it'\"'\"'s secret'\n"


def test_redaction_hides_longest_first_and_known_tokens():
    redact = Redactor(["abcdef", "abcdefgh", "1"])
    assert redact("1 abcdefgh abcdef") == "1 *** ***"
    assert redact(f"login hf_{'x' * 30}!") == "login ***!"


def test_workers_install_what_the_config_uses():
    def extras(*overrides):
        run = config("output=gs://b/r", *overrides)
        environment = read_environment(plain=[], secrets=[], forward=[], local={})
        return Cargo(place(run, may_copy=True), environment, None).extras

    assert extras() == "tpu,demo"
    assert extras("model.name=gs://b/m") == "tpu"
    assert extras("model.name=gs://b/m", "wandb.project=p") == "tpu,wandb"
    assert extras("model.name=gs://b/m", "model.tokenizer=smollm2-135m") == "tpu,demo"
    held_out = ("model.name=gs://b/m", "data.eval=[]", "data.eval_fraction=0.1")
    for source in ("gs://b/rows.parquet", "{datasets: gs://b/saved, split: train}"):
        assert extras(*held_out, f"data.train=[{source}]") == "tpu,data"


def test_packages(tmp_path, monkeypatch):
    assert read_package("checkout") is None
    assert read_package("llama-jax==1.0").requirement == "llama-jax==1.0"
    with pytest.raises(ValueError, match="does not exist"):
        read_package(str(tmp_path / "a.whl"))
    with pytest.raises(ValueError, match="neither checkout, nor a wheel, nor a requirement"):
        read_package("./some folder")
    for name in ("other-1.0-py3-none-any.whl", "llama_jax.whl", "LLaMa.jax-1.0-py3-none-any.whl"):
        (tmp_path / name).touch()
    assert read_package(str(tmp_path / "LLaMa.jax-1.0-py3-none-any.whl")).wheel is not None
    for other in ("pandas>=2", str(tmp_path / "other-1.0-py3-none-any.whl")):
        with pytest.raises(ValueError, match="workers run `llama-jax train`, so give checkout"):
            read_package(other)
    with pytest.raises(ValueError, match="pip refuses a wheel of that name"):
        read_package(str(tmp_path / "llama_jax.whl"))
    monkeypatch.setattr(package, "checkout_folder", lambda: None)
    with pytest.raises(ValueError, match="was not started from a checkout"):
        read_package("checkout")


def test_the_checkout_becomes_a_wheel_that_carries_the_script(tmp_path):
    import zipfile

    built = build_wheel(Shell(lambda text: None), tmp_path, Redactor())
    assert built.wheel == tmp_path / f"llama_jax-{__version__}-py3-none-any.whl"
    assert "train/launch/worker.sh" in zipfile.ZipFile(built.wheel).namelist()
    dry = build_wheel(DryRun([]), tmp_path, Redactor())
    assert (dry.requirement, dry.wheel) == (built.requirement, None)


def test_a_program_that_is_missing_or_takes_too_long():
    shell = Shell(lambda text: None)
    # What was started is stopped with it, as the ssh of gcloud has to be.
    late = ["sh", "-c", "echo a; sleep 9; echo b"]
    assert shell.run(late, timeout=0.5) == Answer(None, "a\n", "")
    assert shell.run(["sh", "-c", "echo b >&2; exit 3"]) == Answer(3, "", "b\n")


def test_lines_are_told_as_they_come_and_neither_stream_blocks(tmp_path):
    shell, seen = Shell(lambda text: None), []
    go = tmp_path / "go"

    def on_line(text):
        seen.append(text)
        go.touch()

    wait = f"echo one; while [ ! -f {go} ]; do sleep 0.05; done; echo two"
    answer = shell.run(["sh", "-c", wait], timeout=20.0, on_line=on_line)
    assert (answer.returncode, seen) == (0, ["one", "two"])
    much = "head -c 1000000 /dev/zero | tr '\\0' x >&2; head -c 1000000 /dev/zero | tr '\\0' y"
    answer = shell.run(["sh", "-c", much], timeout=20.0)
    assert (len(answer.stdout), len(answer.stderr)) == (1000000, 1000000)
    with pytest.raises(KeyboardInterrupt):
        shell.run(["sh", "-c", "echo a; exec sleep 9"], on_line=_interrupt)


def _interrupt(text):
    raise KeyboardInterrupt


def test_gcloud_that_is_not_installed(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(CommandError, match="gcloud is not installed, or not on PATH; see https"):
        Shell(lambda text: None).run(["gcloud", "version"])
