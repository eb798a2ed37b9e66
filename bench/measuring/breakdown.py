"""Measures where the blocked backend's time goes: its products alone, its exponentials alone, and the rest."""

from collections.abc import Callable

import torch

from bench.measure import called_ms
from bench.providers import PROVIDERS
from bench.report import table
from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.tiles import Workspace, blocks, for_each_tile, pair_rounds

ROWS, WIDTH, REPEATS = 8192, 128, 7


def _fastest(run: Callable[[], None]) -> float:
    run()
    return min(called_ms(run) for _ in range(REPEATS))


def measure() -> dict[str, float]:
    """Milliseconds of forward + backward, and of the same tiles with one kind of work alone, fastest of some runs."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.718, requires_grad=True)
    loss = PROVIDERS["fastkd blocked"]()
    rows_a, rows_b = a.detach() / WIDTH, b.detach() / WIDTH
    row_blocks = blocks(ROWS, rows_a.device)
    transposed = {block.start: rows_a[block].T.contiguous() for block in row_blocks}

    def products(rows: slice, cols: slice, workspace: Workspace) -> None:
        # For a tile and its mirror image: similarities forward and again backward, then two products with the gradient.
        for x, y in ((rows_a, rows_b), (rows_b, rows_a))[: 1 if rows == cols else 2]:
            product(x[rows], y[cols])
            G = product(x[rows], y[cols])
            product(G, y[cols].T)
            product(transposed[rows.start], G.T)

    def exponentials(rows: slice, cols: slice, workspace: Workspace) -> None:
        X, U = workspace(rows, cols)
        for _ in range(2 if rows == cols else 4):
            torch.exp2(X, out=U)

    def tiles(work: Callable[[slice, slice, Workspace], None]) -> Callable[[], None]:
        return lambda: for_each_tile(pair_rounds(row_blocks), work, rows_a, buffers=2)

    with torch.no_grad():
        parts = {"products": _fastest(tiles(products)), "exponentials": _fastest(tiles(exponentials))}
    total = _fastest(lambda: loss(a, b, scale).backward())
    return {"forward + backward": total, **parts, "all the rest": total - sum(parts.values())}


def markdown() -> str:
    """A table of :func:`measure`."""
    operations, rows = 8 * ROWS**2 * WIDTH, []
    notes = {"products": f"{operations / 1e9:.1f} GFLOP", "exponentials": f"{2 * ROWS**2 / 1e6:.0f} million"}
    for part, ms in measure().items():
        rate = f" at {operations / ms / 1e6:.0f} GFLOP/s" if part == "products" else ""
        rows.append([part, f"{ms:.0f}", notes.get(part, "") + rate])
    lines = [
        f"## Where the time of `fastkd blocked` goes, N = {ROWS}",
        "",
        "The same tiles run on the same workers with the products alone, or with the exponentials alone. The rest is",
        f"element-wise passes, row sums, normalisation, autograd and Python. Fastest of {REPEATS} runs.",
        "",
        *table(("part", "ms", "work"), rows),
    ]
    return "\n".join(lines) + "\n"
