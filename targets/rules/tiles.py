"""Tiles of registers: how many pixels and channels of a convolution are computed at once, and what that costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Pixels (rows × cols of the output image, or of the batch) times vectors of output channels."""

    rows: int
    cols: int
    vectors: int


@dataclass(frozen=True)
class Shape:
    """Extents of an anchor. A dense layer, and an image of one pixel, count the batch as the width of one image."""

    images: int
    height: int
    width: int
    groups: int
    blocks: int
    lanes: int
    outputs: int
    steps: int
    weight_bytes: int

    @property
    def vector_steps(self) -> float:
        """Steps of the whole kernel on vectors of `lanes`."""
        return float(self.images * self.height * self.width * self.groups * self.blocks * self.steps)

    @property
    def group_outputs(self) -> int:
        return self.outputs // self.groups

    @property
    def whole_blocks(self) -> bool:
        return self.groups == 1 or self.group_outputs % self.lanes == 0


@dataclass(frozen=True)
class TileRequest:
    """What a tile is asked for.

    kind: the rule, and what becomes of its sums. default: the tile by the cost model. together: neighbouring pixels
    that one vector holds. The rest is as in `choose_tile`.
    """

    kind: str
    shape: Shape
    default: Tile
    accumulators: int
    weights: int = 1
    chunk: int | None = None
    most_pixels: int = 64
    together: int = 1


#: Answers a request with a legal tile.
Tiles = Callable[[TileRequest], Tile]


def default_tile(request: TileRequest) -> Tile:
    return request.default


def choose_tile(
    shape: Shape, accumulators: int, *, weights: int = 1, chunk: int | None = None, most_pixels: int = 64
) -> Tile:
    """The cheapest tile of at most `accumulators` registers, with `weights` of them to a vector of weights.

    chunk: number of blocks that is computed together, which the tile's vectors must divide.
    """
    best, best_cost = Tile(1, 1, 1), float("inf")
    blocks = chunk or shape.blocks
    # A rest of blocks costs a launch of the threads for every tile of them, so only where the number is awkward.
    awkward = not chunk and shape.groups == 1 and blocks > 8 and all(blocks % d for d in range(2, 9))
    for vectors in range(1, min(blocks, 8) + 1):
        if blocks % vectors and not awkward:
            continue
        room = min((accumulators - weights * vectors) // vectors, most_pixels)
        if room < 1:
            break
        cols = row_pixels(shape.width, room)
        rows = 1
        if cols == shape.width:
            rows = max(r for r in range(1, shape.height + 1) if shape.height % r == 0 and r * cols <= max(room, cols))
        cost = tile_cost(shape.height, shape.width, blocks, Tile(rows, cols, vectors))
        if cost < best_cost:
            best, best_cost = Tile(rows, cols, vectors), cost
    return best


def row_pixels(width: int, room: int) -> int:
    """Pixels of a row to a tile: a divisor of the width if a good one fits, else equal parts with a rest."""
    if width <= room:
        return width
    exact = max(d for d in range(1, room + 1) if width % d == 0)
    if exact * 2 > room:
        return exact
    tiles = -(-width // room)
    return -(-width // tiles)


def tile_cost(height: int, width: int, blocks: int, tile: Tile) -> float:
    """Cost of one reduction step over an image: the tile's sums, and the loads of its weights and inputs.

    Few independent sums leave the arithmetic's latency exposed.
    """
    pixels = tile.rows * tile.cols
    per_tile = max(pixels * tile.vectors, 6.0) + 0.25 * (pixels + tile.vectors) + 0.5
    return -(-height // tile.rows) * -(-width // tile.cols) * -(-blocks // tile.vectors) * per_tile
