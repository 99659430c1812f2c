"""Properties of the figures and of the page: files that carry their own meaning."""

import base64
import json
import re

import numpy as np
import pytest
from matplotlib.text import Annotation, Text
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from common.errors import UserError
from common.plain_text import code
from report import plots
from report.ablation import plot_arms
from report.page import Command, Figure, Films, Heading, Paragraph, Table, write_page
from report.plot_grids import plot_rows, plot_sample_grids
from report.plot_style import run_style
from report.records import AlignmentRow

RUNS = {"baseline": ([0, 1, 2], [3.0, 2.0, 1.5]), "aligned": ([0, 1, 2], [3.0, float("nan"), 1.0])}


def test_every_figure_lies_beside_the_numbers_it_was_drawn_from(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    plots.plot_curves(tmp_path / "curves.png", RUNS, "loss", "Loss")
    plot_sample_grids(tmp_path / "grids.png", {"a": images, "b": images}, ["x", "y"])
    plot_rows(tmp_path / "rows.png", {"a": [images[0], None], "b": list(images[:2])}, ["x", "y"], "note")
    points = {"steps": [1, 2], "images": [4, 8], "values": [3.0, 2.0], "errors": [0.1, None]}
    plots.plot_metric_curves(tmp_path / "metric.png", {"a": points}, "adm_fid10k", levels={"base": 9.0})
    plots.plot_panels(tmp_path / "panels.png", {"adm_fid10k": {"a": points}, "adm_is10k": {"a": points}})
    sweep = {"a": {"scales": [1.0, 2.0], "x": [3.0, 4.0], "y": [9.0, 8.0]}}
    plots.plot_sweep(tmp_path / "sweep.png", sweep, "IS", "FID")
    for name in ("curves", "grids", "rows", "metric", "panels", "sweep"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 150
    curves = json.loads((tmp_path / "curves.json").read_text())
    assert curves["series"]["aligned"] == {"x": [0.0, 1.0, 2.0], "y": [3.0, None, 1.0]}
    metric = json.loads((tmp_path / "metric.json").read_text())
    assert (metric["series"]["a"], metric["levels"]) == (points, {"base": 9.0})
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows["a"][0] == rows["b"][0] != rows["b"][1]
    assert rows["a"][1] is None
    assert json.loads((tmp_path / "sweep.json").read_text())["series"] == sweep
    assert len(list(tmp_path.iterdir())) == 12  # no temporary file is left


def test_a_run_keeps_its_colour_in_a_figure_without_the_others(tmp_path):
    def colours(path):
        with Image.open(path) as image:
            return {tuple(pixel) for pixel in np.asarray(image.convert("RGB")).reshape(-1, 3)}

    second = tuple(int(run_style(1)["color"][i : i + 2], 16) for i in (1, 3, 5))
    alone = {"aligned": RUNS["aligned"]}
    plots.plot_curves(tmp_path / "a.png", alone, "loss", "t", run_order=["baseline", "aligned"])
    plots.plot_curves(tmp_path / "b.png", alone, "loss", "t")
    assert second in colours(tmp_path / "a.png")
    assert second not in colours(tmp_path / "b.png")


def test_an_enlarged_sample_shows_its_own_pixels_and_no_others(tmp_path):
    image = np.random.default_rng(2).integers(0, 256, (1, 8, 8, 3), dtype=np.uint8)
    plot_sample_grids(tmp_path / "g.png", {"a": image}, ["x"])
    with Image.open(tmp_path / "g.png") as drawn:
        pixels = np.asarray(drawn.convert("RGB"))
    wanted = image[0].repeat(16, axis=0).repeat(16, axis=1)  # (128, 128, 3)
    corners = np.argwhere((pixels[: -128 + 1, : -128 + 1] == wanted[0, 0]).all(axis=-1))
    assert any((pixels[y : y + 128, x : x + 128] == wanted).all() for y, x in corners)


def test_figures_refuse_data_that_does_not_fit(tmp_path):
    with pytest.raises(ValueError, match="one length"):
        plots.plot_curves(tmp_path / "x.png", {"a": ([1, 2], [1])}, "", "")
    grids = {"a": np.zeros((2, 4, 4, 3), np.uint8), "b": np.zeros((1, 4, 4, 3), np.uint8)}
    with pytest.raises(ValueError, match="differ in shape"):
        plot_sample_grids(tmp_path / "x.png", grids, ["x"])
    image = np.zeros((4, 4, 3), np.uint8)
    with pytest.raises(ValueError, match="one for each of 1 columns"):
        plot_rows(tmp_path / "x.png", {"a": [image, image]}, ["x"])
    assert not list(tmp_path.iterdir())


def test_the_page_holds_every_picture_and_asks_for_nothing_else(tmp_path):
    Image.new("RGB", (40, 20), "red").save(tmp_path / "a.png")
    Image.new("RGB", (3000, 20), "blue").save(tmp_path / "b.png")
    blocks = [
        Heading("One"),
        Figure(tmp_path / "a.png", "caption"),
        Heading("Two"),
        Figure(tmp_path / "b.png"),
    ]
    page = write_page(tmp_path / "page.html", title="t", lead="l", sections=blocks).read_text()
    inline = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data) for data in inline] == [
        (tmp_path / n).read_bytes() for n in ("a.png", "b.png")
    ]
    assert page.count("<img") == 2
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)


def test_the_page_escapes_everything_it_is_given(tmp_path):
    evil = "<script>alert(\"1\")</script> & 'x'"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    blocks = [
        Heading(evil),
        Paragraph(evil + " `" + evil + "`"),
        Table([evil], [[evil]], evil),
        Command(evil),
        Figure(tmp_path / "a.png", evil + '" onload="x'),
    ]
    page = write_page(tmp_path / "page.html", title=evil, lead=evil, sections=blocks).read_text()
    assert "<script" not in page
    assert '" onload="' not in page
    assert page.count("&lt;script&gt;") == 12


def test_the_page_shows_what_would_turn_or_hide_the_text_as_escapes(tmp_path):
    odd = "a\u202eb\x1b\udcff"
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    blocks = [
        Heading(odd),
        Paragraph(odd),
        Table([odd], [[odd]], odd),
        Command(odd),
        Figure(tmp_path / "a.png", odd),
    ]
    page = write_page(tmp_path / "page.html", title=odd, lead=odd, sections=blocks).read_text()
    assert page.count(r"a\u202eb\x1b\udcff") == 11
    assert all(letter == "\n" or letter.isprintable() for letter in page)


def test_a_backtick_in_a_name_neither_ends_its_code_nor_starts_another(tmp_path):
    blocks = [Paragraph(f"of {code('a`b')} and {code('`c`')}"), Table(["d`e`f"], [["`g`"]])]
    page = write_page(tmp_path / "page.html", title="t", lead="l", sections=blocks).read_text()
    assert "<p>of <code>a`b</code> and <code>`c`</code></p>" in page
    assert "<th>d`e`f</th></tr></thead><tbody><tr><td>`g`</td>" in page


NAMES = ["$x$", "$\\frac{1}{0}$", "_under", "日本語", "a\u202eb", "a\x1b", "two\nlines"]


@pytest.mark.filterwarnings("error")
def test_a_figure_shows_every_name_as_it_is_without_a_warning(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    plots.plot_curves(tmp_path / "a.png", dict.fromkeys(NAMES, RUNS["baseline"]), "loss", "title")
    points = {"steps": [1, 2], "images": [4, 8], "values": [3.0, 2.0], "errors": [0.1, None]}
    plots.plot_panels(tmp_path / "b.png", {"adm_fid10k": dict.fromkeys(NAMES, points)})
    arms = {name: {0: {"fd": 1.0}} for name in NAMES}
    plot_arms(tmp_path / "c.png", arms, NAMES[0], {"fd": "fd"}, "title")
    shown = [*NAMES[:3], r"\u65e5\u672c\u8a9e", r"a\u202eb", r"a\x1b", "two\nlines"]
    for figure, places in zip(drawn, (Annotation, Text, Text), strict=True):
        texts = [text for text in figure.findobj(places) if text.get_text() in shown]
        assert list(dict.fromkeys(text.get_text() for text in texts)) == shown
        assert not any(text.get_parse_math() for text in texts)


def test_tables_set_numbers_and_refuse_ragged_rows(tmp_path):
    table = Table(["run", "fd"], [["a", 42.123456], ["b", None], ["c", 0]])
    page = write_page(tmp_path / "p.html", title="t", lead="l", sections=[table]).read_text()
    assert re.findall(r'<td class="number">([^<]*)</td>', page) == ["42.12", "–", "0"]
    with pytest.raises(ValueError, match="2 cells"):
        write_page(tmp_path / "q.html", title="t", lead="l", sections=[Table(["a"], [[1, 2]])])
    with pytest.raises(UserError, match=r"missing\.png"):
        write_page(tmp_path / "q.html", title="t", lead="l", sections=[Figure(tmp_path / "missing.png")])
    assert not (tmp_path / "q.html").exists()


def test_a_film_that_is_none_is_one_line(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"no film at all")
    for name, says in (("a.mp4", "is no mp4 file"), ("b.mp4", "cannot be read as a film")):
        with pytest.raises(UserError, match=says):
            write_page(tmp_path / "p.html", title="t", lead="l", sections=[Films({"x": tmp_path / name})])


def test_a_metric_without_a_value_has_a_reason_and_no_other_text():
    row = {"model": "base", "tap": "block2", "timestep": 250, "features": "backbone"}
    cca = {"value": None, "null": None, "reason": "k must be in [1, 16]"}
    adapter = TypeAdapter(AlignmentRow)
    assert adapter.validate_python(row | {"metrics": {"cca": cca}})["metrics"]["cca"] == cca
    with pytest.raises(ValidationError, match=r"cca\.value is no number"):
        adapter.validate_python(row | {"metrics": {"cca": cca | {"value": "high"}}})
