"""Slices as users name them; what the compiler knows of them is in test_slices.py."""

import pytest

from llama_jax.mesh.slices import GENERATIONS, peak_flops, slice_devices, slice_named


@pytest.mark.parametrize(
    ("text", "name", "chips", "topology", "hosts", "devices", "cloud"),
    [
        ("v5e-16", "v5e-16", 16, (4, 4), 4, 16, "v5litepod-16"),
        ("v5litepod-16", "v5e-16", 16, (4, 4), 4, 16, "v5litepod-16"),
        ("v5e-8", "v5e-8", 8, (2, 4), 1, 8, "v5litepod-8"),
        ("v5e-1", "v5e-1", 1, (1, 1), 1, 1, "v5litepod-1"),
        ("v5p-128", "v5p-128", 128, (4, 4, 8), 32, 128, "v5p-256"),
        ("cloud:v5p-128", "v5p-64", 64, (4, 4, 4), 16, 64, "v5p-128"),
        ("v4-8", "v4-8", 8, (2, 2, 2), 2, 8, "v4-16"),
        ("cloud:v4-8", "v4-4", 4, (2, 2, 1), 1, 4, "v4-8"),
        ("v6e-256", "v6e-256", 256, (16, 16), 64, 256, "v6e-256"),
        ("tpu7x-64", "tpu7x-64", 64, (4, 4, 4), 16, 128, "tpu7x-64"),
        ("2xv5e-16", "2xv5e-16", 16, (4, 4), 4, 32, "v5litepod-16"),
    ],
)
def test_names_give_chips_topology_and_clouds_type(
    text, name, chips, topology, hosts, devices, cloud
):
    found = slice_named(text)
    assert (found.name, found.chips, found.topology) == (name, chips, topology)
    assert (found.hosts, found.num_devices) == (hosts, devices)
    assert found.cloud_accelerator_type == cloud
    assert str(chips) in found.describe() and cloud in found.describe()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9-4", "no generation v9"),
        ("v5q-4", "did you mean v5"),
        ("v5e", "write generation-chips"),
        ("v5e-5", "no v5e slice of 5 chips here; sizes are 1, 4, 8"),
        ("cloud:v5p-12", "no v5p slice of 12 cores here; sizes are 8, 16"),
        ("cloud:v5p-7", "no v5p slice of 7 cores"),
        ("0xv5e-4", "has no slices"),
        ("", "write generation-chips"),
    ],
)
def test_unknown_slices_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        slice_devices(name)


def test_a_v4_chip_shows_one_device_and_a_tpu7x_chip_two():
    assert slice_named("v4-8").num_devices == 8
    assert slice_named("tpu7x-8").num_devices == 16
    assert slice_named("2xv5e-4").num_devices == 8


def test_every_size_has_its_chips():
    for generation in GENERATIONS.values():
        for chips in generation.grids:
            found = slice_named(f"{generation.name}-{chips}")
            product = 1
            for side in found.topology:
                product *= side
            assert product == chips == found.hosts * found.chips_per_host


def test_peaks_are_of_a_device():
    assert peak_flops("TPU v5 lite") == peak_flops("TPU v5e") == 197e12
    assert peak_flops("TPU v4") == 275e12  # its cores are one device when it runs
    assert peak_flops("TPU7x") == 2307e12 / 2
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("cpu") is None
