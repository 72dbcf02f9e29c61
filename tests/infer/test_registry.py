"""Versions on the disk: whole or not at all, found by name, checked before use."""

import json
import os

import pytest

from infer.registry import Registry, State, UnknownNameError, register


@pytest.fixture
def root(tmp_path):
    model = tmp_path / "source"
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "weights-1.bin").write_bytes(b"one")
    (model / "weights-2.bin").write_bytes(b"two")
    root = tmp_path / "models"
    for version in ("1", "2"):
        register(root, "m", version, model, source="a test")
    (root / "m" / "state.json").unlink()  # as before anyone has said which answers
    return root


def test_a_version_is_a_checked_read_only_copy(root):
    registry = Registry(root)
    assert registry.names() == ["m"] and registry.versions("m") == ["1", "2"]
    manifest = registry.verify("m", "1", hashes=True)
    assert (manifest.model, manifest.adapter, manifest.source) == ("model", None, "a test")
    assert set(manifest.files) == {
        f"model/{name}" for name in ("config.json", "weights-1.bin", "weights-2.bin")
    }
    for name in manifest.files:
        assert (root / "m" / "1" / name).stat().st_mode & 0o222 == 0


def test_a_version_that_exists_is_never_written_again(root, tmp_path):
    with pytest.raises(ValueError, match="exists; versions never change"):
        register(root, "m", "1", tmp_path / "source", source="again")


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "a\\b", "", ".", "..", ".hidden", "x" * 65])
def test_names_that_could_be_paths_are_refused(root, tmp_path, name):  # R116
    with pytest.raises(ValueError, match="must be 1 to 64"):
        register(root, name, "1", tmp_path / "source", source="x")
    with pytest.raises(ValueError, match="must be 1 to 64"):
        register(root, "m", name, tmp_path / "source", source="x")
    registry = Registry(root)
    assert registry.versions(name) == []
    assert registry.adapters(name) == {}
    for call in (lambda: registry.folder(name, "1"), lambda: registry.folder("m", name)):
        with pytest.raises(UnknownNameError):
            call()


def test_a_copy_that_fails_leaves_nothing(root, tmp_path):
    with pytest.raises(FileNotFoundError):
        register(root, "n", "1", tmp_path / "nothing", source="x")
    assert list((root / "n").iterdir()) == []
    assert Registry(root).names() == ["m"]


@pytest.mark.parametrize("name", ["adapters", "state.json"])
def test_what_lies_beside_versions_is_no_version(root, tmp_path, name):
    with pytest.raises(ValueError, match=r"and not state\.json or adapters"):
        register(root, "m", name, tmp_path / "source", source="x")
    (root / "m" / "2").rename(root / "m" / name)
    registry = Registry(root)
    assert registry.versions("m") == ["1"]


def test_a_state_that_cannot_be_written_leaves_nothing(root):
    (root / "m" / "state.json").mkdir()
    with pytest.raises(OSError, match=r"state\.json"):
        Registry(root).set_state("m", State(active="1"))
    assert not list((root / "m").glob(".state-*"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: path.unlink(), "weights-2.bin is missing"),
        (
            lambda path: path.with_name("chat_template.jinja").touch(),
            "jinja is not in the manifest",
        ),
        (lambda path: path.with_name("x").symlink_to(__file__), "x is a link"),
        (lambda path: path.with_name("x").symlink_to(path.parent), "x is a link"),
        (lambda path: _replace_by_link(path), "weights-2.bin is a link"),
        (lambda path: os.mkfifo(path.with_name("x")), "x is a link or no file"),
        (lambda path: path.write_bytes(b"twoo"), "has 4 bytes, the manifest says 3"),
        (lambda path: path.write_bytes(b"owt"), "not what the manifest says"),
    ],
)
def test_damage_is_named(root, damage, said):
    path = root / "m" / "2" / "model" / "weights-2.bin"
    path.chmod(0o644)
    damage(path)
    registry = Registry(root)
    with pytest.raises(ValueError, match=said):
        registry.verify("m", "2", hashes=True)
    registry.verify("m", "1", hashes=True)


def _replace_by_link(path):
    outside = path.parents[3] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize("left_out", ["all", "model/config.json"])
def test_files_that_the_manifest_leaves_out_are_refused(root, left_out):
    path = root / "m" / "1" / "manifest.json"
    values = json.loads(path.read_text())
    values["files"] = {
        name: entry for name, entry in values["files"].items() if left_out not in ("all", name)
    }
    path.chmod(0o644)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config\.json is not in the manifest"):
        Registry(root).verify("m", "1", hashes=True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "../../outside"}, "no path inside"),
        ({"model": "/etc"}, "no path inside"),
        ({"adapter": "a\\b"}, "no path inside"),
        ({"files": {"model/../../x": {"bytes": 1, "sha256": "x"}}}, "no path inside"),
        ({"files": {"model/x": {"bytes": 1}}}, "sha256"),
        ({"files": {"model/x": {"bytes": "1", "sha256": "x"}}}, 'bytes is "1"'),
        ({"files": {"model/x": 5}}, "must be an object"),
        ({"files": []}, "must be an object"),
        ({"format": 2}, "format 1"),
        ({"format": True}, "format 1"),
        ({"created": "yesterday"}, "it must be a whole number"),
        ({"created": True}, "it must be a whole number"),
        ({"quantization": 5}, "it must be a text or null"),
        ({"source": None}, "it must be a text"),
        ({"speed": 1}, "no field 'speed'"),
        ({"version": "9"}, "moved or copied"),
    ],
)
def test_manifests_are_read_strictly(root, change, said):
    path = root / "m" / "1" / "manifest.json"
    path.chmod(0o644)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=said):
        Registry(root).manifest("m", "1")


def test_manifests_with_a_repeated_key_are_refused(root):
    path = root / "m" / "1" / "manifest.json"
    path.chmod(0o644)
    path.write_text(path.read_text().replace("{", '{"source": "x",', 1))
    with pytest.raises(ValueError, match="'source' appears twice"):
        Registry(root).manifest("m", "1")


def test_the_version_that_answers_goes_on_when_another_is_registered(root, tmp_path):
    registry, source = Registry(root), tmp_path / "source"
    register(root, "n", "b", source, source="x")
    assert not (root / "n" / "state.json").exists()
    for version in ("a", "c"):
        register(root, "n", version, source, source="x")
        assert registry.state("n") == State(active="b")
    state = State(active="c", previous=("b",))
    registry.set_state("n", state)
    register(root, "n", "d", source, source="x")
    assert registry.state("n") == state


def test_the_state_is_kept_and_the_only_version_is_active(root, tmp_path):
    registry = Registry(root)
    assert registry.state("m") == State(active=None)
    register(root, "n", "1", tmp_path / "source", source="x")
    assert registry.state("n") == State(active="1")
    state = State(active="2", previous=("1",), canary="1", share=0.25)
    registry.set_state("m", state)
    assert Registry(root).state("m") == state
    (root / "m" / "state.json").write_text('{"active": 1')
    with pytest.raises(ValueError, match=r"state\.json is damaged"):
        registry.state("m")
    with pytest.raises(UnknownNameError):
        registry.set_state("nothing", state)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('["1"]', r'the state is \["1"\]; it must be an object'),
        ("{}", "lacks active, previous, canary, share"),
        ('{"active": "1", "active": "2"}', "'active' appears twice"),
        ({"active": 5}, "active is 5; it must be a text or null"),
        ({"active": ["1"]}, "it must be a text or null"),
        ({"active": "9"}, "says that '9' is active, which is not there"),
        ({"previous": "12"}, 'previous is "12"; it must be a list'),
        ({"previous": [1]}, "previous has 1, which is no version"),
        ({"previous": ["../1"]}, "which is no version"),
        ({"canary": 1}, "canary is 1"),
        ({"share": "x"}, 'share is "x"; it must be a number'),
        ({"share": True}, "share is true; it must be a number"),
        ({"share": 1.5}, "share is 1.5; it must be from 0 to 1"),
        ({"share": float("nan")}, "it must be from 0 to 1"),
        ({"speed": 1}, "no field 'speed'"),
    ],
)
def test_states_are_read_strictly(root, text, said):
    if isinstance(text, dict):
        text = json.dumps({"active": "1", "previous": [], "canary": None, "share": 0.0, **text})
    (root / "m" / "state.json").write_text(text)
    with pytest.raises(ValueError, match=rf"state\.json .*{said}.*; activate"):
        Registry(root).state("m")
