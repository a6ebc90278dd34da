"""What a pickle of torch.save says, found without unpickling it: its opcodes are followed on a stack of our own, and nothing is called.

    state = read_pickle(data)        # dicts, lists, strings, numbers; Storage and Strided for tensors; Unknown for all else

A name in the pickle (an optimizer's class, a function) stays a name. Three are understood: OrderedDict is a dict, and the two functions by
which torch rebuilds a tensor give a `Strided`.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from pyengine.errors import InputError


class Name(NamedTuple):
    """Something that the pickle would import."""

    module: str
    name: str


class Storage(NamedTuple):
    """So many numbers in the archive: `kind` is torch's name of their type, such as FloatStorage."""

    kind: str
    key: str
    length: int


@dataclass(frozen=True)
class Strided:
    """A tensor: where in a storage it begins, and its shape and strides in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass
class Unknown:
    """An object that is more than data. What it is made of is forgotten."""

    made_by: object


class _Mark:
    pass


_MARK = _Mark()
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": list,
}
# Opcodes whose argument is the value.
_VALUES = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "LONG4", "LONG", "INT", "BINFLOAT", "FLOAT"}
    | {"UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)


def read_pickle(data: bytes) -> Any:
    """The value of a pickle. Raises InputError for one that is cut off or that torch.save does not write."""
    try:
        return _Machine().run(data)
    except InputError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"[checkpoint] expected a pickle of torch.save but its data cannot be followed ({error}); download the file again"
        ) from error


class _Machine:
    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, data: bytes) -> Any:
        for opcode, argument, _ in pickletools.genops(data):
            name = opcode.name
            if name == "STOP":
                return self.stack.pop()
            if name in _VALUES:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _EMPTY:
                self.stack.append(_EMPTY[name]())
            else:
                step = getattr(self, f"_{name.lower()}", None)
                if step is None:
                    raise ValueError(f"opcode {name}")
                step(argument)
        raise ValueError("it has no end")

    def _since_mark(self) -> list[Any]:
        at = max(index for index, value in enumerate(self.stack) if value is _MARK)
        found = self.stack[at + 1 :]
        del self.stack[at:]
        return found

    def _proto(self, _: Any) -> None:
        pass

    _frame = _proto

    def _mark(self, _: Any) -> None:
        self.stack.append(_MARK)

    def _pop(self, _: Any) -> None:
        self.stack.pop()

    def _pop_mark(self, _: Any) -> None:
        self._since_mark()

    def _dup(self, _: Any) -> None:
        self.stack.append(self.stack[-1])

    def _binput(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _long_binput = _put = _binput

    def _memoize(self, _: Any) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _binget(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _long_binget = _get = _binget

    def _tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._since_mark()))

    def _list(self, _: Any) -> None:
        self.stack.append(self._since_mark())

    _frozenset = _list

    def _dict(self, _: Any) -> None:
        items = self._since_mark()
        self.stack.append(dict(zip(items[::2], items[1::2], strict=True)))

    def _tuple1(self, _: Any) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def _tuple2(self, _: Any) -> None:
        self.stack[-2:] = [tuple(self.stack[-2:])]

    def _tuple3(self, _: Any) -> None:
        self.stack[-3:] = [tuple(self.stack[-3:])]

    def _append(self, _: Any) -> None:
        value = self.stack.pop()
        self._extend([value])

    def _appends(self, _: Any) -> None:
        self._extend(self._since_mark())

    _additems = _appends

    def _extend(self, values: list[Any]) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(values)

    def _setitem(self, _: Any) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._update([(key, value)])

    def _setitems(self, _: Any) -> None:
        items = self._since_mark()
        self._update(list(zip(items[::2], items[1::2], strict=True)))

    def _update(self, items: list[tuple[Any, Any]]) -> None:
        if isinstance(self.stack[-1], dict):
            # A key that is no plain value is of no use to anyone who looks for names.
            self.stack[-1].update((k, v) for k, v in items if isinstance(k, (str, int, float, bytes)))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self.stack.append(Name(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Name(str(module), str(name)))

    def _binpersid(self, _: Any) -> None:
        said = self.stack.pop()
        if not isinstance(said, tuple) or len(said) < 5 or said[0] != "storage":
            raise ValueError("a reference that is no storage")
        kind, key, _, count = said[1:5]
        if not isinstance(kind, Name) or not isinstance(key, str) or not isinstance(count, int):
            raise ValueError("a storage without type, key and size")
        self.stack.append(Storage(kind.name, key, count))

    def _newobj(self, _: Any) -> None:
        self.stack.pop()
        self.stack.append(Unknown(self.stack.pop()))

    def _newobj_ex(self, _: Any) -> None:
        del self.stack[-2:]
        self.stack.append(Unknown(self.stack.pop()))

    def _reduce(self, _: Any) -> None:
        given, made_by = self.stack.pop(), self.stack.pop()
        self.stack.append(_made(made_by, given))

    def _build(self, _: Any) -> None:
        self.stack.pop()  # the state of an object: what matters here is what the object holds as a dict


def _made(made_by: object, given: Any) -> Any:
    if made_by == Name("collections", "OrderedDict"):
        return dict(given[0]) if given else {}
    if made_by == Name("torch._utils", "_rebuild_parameter"):
        return given[0]
    if made_by == Name("torch._utils", "_rebuild_tensor_v2"):
        storage, offset, shape, strides = given[:4]
        sizes = (offset, *shape, *strides)
        if not isinstance(storage, Storage) or any(not isinstance(n, int) or n < 0 for n in sizes):
            raise ValueError("a tensor without a storage, shape and strides")
        return Strided(storage, offset, tuple(shape), tuple(strides))
    return Unknown(made_by)
