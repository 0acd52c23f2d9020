"""The page as a browser would read it: parsed, without a browser."""

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from fastinterp.errors import OptionError
from fastinterp.report import write_html

NAN = float("nan")
VOID = {"meta", "br", "hr", "img", "input", "link", "col", "source"}
NASTY = "</script><script>alert(1)</script> <b>bold</b> <!-- &amp; {{ 7 * 7 }}\n" + "\"2\" '1' \u2028 🎉"


class Page(HTMLParser):
    """Collects what the tests ask for; unbalanced elements are an error."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[tuple[str, dict[str, str]]] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.scripts: list[tuple[dict[str, str], str]] = []
        self.styles = ""
        self.cells: list[list[str]] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "every element is closed"

    def handle_starttag(self, tag, attrs):
        attributes = {key: value or "" for key, value in attrs}
        self.elements.append((tag, attributes))
        if tag not in VOID:
            self.open.append((tag, attributes))
        if tag == "script":
            self.scripts.append((attributes, ""))
        if self._in_table():
            if tag == "tr":
                self.cells.append([])
            elif tag in ("td", "th"):
                self.cells[-1].append("")

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        tag = self.open[-1][0] if self.open else ""
        if tag == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif tag == "style":
            self.styles += data
        else:
            self.text += data
            if self._in_table() and any(tag in ("td", "th") for tag, _ in self.open):
                self.cells[-1][-1] += data

    def _in_table(self):
        return any(attributes.get("id") == "prompt-table" for _, attributes in self.open)

    @property
    def data(self):
        (text,) = [text for attributes, text in self.scripts if attributes.get("id") == "report-data"]
        return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))

    def figure(self, name: str) -> tuple[list[dict], dict, dict]:
        """Returns traces, layout and configuration of one figure."""
        (call,) = [
            text for _, text in self.scripts if "newPlot" in text and f'"figure-{name}"' in text and len(text) < 1e6
        ]
        decoder, found = json.JSONDecoder(), []
        position = call.index("[", call.index("Plotly.newPlot("))
        for _ in range(3):
            value, position = decoder.raw_decode(call, position)
            found.append(value)
            position = re.compile(r"[\s,]*").match(call, position).end()
        return tuple(found)

    def heads(self, array: str) -> list[str]:
        """Returns the heads listed under one array, in the order of the page."""
        listed, inside = [], False
        for tag, attributes in self.elements:
            if tag == "section":
                inside = attributes.get("data-array") == array
            elif inside and "data-head" in attributes:
                listed.append(attributes["data-head"])
        return listed


@pytest.fixture
def page(tmp_path):
    def write(dataset, **options):
        return Page(write_html(dataset, tmp_path / "page.html", **options))

    return write


def numbers(value):
    """Returns plotly's array, which may be a list or encoded binary."""
    if isinstance(value, dict):
        flat = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
        shape = [int(size) for size in value.get("shape", str(len(flat))).split(",")]
        return flat.reshape(shape).tolist()
    return value


def test_page_of_a_scan(make_scan, page):
    dataset = make_scan()
    found = page(dataset)
    assert [a["data-array"] for t, a in found.elements if t == "section" and "data-array" in a] == [
        "direct_effect",
        "logit_diff_zero_total",
    ]
    traces, layout, _ = found.figure("map-direct_effect")
    (trace,) = traces
    mean = dataset["direct_effect"].astype("f8").mean("prompt").to_numpy()
    np.testing.assert_allclose(numbers(trace["z"]), mean, rtol=1e-5)
    assert trace["zmid"] == 0
    assert trace["zmax"] == -trace["zmin"] == pytest.approx(np.abs(mean).max(), rel=1e-5)
    assert trace["y"] == [str(layer) for layer in range(30)]
    assert layout["yaxis"]["autorange"] == "reversed", "layer 0 is at the top"
    error = dataset["direct_effect"][:, 23, 3].std(ddof=1).item() / np.sqrt(12)
    assert trace["hovertext"][23][3] == (
        f"<b>L23H3</b><br>mean {mean[23, 3]:.3f} logits<br>standard error {error:.3f}, 12 prompts"
    )
    assert "Head effects of tiny-model" in found.text
    assert "12 prompts: 12 ok" in " ".join(found.text.split())


def test_heads_are_listed_in_order(make_scan, page):
    dataset = make_scan()
    found = page(dataset)
    mean = dataset["direct_effect"].mean("prompt").to_numpy().ravel()
    labels = dataset["head_label"].to_numpy().ravel()
    order = [str(label) for label in labels[np.argsort(-mean)]]
    assert order[0] == "L23H3"
    assert order[-1] == "L0H0"
    assert found.heads("direct_effect") == order[:10] + order[::-1][:10]
    assert found.heads("logit_diff_zero_total")[0] == "L0H0", "the ablation has the other sign"


def test_nothing_is_loaded_from_elsewhere(make_scan, page):
    found = page(make_scan())
    loading = {"src", "href", "action", "data", "srcset", "poster", "background", "formaction", "ping"}
    for tag, attributes in found.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "form"}
        for name in loading & set(attributes):
            assert attributes[name].startswith("#"), (tag, attributes)
    assert "url(" not in found.styles
    assert "@import" not in found.styles
    (policy,) = [a["content"] for t, a in found.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "http" not in policy
    libraries = [text for _, text in found.scripts if len(text) > 1e6]
    assert len(libraries) == 1, "the drawing library is there once"
    for _, text in found.scripts:
        assert text in libraries or not re.search(r"https?://", text)
    config = found.figure("map-direct_effect")[2]
    assert config["showSendToCloud"] is False
    assert config["modeBarButtons"] == [["toImage"], ["zoom2d", "pan2d", "resetScale2d"]]


def test_nasty_text_stays_text(make_scan, page):
    dataset = make_scan(n_layers=2, n_heads=2, n_prompts=2, texts=[NASTY, "plain"])
    dataset["direct_effect"].attrs["long_name"] = NASTY
    dataset["direct_effect"].attrs["units"] = "<i>u</i>"
    dataset["direct_effect"].attrs["sign"] = NASTY
    dataset.attrs["note </dl>"] = NASTY
    dataset["head_label"] = (("layer", "head"), np.array([["</script>", '"'], ["a", "b"]], dtype=object))
    dataset["answer"] = ("prompt", np.array(["</td><script>", "'"], dtype=object))
    dataset = dataset.set_coords("head_label")
    found = page(dataset, title=NASTY)
    assert found.cells[1][2] == NASTY
    assert found.cells[1][3] == "</td><script>"
    assert found.data["arrays"][0]["title"] == NASTY
    assert found.data["arrays"][0]["labels"] == ["</script>", '"', "a", "b"]
    assert "b" not in {tag for tag, _ in found.elements}
    assert not any("alert(1)" in text for attributes, text in found.scripts if not attributes and "newPlot" not in text)
    assert "49" not in found.cells[1][2]
    traces, _, _ = found.figure("map-direct_effect")
    assert traces[0]["hovertext"][0][0].startswith("<b>&lt;/script&gt;</b>"), "plotly reads labels as HTML"


def test_array_names_cannot_break_out(make_scan, page):
    dataset = make_scan(n_layers=1, n_heads=2, n_prompts=2).rename({"direct_effect": 'x"></script>'})
    found = page(dataset)
    assert found.heads('x"></script>')
    assert found.figure("map-x----script-")


def test_half_a_surrogate_pair_does_not_cost_the_page(make_scan, page):
    dataset = make_scan(n_layers=1, n_heads=1, n_prompts=1)
    dataset.attrs["note"] = "half \ud83d of it"
    assert "half ? of it" in page(dataset).text


def test_prompts_are_capped_and_the_page_says_so(make_scan, page):
    dataset = make_scan(n_layers=1, n_heads=2, n_prompts=1234)
    found = page(dataset, max_prompts=5)
    assert [row[0] for row in found.cells] == ["#", "0", "1", "2", "3", "4"]
    assert "The first 5 of 1,234 prompts are listed" in found.text
    assert "Prompt number 5 " not in found.text
    assert {row for array in found.data["arrays"] for head in array["prompts"] for row, _ in head} <= set(range(5))
    assert "the 5 prompts on this page (of 1,234)" in found.text
    assert "mean over 1,234 prompts" in " ".join(found.text.split())
    whole = page(dataset, max_prompts=1234)
    assert len(whole.cells) == 1235
    assert "are listed" not in whole.text
    none = page(dataset, max_prompts=0)
    assert none.cells == []
    assert "The first 0 of 1,234 prompts are listed" in none.text
    with pytest.raises(OptionError, match="max_prompts=-1"):
        page(dataset, max_prompts=-1)


def test_head_picker_names_the_prompts_with_the_largest_effects(make_scan, page):
    dataset = make_scan(n_layers=2, n_heads=2, n_prompts=8)
    dataset["direct_effect"][:, 1, 0] = [0.1, 5.0, NAN, -0.3, 2.0, -7.0, 0.0, 1.0]
    found = page(dataset).data["arrays"][0]
    assert found["name"] == "direct_effect"
    assert found["units"] == "logits"
    at = found["labels"].index("L1H0")
    assert found["prompts"][at] == [[1, 5.0], [4, 2.0], [7, 1.0], [0, 0.1], [3, -0.3], [5, -7.0]]
    strongest = np.abs(dataset["direct_effect"].mean("prompt").to_numpy()).argmax()
    assert found["strongest"] == strongest


def test_arrays_without_values_say_so(make_scan, page):
    dataset = make_scan(n_layers=3, n_heads=2, n_prompts=6)
    dataset["logit_diff_zero_total"][:] = NAN
    dataset["direct_effect"][2:4] = NAN
    dataset["direct_effect"][:, 1, 1] = NAN
    dataset["logit_diff_clean"][2] = NAN
    dataset["status"][2] = 2
    found = page(dataset)
    text = " ".join(found.text.split())
    assert "There is no value in this array: every entry is NaN" in text
    assert found.heads("logit_diff_zero_total") == []
    assert "mean over the 4 prompts (of 6) that have values" in text
    assert "L1H1" not in found.heads("direct_effect")
    (trace,), _, _ = found.figure("map-direct_effect")
    assert trace["z"][1][1] is None
    assert trace["hovertext"][1][1] == "<b>L1H1</b><br>no value"
    assert found.cells[3][-2:] == ["\u2013", "failed"]
    assert "comparison" not in {a.get("id") for _, a in found.elements}


def test_nothing_but_nan_and_no_prompts(make_scan, page):
    dataset = make_scan(n_layers=1, n_heads=1, n_prompts=3)
    empty = dataset.map(lambda array: array * NAN if array.dtype.kind == "f" else array, keep_attrs=True)
    found = page(empty)
    assert found.text.count("every entry is NaN") == 2
    assert not any(len(text) > 1e6 for _, text in found.scripts), "no figure, no drawing library"
    none = page(dataset.isel(prompt=slice(0, 0)))
    assert "the dataset has no prompts" in none.text
    assert "There is no value in this array" in none.text
    nothing = page(xr.Dataset())
    assert "there is nothing to draw" in nothing.text
    assert "no attributes" in nothing.text


def test_one_head_in_nats(make_scan, page):
    dataset = make_scan(n_layers=1, n_heads=1, n_prompts=4, metric="loss", units="nats")
    found = page(dataset)
    assert found.heads("loss_zero_total") == ["L0H0"]
    assert found.heads("direct_effect") == ["L0H0"]
    assert found.cells[0][-2:] == ["loss_clean (nats)", "status"]
    text = " ".join(found.text.split())
    assert re.search(r"metric\s*loss\s*units\s*nats\s*sign\s*ablated - clean", text)
    assert "mean (nats)" in text
    assert "No head has a negative mean." in text
    assert "logit" not in text
    (trace,), _, _ = found.figure("map-loss_zero_total")
    assert trace["colorbar"]["title"]["text"] == "nats"
    assert " nats<br>standard error" in trace["hovertext"][0][0]


def test_direct_effect_against_ablation(make_scan, page):
    dataset = make_scan(n_layers=3, n_heads=2)
    dataset["direct_effect"][:, 2, 0] = NAN
    traces, layout, _ = page(dataset).figure("against-logit_diff_zero_total")
    line, points = traces
    assert (line["x"][0], line["y"][0]) == (-line["x"][1], line["x"][1]), "y = -x"
    assert points["customdata"] == ["L0H0", "L0H1", "L1H0", "L1H1", "L2H1"]
    for axis, name in (("x", "direct_effect"), ("y", "logit_diff_zero_total")):
        means = dataset[name].mean("prompt").to_numpy().ravel()[[0, 1, 2, 3, 5]]
        np.testing.assert_allclose(numbers(points[axis]), means, rtol=1e-5)
    assert layout["xaxis"]["title"]["text"] == "direct effect (logits)"
    assert layout["yaxis"]["title"]["text"] == "zero ablation (logits)"
    dataset["logit_diff_zero_total"].attrs["units"] = "nats"
    traces, _, _ = page(dataset).figure("against-logit_diff_zero_total")
    assert [trace["name"] for trace in traces] == ["heads"], "no diagonal across units"
    assert "Comparison" not in page(dataset.drop_vars("direct_effect")).text


def test_profiles_by_layer_and_by_site(make_scan, page):
    dataset = make_scan(n_layers=3, n_heads=1, n_prompts=2)
    values = np.array([[1.0, 2.0, NAN], [3.0, 2.0, NAN]], dtype="f4")
    dataset["lens"] = (("prompt", "layer"), values, {"units": "logits", "long_name": "logit lens"})
    dataset["parts"] = xr.DataArray(values, dims=("prompt", "site"), coords={"site": ["embed", "<b>", "0_mlp_out"]})
    found = page(dataset)
    (line,), layout, _ = found.figure("profile-lens")
    assert line["type"] == "scatter"
    assert numbers(line["y"]) == [2.0, 2.0, None]
    assert numbers(line["error_y"]["array"]) == [1.0, 0.0, 0]
    assert layout["yaxis"]["title"]["text"] == "mean (logits)"
    (bars,), _, _ = found.figure("profile-parts")
    assert bars["type"] == "bar"
    assert bars["x"] == ["embed", "&lt;b&gt;", "0_mlp_out"]
    assert bars["hovertext"][2] == "<b>site 0_mlp_out</b><br>no value"


def test_provenance(make_scan, page):
    dataset = make_scan(n_layers=1, n_heads=1)
    found = page(dataset)
    text = found.text[found.text.index("Provenance", found.text.index("Prompts of a head", 400)) :]
    order = [
        "hub/tiny-model",
        "0123456789abcdef" * 4,
        "feedbeef" * 8,
        "transformer_lens",
        "float32",
        "2.13.0",
        "mode zero, pos -1",
    ]
    places = [text.index(word) for word in order]
    assert places == sorted(places)
    assert '"n_prompts": 12' in text, "the specification in full"
    assert "positive: the head helps" in found.text


def test_lazy_datasets_arrays_and_paths(make_scan, tmp_path):
    dataset = make_scan(n_layers=2, n_heads=2)
    eager = write_html(dataset, tmp_path / "eager.html")
    lazy = write_html(dataset.chunk(prompt=5), str(tmp_path / "new" / "lazy.html"))
    assert lazy == tmp_path / "new" / "lazy.html"
    assert lazy.read_bytes() == eager.read_bytes(), "and the page is the same from run to run"
    alone = Page(write_html(dataset["direct_effect"], tmp_path / "array.html"))
    assert alone.heads("direct_effect")[0] == "L1H1"


def test_a_dataset_that_went_through_zarr(make_scan, tmp_path):
    dataset = make_scan(n_layers=2, n_heads=2, texts=[NASTY, *["plain"] * 11])
    for name in ("head_label", "prompt_text", "prompt_id"):
        dataset[name] = dataset[name].astype(np.dtypes.StringDType())
    dataset.to_zarr(tmp_path / "run.zarr", zarr_format=3, consolidated=False)
    with xr.open_zarr(tmp_path / "run.zarr", consolidated=False) as opened:
        found = Page(write_html(opened, tmp_path / "page.html"))
    assert found.cells[1][2] == NASTY
    assert found.heads("direct_effect")[0] == "L1H1"


def test_losses_are_averaged_over_each_prompts_positions(make_scan, page):
    dataset = make_scan(n_layers=2, n_heads=1, n_prompts=2)
    nothing = [[NAN], [NAN]]
    values = np.array([[[1.0], [2.0]], [[3.0], [4.0]], nothing, nothing], dtype="f4")
    attrs = {"units": "nats", "long_name": "effect on loss"}
    dataset["loss_zero_total"] = (("prompt", "pos", "layer", "head"), np.stack([values, values + 1]), attrs)
    found = page(dataset)
    (heat,), _, _ = found.figure("map-loss_zero_total")
    assert [row[0] for row in map(numbers, heat["z"])] == [2.5, 3.5]
    assert "effect on loss, mean over positions" in found.text
