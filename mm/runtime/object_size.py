"""How many bytes an object takes, with everything that it alone keeps alive.

A walk over the object graph, for models: never the growth of the process, which says more about
the allocator and the other models than about this one. The rules:

1. Each object counts once, with what ``sys.getsizeof`` says, garbage collector's header included.
2. An object leads to what ``gc.get_referents`` names: items of containers, attributes in a
   ``__dict__`` or in slots, cells, bound objects.
3. An array counts with its whole buffer, even if it shows only a part of it, because the buffer
   lives as long as the array. A buffer counts once, by its address, however many arrays share it.
   Arrays of objects lead to their elements.
4. Compiled classes hide memory from Python (the nodes of a scikit-learn tree, a k-d tree). Their
   state as pickle would take it counts instead: ``__getstate__``, else ``__reduce__``. Arrays in
   it that show the object's own memory count by rule 3.
5. Modules, classes, functions, code and weak references neither count nor lead anywhere: they
   are not the model's own.

What is not seen: memory of C and C++ libraries behind handles, and the allocator's waste.
"""

from __future__ import annotations

import array as arrays
import gc
import mmap
import sys
import types
import weakref
from typing import Any, Final

import numpy as np

_NOT_OWN: Final = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
    types.MethodDescriptorType,
    types.WrapperDescriptorType,
    weakref.ref,
    np.dtype,
    np.ufunc,
)

_LEAVES: Final = (str, bytes, bytearray, int, float, complex, bool, type(None), np.generic)

#: Exporters of buffers whose own size tells the buffer's.
_OWNERS: Final = (np.ndarray, bytes, bytearray, arrays.array, mmap.mmap)

_PYTHON_MODULES: Final = ("builtins", "collections", "datetime", "_io", "_random", "_thread")

#: Type flag of classes made by a ``class`` statement (Py_TPFLAGS_HEAPTYPE).
_HEAP_TYPE: Final = 1 << 9


def object_size_bytes(root: object) -> int:
    """Answer the bytes of an object and what it leads to, by the rules above."""
    return _Walk().total(root)


class _Walk:
    def __init__(self) -> None:
        self._seen: set[int] = set()
        #: Address of a buffer -> its bytes.
        self._buffers: dict[int, int] = {}
        #: Ids are good only while their objects live: keeps states made by rule 4 alive.
        self._states: list[object] = []
        self._pending: list[object] = []

    def total(self, root: object) -> int:
        size_bytes = 0
        self._pending.append(root)
        while self._pending:
            obj = self._pending.pop()
            if id(obj) in self._seen or isinstance(obj, _NOT_OWN) or _is_compiled_function(obj):
                continue
            self._seen.add(id(obj))
            size_bytes += self._visit(obj)
        return size_bytes + sum(self._buffers.values())

    def _visit(self, obj: object) -> int:
        """Answer an object's own bytes, without buffers; queue what it leads to."""
        if isinstance(obj, np.ndarray):
            return self._visit_array(obj)
        if isinstance(obj, memoryview):
            self._pending.append(obj.obj)
        elif isinstance(obj, mmap.mmap):
            return sys.getsizeof(obj) + len(obj)
        elif not isinstance(obj, _LEAVES):
            self._pending.extend(gc.get_referents(obj))
            if isinstance(obj, dict):
                self._pending.extend(obj)  # the collector skips keys that are all text
            if is_opaque(type(obj)):
                self._visit_state(obj)
        return sys.getsizeof(obj)

    def _visit_array(self, array: np.ndarray[Any, Any]) -> int:
        if array.dtype.hasobject:
            self._pending.extend(array.ravel().tolist())
        self._pending.extend(gc.get_referents(array))  # the __dict__ of a subclass
        own_bytes = sys.getsizeof(array)
        if array.flags.owndata:
            self._add_buffer(array)
            return own_bytes - array.nbytes
        if array.base is not None:
            self._pending.append(array.base)
        if not isinstance(_owner(array), _OWNERS):
            self._add_buffer(array)
        return own_bytes

    def _add_buffer(self, array: np.ndarray[Any, Any]) -> None:
        address = array.__array_interface__["data"][0]
        self._buffers[address] = max(array.nbytes, self._buffers.get(address, 0))

    def _visit_state(self, obj: object) -> None:
        cls = type(obj)
        try:
            has_state = cls.__getstate__ is not object.__getstate__
            state = obj.__getstate__() if has_state else obj.__reduce__()
        except (TypeError, NotImplementedError, AttributeError):
            return  # cannot be pickled: what rule 2 sees is all there is
        self._states.append(state)
        self._pending.append(state)


def is_opaque(cls: type) -> bool:
    """Answer whether a class, or one that it extends, is compiled and says how it is pickled.

    Python's own are left out: ``sys.getsizeof`` and ``gc.get_referents`` see all of them.
    """
    return any(
        not base.__flags__ & _HEAP_TYPE
        and base.__module__ not in _PYTHON_MODULES
        and not vars(base).keys().isdisjoint(("__getstate__", "__reduce__"))
        for base in cls.__mro__
    )


def _is_compiled_function(obj: object) -> bool:
    """Answer whether an object is a function of Cython's: each module has a type for its own."""
    return type(obj).__name__ == "cython_function_or_method"


def _owner(array: np.ndarray[Any, Any]) -> object:
    """Answer the object at the end of an array's chain of bases."""
    owner: object = array
    while True:
        if isinstance(owner, np.ndarray) and owner.base is not None:
            owner = owner.base
        elif isinstance(owner, memoryview):
            owner = owner.obj
        else:
            return owner
