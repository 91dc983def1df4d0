"""The tables of docs/scaling.md, from ranks.csv, rank_kills.csv and ranks_model.csv; bench/tables.py lists them."""

from statistics import median

from common import RESULTS, read

ALONE = {1: "alone", 2: "alone, 2 threads"}


def lines(header: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in [header, ["---"] * len(header), *rows])


def measured() -> str:
    """One row per network, type and number of processes."""
    cells = [
        [
            *(row["network"], row["dtype"], row["images"], row["ranks"] or ALONE[row["threads"]]),
            *(f"{row['seconds']:.1f}", f"{row['peak_memory_bytes'] / 2**20:.0f}"),
            *(f"{(row.get('sum_bytes') or 0) / 2**20:.1f}", row.get("sum") or 0, row.get("check_ins") or 0),
            *(f"{row['difference']:.0e}", "yes" if row["same_masks"] and row["same_iterations"] else "no"),
        ]
        for row in read(RESULTS / "ranks.csv")
    ]
    header = ["network", "type", "images", "processes", "seconds", "peak MiB", "summed MiB", "sums", "check-ins"]
    return lines([*header, "difference", "same masks and iterations"], cells)


def kills() -> str:
    """One row for each of the processes that was killed."""
    rows, cells = read(RESULTS / "rank_kills.csv"), []
    if not rows:
        return "Not measured yet."
    for rank in sorted({row["rank"] for row in rows}):
        own = [row for row in rows if row["rank"] == rank]
        seconds = [row["seconds"] for row in own]
        said = sum(row["lines"] == 1 and row["exit_code"] == 1 for row in own)
        same = sum(row["same_bits"] for row in own)
        ends = f"{median(seconds):.1f}", f"{max(seconds):.1f}"
        cells.append([rank, len(own), *ends, f"{said} of {len(own)}", f"{same} of {len(own)}"])
    return lines(["killed", "times", "s to the end, median", "longest", "one line, exit code 1", "same bits"], cells)


def modelled() -> str:
    """One row per network, number of images and machines."""
    seconds = ("sweep_seconds", "sweep_exchange_seconds", "inverse_seconds", "joint_seconds", "joint_exchange_seconds")
    cells = [
        [
            *(row["network"], f"{row['images']:,}", row["machines"], f"{row['sweep_bytes'] / 1e9:.1f}"),
            *(f"{row[name]:.3g}" if row[name] < 100 else f"{row[name]:.0f}" for name in seconds),
        ]
        for row in read(RESULTS / "ranks_model.csv")
    ]
    header = ["network", "images", "machines", "GB summed a sweep", "sweep s", "its exchange s", "inverses s"]
    return lines([*header, "joint step s", "its exchange s"], cells)
