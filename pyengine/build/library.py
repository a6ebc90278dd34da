"""Keeps the loaded variants of one bundle, each in memory once, however many streams and threads want it."""

from __future__ import annotations

import threading
import weakref
from collections import Counter as Counts
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal, NamedTuple

from pyengine.build.builder import Builder
from pyengine.build.progress import Counter, Progress, unheard
from pyengine.bundle.bundle import Bundle
from pyengine.bundle.variant import Variant
from pyengine.errors import StreamClosed
from pyengine.once import Once
from pyengine.options import EngineOptions
from pyengine.plans.plan import Choice, Plan
from pyengine.runtime.open import load_program
from pyengine.runtime.program import LoadedVariant, Program

__all__ = ["VariantLibrary"]


class Key(NamedTuple):
    """What a loaded variant depends on, beside the bundle and the options that a library's variants have in common."""

    variant: Variant
    choice: str
    threads: int | None


class Use(NamedTuple):
    """What a program has in use, whatever its choice."""

    variant: Variant
    threads: int | None


class VariantLibrary:
    """Builds, loads and keeps variants, and hands out programs made of them. Threads share it.

    Building or loading a variant holds up those only who want the same one.

    A variant is in use while a program that has it is. Those in use stay; the others stay as long as everything loaded
    and the buffers of open executors fit into `memory_budget` bytes together, the least recently used go first.

    relieve  called where what is in use passes the budget, to close executors that are kept in reserve
    """

    def __init__(
        self,
        bundle: Bundle,
        options: EngineOptions,
        *,
        progress: Progress | None = None,
        relieve: Callable[[], object] | None = None,
    ) -> None:
        self._bundle, self._options = bundle, options
        self.progress, self._relieve = progress or unheard, relieve
        first = Builder(bundle, options)
        self._builders: dict[tuple[str, int | None], Builder] = {(options.choice, options.threads): first}
        self._lock = threading.Lock()
        self._once: Once[Key, LoadedVariant] = Once()
        self._loaded: OrderedDict[Key, LoadedVariant] = OrderedDict()  # the most recently used last
        self._kept_as: dict[Key, Key] = {}  # `auto` -> what it chose
        self._uses: Counts[Use] = Counts()  # by programs that live or are being put together
        self._programs: list[weakref.ref[Program]] = []
        # Variants of programs that are gone, not looked at yet: garbage may be collected anywhere, also inside the lock.
        self._ended: deque[tuple[Use, ...]] = deque()
        self._plans = {options.threads: first.plan}
        self._closed = False

    def program(
        self, variants: Sequence[Variant], *, choice: Choice | None = None, threads: int | None = None
    ) -> Program:
        """These variants, loaded; what is missing is built or loaded first. `choice` and `threads` instead of the library's.

        Raises BackendUnavailable, BundleError, ConfigError, PlanError, and StreamClosed after `close`.
        """
        wanted = tuple(dict.fromkeys(variants))
        builder = self._builder(choice or self._options.choice, threads or self._options.threads)
        uses = tuple(Use(variant, builder.threads) for variant in wanted)
        with self._locked():
            self._check_open()
            self._uses.update(uses)
        try:
            program = self._program(wanted, builder)
        except BaseException:
            self._end(uses)
            raise
        weakref.finalize(program, self._end, uses).atexit = False
        self._end(())  # there is more in memory now than before
        return program

    def try_streams(self, alone: Program, together: Program) -> None:
        """Runs every variant of `together` whose plan does not say yet whether each of its streams gives, to the bit, what it gives
        in the fewest that `alone` has, and writes it into the plan.
        """
        builder = self._builder(self._options.choice, together.plan.threads)
        for few, many in _by_streams(alone.variants, together.variants):
            known = together.plan.part(many)
            if known.exact is not None or known.folder == alone.plan.part(few).folder:
                continue
            part = builder.note_exact(alone, few, together, many)
            together.plan.parts[many] = part
            with self._locked():
                self._plans[builder.threads].parts[many] = part
                key = Key(many, part.choice, builder.threads)
                if key in self._loaded:
                    self._loaded[key] = replace(self._loaded[key], part=part)

    @property
    def plans(self) -> list[Plan]:
        """Every part built or found so far, with the measured times of its choices: one plan per number of threads."""
        with self._locked():
            return [replace(plan, parts=dict(plan.parts)) for plan in self._plans.values()]

    @property
    def loaded(self) -> list[Variant]:
        """Variants in memory, the least recently used first."""
        with self._locked():
            return [key.variant for key in self._loaded]

    @property
    def nbytes(self) -> int:
        """An estimate of the bytes in memory: engine files and constants of what is loaded, buffers of open executors."""
        with self._locked():
            return self._nbytes()

    def has_room(self) -> bool:
        """Whether everything in memory fits into the budget."""
        with self._locked():
            return not self._over_budget()

    def close(self) -> None:
        """Lets go of every variant. Programs that live keep theirs."""
        with self._locked():
            self._closed = True
            dropped = list(self._loaded.values())
            self._loaded.clear()
        del dropped  # outside the lock, since it takes time to free engines

    def _program(self, variants: tuple[Variant, ...], builder: Builder) -> Program:
        keys = {variant: Key(variant, builder.choice, builder.threads) for variant in variants}
        counter = self._counter(keys.values(), builder)
        # What another thread is making comes last: perhaps it is done by then.
        order = sorted(variants, key=lambda variant: self._once.busy(keys[variant]))
        got = {variant: self._get(keys[variant], builder, counter) for variant in order}
        plan = replace(builder.plan, parts={variant: got[variant].part for variant in variants})
        program = load_program(plan, {variant: got[variant] for variant in variants})
        with self._locked():
            self._check_open()
            self._plans.setdefault(builder.threads, builder.plan).parts.update(plan.parts)
            for key in keys.values():
                self._loaded.move_to_end(self._kept_as[key])
            self._programs = [known for known in self._programs if known() is not None]
            self._programs.append(weakref.ref(program))
        return program

    def _get(self, key: Key, builder: Builder, counter: Counter) -> LoadedVariant:
        with self._locked():
            held = self._held(key)
        if held is not None:
            return held
        made = False

        def make() -> LoadedVariant:
            nonlocal made
            with self._locked():
                self._check_open()
                held = self._held(key)
            if held is not None:
                return held
            made = True
            loaded = builder.load(key.variant, counter)
            with self._locked():
                self._check_open()
                kept_as = self._kept_as[key] = key._replace(choice=loaded.part.choice)
                return self._loaded.setdefault(kept_as, loaded)

        loaded = self._once.get(key, make)
        if not made:
            counter.spare(key.variant)
        return loaded

    def _held(self, key: Key) -> LoadedVariant | None:
        return self._loaded.get(self._kept_as.setdefault(key, key))

    def _builder(self, choice: Literal["auto", "cut", "inline"], threads: int | None) -> Builder:
        with self._locked():
            if (choice, threads) not in self._builders:
                options = replace(self._options, choice=choice, threads=threads)
                self._builders[choice, threads] = Builder(self._bundle, options)
            return self._builders[choice, threads]

    def _counter(self, keys: Iterable[Key], builder: Builder) -> Counter:
        """For a progress bar over everything that must be built."""
        counter = Counter(self.progress)
        with self._locked():
            missing = [key.variant for key in keys if self._held(key) is None]
        for variant in missing:
            if not builder.is_kept(variant):
                counter.expect(variant, builder.count(variant))
        return counter

    def _end(self, uses: tuple[Use, ...]) -> None:
        """A program of these variants is gone."""
        self._ended.append(uses)
        self._settle()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            with self._lock:
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Counts programs that are gone, and evicts. Where the lock is taken its holder does so, on letting go of it."""
        while self._ended and self._lock.acquire(blocking=False):
            dropped = []
            try:
                while self._ended:
                    self._uses.subtract(self._ended.popleft())
                over = self._over_budget()
                for key in list(self._loaded) if over else ():
                    if self._uses[Use(key.variant, key.threads)] <= 0 and self._over_budget():
                        dropped.append(self._loaded.pop(key))
                over = over and self._over_budget()
            finally:
                self._lock.release()
            del dropped  # outside the lock, since it takes time to free engines
            if over and self._relieve is not None:
                self._relieve()

    def _over_budget(self) -> bool:
        budget = self._options.memory_budget
        return budget is not None and self._nbytes() > budget

    def _nbytes(self) -> int:
        programs = [known() for known in self._programs]
        buffers = sum(program.buffer_bytes for program in programs if program is not None)
        return buffers + sum(loaded.nbytes for loaded in self._loaded.values())

    def _check_open(self) -> None:
        if self._closed:
            raise StreamClosed("the engine is closed; load another with pyengine.load(...)")


def _by_streams(alone: Iterable[Variant], together: Iterable[Variant]) -> Iterator[tuple[Variant, Variant]]:
    """(the one with the fewest streams in `alone`, one of `together`) of variants that differ in that alone."""
    fewest: dict[Variant, Variant] = {}
    for variant in sorted(alone, key=lambda variant: -variant.symbols.get("streams", 0)):
        fewest[variant.sized(streams=0)] = variant
    for many in together:
        few = fewest.get(many.sized(streams=0))
        if few is None or "streams" not in many.symbols:
            continue
        if many.symbols["streams"] % few.symbols["streams"] == 0:
            yield few, many
