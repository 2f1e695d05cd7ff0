"""What Numba has no word for: sixteen float32 side by side, a prefetch, and bfloat16.

They compile to what the processor has: one AVX-512 register, two of AVX2, four of NEON. Indices are
not checked.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

WIDTH = 16

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)
_LANES = ir.VectorType(_FLOAT, WIDTH)
_ZEROS = ir.Constant(_LANES, [_FLOAT(0.0)] * WIDTH)


class _Lanes(types.Type):
    def __init__(self) -> None:
        super().__init__(name="Lanes")


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _LANES)  # type: ignore[no-untyped-call]


_lanes: Any = _Lanes()
_compiled: Any = intrinsic
_declare: Any = cgutils.get_or_insert_function


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, value=array).data, [index])


@_compiled
def lanes_zero(_typing):  # type: ignore[no-untyped-def]
    """Return sixteen zeros."""
    return _lanes(), lambda _context, _builder, _signature, _args: _ZEROS


@_compiled
def lanes_add(_typing, lanes, value, array, start):  # type: ignore[no-untyped-def]
    """Return ``lanes + value * array[start : start + 16]`` of a flat float32 array."""
    signature = _lanes(lanes, types.float32, array, types.uintp)

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lanes, value, array, start = args
        source = _address(context, builder, signature.args[2], array, start)
        row = builder.load(builder.bitcast(source, _LANES.as_pointer()), align=4)
        first = builder.insert_element(_ZEROS, value, _INT(0))
        every = ir.Constant(ir.VectorType(_INT, WIDTH), [_INT(0)] * WIDTH)
        kind = ir.FunctionType(_LANES, [_LANES] * 3)
        fma = _declare(builder.module, kind, f"llvm.fma.v{WIDTH}f32")
        return builder.call(fma, [builder.shuffle_vector(first, _ZEROS, every), row, lanes])

    return signature, code


@_compiled
def lanes_store(_typing, array, start, lanes):  # type: ignore[no-untyped-def]
    """Write ``array[start : start + 16] = lanes`` into a flat float32 array."""
    signature = types.void(array, types.uintp, lanes)

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array, start, lanes = args
        target = _address(context, builder, signature.args[0], array, start)
        builder.store(lanes, builder.bitcast(target, _LANES.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, code


@_compiled
def prefetch(_typing, array, index):  # type: ignore[no-untyped-def]
    """Ask for ``array[index]``, which may lie beyond the array's end, to be in the cache soon."""
    signature = types.void(array, types.uintp)

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _address(context, builder, signature.args[0], *args)
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _INT, _INT, _INT])
        call = _declare(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [place, _INT(0), _INT(3), _INT(1)])  # to read, keep near, data
        return context.get_dummy_value()

    return signature, code


@_compiled
def as_float(_typing, value):  # type: ignore[no-untyped-def]
    """Return a float32 as it is, and the bits of a bfloat16 (a uint16) as the float32 they are."""

    def code(_context, builder, signature, args):  # type: ignore[no-untyped-def]
        if signature.args[0] == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _INT), _INT(16)), _FLOAT)

    return types.float32(value), code
