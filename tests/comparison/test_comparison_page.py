"""The report of a comparison as files: every number drawn is one of the result, levels may be missing, names stay names."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
from made import made_result
from pages import Page, leaves, resolve

from moecompiler.comparison.report.logits import context_of
from moecompiler.comparison.report.markdown import markdown
from moecompiler.comparison.report.page import render
from moecompiler.comparison.report.write import write_report
from moecompiler.comparison.result import LEVELS, Meta, OpLevel, Result
from moecompiler.errors import UserError

GOOD, BAD = made_result(), made_result(bad=True)
NOTHING = replace(GOOD, op=None, layer=None, model=None, routing=None, verdict=(), notes=())
HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>|`*"


def test_files(tmp_path: Path) -> None:
    """Of another report none is left, and no other file is touched."""
    directory = tmp_path / "new" / "report"
    write_report(BAD, directory)
    (directory / "mine.txt").write_text("mine")
    path = write_report(GOOD, directory)
    assert path == directory / "report.html"
    assert sorted(each.name for each in directory.iterdir()) == ["mine.txt", "report.html", "report.md", "result.json"]
    assert json.loads((directory / "result.json").read_text()) == json.loads(json.dumps(GOOD.to_json()))
    assert Result.from_json(json.loads((directory / "result.json").read_text())) == GOOD
    assert path.read_text() == render(GOOD)
    assert (directory / "report.md").read_text() == markdown(GOOD)


def test_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file.*the report cannot be written"):
        write_report(GOOD, tmp_path / "file")
    (tmp_path / "report.md").mkdir()
    with pytest.raises(UserError, match=r"report\.md: the report cannot be written"):
        write_report(GOOD, tmp_path)
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("result", [GOOD, BAD], ids=["good", "bad"])
def test_every_number_drawn_is_in_the_json(result: Result) -> None:
    page = Page(render(result))
    data = page.data
    assert data == json.loads(json.dumps(result.to_json()))
    for source in page.sources():
        value = resolve(data, source)
        assert isinstance(value, int | float | dict) or value in (None, "NaN", "Infinity"), source
    marks = page.sources("i")
    for level in (("layer",), ("routing", "replayed", "layer")):
        base = "/" + "/".join(level)
        for number, program in enumerate(resolve(data, base)["programs"]):
            assert set(leaves(program["relative"], f"{base}/programs/{number}/relative")) <= set(marks)
            stream = [i for i, name in enumerate(resolve(data, base)["places"]) if not name.endswith(("attn", "mlp"))]
            for place in stream:
                assert set(leaves(program["worst"][place], f"{base}/programs/{number}/worst/{place}")) <= set(marks)
    tokens = page.sources("span")
    for number, program in enumerate(data["model"]["programs"]):
        kl = set(leaves(program["kl"], f"/model/programs/{number}/kl"))
        assert kl <= set(marks)
        assert kl <= set(tokens)
        filled = {place for place, count in enumerate(program["errors"]["counts"]) if count}
        assert {f"/model/programs/{number}/errors/counts/{place}" for place in filled} <= set(marks)
    cells = page.sources("td")
    for number, program in enumerate(data["routing"]["programs"]):
        assert set(leaves(program["flip_counts"], f"/routing/programs/{number}/flip_counts")) <= set(cells)
        margins = {
            f"/routing/programs/{number}/flips/{place}/relative_margin" for place in range(len(program["flips"]))
        }
        assert margins <= set(marks)
    assert {f"/op/times/{place}/milliseconds" for place in range(len(data["op"]["times"]))} <= set(marks)
    rows = page.sources("tr")
    assert {f"/op/cases/{place}" for place in range(len(data["op"]["cases"]))} == set(rows)


@pytest.mark.parametrize("level", LEVELS)
def test_one_level_alone(level: str) -> None:
    result = replace(NOTHING, **{level: getattr(BAD, level)})
    text = render(result)
    assert text.count("Not measured:") == 3
    assert f"<code>--level {level}</code>" not in text
    assert "nothing was held against a bound" in text
    assert markdown(result).count("Not measured.") == 3
    assert {source.split("/")[1] for source in Page(text).sources()} == {level}


def test_levels_with_nothing_in_them() -> None:
    layer, model, routing = GOOD.layer, GOOD.model, GOOD.routing
    assert layer
    assert model
    assert routing
    empty = replace(
        GOOD,
        meta=replace(GOOD.meta, programs=()),
        op=OpLevel((), ()),
        layer=replace(layer, places=(), layers=(), stretches=(), programs=()),
        model=replace(model, tokens=(), programs=(), between=None, greedy=()),
        routing=replace(routing, tokens=(), programs=(), replayed=None),
    )
    page = Page(render(empty))
    assert "No node was compared." in page.text
    assert page.sources() == []
    assert "No node was compared." in markdown(empty)


def test_what_failed_is_said_first() -> None:
    page = Page(render(BAD))
    assert page.text.index("✗ out of bounds: op, routing") < page.text.index("Programs")
    assert "✗ routing: 0 of 1 check passed" in page.text
    assert "1 of 144 cases further from the truth" in page.text
    assert "model.layers.1.mlp/MoE" in page.text[: page.text.index("Error by layer")]
    rows = page.sources("tr")
    assert BAD.op
    wrong = next(place for place, case in enumerate(BAD.op.cases) if not case.no_further)
    assert rows[0] == f"/op/cases/{wrong}"
    said = markdown(BAD)
    assert said.startswith("# Comparison of tiny-mixtral: ✗ out of bounds: op, routing\n")
    assert "| routing | flips beyond rounding | plugins | 2 | ≤ 0 |" in said
    assert "prefers it by 0.9 logits" in page.text
    assert "≈ a tie:" in page.text
    assert "✓ within bounds" in Page(render(GOOD)).text


def test_text_that_was_read_before_is_written_before() -> None:
    model, routing = GOOD.model, GOOD.routing
    assert model
    assert routing
    later = replace(
        model,
        tokens=model.tokens[4:],
        programs=tuple(replace(each, kl=each.kl[4:]) for each in model.programs),
    )
    before = "".join(token.text for token in routing.tokens[:4])
    assert context_of(replace(GOOD, model=later)) == {0: before}
    assert f'<span class="before">{before}</span>' in render(replace(GOOD, model=later))
    assert context_of(GOOD) == {0: ""}
    assert context_of(replace(GOOD, routing=None)) == {}


def test_two_artifacts_are_called_by_their_directories() -> None:
    text = json.dumps(replace(GOOD, op=None).to_json())
    for old, new in (("plugins", "A"), ("ootb", "B")):
        text = re.sub(rf'"{old}"(?!:)', f'"{new}"', text)
    result = Result.from_json(json.loads(text))
    labelled = replace(
        result,
        meta=replace(result.meta, programs=tuple(replace(p, label=f"dir-{p.name}") for p in result.meta.programs)),
    )
    page = Page(render(labelled))
    assert "A: dir-A and B: dir-B" in page.text
    assert "plugins on" not in page.text


def test_numbers_that_are_none_have_a_place() -> None:
    layer = GOOD.layer
    assert layer
    first = layer.programs[0]
    one, other = first.relative[:2]
    broken = replace(first, relative=((0.0, math.nan, *one[2:]), (math.inf, *other[1:]), *first.relative[2:]))
    result = replace(GOOD, layer=replace(layer, programs=(broken, *layer.programs[1:])))
    page = Page(render(result))
    places = {
        attrs["data-from"]: str(attrs["style"]) for name, attrs in page.tags if name == "i" and "data-from" in attrs
    }
    beyond = [places[f"/layer/programs/0/relative/{place}"] for place in ("0/1", "1/0")]
    assert all(float(style.split("bottom:")[1].rstrip("%")) > 93 for style in beyond)
    assert "∞" in page.text
    assert page.data["layer"]["programs"][0]["relative"][0][:2] == [0.0, "NaN"]


def hostile_result() -> Result:
    """In which whatever may be called anything is called what would be markup."""
    meta = replace(
        BAD.meta, **{each.name: HOSTILE for each in fields(Meta) if isinstance(getattr(BAD.meta, each.name), str)}
    )
    op, layer, model, routing, bisection = BAD.op, BAD.layer, BAD.model, BAD.routing, BAD.bisection
    assert op
    assert layer
    assert model
    assert routing
    assert bisection
    meta = replace(meta, programs=tuple(replace(p, label=HOSTILE, directory=HOSTILE) for p in meta.programs))
    return replace(
        BAD,
        meta=meta,
        op=replace(op, cases=tuple(replace(case, node=HOSTILE, op=HOSTILE) for case in op.cases)),
        layer=replace(layer, how=HOSTILE, places=tuple(HOSTILE for _ in layer.places)),
        model=replace(
            model,
            tokens=tuple(replace(token, text=HOSTILE) for token in model.tokens),
            greedy=tuple(
                replace(text, prompt=HOSTILE, programs=tuple(replace(p, texts=(HOSTILE,) * 12) for p in text.programs))
                for text in model.greedy
            ),
        ),
        routing=replace(routing, tokens=tuple(replace(token, text=HOSTILE) for token in routing.tokens)),
        verdict=tuple(replace(check, name=HOSTILE, subject=HOSTILE) for check in BAD.verdict),
        notes=(HOSTILE,),
        bisection=replace(bisection, culprits=(HOSTILE,), folder=HOSTILE),
    )


def test_names_are_no_markup() -> None:
    text = render(hostile_result())
    page = Page(text)
    assert [attrs.get("type") for tag, attrs in page.tags if tag == "script"] == ["application/json", None]
    assert not any(tag == "img" for tag, _ in page.tags)
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert "alert(1)</script>" not in text
    assert page.data["meta"]["model"] == HOSTILE
    said = markdown(hostile_result())
    assert "<script" not in said.replace("\\<", "")
    assert "](" not in said


def test_the_page_asks_for_nothing() -> None:
    text = render(GOOD)
    for elsewhere in ("http:", "https:", "//www", "url(", "@import", "src="):
        assert elsewhere not in text, elsewhere
    assert all((attrs["href"] or "").startswith(("#", "data:,")) for _, attrs in Page(text).tags if "href" in attrs)
