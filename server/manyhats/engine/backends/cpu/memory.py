"""Arrays of a kernel, for code that emits LLVM's instructions."""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from manyhats.engine.backends.cpu.packing import GROUP_ROWS
from manyhats.engine.backends.cpu.simd import ask_ahead, element, spread

_I8, _I32 = ir.IntType(8), ir.IntType(32)


class Memory:
    """One array of the kernel, at indices of its elements."""

    def __init__(self, context: Any, builder: Any, array_type: Any, array: Any) -> None:
        self._builder = builder
        self._pointer = lambda index: element(context, builder, array_type, array, index)
        self._align = array_type.dtype.bitwidth // 8

    def load(self, index: Any, kind: Any) -> Any:
        """A value of an LLVM type."""
        pointer = self._builder.bitcast(self._pointer(index), kind.as_pointer())
        return self._builder.load(pointer, align=self._align)

    def store(self, index: Any, value: Any) -> None:
        """A value of any LLVM type."""
        pointer = self._builder.bitcast(self._pointer(index), value.type.as_pointer())
        self._builder.store(value, pointer, align=self._align)

    def ask_ahead(self, index: Any) -> None:
        """Asks for the cache line of an element, which may lie past the end."""
        ask_ahead(self._builder, self._builder.bitcast(self._pointer(index), _I8.as_pointer()), near=3)

    def spread(self, index: Any) -> Any:
        """A 32-bit value in every lane."""
        return spread(self._builder, self.load(index, _I32), GROUP_ROWS)
