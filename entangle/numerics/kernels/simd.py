"""SIMD intrinsics that Numba lacks: vectors of float32, a prefetch, and bfloat16.

A vector of sixteen floats compiles to one AVX-512 register, two AVX2 registers or four NEON
registers. Indices are not checked.
"""

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_FLOAT, _INT = ir.FloatType(), ir.IntType(32)


class _Lanes(types.Type):
    def __init__(self, width: int) -> None:
        super().__init__(name=f"Lanes({width})")
        self.width = width
        self.vector = ir.VectorType(_FLOAT, width)
        self.zeros = ir.Constant(self.vector, [_FLOAT(0.0)] * width)


@register_model(_Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, kind.vector)  # type: ignore[no-untyped-call]


_compiled: Any = intrinsic
_constant: Any = intrinsic(prefer_literal=True)
_lanes: Any = _Lanes
_declare: Any = cgutils.get_or_insert_function


def _address(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    return builder.gep(context.make_array(kind)(context, builder, value=array).data, [index])


@_constant
def lanes_zero(_typing, width):  # type: ignore[no-untyped-def]
    """Return a vector of ``width`` zeros; the width must be a constant."""
    lanes = _lanes(width.literal_value)
    return lanes(width), lambda _context, _builder, _signature, _args: lanes.zeros


@_compiled
def lanes_add(_typing, lanes, value, array, start):  # type: ignore[no-untyped-def]
    """Return ``lanes + value * array[start : start + width]`` of a flat float32 array."""
    signature = lanes(lanes, types.float32, array, types.uintp)

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        lanes, value, array, start = args
        kind, width = signature.args[0].vector, signature.args[0].width
        source = _address(context, builder, signature.args[2], array, start)
        row = builder.load(builder.bitcast(source, kind.as_pointer()), align=4)
        first = builder.insert_element(signature.args[0].zeros, value, _INT(0))
        every = ir.Constant(ir.VectorType(_INT, width), [_INT(0)] * width)
        many = builder.shuffle_vector(first, first, every)
        fma = _declare(builder.module, ir.FunctionType(kind, [kind] * 3), f"llvm.fma.v{width}f32")
        return builder.call(fma, [many, row, lanes])

    return signature, code


@_compiled
def lanes_store(_typing, array, start, lanes):  # type: ignore[no-untyped-def]
    """Write ``array[start : start + width] = lanes`` into a flat float32 array."""
    signature = types.void(array, types.uintp, lanes)

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        array, start, lanes = args
        target = _address(context, builder, signature.args[0], array, start)
        builder.store(lanes, builder.bitcast(target, lanes.type.as_pointer()), align=4)
        return context.get_dummy_value()

    return signature, code


@_compiled
def prefetch(_typing, array, index):  # type: ignore[no-untyped-def]
    """Load ``array[index]`` into the cache; the index may lie beyond the array's end."""
    signature = types.void(array, types.uintp)

    def code(context, builder, signature, args):  # type: ignore[no-untyped-def]
        place = _address(context, builder, signature.args[0], *args)
        place = builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, _INT, _INT, _INT])
        call = _declare(builder.module, kind, "llvm.prefetch.p0")
        builder.call(call, [place, _INT(0), _INT(3), _INT(1)])  # read, keep near, data cache
        return context.get_dummy_value()

    return signature, code


@_compiled
def as_float(_typing, value):  # type: ignore[no-untyped-def]
    """Return a float32 unchanged, or the float32 value of a bfloat16 whose bits are a uint16."""

    def code(_context, builder, signature, args):  # type: ignore[no-untyped-def]
        if signature.args[0] == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _INT), _INT(16)), _FLOAT)

    return types.float32(value), code
