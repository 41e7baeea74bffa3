"""The tiles that a search may try: what the schedules take, the most promising by the cost model first."""

from __future__ import annotations

from .tiles import Tile, TileRequest, tile_cost

#: Registers beyond those that the rules give to sums: some temporaries are shorter-lived than the rules assume.
_SPARE = 3


def candidates(request: TileRequest, most: int) -> tuple[Tile, ...]:
    """At most so many legal tiles: the default, then the others, the cheapest by the cost model first."""
    shape, chunk = request.shape, request.chunk or request.shape.blocks
    sums = request.accumulators + _SPARE
    pixels = min(request.most_pixels, sums * request.together)
    tiles = {
        Tile(rows, cols, vectors)
        for vectors in range(1, min(chunk, sums) + 1)
        for rows in range(1, min(shape.height, pixels) + 1)
        for cols in range(1, min(shape.width, pixels // rows) + 1)
    }
    found = sorted(
        (tile for tile in tiles if tile != request.default and is_legal(request, tile)),
        key=lambda tile: (tile_cost(shape.height, shape.width, chunk, tile), tile.rows, tile.cols),
    )
    return (request.default, *found)[:most]


def is_legal(request: TileRequest, tile: Tile) -> bool:
    """Whether a schedule can be made with this tile whose sums fit the registers, or nearly so."""
    if tile == request.default:
        return True
    shape, pixels = request.shape, tile.rows * tile.cols
    if min(tile.rows, tile.cols, tile.vectors) < 1 or tile.cols > shape.width or pixels > request.most_pixels:
        return False
    # Only columns and channels may leave a rest: it is those loops that are peeled; not where pixels share a vector.
    if shape.height % tile.rows or tile.cols % request.together:
        return False
    if request.together > 1 and shape.width % tile.cols:
        return False
    registers = (pixels // request.together + request.weights) * tile.vectors
    return registers <= request.accumulators + _SPARE and _divides_channels(request, tile.vectors)


def _divides_channels(request: TileRequest, vectors: int) -> bool:
    shape = request.shape
    if request.chunk:
        return request.chunk % vectors == 0
    if not shape.whole_blocks:  # the whole group is one tile's
        return vectors == request.default.vectors
    return vectors <= shape.blocks if shape.groups == 1 else shape.blocks % vectors == 0
