"""Collectives and traffic read off compiled programs whose numbers are known."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from llama_jax.mesh.hlo import Program, _first_group
from llama_jax.mesh.sharding import make_mesh


def compiled(function, *shapes, mesh, specs, out):
    places = [NamedSharding(mesh, spec) for spec in specs]
    structs = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
        for shape, place in zip(shapes, places, strict=True)
    ]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, out))
    return Program.parse(jitted.lower(*structs).compile().as_text())


def test_an_all_reduce_in_a_loop_counts_once_an_iteration():
    mesh = make_mesh({"fsdp": 8})

    def scanned(x, weights):
        def body(x, w):
            # Contracted over the sharded dimension: each device has a part of the sum.
            y = jax.lax.with_sharding_constraint(x @ w, NamedSharding(mesh, PartitionSpec()))
            return jax.lax.with_sharding_constraint(
                jnp.tanh(y), NamedSharding(mesh, PartitionSpec(None, "fsdp"))
            ), None

        return jax.lax.scan(body, x, weights)[0].sum()

    program = compiled(
        scanned,
        (16, 64),
        (5, 64, 64),
        mesh=mesh,
        specs=[PartitionSpec(None, "fsdp"), PartitionSpec(None, "fsdp", None)],
        out=PartitionSpec(),
    )
    sent = program.collectives()["all-reduce"]
    # Five of [16, 64] floats, and the one number at the end.
    assert sent.count == 6
    assert sent.bytes == pytest.approx((5 * 16 * 64 * 4 + 4) * 2 * 7 / 8)
    assert sent.dcn_bytes == 0
    assert not program.uncounted_loops


def test_groups_that_span_slices_are_told_apart():
    mesh = make_mesh({"data": 2, "fsdp": 4})

    def summed(x):
        along_fsdp = jax.shard_map(
            lambda x: jax.lax.psum(x, "fsdp"),
            mesh=mesh,
            in_specs=PartitionSpec(("data", "fsdp")),
            out_specs=PartitionSpec("data"),
        )(x)
        return jax.shard_map(
            lambda x: jax.lax.psum(x, "data"),
            mesh=mesh,
            in_specs=PartitionSpec("data"),
            out_specs=PartitionSpec(),
        )(along_fsdp)

    spec = PartitionSpec(("data", "fsdp"))
    program = compiled(summed, (8, 32), mesh=mesh, specs=[spec], out=PartitionSpec())
    sent = program.collectives(devices_per_slice=4)["all-reduce"]
    assert sent.count == 2
    inside, between = 32 * 4 * 2 * 3 / 4, 32 * 4 * 2 * 1 / 2
    assert sent.bytes == pytest.approx(inside + between)
    assert sent.dcn_bytes == pytest.approx(between)


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ("replica_groups={{0,2},{1,3}}", [0, 2]),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3]),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4]),
        ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4]),
        ("source_target_pairs={{3,4},{4,5}}", [3, 4]),
    ],
)
def test_every_way_to_write_groups(groups, expected):
    from llama_jax.mesh.hlo import _first_group

    assert _first_group(f"%x), channel_id=1, {groups}, dimensions=0") == expected


TEXT = """HloModule m
%fused (p0: f32[4,8,8], p1: s32[]) -> f32[8,8] {
  %p0 = f32[4,8,8]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %slice = f32[1,8,8]{2,1,0} dynamic-slice(%p0, %p1, %zero, %zero), dynamic_slice_sizes={1,8,8}
  ROOT %cast = f32[8,8]{1,0} bitcast(%slice)
}

%cond (c: (s32[], f32[4,8,8])) -> pred[] {
  %c = (s32[], f32[4,8,8]) parameter(0)
  %bound = s32[] constant(4)
  %at = s32[] get-tuple-element(%c), index=0
  ROOT %lt = pred[] compare(%at, %bound), direction=LT
}

%body (b: (s32[], f32[4,8,8])) -> (s32[], f32[4,8,8]) {
  %b = (s32[], f32[4,8,8]) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[4,8,8]{2,1,0} get-tuple-element(%b), index=1
  %row = f32[8,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %onchip = f32[8,8]{1,0:S(1)} copy(%row)
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  ROOT %out = (s32[], f32[4,8,8]) tuple(%next, %x)
}

ENTRY %main (a: f32[4,8,8]) -> (s32[], f32[4,8,8]) {
  %a = f32[4,8,8]{2,1,0} parameter(0)
  %start = s32[] constant(0)
  %init = (s32[], f32[4,8,8]) tuple(%start, %a)
  ROOT %loop = (s32[], f32[4,8,8]) while(%init), condition=%cond, body=%body
}
"""


def test_traffic_counts_slices_and_leaves_out_what_stays_on_the_chip():
    program = Program.parse(TEXT)
    matrix, number = 8 * 8 * 4, 4
    # Of the stacked array one matrix is read and written an iteration, then read by the copy, whose
    # result stays on the chip; the counter is read twice (fusion, add) with the one, and written.
    once = (matrix + number + matrix) + matrix + (number + number + number)
    # The condition runs as often as the body here: its compare reads two numbers, writes a pred.
    assert program.bytes_accessed() == pytest.approx(4 * once)
    assert program.uncounted_loops == []


def test_a_loop_of_unknown_length_is_named():
    program = Program.parse(TEXT.replace("constant(4)", "parameter(1)"))
    program.collectives()
    assert program.uncounted_loops == ["loop"]


def test_text_without_an_entry_is_refused():
    with pytest.raises(ValueError, match="no ENTRY"):
        Program.parse("HloModule nothing")


# As the TPU compiler writes them: a layer of a stack is sliced in a fusion inside the fusion of its
# product, in another order of bytes; a scatter updates its first operand; a kernel reads what it
# likes of its operands.
SERVED = """
%reordered (p.0: s8[4,64,32]) -> s8[4,64,32] {
  %p.0 = s8[4,64,32]{2,1,0} parameter(0)
  ROOT %copy.1 = s8[4,64,32]{2,1,0} copy(%p.0)
}

%sliced (p.1: s8[4,64,32], p.2: s32[]) -> bf16[64,32] {
  %p.1 = s8[4,64,32]{2,1,0} parameter(0)
  %f.1 = s8[4,64,32]{2,1,0} fusion(%p.1), kind=kLoop, output_to_operand_aliasing={{}: (0, {})}, calls=%reordered
  %p.2 = s32[] parameter(1)
  %zero = s32[] constant(0)
  %s.1 = s8[1,64,32]{2,1,0} dynamic-slice(%f.1, %p.2, %zero, %zero), dynamic_slice_sizes={1,64,32}
  ROOT %c.1 = bf16[64,32]{1,0} convert(%s.1)
}

%product (p.3: s8[4,64,32], p.4: s32[], p.5: bf16[8,32]) -> bf16[8,64] {
  %p.3 = s8[4,64,32]{2,1,0} parameter(0)
  %p.4 = s32[] parameter(1)
  %p.5 = bf16[8,32]{1,0} parameter(2)
  %f.2 = bf16[64,32]{1,0} fusion(%p.3, %p.4), kind=kLoop, calls=%sliced
  ROOT %conv = bf16[8,64]{1,0} convolution(%p.5, %f.2), dim_labels=bf_oi->bf
}

%written (p.6: bf16[100,64], p.7: s32[8,1], p.8: bf16[8,64]) -> bf16[100,64] {
  %p.6 = bf16[100,64]{1,0} parameter(0)
  %p.7 = s32[8,1]{1,0} parameter(1)
  %p.8 = bf16[8,64]{1,0} parameter(2)
  ROOT %scatter.1 = bf16[100,64]{1,0} scatter(%p.6, %p.7, %p.8), to_apply=%add
}

ENTRY %main (a: s8[4,64,32], i: s32[], x: bf16[8,32], pages: bf16[100,64], at: s32[8,1]) -> bf16[8,64] {
  %a = s8[4,64,32]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %x = bf16[8,32]{1,0} parameter(2)
  %pages = bf16[100,64]{1,0} parameter(3)
  %at = s32[8,1]{1,0} parameter(4)
  %y = bf16[8,64]{1,0} fusion(%a, %i, %x), kind=kOutput, calls=%product
  %new = bf16[100,64]{1,0} fusion(%pages, %at, %y), kind=kCustom, calls=%written
  ROOT %attend.1 = bf16[8,64]{1,0} custom-call(%y, %new), custom_call_target="tpu_custom_call"
}
"""  # noqa: E501  as a compiler writes it


def test_what_is_sliced_scattered_or_read_by_a_kernel_is_no_whole_array():
    program = Program.parse(SERVED)
    product = 64 * 32 + 4 + 2 * 8 * 32 + 2 * 8 * 64  # the layer, its number, operand, result
    written = 4 * 8 + 2 * 8 * 64 + 2 * 8 * 64  # places, new rows read and written
    assert program.bytes_accessed(of_kernels={"attend": 1000.0}) == product + written + 1000
    whole = 2 * (2 * 8 * 64) + 2 * 100 * 64
    assert program.bytes_accessed() == product + written + whole


def test_groups_in_another_order_of_devices_are_read():
    line = (
        "(%x), replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_1'}, "
        "to_apply=%add"
    )
    assert _first_group(line) == [0, 2, 4, 6]
    assert _first_group(line.replace(", device_ids=([4,2]T(1,0))", "")) == [0, 1, 2, 3]


# An all-gather that goes on beside a product in a loop: its arrays pass through every fusion.
SPREAD = """
%begun (p.0: bf16[4,64]) -> (bf16[4,64], bf16[64,64], u32[]) {
  %p.0 = bf16[4,64]{1,0} parameter(0)
  %g.1 = bf16[64,64]{1,0} all-gather(%p.0), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %s.1 = (bf16[4,64]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%beside (p.1: bf16[4,64], p.2: bf16[64,64], p.3: u32[], p.4: bf16[8,32], p.5: bf16[8,16]) -> (f32[32,16], bf16[4,64], bf16[64,64], bf16[64,64], u32[]) {
  %p.1 = bf16[4,64]{1,0} parameter(0)
  %p.2 = bf16[64,64]{1,0} parameter(1)
  %p.3 = u32[]{:S(2)} parameter(2)
  %p.4 = bf16[8,32]{1,0} parameter(3)
  %p.5 = bf16[8,16]{1,0} parameter(4)
  %conv = f32[32,16]{1,0} convolution(%p.4, %p.5), dim_labels=fb_io->bf
  %g.2 = bf16[64,64]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %t.1 = (f32[32,16]{1,0}, bf16[4,64]{1,0}, bf16[64,64]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) tuple(%conv, %p.1, %p.2, %g.2, %p.3)
}

%ended (p.6: bf16[4,64], p.7: bf16[64,64], p.8: u32[]) -> bf16[64,64] {
  %p.6 = bf16[4,64]{1,0} parameter(0)
  %p.7 = bf16[64,64]{1,0} parameter(1)
  %p.8 = u32[]{:S(2)} parameter(2)
  %g.3 = bf16[64,64]{1,0} all-gather(%p.6), channel_id=7, replica_groups=[1,16]<=[16], dimensions={0}
  ROOT %d.1 = bf16[64,64]{1,0} custom-call(%p.6, %p.7, %g.3, %p.8), custom_call_target="AsyncCollectiveDone"
}

%sums (p.9: f32[4,32,16], p.10: f32[32,16], p.11: f32[8,8], p.12: s32[]) -> (f32[4,32,16], f32[8,8]) {
  %p.9 = f32[4,32,16]{2,1,0} parameter(0)
  %p.10 = f32[32,16]{1,0} parameter(1)
  %p.11 = f32[8,8]{1,0} parameter(2)
  %p.12 = s32[]{:S(6)} parameter(3)
  %b.1 = f32[1,32,16]{2,1,0} bitcast(%p.10)
  %zero = s32[] constant(0)
  %u.1 = f32[4,32,16]{2,1,0} dynamic-update-slice(%p.9, %b.1, %p.12, %zero, %zero)
  %n.1 = f32[8,8]{1,0} negate(%p.11)
  ROOT %t.2 = (f32[4,32,16]{2,1,0}, f32[8,8]{1,0}) tuple(%u.1, %n.1)
}

ENTRY %main (w: bf16[4,64], x: bf16[8,32], y: bf16[8,16], all: f32[4,32,16], z: f32[8,8], at: s32[]) -> (f32[4,32,16], f32[8,8]) {
  %w = bf16[4,64]{1,0} parameter(0)
  %x = bf16[8,32]{1,0} parameter(1)
  %y = bf16[8,16]{1,0} parameter(2)
  %all = f32[4,32,16]{2,1,0} parameter(3)
  %z = f32[8,8]{1,0} parameter(4)
  %at = s32[]{:S(6)} parameter(5)
  %start = (bf16[4,64]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) fusion(%w), kind=kCustom, calls=%begun
  %s0 = bf16[4,64]{1,0} get-tuple-element(%start), index=0
  %s1 = bf16[64,64]{1,0} get-tuple-element(%start), index=1
  %s2 = u32[]{:S(2)} get-tuple-element(%start), index=2
  %step = (f32[32,16]{1,0}, bf16[4,64]{1,0}, bf16[64,64]{1,0}, bf16[64,64]{1,0}, u32[]{:S(2)}) fusion(%s0, %s1, %s2, %x, %y), kind=kOutput, calls=%beside
  %r0 = f32[32,16]{1,0} get-tuple-element(%step), index=0
  %r1 = bf16[4,64]{1,0} get-tuple-element(%step), index=1
  %r2 = bf16[64,64]{1,0} get-tuple-element(%step), index=2
  %r4 = u32[]{:S(2)} get-tuple-element(%step), index=4
  %done = bf16[64,64]{1,0} fusion(%r1, %r2, %r4), kind=kCustom, calls=%ended
  ROOT %out = (f32[4,32,16]{2,1,0}, f32[8,8]{1,0}) fusion(%all, %r0, %z, %at), kind=kLoop, calls=%sums
}
"""  # noqa: E501


def test_a_collective_that_is_spread_over_fusions_is_read_and_written_once():
    program = Program.parse(SPREAD)
    gathered = 2 * 4 * 64 + 2 * 64 * 64
    product = 2 * 8 * 32 + 2 * 8 * 16 + 4 * 32 * 16
    # Of two results one overwrites a part of the sums, which are not read, the other is whole.
    sums = 2 * 4 * 32 * 16 + 2 * 4 * 8 * 8
    assert program.bytes_accessed() == gathered + product + sums
    assert program.collectives()["all-gather"].count == 1
