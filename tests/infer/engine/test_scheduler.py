"""Who is served when, without a model."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infer.completion import Row
from infer.engine.blocks import BlockManager
from infer.engine.request import Request
from infer.engine.scheduler import Piece, Scheduler, plan_pieces
from infer.params import SamplingParams

BLOCK, SHAPES = 4, (4, 8)


def make_scheduler(num_blocks=16, max_slots=3):
    blocks = BlockManager(num_blocks, BLOCK)
    return Scheduler(
        blocks, max_slots=max_slots, shapes=SHAPES, model_version="v", save=lambda c: "saved"
    )


def add(scheduler, name, num_tokens, *, limit=8, tenant="", priority=0, start=0, cached=True):
    tokens = list(range(start, start + num_tokens))
    request = Request(name, tuple(tokens), SamplingParams(), tenant=tenant, priority=priority)
    row = Row(
        prompt=None, prompt_token_ids=tokens, params=request.params, seed=0, prompt_index=0,
        index=0, limit=limit, end_tokens=frozenset(), tokenizer=None, continues_text=True,
    )  # fmt: skip
    choice = scheduler.make_choice(request, row, adapter="", use_cache=cached)
    scheduler.add(choice)
    return choice


def read_all(scheduler):
    while (found := scheduler.next_piece()) is not None:
        choice, piece = found
        scheduler.name_blocks(choice, *scheduler.piece_done(choice, piece))


def names(choices):
    return [choice.request.id for choice in choices]


@pytest.mark.parametrize(
    "num_tokens, pieces",
    [
        (1, [Piece(0, 1, 4)]),
        (4, [Piece(0, 4, 4)]),
        (5, [Piece(0, 5, 8)]),
        (16, [Piece(0, 8, 8), Piece(8, 16, 8)]),
        (18, [Piece(0, 8, 8), Piece(8, 16, 8), Piece(16, 18, 4)]),
    ],
)
def test_a_prompt_is_read_as_its_length_says(num_tokens, pieces):
    assert plan_pieces(num_tokens, SHAPES) == pieces


def test_prompts_take_turns_so_that_a_long_one_stalls_nobody():
    scheduler = make_scheduler()
    add(scheduler, "long", 32, start=100)
    add(scheduler, "short", 6)
    scheduler.admit()
    order = []
    while (found := scheduler.next_piece()) is not None:
        order.append(found[0].request.id)
        scheduler.piece_done(*found)
    assert order == ["long", "short", "long", "long", "long"]


def test_reading_gets_more_time_while_more_prompts_are_nearly_read_than_choices_generate():
    scheduler = make_scheduler(max_slots=4)
    for name, length in [("long", 24), ("a", 5), ("b", 6), ("c", 7)]:
        add(scheduler, name, length, start=100 * length)
    scheduler.admit()
    shares = []
    for _ in range(4):
        shares.append(scheduler.reading_share(0.4))
        choice, piece = scheduler.next_piece()
        scheduler.piece_done(choice, piece)
    # The long one takes a piece first; then a, b and c are read one after the other.
    assert shares == [1, 1, 4 / 5, 2 / 4]
    # Two pieces of the long one are left, then one, beside three that generate.
    for wanted in (0.3, 2 / 5):
        assert scheduler.reading_share(0.3) == wanted
        scheduler.piece_done(*scheduler.next_piece())
    assert scheduler.reading_share(0.3) == 0.3


def test_tenants_take_turns_whatever_the_number_of_their_requests():
    scheduler = make_scheduler(num_blocks=100, max_slots=1)
    for number in range(4):
        add(scheduler, f"greedy {number}", 8, tenant="greedy", start=100 * number)
    add(scheduler, "modest", 8, tenant="modest", start=1000)
    order = []
    while scheduler.waiting:
        (choice,) = scheduler.admit()
        order.append(choice.request.id)
        read_all(scheduler)
        scheduler.remove(choice)
    assert order == ["greedy 0", "modest", "greedy 1", "greedy 2", "greedy 3"]


def test_a_tenant_that_was_away_has_saved_nothing_up():
    scheduler = make_scheduler(num_blocks=100, max_slots=1)
    for number in range(3):
        add(scheduler, f"old {number}", 8, tenant="old", start=100 * number)
        (choice,) = scheduler.admit()
        read_all(scheduler)
        if number < 2:
            scheduler.remove(choice)
    for number in range(2):
        add(scheduler, f"new {number}", 8, tenant="new", start=1000 + 100 * number)
        add(scheduler, f"old {3 + number}", 8, tenant="old", start=3000 + 100 * number)
    order = []
    scheduler.remove(choice)
    while scheduler.waiting:
        (choice,) = scheduler.admit()
        order.append(choice.request.id)
        read_all(scheduler)
        scheduler.remove(choice)
    assert order in (["new 0", "old 3", "new 1", "old 4"], ["old 3", "new 0", "old 4", "new 1"])


def test_the_urgent_go_first_and_take_slots_from_the_patient():
    scheduler = make_scheduler(max_slots=1)
    patient = add(scheduler, "patient", 6, priority=3)
    assert names(scheduler.admit()) == ["patient"]
    read_all(scheduler)
    add(scheduler, "urgent", 6, priority=1, start=50)
    add(scheduler, "also patient", 6, priority=3, start=90)
    assert names(scheduler.admit()) == ["urgent"]
    assert patient.saved == "saved" and patient.slot is None and not patient.blocks
    assert scheduler.num_preemptions == 1
    assert scheduler.admit() == []
    scheduler.remove(scheduler.running[0])
    assert names(scheduler.admit()) == ["patient"]  # it goes on before the other begins


def test_the_latest_loses_its_slot_when_blocks_run_out():
    scheduler = make_scheduler(num_blocks=4)
    first = add(scheduler, "first", 7, limit=9)
    second = add(scheduler, "second", 7, limit=9, start=50)
    assert len(scheduler.admit()) == 2
    read_all(scheduler)
    for choice in (first, second):
        choice.row.token_ids += [1, 2]
    assert names(scheduler.decodable()) == ["first"]
    assert len(first.blocks) == 3 and second.slot is None and second.saved == "saved"
    assert scheduler.admit() == []  # not before there is room for it
    scheduler.remove(first)
    assert names(scheduler.admit()) == ["second"]
    assert second.is_read and len(second.blocks) == 3


def test_a_known_prefix_is_not_read_again():
    scheduler = make_scheduler()
    add(scheduler, "first", 24)
    scheduler.admit()
    read_all(scheduler)
    second, stranger = add(scheduler, "second", 24), add(scheduler, "third", 24, tenant="t")
    scheduler.admit()
    assert (second.cached, stranger.cached) == (20, 0)  # the last token is always computed
    assert second.blocks[:5] == scheduler.running[0].blocks[:5]
    assert scheduler.next_piece() == (second, Piece(20, 24, 8))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), num_blocks=st.integers(6, 20))
def test_everyone_ends_and_every_block_comes_back(seed, num_blocks):
    rng = random.Random(seed)
    scheduler = make_scheduler(num_blocks=num_blocks)
    alive, made = [], 0
    for _ in range(600):
        if made < 25 and rng.random() < 0.3:
            tokens = rng.randint(1, 12)
            alive.append(
                add(
                    scheduler, f"c{made}", tokens, limit=rng.randint(1, 24 - tokens),
                    tenant=rng.choice("ab"), priority=rng.randint(0, 1), start=rng.choice([0, 40]),
                )
            )  # fmt: skip
            made += 1
        if alive and rng.random() < 0.05:
            scheduler.remove(alive.pop(rng.randrange(len(alive))))
        for choice in scheduler.admit():
            choice.saved = None
        slots = [choice.slot for choice in scheduler.running]
        assert len(set(slots)) == len(slots) and all(0 <= slot < 3 for slot in slots)
        found = scheduler.next_piece()
        if found is not None:
            scheduler.name_blocks(found[0], *scheduler.piece_done(*found))
            if found[0].is_read:
                found[0].row.token_ids.append(1)
        for choice in scheduler.decodable():
            assert len(choice.blocks) * BLOCK >= choice.num_tokens
            if len(choice.row.token_ids) >= choice.row.limit:
                scheduler.remove(choice)
                alive.remove(choice)
            else:
                choice.row.token_ids.append(1)
                scheduler.took(choice, 1)
        if made == 25 and not alive:
            break
    assert made < 25 or not alive, "somebody waits for ever"
    for choice in alive:
        scheduler.remove(choice)
    assert scheduler.blocks.num_free == num_blocks


def test_blocks_are_held_for_a_token_ahead_where_there_are_any():
    scheduler = make_scheduler(num_blocks=4)
    first, second = (add(scheduler, name, 3, start=10 * n) for n, name in enumerate("ab"))
    scheduler.admit()
    read_all(scheduler)
    for choice in (first, second):
        choice.row.token_ids += [1] * 5  # two whole blocks
    assert scheduler.decodable() == [first, second]
    assert scheduler.blocks.num_free == 0
    assert not scheduler.hold_ahead([first])
    scheduler.remove(second)
    assert scheduler.hold_ahead([first]) and len(first.blocks) == 3
    assert scheduler.hold_ahead([first]) and len(first.blocks) == 3
    scheduler.remove(first)
    assert scheduler.blocks.num_free == 4 and (first.admissions, second.admissions) == (1, 1)
