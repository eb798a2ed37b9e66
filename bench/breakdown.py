"""Where the blocked backend's time goes: its products alone, its exponentials alone, and the rest."""

import time
from collections.abc import Callable

import torch

from bench.providers import PROVIDERS
from fastkd.backends.blocked.gemm import product
from fastkd.backends.blocked.tiles import Workspace, blocks, for_each_tile, pair_rounds

ROWS, WIDTH, REPEATS = 8192, 128, 7


def _fastest(run: Callable[[], None]) -> float:
    run()
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure() -> dict[str, float]:
    """Seconds, the fastest of a few runs: forward + backward, and the same tiles with nothing but one kind of work."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(ROWS, WIDTH, generator=generator, requires_grad=True) for _ in range(2))
    scale = torch.tensor(2.718, requires_grad=True)
    loss = PROVIDERS["fastkd blocked"]()
    rows_a, rows_b = a.detach() / WIDTH, b.detach() / WIDTH
    row_blocks = blocks(ROWS, rows_a.device)
    transposed = {block.start: rows_a[block].T.contiguous() for block in row_blocks}

    def products(rows: slice, cols: slice, workspace: Workspace) -> None:
        # A tile and its mirror image: similarities forward and again backward, then four products with the gradient.
        G = product(rows_a[rows], rows_b[cols])
        product(rows_a[rows], rows_b[cols])
        product(G, rows_b[cols].T)
        product(transposed[rows.start], G.T)
        if rows != cols:
            product(rows_b[rows], rows_a[cols])
            product(rows_b[rows], rows_a[cols])
            product(G, rows_a[cols].T)
            product(transposed[rows.start], G.T)

    def exponentials(rows: slice, cols: slice, workspace: Workspace) -> None:
        X, U = workspace(rows, cols)
        for _ in range(2 if rows == cols else 4):
            torch.exp(X, out=U)

    def tiles(work: Callable[[slice, slice, Workspace], None]) -> Callable[[], None]:
        return lambda: for_each_tile(pair_rounds(row_blocks), work, rows_a, buffers=2)

    with torch.no_grad():
        parts = {"products": _fastest(tiles(products)), "exponentials": _fastest(tiles(exponentials))}
    total = _fastest(lambda: loss(a, b, scale).backward())
    return {"forward + backward": total, **parts, "all the rest": total - sum(parts.values())}


def markdown() -> str:
    """A table of :func:`measure`."""
    operations = 8 * ROWS**2 * WIDTH
    lines = [
        f"## Where the time of `fastkd blocked` goes, N = {ROWS}",
        "",
        "The same tiles on the same workers with nothing but the products, or nothing but the exponentials; fastest of",
        f"{REPEATS}. The rest: element-wise passes, row sums, normalisation, autograd, Python.",
        "",
        "| part | ms | |",
        "|---|---:|---|",
    ]
    notes = {"products": f"{operations / 1e9:.1f} GFLOP", "exponentials": f"{2 * ROWS**2 / 1e6:.0f} million"}
    for part, seconds in measure().items():
        note = notes.get(part, "")
        if part == "products":
            note += f" at {operations / seconds / 1e9:.0f} GFLOP/s"
        lines.append(f"| {part} | {1e3 * seconds:.0f} | {note} |")
    return "\n".join(lines) + "\n"
