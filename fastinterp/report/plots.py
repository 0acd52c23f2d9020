"""The figures of the report, as plotly figures that the page embeds."""

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from fastinterp.report.statistics import Statistics
from fastinterp.report.tables import NO_VALUE, format_number

# Light-mode colours; the page repaints figures when the reader's scheme is dark, from the same two lists.
DIVERGING = {
    "light": ["#1f4e8c", "#5b8fc7", "#b9d2ea", "#f6f5f2", "#f3c3ae", "#d9765a", "#9b2a2f"],
    "dark": ["#8fc0ff", "#4d86c9", "#28456b", "#20242b", "#66382f", "#cf6a4c", "#ffab8f"],
}
_LAYERS = ["#e0a030", "#d1495b", "#8a6fd1"]
_ACCENT = "#3b76b8"
_INK, _GRID = "#23272f", "#e3e4e8"
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_MAX_TICKS = 16
_LABELLED_POINTS = 8

CONFIG: dict[str, Any] = {
    "responsive": True,
    "displaylogo": False,
    # plotly.js would offer to upload the figure's data. The buttons are listed, so that no update adds one.
    "showSendToCloud": False,
    "modeBarButtons": [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]],
}


def scale(colours: list[str]) -> list[list[Any]]:
    """Returns evenly spaced colours as plotly's colour scale."""
    return [[i / (len(colours) - 1), colour] for i, colour in enumerate(colours)]


def plain(text: object) -> str:
    """Returns text that plotly shows as it is: its labels read a subset of HTML."""
    return html.escape(str(text), quote=False).replace("\n", " ")


def with_units(name: str, units: str) -> str:
    """Returns ``name (units)``, or the name alone."""
    return plain(f"{name} ({units})" if units else name)


def heatmap(statistics: Statistics, labels: list[list[str]], layers: list[Any], heads: list[Any], units: str) -> Any:
    """Returns the layer by head map of the mean over prompts; colours are centred at zero."""
    mean = statistics.mean
    finite = np.abs(mean[np.isfinite(mean)])
    limit = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    figure = go.Figure(
        go.Heatmap(
            z=np.where(np.isfinite(mean), mean, np.nan).tolist(),
            x=[str(head) for head in heads],
            y=[str(layer) for layer in layers],
            customdata=labels,
            hovertext=_hover(statistics, labels, units),
            hoverinfo="text",
            hoverongaps=False,
            zmin=-limit,
            zmax=limit,
            zmid=0,
            colorscale=scale(DIVERGING["light"]),
            xgap=1,
            ygap=1,
            colorbar={
                "title": {"text": plain(units), "side": "top"},
                "thickness": 12,
                "outlinewidth": 0,
                "nticks": 7,
            },
        )
    )
    # Category axes keep cells of one size when a scan took only some of the layers.
    figure.update_xaxes(title="head", type="category", tickvals=_ticks(heads), showgrid=False)
    figure.update_yaxes(title="layer", type="category", tickvals=_ticks(layers), showgrid=False, autorange="reversed")
    return _styled(figure, height=min(1100, 90 + max(150, 19 * len(layers))))


def heatmap_width(n_heads: int) -> int:
    """Widest that a map of this many heads should be drawn, in pixels."""
    return 170 + max(90, 64 * n_heads)


def scatter(
    horizontal: Statistics,
    vertical: Statistics,
    labels: list[list[str]],
    layers: list[Any],
    titles: tuple[str, str],
    units: tuple[str, str],
) -> Any:
    """Returns one point per head: the mean of one array against the mean of another, coloured by layer."""
    x, y = horizontal.mean.reshape(-1), vertical.mean.reshape(-1)
    names = [label for row in labels for label in row]
    depth = [index for index, row in enumerate(labels) for _ in row]
    both = np.isfinite(x) & np.isfinite(y)
    # The heads furthest out carry their name; labelling all of them would hide the points.
    reach = np.where(both, np.hypot(_unit_range(x), _unit_range(y)), -1.0)
    named = set(np.argsort(-reach, kind="stable")[:_LABELLED_POINTS].tolist())
    keep = np.flatnonzero(both).tolist()
    figure = go.Figure()
    if units[0] == units[1] and keep:
        reference = float(np.abs(np.concatenate([x[keep], y[keep]])).max())
        figure.add_scatter(
            x=[-reference, reference],
            y=[reference, -reference],
            mode="lines",
            line={"color": "#9aa0aa", "width": 1, "dash": "dot"},
            hoverinfo="skip",
            name="y = -x",
        )
    figure.add_scatter(
        x=x[keep].tolist(),
        y=y[keep].tolist(),
        mode="markers+text",
        text=[plain(names[i]) if i in named else "" for i in keep],
        textposition="top center",
        textfont={"size": 11},
        customdata=[names[i] for i in keep],
        hovertext=[
            f"<b>{plain(names[i])}</b><br>{plain(titles[0])}: {_measure(x[i], units[0])}"
            f"<br>{plain(titles[1])}: {_measure(y[i], units[1])}"
            for i in keep
        ],
        hoverinfo="text",
        name="heads",
        cliponaxis=False,
        marker={
            "size": 8,
            "opacity": 0.85,
            "color": [depth[i] for i in keep],
            "colorscale": scale(_LAYERS),
            "cmin": 0,
            "cmax": max(1, len(layers) - 1),
            "showscale": len(layers) > 1,
            "colorbar": {
                "title": {"text": "layer", "side": "top"},
                "thickness": 12,
                "outlinewidth": 0,
                "tickvals": _tick_positions(len(layers)),
                "ticktext": _ticks(layers),
            },
        },
    )
    if keep:
        # The reference line must not decide what is in view.
        figure.update_xaxes(range=_padded(x[keep]))
        figure.update_yaxes(range=_padded(y[keep]))
    figure.update_xaxes(title=with_units(titles[0], units[0]), zeroline=True)
    figure.update_yaxes(title=with_units(titles[1], units[1]), zeroline=True)
    return _styled(figure, height=480)


def profile(statistics: Statistics, positions: list[Any], axis: str, title: str, units: str) -> Any:
    """Returns the mean with its standard error along layers (a line) or sites (bars)."""
    mean, error = statistics.mean, statistics.standard_error
    shared = {
        "x": [plain(position) for position in positions],
        "y": [value if np.isfinite(value) else None for value in mean.tolist()],
        "error_y": {
            "type": "data",
            "array": [value if np.isfinite(value) else 0 for value in error.tolist()],
            "thickness": 1,
            "width": 2,
        },
        "hovertext": [
            f"<b>{plain(axis)} {plain(position)}</b><br>" + _description(statistics, (index,), units)
            for index, position in enumerate(positions)
        ],
        "hoverinfo": "text",
        "name": plain(title),
    }
    if axis == "layer":
        trace = go.Scatter(mode="lines+markers", line={"color": _ACCENT, "width": 2}, marker={"size": 6}, **shared)
    else:
        trace = go.Bar(marker={"color": _ACCENT}, **shared)
    figure = go.Figure(trace)
    figure.update_xaxes(title=axis, type="category", tickvals=_ticks(positions, limit=40))
    figure.update_yaxes(title=with_units("mean", units), zeroline=True)
    return _styled(figure, height=380)


# Pieces -----------------------------------------------------------------------------------------------------


def _styled(figure: Any, height: int) -> Any:
    for axes in (figure.update_xaxes, figure.update_yaxes):
        axes(gridcolor=_GRID, zerolinecolor="#9aa0aa", zerolinewidth=1, automargin=True)
    figure.update_layout(
        template="none",
        height=height,
        margin={"l": 52, "r": 12, "t": 24, "b": 46},
        font={"family": _FONT, "size": 12, "color": _INK},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        showlegend=False,
        hoverlabel={"font": {"family": _FONT, "size": 12}, "align": "left"},
    )
    return figure


def _hover(statistics: Statistics, labels: list[list[str]], units: str) -> list[list[str]]:
    return [
        [
            f"<b>{plain(label)}</b><br>" + _description(statistics, (layer, head), units)
            for head, label in enumerate(row)
        ]
        for layer, row in enumerate(labels)
    ]


def _description(statistics: Statistics, index: tuple[int, ...], units: str) -> str:
    count = int(statistics.count[index])
    if count == 0:
        return "no value"
    error = statistics.standard_error[index]
    spread = "one prompt" if count == 1 else f"standard error {format_number(error)}, {count:,} prompts"
    return f"mean {_measure(statistics.mean[index], units)}<br>{spread}"


def _measure(value: float, units: str) -> str:
    text = format_number(value)
    return f"{text} {plain(units)}" if units and text != NO_VALUE else text


def _tick_positions(size: int, limit: int = _MAX_TICKS) -> list[int]:
    return list(range(0, size, max(1, -(-size // limit))))


def _ticks(values: list[Any], limit: int = _MAX_TICKS) -> list[str]:
    return [plain(values[index]) for index in _tick_positions(len(values), limit)]


def _unit_range(values: Any) -> Any:
    largest = np.abs(values[np.isfinite(values)]).max(initial=0.0)
    return np.where(np.isfinite(values), values, 0.0) / (largest or 1.0)


def _padded(values: Any) -> list[float]:
    low, high = min(0.0, float(values.min())), max(0.0, float(values.max()))
    margin = 0.08 * (high - low) or 1.0
    return [low - margin, high + margin]
