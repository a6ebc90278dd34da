"""Encodes prompts, each once however many streams show it."""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping

import numpy as np

from pyengine.bundle.variant import Variant
from pyengine.once import Once
from pyengine.runtime.executor import Executor
from pyengine.runtime.program import Program

__all__ = ["PromptEncoder"]

Features = dict[str, np.ndarray]
EXECUTORS = 2  # that encode at the same time: a prompt waits for others hardly longer than one encoding takes
KEPT = 32  # prompts whose features are kept, the last ones used


class PromptEncoder:
    """The text encoder with executors of its own, shared by all streams of an engine and their threads.

    inputs   makes the encoder's inputs of a prompt. Raises PromptError
    program  gives the loaded encoder
    has_room  whether an executor may be kept in reserve
    """

    def __init__(
        self,
        variant: Variant,
        outputs: Mapping[str, object],
        inputs: Callable[[str], Mapping[str, np.ndarray]],
        program: Callable[[], Program],
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        self._variant, self._outputs = variant, tuple(outputs)
        self._inputs, self._program, self._has_room = inputs, program, has_room
        self._room = threading.BoundedSemaphore(EXECUTORS)
        self._idle: deque[Executor] = deque()
        self._lock = threading.Lock()
        self._features: OrderedDict[str, Features] = OrderedDict()
        self._once: Once[str, Features] = Once()
        self._closed = False

    def features(self, prompt: str) -> Features:
        """The encoder's outputs by name, read-only. Raises PromptError."""
        known = self._known(prompt)
        return dict(self._once.get(prompt, lambda: self._make(prompt)) if known is None else known)

    def release(self) -> None:
        """Closes the executors that encode nothing just now."""
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def close(self) -> None:
        """Closes every executor, one that is at work as soon as it is done, and forgets the features."""
        self._closed = True
        self.release()
        with self._lock:
            self._features.clear()

    def _known(self, prompt: str) -> Features | None:
        with self._lock:
            features = self._features.get(prompt)
            if features is not None:
                self._features.move_to_end(prompt)
            return features

    def _make(self, prompt: str) -> Features:
        known = self._known(prompt)
        if known is not None:
            return known
        inputs = self._inputs(prompt)
        with self._room:
            features = self._encode(inputs)
        for array in features.values():
            array.setflags(write=False)
        with self._lock:
            if not self._closed:
                self._features[prompt] = features
                while len(self._features) > KEPT:
                    self._features.popitem(last=False)
        return features

    def _encode(self, inputs: Mapping[str, np.ndarray]) -> Features:
        try:
            executor = self._idle.pop()
        except IndexError:
            executor = self._program().executor()
        try:
            for name, value in inputs.items():
                executor.input(self._variant, name)[...] = value
            executor.run(self._variant)
            return {name: executor.output(self._variant, name).copy() for name in self._outputs}
        finally:
            self._idle.append(executor)
            if self._closed or not self._has_room():
                self.release()
