"""The shipped configs: each loads, is named after what it is, and is on the page of proofs."""

from pathlib import Path

import pytest
import yaml

from infer.engine.options import parse_mesh
from infer.server.build import engine_options
from infer.server.settings_reader import read_settings
from llama_jax.commands.run_config import find_merge_recipe
from llama_jax.mesh.slices import slice_named
from llama_jax.weights.merge_recipe import read_recipe
from train.config import load_run_config

ROOT = Path(__file__).parent.parent
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
SERVED = sorted((ROOT / "configs" / "serve").glob("*.yaml"))
RECIPES = sorted((ROOT / "configs" / "merge").glob("*.yaml"))
PAGE = (ROOT / "docs" / "proven-configs.md").read_text()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_name_says_method_and_slice_and_the_header_the_command(path):
    run = load_run_config(path)
    assert path.stem.endswith(f"-{run.method}-{run.mesh.slice or 'cpu'}")
    head = path.read_text().split("\nmodel:")[0]
    assert f"llama-jax train {path.name}" in head
    if run.mesh.slice is not None:
        assert f"llama-jax fit {path.name}" in head


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_page_of_proofs_tells_of_this_very_config(path):
    run = load_run_config(path)
    lines = [line for line in PAGE.splitlines() if f"`{path.name}`" in line]
    if run.mesh.slice is None:
        assert not lines
        return
    (line,) = lines
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:4] == [
        run.method,
        run.mesh.slice,
        f"{run.train.batch_size} x {run.train.sequence_length}",
    ]
    together, limit = float(cells[6]), float(cells[7])
    assert together <= limit == round(slice_named(run.mesh.slice).hbm_bytes_per_chip / 2**30, 2)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_is_complete_and_its_header_has_the_command(path):
    text = path.read_text()
    recipe = read_recipe(yaml.safe_load(text), path.name)
    assert path.stem.endswith(recipe.method.replace("_", "-"))
    assert f"llama-jax merge {path.name} OUT" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral-7b-lora-v5e-8", "llama3.1-405b-full-v5p-512"])
def test_a_representative_few_are_compiled_again(name):
    pytest.importorskip("libtpu", reason="the TPU compiler is on Linux x86-64 only")
    from train.fit import fit

    run = load_run_config(ROOT / "configs" / f"{name}.yaml")
    assert run.mesh.slice is not None
    result = fit(run, slice_named(run.mesh.slice))
    assert result.compiled.fits
    assert result.flops == pytest.approx(result.closed_form_flops, rel=0.01)
    (line,) = [line for line in PAGE.splitlines() if f"`{name}.yaml`" in line]
    stated = float(line.split("|")[7]) * 2**30
    # The page is written anew when the model changes; small drift of the compiler is none.
    assert result.chip_bytes == pytest.approx(stated, rel=0.05)


def served_settings(path):
    return read_settings({}, config=path, environment={})


@pytest.mark.parametrize("path", SERVED, ids=lambda path: path.stem)
def test_a_serve_config_says_what_it_is_for_and_is_proven(path):
    settings = served_settings(path)
    assert settings.slice is not None and settings.cache_tokens is not None
    wanted = slice_named(settings.slice)
    quantized = [settings.quantization] if settings.quantization else []
    cache = ["cache", settings.cache_dtype] if settings.cache_dtype else []
    adapters = ["adapters"] if settings.max_adapters else []
    name = [settings.architecture, "serve", *quantized, *cache, *adapters, settings.slice]
    assert path.stem == "-".join(name)
    head = path.read_text().split("\nmodels:")[0]
    assert f"llama-jax fit --serve {path.name}" in head
    assert f"llama-jax serve --config {path.name}" in head
    assert ("on each of them" in head) == (wanted.hosts > 1)
    options = engine_options(settings)
    assert options.cache == "pages"
    sizes = parse_mesh(settings.mesh or "tensor=1")
    assert wanted.num_devices == sizes["tensor"] * sizes.get("fsdp", 1)
    (line,) = [line for line in PAGE.splitlines() if f"`{path.name}`" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    row = min(settings.max_context, settings.cache_tokens // settings.max_slots)
    weights = settings.quantization or settings.dtype
    if settings.max_adapters:
        weights += f", {settings.max_adapters} adapters of rank {settings.max_lora_rank}"
    assert cells[1:6] == [
        weights,
        settings.cache_dtype or settings.dtype,
        settings.slice,
        f"{settings.max_slots} x {row}",
        str(settings.cache_tokens),
    ]
    together, limit, largest = float(cells[6]), float(cells[7]), int(cells[8])
    assert together <= limit == round(wanted.hbm_bytes_per_chip / 2**30, 2)
    assert settings.cache_tokens <= largest


@pytest.mark.slow
def test_a_representative_server_is_compiled_again():
    pytest.importorskip("libtpu", reason="the TPU compiler is on Linux x86-64 only")
    from infer.fit.trial import fit

    (path,) = [path for path in SERVED if path.stem == "llama3.1-8b-serve-int8-v5e-4"]
    settings = served_settings(path)
    report = fit(settings, slice_named(settings.slice), lambda _: None).to_dict()
    assert report["fits"]
    (line,) = [line for line in PAGE.splitlines() if f"`{path.name}`" in line]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert report["hbm_bytes_per_chip"] == pytest.approx(float(cells[6]) * 2**30, rel=0.05)
    assert report["largest_cache_tokens"] == pytest.approx(int(cells[8]), rel=0.05)


def test_shipped_recipes_are_found_by_name():
    name = "llama3.1-8b-chat-vector.yaml"
    assert find_merge_recipe(name) == ROOT / "configs/merge" / name
    with pytest.raises(ValueError, match=f"the recipe nope.yaml does not exist; .*{name}"):
        find_merge_recipe("nope.yaml")
