"""Images move to NHWC, where a pixel's channels lie together and pack into words.

    y = nn.conv2d(x, W, data_layout="NCHW")   -->   x__nhwc = permute_dims(x, [0, 2, 3, 1])
                                                    y = nn.conv2d(x__nhwc, W, data_layout="NHWC")
    y = nn.conv1d(x, W)                       -->   the same on an image of height 1
    y = nn.conv3d(x, W)                       -->   u = bnncc.unfold_depth(x__nhwc); y = nn.conv2d(u, W')

After all fusions, which read the model's own layout; before packing. Every image becomes 4-D, so that one family of
kernels serves all ranks: [N, C, W] is [N, 1, W, C], and [N, C, D, H, W] is [N·D, H, W, C]. A value keeps its name; a
reader that this pass does not know gets `y__nchw`, permuted back, so that transpositions stand only where a graph
enters, leaves or flattens. Declines nothing: an operator it does not know simply reads the model's layout, and so do
those that serve any layout (elementwise operators, concatenations, where the target has kernels for it also pools and
depthwise convolutions) and that no chain of their kind connects to an operator which gains from this one.

The caller may hold its images channels-last already: then the function's inputs, outputs or both are [N, …, C].

The operators themselves stand in `nhwc_operators.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op as R

from bnncc.dialect.kernels import ELEMENTWISE
from bnncc.dialect.ops import op_name, shape_of
from bnncc.passes import nhwc_operators
from bnncc.passes.rewriter import Origin, Rewriter, is_const, module_pass, numpy_of, operands


def channels_last(rank: int) -> tuple[int, ...]:
    """The permutation from N, C, … to N, …, C."""
    return (0, *range(2, rank), 1)


def channels_first(rank: int) -> tuple[int, ...]:
    return (0, rank - 1, *range(1, rank - 1))


def image_shape(shape: tuple[int, ...]) -> tuple[int, int, int, int]:
    """The 4-D image of a value [N, C, W], [N, C, H, W] or [N, C, D, H, W]."""
    n, c, *image = shape
    if len(image) == 1:
        return n, 1, image[0], c
    if len(image) == 3:
        return n * image[0], image[1], image[2], c
    return n, image[0], image[1], c


class _ToNHWC(Rewriter):
    def __init__(self, mod: Any, channels_last: str, planar_windows: bool):
        super().__init__(mod)
        self.channels_last = channels_last
        self.planar_windows = planar_windows
        self.images: set[Any] = set()  # new variables that are images
        self.nhwc: dict[Any, Any] = {}  # new variable in the model's layout → its image
        self.helper: Origin | None = None  # of what an operator computes on the way to its value
        self.nchw: dict[Any, Any] = {}  # (image, shape) → it in the model's layout, once something needed that

        self.apart = self.without_images()

    def without_images(self) -> set[Any]:
        """The results of operators that serve any layout and meet no other on images, directly or among their like.

        Moving them would cost two transpositions and gain nothing.
        """
        parent: dict[Any, Any] = {}

        def root(var: Any) -> Any:
            while (above := parent.get(var, var)) is not var:
                var = above
            return var

        met: list[Any] = []
        for binding in self.bindings:
            var, name = binding.var, str(op_name(binding.value))
            planar = self.planar_windows and nhwc_operators.is_planar(binding.value)
            if planar or name in ELEMENTWISE or name in nhwc_operators.ANY_LAYOUT:
                for operand in operands(binding.value):
                    parent[root(operand)] = root(var)
            elif name in nhwc_operators.OPERATORS and name != "reshape":
                met += [var, *operands(binding.value)]
        images = {root(var) for var in met}
        return {var for var in self.definition if root(var) not in images}

    def params(self) -> list[Any]:
        if self.channels_last not in ("inputs", "both"):
            return super().params()
        return [_channels_last_param(param) for param in self.func.params]

    def begin(self) -> None:
        for old, new in zip(self.func.params, self.new_params, strict=True):
            if not new.same_as(old):
                shape = shape_of(old)
                image = new if len(shape) == 4 else self.emit(R.reshape(new, image_shape(shape)), f"{old.name}__image")
                self.stands_for(new, old, channels_last(len(shape)))
                self.images.add(image)
                self.replace(old, image)

    def rewrite(self, var: Any, value: Any) -> Any | None:
        old = self.definition[var]
        name = op_name(old)
        operator = nhwc_operators.OPERATORS.get(str(name))
        origin = self.origin(var)
        self.helper = Origin("", origin.path) if origin else None
        new = None
        if var in self.apart and not any(self.replaced(v) in self.images for v in operands(old)):
            pass
        elif operator is not None:
            new = operator(self, old)
        elif name in ELEMENTWISE:
            new = self.elementwise(old)
        if new is None:
            return self.in_model_layout(old)
        result = self.emit(new, var.name)
        rank = len(shape_of(var))
        if rank >= 3:
            self.images.add(result)
            if origin:
                self.origins[var.name] = replace(origin, order=channels_last(rank))
        return result

    def image(self, old: Any) -> Any:
        """An old operand as a 4-D NHWC variable."""
        new = self.replaced(old)
        if new in self.images:
            return new
        if new not in self.nhwc:
            shape = shape_of(old)
            order = channels_last(len(shape))
            moved = self.emit(R.permute_dims(new, order), f"{old.name}__nhwc")
            self.stands_for(moved, old, order)
            if len(shape) != 4:
                moved = self.emit(R.reshape(moved, image_shape(shape)), f"{old.name}__image")
            self.nhwc[new] = moved
        return self.nhwc[new]

    def plain(self, old: Any) -> Any:
        """An old operand in the model's layout."""
        if isinstance(old, relax.Tuple):
            return relax.Tuple([self.plain(field) for field in old.fields])
        new = self.replaced(old)
        if new not in self.images:
            return new
        if new not in self.nchw:
            shape = shape_of(old)
            source = new
            if len(shape) != 4:
                moved = tuple(shape[axis] for axis in channels_last(len(shape)))
                source = self.emit(R.reshape(new, moved), f"{old.name}__nhwc")
            self.nchw[new] = self.emit(R.permute_dims(source, channels_first(len(shape))), f"{old.name}__nchw")
            self.stands_for(self.nchw[new], old, None)
        return self.nchw[new]

    def last(self, old: Any) -> Any:
        """An old value with its channels last, in its own rank."""
        while isinstance(self.definition.get(old), relax.Var | relax.Tuple):
            old = self.definition[old]  # another name of a value
        if isinstance(old, relax.Tuple):
            return relax.Tuple([self.last(field) for field in old.fields])
        shape, new = shape_of(old), self.replaced(old)
        if len(shape) < 3 or not isinstance(new, relax.Var):
            return self.plain(old)
        order = channels_last(len(shape))
        if new not in self.images:
            new = self.emit(R.permute_dims(new, order), f"{old.name}__nhwc")
        elif len(shape) != 4:
            new = self.emit(R.reshape(new, tuple(shape[axis] for axis in order)), f"{old.name}__nhwc")
        self.stands_for(new, old, order)
        return new

    def stands_for(self, new: Any, old: Any, order: tuple[int, ...] | None) -> None:
        """Notes that a new variable holds an old one's value, in this order of its axes."""
        if origin := self.origin(old):
            self.origins[new.name] = replace(origin, order=order)

    def in_model_layout(self, old: Any) -> Any | None:
        if isinstance(old, relax.Call):
            args = [self.plain(a) if isinstance(a, (relax.Var, relax.Tuple)) else a for a in old.args]
            return relax.Call(old.op, args, old.attrs, old.ty_args)
        return None if isinstance(old, relax.TupleGetItem) else self.plain(old)

    def finish(self, output: Any) -> Any:
        old = self.func.body.body
        return self.last(old) if self.channels_last in ("outputs", "both") else self.plain(old)

    def elementwise(self, old: relax.Call) -> Any | None:
        """On images if all its operands can be; image by image, so nothing it reads may vary with the depth."""
        shape = shape_of(old)
        if len(shape) < 3:
            return None
        args = []
        for arg in old.args:
            if isinstance(arg, relax.Var):
                own = shape_of(arg)
                if len(own) != len(shape) or (len(shape) == 5 and own[2] != shape[2]):
                    return None
                args.append(self.image(arg))
            elif is_const(arg) and numpy_of(arg).ndim:
                image = _image_const(numpy_of(arg), shape)
                if image is None:
                    return None
                args.append(image)
            else:
                args.append(arg)
        return relax.Call(old.op, args, old.attrs, old.ty_args)


def _image_const(array: np.ndarray, shape: tuple[int, ...]) -> Any | None:
    """A constant that broadcasts against `shape`, for that shape's image; None if it varies along N or D of N·D."""
    rank = len(shape)
    full = array.reshape((1,) * (rank - array.ndim) + array.shape)
    if rank == 5 and (full.shape[0] != 1 or full.shape[2] != 1):
        return None
    moved = np.ascontiguousarray(full.transpose(channels_last(rank)))
    if rank == 3:
        return relax.const(moved[:, None])
    return relax.const(moved[:, 0] if rank == 5 else moved)


def _channels_last_param(param: Any) -> Any:
    shape = shape_of(param)
    if len(shape) < 3:
        return param
    moved = tuple(shape[axis] for axis in channels_last(len(shape)))
    return relax.Var(param.name, relax.TensorType(moved, param.ty.dtype))


def ToNHWC(channels_last: str = "none", planar_windows: bool = False) -> Any:
    """The pass; channels_last: "inputs", "outputs" or "both" of the function are N, …, C instead of N, C, ….

    planar_windows: the target computes pools and depthwise convolutions as well in the model's layout.
    """
    return module_pass(lambda mod: _ToNHWC(mod, channels_last, planar_windows).run(), "ToNHWC")
