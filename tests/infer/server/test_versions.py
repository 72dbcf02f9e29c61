"""Versions of a running server: loading, switching, rolling back, canaries, adapters."""

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from infer.registry import Registry, State, register
from infer.server.build import given_sources, make_build
from infer.server.loaded import Built, Source
from infer.server.settings import Secret, Settings
from infer.server.watcher import WATCH_SECONDS
from llama_jax.formats.hf import save_hf
from tests.infer.server.running import byte_tokenizer, running, until
from tests.infer.server.scripted_engine import ScriptedEngine
from tests.infer.server.test_operation import data_lines, open_stream
from tests.tiny import tiny_config, tiny_params

ADMIN = "key-of-the-admin"


@pytest.fixture
def models_dir(tmp_path):
    """Three versions, each of which says its number."""
    root = tmp_path / "models"
    for version in ("1", "2", "3"):
        source = tmp_path / f"source-{version}"
        source.mkdir()
        for name in ("config.json", "shard-1", "shard-2"):
            (source / name).write_text(version)
        register(root, "m", version, source, source="a test")
    Registry(root).set_state("m", State(active="1"))
    return root


class Fleet:
    """Scripted engines that say which version they are; `adjust` changes those made later."""

    def __init__(self):
        self.built = []
        self.options = {}
        self.damaged = set()

    def __call__(self, source):
        said = (source.model / "config.json").read_text()
        tokenizer = byte_tokenizer()
        ids = tokenizer.encode(f"v{said}" * 20, add_special_tokens=False)
        options = {"step_seconds": 0.002, **self.options.get(source.version, {})}
        engine = ScriptedEngine(tokenizer, lambda request, index: ids, **options)
        add_adapter = engine.add_adapter

        def add(name, folder):
            if name in self.damaged:
                raise ValueError(f"{folder} is damaged")
            add_adapter(name, folder)

        engine.add_adapter = add
        self.built.append((source.version, engine))
        return Built(engine, tokenizer, "int8")


@pytest.fixture
def fleet():
    return Fleet()


def serving(models_dir, fleet, **settings):
    return running(
        fleet,
        sources=[],
        models=(),
        models_dir=str(models_dir),
        admin_key=Secret(ADMIN),
        **settings,
    )


def admin(server, what, **body):
    return server.call(f"/admin/{what}", {"model": "m", **body}, key=ADMIN)


def said(server, model="m"):
    status, body, headers = server.call("/v1/completions", {"model": model, "prompt": "x"})
    assert status == 200, body
    assert body["system_fingerprint"] == headers["x-llama-jax-version"]
    version = body["system_fingerprint"].split("@")[1]
    assert body["choices"][0]["text"] == f"v{version}" * 20
    return version


def test_the_first_request_loads_the_active_version_once(models_dir, fleet):
    fleet.options["1"] = {"start_seconds": 0.3}
    with serving(models_dir, fleet) as server:
        assert server.call("/v1/models")[1]["data"][0]["loaded"] is False
        versions = []
        threads = [threading.Thread(target=lambda: versions.append(said(server))) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert versions == ["1"] * 5
        assert [version for version, _ in fleet.built] == ["1"]
        entry = server.call("/v1/models")[1]["data"][0]
        assert (entry["loaded"], entry["version"]) == (True, "1")
        (row,) = server.call("/admin/models", key=ADMIN)[1]["models"]
        assert row["versions"][0]["quantization"] == "int8"
        assert "quantization" not in row["versions"][1]
        assert said(server, "m@3") == "3"


def test_a_switch_waits_for_a_probe_and_never_mixes(models_dir, fleet):  # R109
    fleet.options["2"] = {"start_seconds": 0.5}
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        connection, response = open_stream(server, max_tokens=100)
        lines = data_lines(response)
        chunks = [json.loads(next(lines))]
        answers, done = [], threading.Event()

        def ask():
            while not done.is_set():
                answers.append(said(server))

        asking = threading.Thread(target=ask)
        asking.start()
        begin = time.monotonic()
        status, body, _ = admin(server, "models/activate", version="2")
        assert (status, body["active"], body["previous"]) == (200, "2", ["1"])
        assert time.monotonic() - begin >= 0.5
        assert [r.tenant for r in fleet.built[-1][1].seen][:1] == ["probe"]
        assert said(server) == "2"
        done.set()
        asking.join()
        # No gap: the old one answered until the new one did, and then only the new one.
        assert answers[0] == "1" and answers == sorted(answers)
        chunks += [json.loads(line) for line in lines if line != "[DONE]"]
        assert {chunk["system_fingerprint"] for chunk in chunks} == {"m@1"}
        assert "".join(c["choices"][0]["text"] for c in chunks) == "v1" * 20
        connection.close()
        assert server.metric("llama_jax_requests_total", version="2") >= 1


@pytest.mark.parametrize("reason", ["shard-2 is missing", "the engine is sick"])
def test_a_switch_that_fails_says_why_and_changes_nothing(models_dir, fleet, reason):  # R109
    if "shard" in reason:
        _remove(models_dir)
    else:
        fleet.options["2"] = {"start_error": ValueError(reason)}
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        status, body, _ = admin(server, "models/activate", version="2")
        assert status == 503 and reason in body["error"]["message"]
        assert said(server) == "1"
        assert Registry(models_dir).state("m").active == "1"
        # A client who asks for it hears less: files are not its business.
        status, body, _ = server.call("/v1/completions", {"model": "m@2", "prompt": "x"})
        assert status == 503 and reason not in body["error"]["message"]


@pytest.mark.parametrize("load_on_demand", [True, False])
@pytest.mark.parametrize("reason", ["shard-2 is missing", "the engine is sick"])
def test_a_switch_without_room_keeps_the_old_version(
    models_dir, fleet, reason, load_on_demand
):  # R109
    if "shard" in reason:
        _remove(models_dir)
    else:
        fleet.options["2"] = {"start_error": ValueError(reason)}
    with serving(models_dir, fleet, max_loaded=1, load_on_demand=load_on_demand) as server:
        assert admin(server, "models/load", version="1")[0] == 200
        status, body, _ = admin(server, "models/activate", version="2")
        assert status == 503 and reason in body["error"]["message"]
        assert said(server) == "1"
        assert admin(server, "models/activate", version="3")[0] == 200
        assert said(server) == "3"
        # Beside the old one for a moment only.
        until(lambda: fleet.built[0][1].state == "stopped")
        assert admin(server, "models/rollback")[1]["active"] == "1"
        assert said(server) == "1"
        assert [version for version, _ in fleet.built if version != "2"] == ["1", "3", "1"]


def test_a_version_that_answers_makes_no_room_for_a_canary(models_dir, fleet):
    with serving(models_dir, fleet, max_loaded=1) as server:
        assert said(server) == "1"
        status, body, headers = admin(server, "models/activate", version="2", share=0.5)
        assert (status, body["error"]["code"]) == (503, "no_room")
        assert "max_loaded is 1; unload one, or raise it" in body["error"]["message"]
        assert headers["retry-after"] == "10"
        assert {said(server) for _ in range(10)} == {"1"}
        assert [version for version, _ in fleet.built] == ["1"]


def test_a_version_that_nobody_would_load_again_makes_no_room(models_dir, fleet):
    with serving(models_dir, fleet, max_loaded=1, load_on_demand=False) as server:
        assert admin(server, "models/load", version="1")[0] == 200
        status, body, _ = admin(server, "models/load", version="2")
        assert (status, body["error"]["code"]) == (503, "no_room")
        assert said(server) == "1"


def test_loads_at_once_are_no_more_than_may_be(models_dir, fleet):
    fleet.options = {version: {"start_seconds": 0.3} for version in "123"}
    with serving(models_dir, fleet, max_loaded=2) as server:

        def ask(version):
            body = {"model": f"m@{version}", "prompt": "x"}
            return server.call("/v1/completions", body)[:2]

        with ThreadPoolExecutor(3) as pool:
            answers = list(pool.map(ask, "123"))
        assert sorted(status for status, _ in answers) == [200, 200, 503]
        assert {body["error"]["code"] for status, body in answers if status == 503} == {"no_room"}
        assert len(fleet.built) == 2


def _remove(root):
    path = root / "m" / "2" / "model" / "shard-2"
    path.parent.chmod(0o755)
    path.unlink()


def test_rolling_back_gives_the_same_answers_and_survives_a_restart(models_dir, fleet):  # R109
    with serving(models_dir, fleet) as server:
        for version in ("2", "3"):
            assert admin(server, "models/activate", version=version)[0] == 200
        assert said(server) == "3"
        status, body, _ = admin(server, "models/rollback")
        assert (status, body["active"], body["previous"]) == (200, "2", ["1"])
        assert said(server) == "2"
    with serving(models_dir, fleet) as server:
        assert said(server) == "2"
        assert admin(server, "models/rollback")[1]["active"] == "1"
        assert said(server) == "1"
        status, body, _ = admin(server, "models/rollback")
        assert status == 409 and "was active before" in body["error"]["message"]


def test_a_canary_gets_its_share_and_the_same_id_the_same_version(models_dir, fleet):
    with serving(models_dir, fleet) as server:
        assert admin(server, "models/activate", version="2", share=0.25)[0] == 200
        versions = [
            server.call(
                "/v1/completions",
                {"model": "m", "prompt": "x", "max_tokens": 1},
                headers={"x-request-id": f"request-{number}"},
            )[1]["system_fingerprint"]
            for _ in range(2)
            for number in range(60)
        ]
        assert versions[:60] == versions[60:]
        assert 5 <= versions[:60].count("m@2") <= 26
        assert admin(server, "models/rollback")[1]["canary"] is None
        assert {said(server) for _ in range(10)} == {"1"}
        assert admin(server, "models/activate", version="1", share=0.5)[0] == 409


def test_versions_that_are_not_used_make_room(models_dir, fleet):
    with serving(models_dir, fleet, max_loaded=2) as server:
        for version in ("1", "2", "3"):
            assert said(server, f"m@{version}") == version
        states = {
            row["version"]: row["state"]
            for row in server.call("/admin/models", key=ADMIN)[1]["models"][0]["versions"]
        }
        assert states == {"1": "unloaded", "2": "ready", "3": "ready"}
        assert fleet.built[0][1].state == "stopped"


def test_idle_versions_are_unloaded_by_policy(models_dir, fleet):
    with serving(models_dir, fleet, idle_unload_seconds=0.2) as server:
        assert said(server) == "1"
        until(lambda: fleet.built[0][1].state == "stopped")
        assert said(server) == "1"
        assert len(fleet.built) == 2


def test_unloading_waits_for_running_requests(models_dir, fleet):
    fleet.options["1"] = {"step_seconds": 0.01}
    with serving(models_dir, fleet, drain_seconds=10.0) as server:
        connection, response = open_stream(server, max_tokens=100)
        lines = data_lines(response)
        next(lines)
        assert admin(server, "models/unload", version="1")[0] == 200
        assert list(lines)[-1] == "[DONE]"
        connection.close()
        assert admin(server, "models/unload", version="1")[0] == 409


def test_loading_on_demand_can_be_off(models_dir, fleet):
    with serving(models_dir, fleet, load_on_demand=False) as server:
        status, body, _ = server.call("/v1/completions", {"model": "m", "prompt": "x"})
        assert (status, body["error"]["code"]) == (503, "model_not_loaded")
        assert admin(server, "models/load", version="1")[0] == 200
        assert said(server) == "1"


@pytest.mark.parametrize(
    "name", ["../../outside", "/etc", "a/../../b", "a\\b", "", "m/1", "adapters", "state.json"]
)
def test_admins_name_things_too_and_never_paths(models_dir, fleet, name):  # R116
    with serving(models_dir, fleet) as server:
        for what in ("models/load", "models/activate", "models/unload"):
            body = {"model": name, "version": "1"}
            assert server.call(f"/admin/{what}", body, key=ADMIN)[0] == 404
            assert admin(server, what, version=name)[0] == 404
        for what in ("models/rollback",):
            assert server.call(f"/admin/{what}", {"model": name}, key=ADMIN)[0] == 404
        for what in ("adapters/load", "adapters/unload"):
            assert admin(server, what, adapter="a", version=name)[0] in (404, 409)
            assert (
                server.call(f"/admin/{what}", {"model": name, "adapter": "a"}, key=ADMIN)[0] == 404
            )
        assert fleet.built == []
    assert not list(models_dir.parent.glob("outside*"))


def test_a_damaged_model_harms_no_other(models_dir, fleet, tmp_path):
    register(models_dir, "n", "1", tmp_path / "source-1", source="x")
    (models_dir / "m" / "state.json").write_text("{")
    with serving(models_dir, fleet) as server:
        versions = {e["id"]: e["version"] for e in server.call("/v1/models")[1]["data"]}
        assert versions == {"m": None, "n": "1"}
        assert len(server.call("/admin/models", key=ADMIN)[1]["models"]) == 2
        status, body, headers = server.call("/v1/completions", {"model": "m", "prompt": "x"})
        assert (status, body["error"]["code"]) == (503, "registry_damaged")
        assert headers["retry-after"] == "10"
        assert "state.json" not in body["error"]["message"]
        assert server.call("/v1/completions", {"model": "n", "prompt": "x"})[0] == 200


@pytest.mark.parametrize(
    ("state", "reason"),
    [
        ({"share": "x"}, 'share is \\"x\\"; it must be a number'),
        ({"active": ["1"]}, "active is"),
        ({"active": 5}, "active is 5; it must be a text or null"),
        ({"active": "9"}, "'9' is active, which is not there"),
        ({"previous": "12"}, "previous is"),
    ],
)
def test_a_damaged_state_is_named_to_admins_and_mended(models_dir, fleet, state, reason):
    path = models_dir / "m" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **state}))
    with serving(models_dir, fleet) as server:
        status, body, _ = server.call("/v1/completions", {"model": "m", "prompt": "x"})
        assert (status, body["error"]["code"]) == (503, "registry_damaged")
        assert str(path) not in body["error"]["message"]
        assert said(server, "m@3") == "3"
        status, body, _ = admin(server, "models/rollback")
        assert (status, body["error"]["code"]) == (503, "registry_damaged")
        message = json.dumps(body["error"]["message"])
        assert str(path) in message and reason in message
        assert admin(server, "models/activate", version="2")[0] == 200
        assert said(server) == "2"
    assert Registry(models_dir).state("m") == State(active="2")


def test_a_state_that_cannot_be_written_changes_nothing(models_dir, fleet):
    path = models_dir / "m" / "state.json"
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        path.unlink()
        path.mkdir()
        status, body, _ = admin(server, "models/activate", version="2")
        assert (status, body["error"]["code"]) == (503, "state_not_written")
        assert str(path) in body["error"]["message"]
        assert said(server) == "1"


def test_a_canary_that_is_not_there_is_ignored(models_dir, fleet):
    Registry(models_dir).set_state("m", State(active="1", canary="9", share=0.9999))
    with serving(models_dir, fleet) as server:
        assert {said(server) for _ in range(5)} == {"1"}
        (row,) = server.call("/admin/models", key=ADMIN)[1]["models"]
        assert (row["active"], row["canary"], row["share"]) == ("1", None, 0.0)


def test_adapters_are_loaded_beside_the_active_version(models_dir, fleet):
    (models_dir / "m" / "adapters" / "poet").mkdir(parents=True)
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        assert admin(server, "models/activate", version="2", share=0.5)[0] == 200
        for what in ("load", "unload"):
            assert admin(server, f"adapters/{what}", adapter="poet", version="")[0] == 404
            status, body, _ = admin(server, f"adapters/{what}", adapter="poet")
            assert (status, body["version"]) == (200, "1")


def test_a_version_that_made_room_comes_back_with_its_adapters(models_dir, fleet):
    for name in ("poet", "gone"):
        (models_dir / "m" / "adapters" / name).mkdir(parents=True)
    with serving(models_dir, fleet, max_loaded=1) as server:
        assert said(server) == "1"
        for name in ("poet", "gone"):
            assert admin(server, "adapters/load", adapter=name)[0] == 200
        (models_dir / "m" / "adapters" / "gone").rmdir()
        assert said(server, model="m@2") == "2"
        assert fleet.built[0][1].state == "stopped"
        assert said(server, model="m:poet") == "1"
        assert list(fleet.built[2][1].adapters) == ["poet"]
    with serving(models_dir, fleet) as server:
        assert admin(server, "models/load", version="2")[0] == 200
        assert admin(server, "adapters/load", adapter="poet", version="2")[0] == 200
        for what in ("unload", "load"):  # as somebody said
            assert admin(server, f"models/{what}", version="2")[0] == 200
        assert not fleet.built[-1][1].adapters


def test_an_adapter_that_was_damaged_since_keeps_no_version_away(models_dir, fleet, caplog):
    for name in ("poet", "critic"):
        (models_dir / "m" / "adapters" / name).mkdir(parents=True)
    with serving(models_dir, fleet, max_loaded=1) as server:
        assert said(server) == "1"
        for name in ("poet", "critic"):
            assert admin(server, "adapters/load", adapter=name)[0] == 200
        assert said(server, "m@2") == "2"  # for which version 1 is put away
        fleet.damaged = {"poet"}
        assert said(server) == "1"
        assert set(fleet.built[-1][1].adapters) == {"critic"}
        assert server.call("/v1/completions", {"model": "m:critic", "prompt": "x"})[0] == 200
        assert server.call("/v1/completions", {"model": "m:poet", "prompt": "x"})[0] == 404
        fleet.damaged = {"critic"}
        engine = fleet.built[-1][1]
        engine.adapters.clear()  # as an engine that begins afresh does
        engine.break_down()
        until(lambda: server.metric("llama_jax_engine_restarts_total") == 1)
        until(lambda: server.call("/v1/completions", {"model": "m", "prompt": "x"})[0] == 200)
        assert server.call("/v1/completions", {"model": "m:critic", "prompt": "x"})[0] == 404
    told = [each.model for each in caplog.records if each.message == "adapter not loaded again"]
    assert told == ["m:poet", "m:critic"]


def test_adapters_come_and_go_while_the_model_serves(models_dir, fleet):
    for name in ("poet", "bad"):
        (models_dir / "m" / "adapters" / name).mkdir(parents=True)
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        assert server.call("/v1/completions", {"model": "m:poet", "prompt": "x"})[0] == 404
        status, body, _ = admin(server, "adapters/load", adapter="poet")
        assert (status, body) == (200, {"model": "m:poet", "version": "1"})
        engine = fleet.built[0][1]
        assert engine.adapters == {"poet": str(models_dir / "m" / "adapters" / "poet")}
        assert server.call("/v1/completions", {"model": "m:poet", "prompt": "x"})[0] == 200
        assert engine.seen[-1].adapter == "poet"
        ids = [entry["id"] for entry in server.call("/v1/models")[1]["data"]]
        assert ids == ["m", "m:poet"]
        assert admin(server, "adapters/load", adapter="poet")[0] == 409
        status, body, _ = admin(server, "adapters/load", adapter="bad")
        assert status == 409 and "is no adapter" in body["error"]["message"]
        for name in ("..", "../poet", "nothing", ""):
            assert admin(server, "adapters/load", adapter=name)[0] == 404
        assert admin(server, "adapters/unload", adapter="poet")[0] == 200
        assert engine.adapters == {}
        assert server.call("/v1/completions", {"model": "m:poet", "prompt": "x"})[0] == 404


def test_models_given_at_the_start_stay():
    with running(admin_key=Secret(ADMIN)) as server:
        for what, body in (
            ("models/unload", {"version": "1"}),
            ("models/rollback", {}),
            ("models/activate", {"version": "1"}),
        ):
            assert admin(server, what, **body)[0] == 409
        assert server.complete()[0] == 200


@pytest.mark.parametrize(("kind", "code"), [(ValueError, 2), (RuntimeError, 1)])
def test_a_start_that_cannot_load_ends_with_an_error(kind, code):
    def build(source):
        raise kind("no such thing")

    with (
        pytest.raises(AssertionError, match=rf"\[{code}\]"),
        running(build, sources=[Source("m", "1", "m")], wait_ready=False) as server,
    ):
        until(lambda: not _answers(server))


def test_a_certain_version_is_looked_up_as_requests_name_it(models_dir, fleet):
    (models_dir / "m" / "adapters" / "poet").mkdir(parents=True)
    with serving(models_dir, fleet) as server:

        def looked_up(model):
            status, body, _ = server.call(f"/v1/models/{model}")
            return status, body.get("id"), body.get("version"), body.get("loaded")

        assert said(server, "m@2") == "2"
        assert looked_up("m") == (200, "m", "1", False)
        assert looked_up("m@1") == (200, "m@1", "1", False)
        assert looked_up("m@2") == (200, "m@2", "2", True)
        assert looked_up("m@2:poet")[0] == 404
        assert admin(server, "adapters/load", adapter="poet", version="2")[0] == 200
        assert looked_up("m@2:poet") == (200, "m@2:poet", "2", True)
        for unknown in ("m:poet", "m@1:poet", "m@9", "m@", "m@2:", "n@1", "@1"):
            assert looked_up(unknown)[0] == 404


def test_a_switch_to_a_version_that_broke_keeps_the_old_one(models_dir, fleet):  # R109
    (models_dir / "m" / "adapters" / "poet").mkdir(parents=True)
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        assert admin(server, "models/load", version="2")[1]["state"] == "ready"
        broken = _break(server, fleet)
        for share in (None, 0.5):
            status, body, headers = admin(server, "models/activate", version="2", share=share)
            assert (status, body["error"]["code"]) == (503, "model_not_ready")
            assert body["error"]["message"] == "m version 2 is restarting; ask again"
            assert int(headers["retry-after"]) >= 1
        assert admin(server, "models/load", version="2")[1]["state"] == "restarting"
        for what in ("load", "unload"):
            status, body, _ = admin(server, f"adapters/{what}", adapter="poet", version="2")
            assert (status, body["error"]["code"]) == (503, "model_not_ready")
        assert said(server) == "1"
        assert Registry(models_dir).state("m").active == "1"
        broken.start_error = None
        until(lambda: admin(server, "models/activate", version="2")[0] == 200)
        assert said(server) == "2"


def test_a_version_that_is_to_answer_is_not_unloaded_as_idle(
    models_dir, fleet, monkeypatch
):  # R109
    set_state, states = Registry.set_state, []

    def set_late(registry, name, state):
        time.sleep(3 * WATCH_SECONDS)
        states.append(fleet.built[-1][1].state)
        set_state(registry, name, state)

    monkeypatch.setattr(Registry, "set_state", set_late)
    with serving(models_dir, fleet, idle_unload_seconds=0.0) as server:
        assert admin(server, "models/activate", version="2")[0] == 200
    assert states == ["ready"]


def _break(server, fleet):
    """The engine built last, which does not start again until its start_error goes."""
    engine = fleet.built[-1][1]
    engine.start_error = RuntimeError("still sick")
    engine.break_down()
    until(lambda: server.metric("llama_jax_engine_restarts_total") == 1)
    return engine


def test_a_version_that_does_not_start_again_is_unloaded_and_loaded_anew(models_dir, fleet):
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        broken = _break(server, fleet)
        assert server.call("/v1/completions", {"model": "m", "prompt": "x"})[0] == 503
        assert admin(server, "models/unload", version="1")[0] == 200
        assert said(server) == "1"
        assert len(fleet.built) == 2 and broken.state == "stopped"


def test_a_version_that_is_unloaded_while_it_starts_again_is_stopped(models_dir, fleet):
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        engine = fleet.built[0][1]
        starting, may_start, started = (threading.Event() for _ in range(3))
        start = engine.start

        def start_late():
            starting.set()
            may_start.wait(20)
            start()
            started.set()

        engine.start = start_late
        engine.break_down()
        assert starting.wait(20)
        assert admin(server, "models/unload", version="1")[0] == 200
        may_start.set()
        assert started.wait(20)
        until(lambda: engine.state == "stopped")
        assert said(server) == "1"


def test_admins_are_refused_while_the_server_shuts_down(models_dir, fleet):  # R102
    with serving(models_dir, fleet) as server:
        assert said(server) == "1"
        engine = fleet.built[0][1]
        may_stop, stop = threading.Event(), engine.stop

        def stop_late(drain_seconds):
            may_stop.wait(20)
            stop(drain_seconds)

        engine.stop = stop_late
        server.stop()
        try:
            until(lambda: server.call("/readyz")[1] == {"status": "draining"})
            for what in ("models/load", "models/activate"):
                for version in ("1", "2"):
                    status, body, headers = admin(server, what, version=version)
                    assert (status, body["error"]["code"]) == (503, "shutting_down")
                    assert int(headers["retry-after"]) >= 1
        finally:
            may_stop.set()
    assert Registry(models_dir).state("m").active == "1"
    assert len(fleet.built) == 1


def test_no_request_waits_longer_than_its_time_for_a_version(models_dir, fleet):
    may_load = threading.Event()

    def build(source):
        may_load.wait(60)
        return fleet(source)

    with serving(models_dir, build, request_timeout_seconds=0.2) as server:
        try:
            for path, fields in (
                ("/tokenize", {"prompt": "x"}),
                ("/detokenize", {"tokens": [65]}),
                ("/v1/embeddings", {"input": "x"}),
                ("/v1/completions", {"prompt": "x"}),
            ):
                status, body, _ = server.call(path, {"model": "m", **fields})
                assert (status, body["error"]["code"]) == (504, "timeout")
                assert body["error"]["message"] == "not done within 0.2 seconds"
        finally:
            may_load.set()


REACHING = '{% if tools %}{{ lipsum.__globals__["os"].system("touch MARKER") }}{% endif %}'


@pytest.mark.parametrize("template", [REACHING, '{{ ""|attr("__cla" ~ "ss__") }}'])
def test_a_model_whose_own_template_reaches_out_is_not_loaded(tmp_path, template):  # R113
    folder, root = tmp_path / "tiny", tmp_path / "models"
    config = tiny_config(vocab_size=264, bos_token_id=None, eos_token_id=(258,))
    save_hf(folder, config, tiny_params(config), tokenizer=byte_tokenizer())
    (folder / "chat_template.jinja").write_text(template)
    settings = Settings(models=(str(folder),))
    (source,) = given_sources(settings)
    with pytest.raises(ValueError, match=r"'default' is refused: chat template reaches for '__"):
        make_build(settings)(source)
    # As one that was registered before such templates were refused there.
    register(root, "m", "1", folder, source="a test")
    build = make_build(Settings(models_dir=str(root)))
    options = {"models_dir": str(root), "admin_key": Secret(ADMIN)}
    with running(build, sources=[], models=(), **options) as server:
        status, body, _ = admin(server, "models/load", version="1")
        assert (status, body["error"]["code"]) == (503, "load_failed")
        assert "'default' is refused" in body["error"]["message"]


def test_models_of_a_registry_that_were_made_for_less_keep_their_own_context(tmp_path):
    folder = tmp_path / "tiny"
    config = tiny_config(vocab_size=264, max_position_embeddings=64)
    save_hf(folder, config, tiny_params(config))
    source = Source("m", "1", folder)
    for max_context, used in ((200, 64), (48, 48)):
        settings = Settings(models_dir=str(tmp_path), max_context=max_context, block_size=16)
        assert make_build(settings)(source).engine.max_context == used
    with pytest.raises(ValueError, match="max_context is 200, but the model was made for 64"):
        make_build(Settings(models=(str(folder),), max_context=200))(source)


def _answers(server):
    import urllib.error

    try:
        return server.call("/healthz")[0] == 200
    except (urllib.error.URLError, ConnectionError):
        return False
