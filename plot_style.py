"""The looks that all plots share: type, colours, titles, heat maps, and how a figure becomes a file.

The colours of methods are those of Okabe and Ito and darker ones, which any colour vision tells apart, and each method
has a marker of its own; shares are drawn in cividis.
"""

import hashlib
import io
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from records import Record
from tables import describe_classes

METHOD_COLOURS = {
    "ocap": "#0072B2",
    "lrp": "#009E73",
    "pxp": "#225522",  # a configuration of lrp: a darker green
    "crisp": "#E69F00",
    "class_taylor": "#56B4E9",
    "firing_rate": "#CC79A7",
    "torchpruner": "#661100",
    "torch_pruning": "#332288",
    "ln_structured": "#D55E00",
    "random": "#858585",  # the controls are grey
    "matched_random": "#444444",
}
# A second sign beside the colour, which tells the methods apart without any.
METHOD_MARKERS = {"ocap": "o", "lrp": ">", "pxp": "<", "crisp": "D", "class_taylor": "^", "firing_rate": "v",
                  "torchpruner": "P", "torch_pruning": "X", "ln_structured": "s", "random": "*",
                  "matched_random": "x"}  # fmt: skip
MARKERS = "o^sDvPX<>p*h"
INK, FAINT, PALE = "#333333", "#8C8C8C", "#E3E3E3"
STYLE = {
    "font.size": 9,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "pdf.fonttype": 42,  # TrueType fonts in the file, as publishers ask
    "savefig.dpi": 200,
    "text.color": INK,
    "text.parse_math": False,  # a class may be called "$5 note"
    "xtick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.color": FAINT,
    "ytick.labelcolor": INK,
}


def method_colour(method: str) -> str:
    """The colour of a method, the same in every plot; of one that is not listed, chosen by its name."""
    palette = list(METHOD_COLOURS.values())
    return METHOD_COLOURS.get(method, palette[hashlib.sha256(method.encode()).digest()[0] % len(palette)])


def variant_style(variant: str) -> dict[str, str]:
    """Colour, marker and line of a variant, by its text alone: its method's, with settings of its own dashed."""
    method, _, changes = variant.partition(" ")
    marker, line = METHOD_MARKERS.get(method, "o"), "-"
    if changes:
        digest = hashlib.sha256(changes.encode()).digest()
        others = MARKERS.replace(marker, "")
        # Any byte would do; by this one the settings that experiments vary have markers that differ.
        marker, line = others[digest[23] % len(others)], ("--", "-.", ":")[digest[1] % 3]
    return {"color": method_colour(method), "marker": marker, "linestyle": line}


def render(figure: Figure) -> dict[str, bytes]:
    """The figure as a PNG and a PDF file, by their suffix; the same figure gives the same bytes."""
    files = {}
    with rc_context(STYLE), _quiet("fontTools"):  # which logs every table of every font it embeds
        figure.draw_without_rendering()  # lays it out, once for both
        figure.set_layout_engine("none")
        for suffix, metadata in (("png", {}), ("pdf", {"CreationDate": None})):
            content = io.BytesIO()
            figure.savefig(content, format=suffix, metadata=metadata)
            files[suffix] = content.getvalue()
    return files


@contextmanager
def _quiet(library: str) -> Iterator[None]:
    """Within the block, of this library's messages only warnings and errors reach the log."""
    logger = logging.getLogger(library)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


def title(figure: Figure, record: Record, what: str) -> None:
    """Two lines at the top left: what is shown, and of which run, with as many class names as there is room for."""
    run = f"{record.method}, {record.model}, {record.dataset}; "
    letters = int(13 * figure.get_figwidth()) - len(run)  # at the size of a title
    classes = describe_classes(record.class_names, room=letters - len(" and 99 more 99 classes: "))
    figure.suptitle(f"{what}\n{run}{classes}", x=0.01, ha="left", linespacing=1.4)


def heat_maps(columns: Sequence[int], rows: Sequence[str], cell_width: float) -> tuple[Figure, list[Axes]]:
    """Heat maps with so many columns side by side, sharing their named rows; cells are `cell_width` inches wide."""
    width = cell_width * sum(columns) + 0.3 * len(columns) + 0.075 * max(map(len, rows))
    figure = Figure(figsize=(max(width, 6.4), 0.19 * len(rows) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False, width_ratios=columns)[0]
    axes[0].set_yticks(range(len(rows)), rows)
    axes[0].set_ylim(len(rows) - 0.5, -0.5)
    return figure, list(axes)


def stacked_heat_maps(rows: Sequence[Sequence[str]], columns: int, cell_width: float) -> tuple[Figure, list[Axes]]:
    """Heat maps below each other, each with named rows of its own, all with the same columns."""
    counts = [len(names) for names in rows]
    width = cell_width * columns + 0.3 + 0.075 * max(len(name) for names in rows for name in names)
    height = 0.19 * sum(counts) + 0.5 * len(counts) + 0.9
    figure = Figure(figsize=(max(width, 6.4), height), layout="constrained")
    axes = list(figure.subplots(len(counts), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0])
    for names, place in zip(rows, axes, strict=True):
        place.set_yticks(range(len(names)), names)
        place.set_ylim(len(names) - 0.5, -0.5)
    return figure, axes


def draw_heat_map(
    axes: Axes, values: Sequence[Sequence[float]], texts: Sequence[Sequence[str]], low: float, high: float
) -> None:
    """Cells in cividis from `low` to `high`, each with its text in whichever of black and white can be read on it."""
    edges = [[position - 0.5 for position in range(count + 1)] for count in (len(values[0]), len(values))]
    axes.pcolormesh(*edges, values, cmap="cividis", vmin=low, vmax=high, edgecolor="white", linewidth=0.6)
    for row, cells in enumerate(values):
        for column, value in enumerate(cells):
            ink = "black" if value > low + 0.55 * (high - low) else "white"
            text = axes.text(column, row, texts[row][column], ha="center", va="center", size=6.5, color=ink)
            text.set_in_layout(False)  # it is inside its cell; measuring hundreds of them takes seconds
    axes.set_xticks(range(len(values[0])))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
