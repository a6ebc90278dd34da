"""The schedule: properties over all configurations, and the tables and counts of the published systems."""

import tracemalloc
from collections import Counter
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from pyengine.errors import ConfigError
from pyengine.schedule.progressive import ScheduleConfig, noise_levels, recache_steps, step_at
from pyengine.schedule.ring import EMPTY

PA_O = ScheduleConfig(
    steps=30,
    chunk_frames=5,
    cadence=5,
    chunks=84,
    warp=3.6875,
    context="recompute",
    recent_frames=5,
    given_chunks=1,
)
PROGRESSIVE = ScheduleConfig(steps=16, chunk_frames=2, cadence=4, chunks=9, sink_frames=2, recent_frames=6)


def steps(config, start=None):
    """Every call of a stream in order, from call `start` (default: the first)."""
    call = config.first_call if start is None else start
    while config.calls is None or call < config.calls:
        yield step_at(config, call)
        call += 1


@st.composite
def configs(draw, contexts=("ring", "recompute", "none"), least_cadence=0):
    total = draw(st.integers(1, 9))
    size = draw(st.integers(1, 3))
    context = draw(st.sampled_from(contexts))
    return ScheduleConfig(
        steps=total,
        chunk_frames=size,
        cadence=draw(st.integers(min(least_cadence, total), total)),
        chunks=draw(st.integers(1, 7)),
        warp=draw(st.sampled_from([1.0, 0.5, 3.6875])),
        context=context,
        sink_frames=size * draw(st.integers(0, 2)),
        recent_frames=size * draw(st.integers(1, 3)),
        given_chunks=0 if context == "none" else draw(st.integers(0, 3)),
    )


def present(step):
    """Rows that hold a frame."""
    return [row for row, frame in enumerate(step.frame_index) if frame >= 0]


# ---- the formula ---------------------------------------------------------------------------------


@given(configs())
def test_levels_are_the_formula_and_calls_are_counted_by_it(config):
    calls = [step for step in steps(config) if step.call >= 0]
    n, m, top = config.chunks, config.cadence, config.steps
    assert len(calls) == config.calls == m * (n - 1) + top
    for step in calls:
        for chunk in range(n):
            age = step.call - m * chunk
            is_active = 0 <= age < top
            noisy = {c for c, t in zip(step.chunk, step.level, strict=True) if t > 0}
            assert (config.given_chunks + chunk in noisy) == is_active
            if is_active:
                rows = step.rows(config.given_chunks + chunk)
                assert step.level[rows] == (config.levels[top - age],) * config.chunk_frames
                assert step.level_next[rows] == (config.levels[top - age - 1],) * config.chunk_frames


@given(configs())
def test_every_chunk_gets_exactly_s_updates_that_end_at_zero(config):
    level, updates, emitted = {}, Counter(), []
    for step in steps(config):
        for row in present(step):
            frame = step.frame_index[row]
            if row in step.born:
                assert frame not in level
                level[frame] = 1.0
            if row in step.given:
                level[frame] = 0.0
            assert step.level[row] == level[frame]
            updates[frame] += step.level_next[row] < step.level[row]
            level[frame] = step.level_next[row]
        for chunk in step.emit:
            assert all(t == 0 for t in step.level_next[step.rows(chunk)])
        emitted += step.emit
    known = config.given_chunks * config.chunk_frames
    assert emitted == list(range(config.given_chunks, config.given_chunks + config.chunks))
    assert set(level.values()) == {0.0}
    generated = range(known, known + config.chunks * config.chunk_frames)
    assert +updates == dict.fromkeys(generated, config.steps)  # + drops the frames never updated


@given(configs())
def test_window_is_ordered_and_fits_a_prepared_shape(config):
    for step in steps(config):
        rows = present(step)
        frames = [step.frame_index[row] for row in rows]
        assert frames == sorted(set(frames))
        assert rows == list(range(step.frames - len(rows), step.frames))  # absent rows come first
        assert all(low <= high for low, high in zip(step.level, step.level[1:], strict=False))
        assert step.frames == min(shape for shape in config.shapes if shape >= len(rows))
        assert step.present == len(rows)
        assert all(
            frame // config.chunk_frames == chunk
            for frame, chunk in zip(step.frame_index, step.chunk, strict=True)
        )
        for row in range(step.frames - len(rows)):
            record = (
                step.chunk[row],
                step.level[row],
                step.level_next[row],
                step.source[row],
                step.append_slot[row],
            )
            assert record == (-1, 0, 0, -1, -1)
        lengths = [
            len(part) for part in (step.chunk, step.level, step.level_next, step.source, step.append_slot)
        ]
        assert lengths == [step.frames] * 5


@given(configs())
def test_every_shape_is_needed(config):
    """Given enough chunks: else a plan would hold an engine that never runs."""
    assume(config.cadence > 0 or config.steps > 1)  # in one call for all, either everybody rides or nobody
    long = replace(config, chunks=max(config.chunks, config.steps + 2)) if config.cadence else config
    assert {step.frames for step in steps(long)} == set(config.shapes)


@given(configs())
def test_every_present_row_comes_from_exactly_one_place(config):
    before = None
    for step in steps(config):
        for row in present(step):
            carried = step.source[row] >= 0
            assert carried + (row in step.born) + (row in step.given) == 1
            if carried:
                assert before.frame_index[step.source[row]] == step.frame_index[row]
        before = step


@given(configs(contexts=("ring", "none")))
def test_frames_move_up_by_the_number_born_and_at_no_other_time(config):
    """So a buffer of the largest window's rows, of which a step uses the last, is moved at births alone."""
    before = None
    for step in steps(config):
        for row in present(step):
            if step.source[row] >= 0:
                arrived = sum(r in step.born or r in step.given for r in range(row + 1, step.frames))
                assert before.frames - step.source[row] == step.frames - row - arrived
        before = step


@given(configs())
def test_a_step_depends_on_its_call_alone(config):
    every = list(steps(config))
    middle = len(every) // 2
    assert list(steps(config, start=every[middle].call)) == every[middle:]
    assert step_at(config, every[middle].call) == every[middle]


@given(configs(least_cadence=1), st.one_of(st.none(), st.integers(1, 5)))
def test_a_stream_of_n_chunks_is_the_head_of_a_longer_one(config, more):
    """Calls, levels, births, ring and emissions of the first N chunks do not know what follows."""
    last = config.given_chunks + config.chunks
    longer = replace(config, chunks=None if more is None else config.chunks + more)

    def head(step):
        rows = [row for row in present(step) if step.chunk[row] < last]
        fields = (step.frame_index, step.level, step.level_next, step.append_slot)
        born = tuple(step.frame_index[row] for row in step.born if step.chunk[row] < last)
        emit = tuple(chunk for chunk in step.emit if chunk < last)
        return [[field[row] for field in fields] for row in rows], born, emit, step.ring_index

    # `steps` of the longer stream is endless for more = None: zip stops at the shorter.
    for short, long in zip(steps(config), steps(longer), strict=False):
        assert short.call == long.call
        assert head(short) == head(long)


@pytest.mark.parametrize("context", ["ring", "none"])
@pytest.mark.parametrize(("total", "warp"), [(1, 1.0), (30, 1.0), (30, 3.6875), (64, 5.0)])
def test_strict_and_one_chunk_is_the_ordinary_sampler_bit_for_bit(total, warp, context):
    config = ScheduleConfig(total, 3, cadence=total, chunks=1, warp=warp, context=context, recent_frames=3)
    plain = np.arange(total, -1, -1, dtype=np.float64) / total
    ordinary = np.float32(warp * plain / (1 + (warp - 1) * plain))
    record = list(steps(config))
    assert [step.level for step in record] == [(t,) * 3 for t in ordinary[:-1].tolist()]
    assert [step.level_next for step in record] == [(t,) * 3 for t in ordinary[1:].tolist()]
    assert all(step.present == step.frames == 3 for step in record)
    assert [step.emit for step in record] == [()] * (total - 1) + [(0,)]


def test_levels_telescope_to_one_in_float32():
    levels = np.float32(noise_levels(30, 3.6875))
    assert np.isclose((levels[1:] - levels[:-1]).sum(dtype=np.float32), 1, atol=1e-6)
    assert levels[0] == 0
    assert levels[-1] == 1


# ---- context -------------------------------------------------------------------------------------


@given(configs(contexts=("ring",)))
def test_ring_shows_exactly_the_sink_and_the_newest_clean_frames(config):
    """Played on a ring: what is readable is in its slot, and no call writes what it reads. Frames are written in order."""
    ring, written = [EMPTY] * config.ring_frames, 0
    clean = 0  # frames clean before the call, riders included
    for step in steps(config):
        riders = [row for row in present(step) if step.append_slot[row] >= 0]
        clean += len(riders)
        expected = {f for f in range(clean) if f < config.sink_frames or f >= clean - config.recent_frames}
        readable = {frame for frame in step.ring_index if frame >= 0}
        riding = {step.frame_index[row] for row in riders}
        assert readable | riding == expected
        assert not readable & riding
        assert not readable & set(step.frame_index)  # no frame is seen twice
        for slot, frame in enumerate(step.ring_index):
            assert frame < 0 or ring[slot] == frame
        for row in riders:
            assert step.level[row] == step.level_next[row] == 0
            assert step.ring_index[step.append_slot[row]] == -1
            assert step.frame_index[row] == written
            ring[step.append_slot[row]] = written
            written += 1
    emitted = config.given_chunks + (0 if config.cadence == 0 else config.chunks - 1)
    assert written == emitted * config.chunk_frames  # all but the last, which nobody follows


@given(configs(contexts=("ring",)))
def test_a_clean_chunk_rides_in_the_very_next_call(config):
    finished = ()
    for step in steps(config):
        riding = {chunk for chunk, slot in zip(step.chunk, step.append_slot, strict=True) if slot >= 0}
        if step.call > 0:
            assert riding == set(finished)
        finished = step.emit


@given(configs(contexts=("none",)))
def test_without_context_nothing_is_kept(config):
    for step in steps(config):
        assert step.ring_index == (-1,) * (config.sink_frames + config.recent_frames)
        assert set(step.append_slot) == {-1}
        assert all(step.level[row] > 0 for row in present(step))


@given(configs(contexts=("recompute",)))
def test_recomputed_context_is_the_sink_and_the_newest_clean_frames(config):
    clean = config.given_chunks * config.chunk_frames
    for step in steps(config):
        context = [step.frame_index[row] for row in present(step) if step.level[row] == 0]
        assert context == [
            f for f in range(clean) if f < config.sink_frames or f >= clean - config.recent_frames
        ]
        assert step.ring_index == ()
        assert set(step.append_slot) == {-1}
        clean += len(step.emit) * config.chunk_frames


@given(configs(contexts=("ring",), least_cadence=1), st.data())
def test_recache_rewrites_what_the_call_will_read(config, data):
    call = data.draw(st.integers(config.first_call, config.calls - 1))
    wanted = step_at(config, call).ring_index
    memory = [-1] * config.ring_frames
    for step in recache_steps(config, call):
        rows = present(step)
        assert tuple(rows) == step.given
        assert step.born == step.emit == ()
        assert set(step.source) == {-1}
        assert set(step.level) == set(step.level_next) == {0.0}
        assert step.frames in config.shapes
        assert all(frame in (-1, memory[slot]) for slot, frame in enumerate(step.ring_index))
        assert set(step.ring_index) - {-1} == set(memory) - {-1}  # all that was rewritten before is seen
        for row in rows:
            memory[step.append_slot[row]] = step.frame_index[row]
    assert tuple(memory) == wanted


def test_given_chunks_but_the_last_are_written_before_call_0():
    config = replace(PROGRESSIVE, given_chunks=3)
    record = list(steps(config))
    assert [step.call for step in record[:4]] == [-2, -1, 0, 1]
    assert [[step.frame_index[row] for row in step.given] for step in record[:4]] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [],
    ]
    assert [step.present for step in record[:4]] == [2, 2, 4, 2]
    assert len(record) == config.calls + 2


# ---- published systems (specs: PA-VDM section 1, general formulation section 5) ------------------


def test_pa_o_takes_445_calls_with_the_published_window_lengths():
    record = list(steps(PA_O))
    assert len(record) == 445
    assert Counter(step.present for step in record) == {35: 395, 10: 10, 15: 10, 20: 10, 25: 10, 30: 10}
    assert [step.present for step in record[:30:5]] == [10, 15, 20, 25, 30, 35]
    assert [step.present for step in record[-30::5]] == [35, 30, 25, 20, 15, 10]
    assert sum(step.present for step in record) == 14825
    assert PA_O.shapes == (35,)
    assert 5 + 5 * sum(len(step.emit) for step in record) == 425


def test_pa_o_follows_the_loop_of_the_paper():
    """Section 1.8 as written, with INIT, regular and TERM branches; the formula has none."""
    n, m, tau = 6, 5, PA_O.levels
    row = [[tau[(j + 1) * m - s] for j in range(n)] for s in range(m)]  # equation (1)
    window, clean, next_chunk, expected = [1], 0, 2, []
    for call in range(PA_O.calls):
        s, length = call % m, len(window)
        is_init, is_end = window[0] == 1 and length < n, window[-1] == 84 and window[0] > 84 - n + 1
        levels = row[s][-length:] if is_init else row[s][:length] if is_end else row[s]
        expected.append([(clean, 0.0), *zip(window, levels, strict=True)])
        if s == m - 1:
            if not is_init:
                clean, window = window[0], window[1:]
            if next_chunk <= 84:
                window, next_chunk = [*window, next_chunk], next_chunk + 1
    got = []
    for step in steps(PA_O):
        pairs = zip(step.chunk, step.level, strict=True)
        got.append([pair for pair in dict.fromkeys(pairs) if pair[0] >= 0])
    assert got == expected


PLAIN_ROWS = """166.7 333.3 500 666.7 833.3 1000 | 133.3 300 466.7 633.3 800 966.7
              | 100 266.7 433.3 600 766.7 933.3 | 66.7 233.3 400 566.7 733.3 900
              | 33.3 200 366.7 533.3 700 866.7"""
WARPED_ROWS = """424.5 648.4 786.7 880.6 948.6 1000 | 362.0 612.5 763.4 864.3 936.5 990.7
               | 290.6 572.8 738.2 846.9 923.8 981.0 | 208.5 528.8 710.8 828.2 910.2 970.7
               | 112.8 479.7 681.0 808.2 895.9 959.9"""
WARPED_LEVELS = """112.81 208.48 290.64 361.96 424.46 479.67 528.81 572.82 612.46 648.35 681.01 710.84 738.21
    763.40 786.67 808.22 828.24 846.89 864.30 880.60 895.88 910.24 923.76 936.51 948.55 959.95 970.75 981.00
    990.74 1000"""


@pytest.mark.parametrize(("warp", "table", "within"), [(1.0, PLAIN_ROWS, 0.051), (3.6875, WARPED_ROWS, 0.06)])
def test_pa_o_stage_table(warp, table, within):
    config = replace(PA_O, warp=warp)
    for stage, row in enumerate(table.split("|")):
        step = step_at(config, 100 + stage)
        levels = [1000 * t for t in dict.fromkeys(step.level) if t > 0]
        assert levels == pytest.approx([float(number) for number in row.split()], abs=within)


def test_pa_o_warped_ladder():
    expected = [float(number) for number in WARPED_LEVELS.split()]
    assert 1000 * np.array(noise_levels(30, 3.6875)[1:]) == pytest.approx(expected, abs=0.0051)


def test_pa_o_starts_as_an_ordinary_denoise_of_one_chunk():
    """Section 5, check 4: levels 1000, 966.7, ..., 866.7, then 833.3 on the first shift."""
    levels = [
        1000 * step_at(replace(PA_O, warp=1.0), call).level[step_at(PA_O, call).rows(1)][0]
        for call in range(6)
    ]
    assert levels == pytest.approx([1000, 966.7, 933.3, 900, 866.7, 833.3], abs=0.05)


def test_wan_warp():
    """Rolling Forcing's five levels and Self-Forcing's four, t' = 5t / (1 + 4t)."""
    assert 1000 * np.array(noise_levels(5, 5.0)[:0:-1]) == pytest.approx(
        [1000, 952.4, 882.4, 769.2, 555.6], abs=0.05
    )
    assert 1000 * np.array(noise_levels(4, 5.0)[:0:-1]) == pytest.approx([1000, 937.5, 833.3, 625], abs=0.05)


def test_ladder_of_ones_own():
    """CausVid's 1000 / 757 / 522."""
    config = ScheduleConfig(3, 3, 3, ladder=(0, 0.522, 0.757, 1), recent_frames=18)
    assert [round(step_at(config, call).level[-1], 3) for call in range(4)] == [1, 0.757, 0.522, 1]


@pytest.mark.parametrize(
    ("system", "config", "calls"),
    [
        ("Rolling Forcing: N + 4", ScheduleConfig(5, 3, 1, chunks=21, sink_frames=3, recent_frames=3), 25),
        ("MAGI-1: m(N-1) + 4m", ScheduleConfig(64, 6, 16, chunks=10, recent_frames=24), 16 * 9 + 64),
        ("SkyReels-V2: 50 + 4*5", ScheduleConfig(50, 5, 5, chunks=5, context="none"), 70),
        (
            "SkyReels-V2, one block given",
            ScheduleConfig(50, 5, 5, chunks=4, recent_frames=5, given_chunks=1),
            65,
        ),
        ("Diffusion Forcing pyramid: S + (h-1)u", ScheduleConfig(100, 1, 1, chunks=16, context="none"), 115),
        ("Diffusion Forcing full sequence, u = 0", ScheduleConfig(100, 1, 0, chunks=16, context="none"), 100),
        (
            "Diffusion Forcing autoregressive, u = S",
            ScheduleConfig(100, 1, 100, chunks=16, context="none"),
            1600,
        ),
        (
            "PA-M, S = 150",
            ScheduleConfig(150, 5, 15, chunks=90, context="recompute", recent_frames=5),
            15 * 89 + 150,
        ),
    ],
)
def test_calls_of_published_systems(system, config, calls):
    assert sum(1 for step in steps(config) if step.call >= 0) == config.calls == calls


def test_diffusion_forcing_matrix():
    """K[r, j] = clip(S + u j - r, 0, S), 0 <= u <= S."""
    for u in (0, 1, 3, 4):
        config = ScheduleConfig(4, 1, u, chunks=5, context="none")
        for step in steps(config):
            for row in present(step):
                index = min(max(4 + u * step.frame_index[row] - step.call, 0), 4)
                assert step.level[row] == config.levels[index]


@pytest.mark.parametrize(
    ("config", "shapes"),
    [
        (PROGRESSIVE, (8, 10)),
        (replace(PROGRESSIVE, context="none"), (8,)),
        (replace(PROGRESSIVE, context="recompute"), (16,)),
        (replace(PROGRESSIVE, cadence=16), (2, 4)),  # strict autoregression
        (
            replace(PROGRESSIVE, cadence=5),
            (8,),
        ),  # S % m != 0: the rider takes the place of who is not yet born
        (replace(PROGRESSIVE, cadence=0), (18,)),
        (replace(PROGRESSIVE, cadence=0, given_chunks=1), (18, 20)),
        (replace(PROGRESSIVE, chunks=1), (8, 10)),  # shapes do not know how long the video is
        (replace(PROGRESSIVE, row_counts=(12, 8)), (8, 12)),
    ],
)
def test_prepared_shapes(config, shapes):
    assert config.shapes == shapes
    assert {step.frames for step in steps(config)} <= set(shapes)


# ---- records, memory, refusals -------------------------------------------------------------------


def test_steady_state_repeats_every_m_calls():
    config = replace(PROGRESSIVE, chunks=None)
    for call in range(40, 44):
        now, later = step_at(config, call), step_at(config, call + 4 * config.cadence)
        assert (now.level, now.level_next, now.born, now.source) == (
            later.level,
            later.level_next,
            later.born,
            later.source,
        )


def test_memory_is_flat_to_20000_frames():
    config = ScheduleConfig(2, 4, 1, sink_frames=4, recent_frames=8)
    early = 0
    tracemalloc.start()
    try:
        for step in steps(config):
            if step.frame_index[-4] == 200:
                early = tracemalloc.get_traced_memory()[0]
            if step.frame_index[-4] == 20_000:
                break
        assert early > 0
        assert tracemalloc.get_traced_memory()[0] - early < 8192
    finally:
        tracemalloc.stop()


def test_a_step_is_frozen_hashable_and_prints():
    step = step_at(PROGRESSIVE, 16)
    with pytest.raises(FrozenInstanceError):
        step.call = 3
    assert len({step, step_at(PROGRESSIVE, 16), step_at(PROGRESSIVE, 17)}) == 2
    assert str(step) == (
        "call 16  rows 10/10  0: 0.000->0.000  1: 0.250->0.188  2: 0.500->0.438  3: 0.750->0.688"
        "  4: 1.000->0.938  append [0, 1]"
    )
    assert str(step_at(PROGRESSIVE, 15)).endswith("emit [0]")


def test_levels_are_exact_in_float32():
    assert all(float(np.float32(level)) == level for level in noise_levels(30, 3.6875))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be at least 1 but is 0"),
        ({"chunk_frames": 0}, "chunk_frames must be at least 1 but is 0"),
        ({"given_chunks": -1}, "given_chunks must be at least 0 but is -1"),
        ({"cadence": 17}, "cadence must be from 0 to the 16 steps but is 17"),
        ({"cadence": -1}, "cadence must be"),
        ({"cadence": 0, "chunks": None}, "chunks must be a number with cadence 0"),
        ({"chunks": 0}, "chunks must be at least 1"),
        ({"warp": 0}, "warp must be a positive number but is 0"),
        ({"warp": float("nan")}, "warp must be a positive number but is nan"),
        ({"warp": 1e9}, "levels must increase at every step"),
        ({"ladder": (0, 1)}, "ladder must be 17 levels"),
        ({"steps": 2, "cadence": 1, "ladder": (0, 0.5, 0.9)}, "ladder must be 3 levels from 0 to 1"),
        ({"steps": 3, "cadence": 1, "ladder": (0, 0.6, 0.5, 1)}, "levels must increase"),
        ({"context": "cache"}, "context must be one of ring, recompute, none but is 'cache'"),
        ({"sink_frames": 3}, "sink_frames must be a multiple of chunk_frames 2 but is 3"),
        ({"recent_frames": -2}, "recent_frames must be a multiple"),
        ({"recent_frames": 0}, "needs recent_frames of at least"),
        ({"context": "none", "given_chunks": 1}, "given_chunks need a context"),
        ({"row_counts": (8,)}, "row_counts must offer 10 rows or more"),
        ({"row_counts": ()}, "row_counts must offer 10 rows or more"),
    ],
)
def test_nonsense_is_refused_in_one_sentence(changes, message):
    with pytest.raises(ConfigError, match=message) as refused:
        replace(PROGRESSIVE, **changes)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("call", [-1, 48])
def test_calls_outside_the_stream_are_refused(call):
    with pytest.raises(ConfigError, match=f"call must be from 0 to 47 but is {call}"):
        step_at(PROGRESSIVE, call)
    with pytest.raises(ConfigError, match="call must be from 0 but is -1"):
        step_at(replace(PROGRESSIVE, chunks=None), -1)


def test_rows_of_an_absent_chunk_are_refused():
    for chunk in (-1, 7):
        with pytest.raises(ConfigError, match="must be in the window of call 0"):
            step_at(PROGRESSIVE, 0).rows(chunk)


@settings(max_examples=30)
@given(configs(contexts=("ring", "none"), least_cadence=1), st.integers(10**6, 10**12))
def test_an_endless_stream_reaches_any_call_at_once(config, call):
    endless = replace(config, chunks=None)
    assume(call % config.cadence == 0)
    step = step_at(endless, call)
    assert step.chunk[-1] == config.given_chunks + call // config.cadence
    assert len(step.born) == config.chunk_frames
