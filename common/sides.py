"""Sizes in pixels and grids of tokens: one number of a square, else (height, width).

Command lines and messages say WIDTHxHEIGHT, as users write sizes; everything else has the height first, as tensors do.
"""

from collections.abc import Sequence

GRID = 256  # the most tokens per side: far above what anyone needs
Sides = int | Sequence[int]


def height_width(sides: Sides) -> tuple[int, int]:
    """Return both sides."""
    return (sides, sides) if isinstance(sides, int) else tuple(sides)


def as_kept(height: int, width: int) -> int | tuple[int, int]:
    """Return both sides as configs and manifests keep them: the side of a square as one number."""
    return height if height == width else (height, width)


def written(sides: Sides) -> str:
    """Return sides as a command line takes them: 512, or 1024x768."""
    return str(sides) if isinstance(sides, int) else f"{sides[1]}x{sides[0]}"


def check_grid(value: object) -> int | tuple[int, int]:
    """Return tokens per side, or (height, width) where they differ, of a config's value; raises ValueError for none."""
    sides = value if isinstance(value, list | tuple) else (value, value)
    if len(sides) != 2 or not all(type(side) is int and 2 <= side <= GRID for side in sides):
        raise ValueError(f"2 to {GRID} tokens per side were expected, or [height, width]")
    return as_kept(*sides)


def same_aspect(a: Sides, b: Sides) -> bool:
    """Return whether two rectangles have exactly one shape."""
    (height_a, width_a), (height_b, width_b) = height_width(a), height_width(b)
    return height_a * width_b == height_b * width_a


def covers(grid: Sides, size: Sides) -> bool:
    """Return whether the cells of a grid over a rectangle are squares, as far as whole numbers of cells allow it."""
    (rows, columns), (height, width) = height_width(grid), height_width(size)
    return abs(rows - columns * height / width) < 1 or abs(columns - rows * width / height) < 1
