"""Reports: what a page says of a fault, that it needs nothing else, and what it may replace."""

import base64
import io
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import int4_lora.reference
from int4_lora.integration.cli.app import app
from int4_lora.integration.conformance.golden.write import exportable, file_name
from int4_lora.integration.conformance.report import page
from int4_lora.integration.conformance.report.breakdown import breakdowns
from int4_lora.integration.conformance.report.drawing import draw
from int4_lora.integration.conformance.report.error_map import NOT_FINITE, error_map
from int4_lora.integration.conformance.report.file import OPENING, check_replaceable
from int4_lora.integration.conformance.report.meanings import MISTAKES, RULES
from int4_lora.integration.conformance.scoreboard import Row
from int4_lora.reference.conformance import IDENTIFIERS, Backend, Manifest, run, select, settled
from int4_lora.reference.conformance.evidence import JudgedCall
from int4_lora.reference.conformance.judging.answers import answer
from int4_lora.reference.conformance.judging.verdict import judge
from int4_lora.reference.float4 import unpack_float4
from support.conformance_faults import ThreeFaults

Image = pytest.importorskip("PIL.Image")
pytest.importorskip("matplotlib")

runner = CliRunner()
CASES = (
    "int4_lora_linear/mixed/bf16,int4_linear/g_idx/bf16,int4_linear/ragged_channel/bf16,"
    "int4_linear/group_128/fp32,int4_linear/one_hot/fp16"
)


class Reader(HTMLParser):
    """Reads the addresses, the anchors, the tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.anchors, self.addresses, self.text = [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name == "id":
                self.anchors.append(value)
            elif name in ("src", "href", "srcset", "action", "data", "poster"):
                self.addresses.append(value)

    def handle_data(self, data):
        self.text += f" {data}"


def outcomes_of(under_test, patterns=CASES, name="under test"):
    return settled(list(run(Backend(under_test, name), select(patterns), evidence=True)))


@pytest.fixture(scope="module")
def three_faults():
    return outcomes_of(ThreeFaults())


def read(outcomes, name="under test"):
    text = page.run_page(name, Manifest(), outcomes, "cpu", 0)
    assert text.startswith(OPENING)
    return Reader(text)


def test_a_page_names_each_fault_and_shows_where_it_is(three_faults):
    shown = read(three_faults)
    for name in ("adapter_minus_one_indexed", "g_idx_ignored", "tail_lost"):
        assert name in shown.text
        assert MISTAKES[name] in shown.text
    assert "only no adapter (-1)" in shown.text
    assert "outputs 16-20 of 21" in shown.text
    assert "backend.call(case.function" in shown.text
    assert "token 0, outputs 0 to 7" in shown.text
    images = [address for address in shown.addresses if address.startswith("data:image/png")]
    assert len(images) == 3
    image = Image.open(io.BytesIO(base64.b64decode(images[0].partition(",")[2])))
    assert image.width > 600


def test_a_passed_case_has_its_share_of_the_bound_and_its_bias():
    outcomes = outcomes_of(int4_lora.reference, "int4_lora_linear/bias_of_errors/fp32,pack/ragged")
    packed, many = (outcome.evidence.closeness for outcome in outcomes)
    assert (packed.calls, packed.elements) == (1, 0)
    assert many.calls == 16
    assert 0 < many.largest < 1
    assert len(many.means) == 2
    assert not any(mean.systematic for mean in many.means)
    shown = read(outcomes)
    assert f"{100 * many.means[0].mean:+.2f}" in shown.text
    assert "equal" in shown.text


def test_a_page_needs_nothing_else_and_its_links_lead_somewhere(three_faults):
    for text in (
        page.run_page("under test", Manifest(), three_faults, "cpu", 0),
        page.scoreboard_page(
            [Row("a", three_faults, ""), Row("b", three_faults[:2], ""), Row("c", (), "no GPU")],
            {"torch": "2"}, device="cpu", seed=0,
        ),
    ):  # fmt: skip
        shown = Reader(text)
        links = [address[1:] for address in shown.addresses if address.startswith("#")]
        others = [address for address in shown.addresses if not address.startswith("#")]
        assert links
        assert set(links) <= set(shown.anchors)
        assert len(shown.anchors) == len(set(shown.anchors))
        assert all(address.startswith("data:") for address in others)
        assert "http" not in shown.text
        assert "@import" not in text
        assert "url(" not in text
        assert shown.tags.count("script") == 1
        assert len(text) < 3_000_000


class WithoutSign:
    """A backend that leaves the sign of FP4 codes out."""

    manifest = {"formats": ["nvfp4"]}  # noqa: RUF012

    def dequantize(self, weight, dtype=None):
        return int4_lora.reference.dequantize(weight, dtype).abs()


def test_a_map_of_fp4_has_groups_scales_and_the_codes_that_are_wrong():
    (outcome,) = outcomes_of(WithoutSign(), "dequantize/nvfp4/bf16")
    call = outcome.evidence.failure
    drawn = error_map("dequantize", call)
    weight = call.operands.weight
    negative = unpack_float4(weight.packed) >= 8
    assert torch.equal(drawn.wrong & negative, drawn.wrong)
    assert drawn.unit.name == "error / scale"
    # twice the value of the code: -0.5, -1 are off by 1, 2 scales; -6 by 12
    classes = drawn.classes[unpack_float4(weight.packed) == 9].unique().tolist()
    assert max(classes) == 4
    assert int(drawn.classes[unpack_float4(weight.packed) == 15].max()) == 5
    assert drawn.columns.lines == tuple(range(16, weight.in_features, 16))
    assert not drawn.columns.words
    (by_code,) = (each for each in breakdowns("dequantize", call, drawn.wrong) if "code" in each.by)
    assert by_code.by == "value of the code"
    assert "-6" in by_code.only
    assert "+6" not in by_code.only
    assert "value of the code" in read([outcome]).text


class DropsAnExpert:
    """A backend whose expert 1 returns zeros."""

    def int4_moe(self, x, experts, topk_ids, topk_weights, *more, **options):
        kept = torch.where(topk_ids == 1, 0.0, topk_weights)
        return int4_lora.reference.int4_moe(x, experts, topk_ids, kept, *more, **options)


def test_a_map_of_experts_tells_the_tokens_of_the_wrong_one():
    (outcome,) = outcomes_of(DropsAnExpert(), "int4_moe/mixed/bf16")
    call = outcome.evidence.failure
    drawn = error_map("int4_moe", call)
    uses = (call.operands.topk_ids == 1).any(dim=1)
    assert torch.equal(drawn.wrong.any(dim=1), uses)
    assert (drawn.rows.name, drawn.columns.name) == ("token", "output")
    (by_expert,) = (
        each for each in breakdowns("int4_moe", call, drawn.wrong) if "expert" in each.by
    )
    shares = {part.name: part.share for part in by_expert.parts}
    assert shares["expert 1"] > 0.9
    assert min(shares.values()) < 0.7
    assert "expert of the token" in read([outcome]).text


def test_the_budget_of_images_is_kept(three_faults, monkeypatch):
    monkeypatch.setattr(page, "MAP_BYTES", 10)
    text = page.run_page("x", Manifest(), three_faults, "cpu", 0)
    assert "data:image" not in text
    assert text.count("so that the page stays small") == 3


class Hostile:
    """A backend that raises HTML."""

    def int4_linear(self, x, weight, bias=None):
        raise ValueError("<script>alert(1)</script> & {{ 7 * 7 }}")


def test_names_are_escaped():
    name = "<img src=x onerror=alert(1)>"
    shown = read(outcomes_of(Hostile(), "int4_linear/group_128/bf16", name), name)
    assert shown.tags.count("script") == 1
    assert "img" not in shown.tags
    assert name in shown.text
    assert "<script>alert(1)</script> & {{ 7 * 7 }}" in shown.text


def failed_call(name, change):
    """Return the function and the call of a case whose right result was changed."""
    (case,) = select(name)
    operands = case.operands()
    held = answer(case.function, operands, Manifest())
    result = held.exact.to(held.dtype, copy=True)
    change(result)
    finding = judge(result, held, equal=case.equal, yardstick=None)
    return case.function, JudgedCall(operands, result, held, finding)


def test_a_map_shows_the_planted_elements_and_their_size():
    def change(result):
        result[3, 8:16] = float("nan")

    drawn = error_map(*failed_call("int4_lora_linear/mixed/bf16", change))
    assert (drawn.classes == NOT_FINITE).nonzero().tolist() == [[3, c] for c in range(8, 16)]
    assert draw(drawn).startswith("data:image/png;base64,")
    assert [name.split(":")[0] for name in drawn.rows.names] == [str(t) for t in range(16)]


def test_infinity_where_nan_is_right_is_no_rounding():
    def change(result):
        result[result.isnan()] = torch.inf

    function, call = failed_call("dequantize/mxfp4_all_scales/bf16", change)
    drawn = error_map(function, call)
    assert drawn.wrong.any()
    assert (drawn.classes[drawn.wrong] == NOT_FINITE).all()


@pytest.mark.parametrize(
    ("name", "change", "by", "only"),
    [
        ("dequantize/group_128_asym/bf16", lambda w: w[:, 3::8].add_(1), "place of the code", "3"),
        ("dequantize/group_128_asym/bf16", lambda w: w[:, 128:].mul_(2), "group", "1"),
        ("dequantize/group_128_asym/bf16", lambda w: w[5::8].add_(1), "place of the zero", "5"),
        ("from_gptq/g_idx/fp16", lambda w: w[:, 3::8].add_(1), "place of the code", "3"),
        ("from_awq/group_32/fp16", lambda w: w[5::8].add_(1), "place of the output", "5"),
        ("unpack/zero_points", lambda q: q[7::8].add_(1), "place of the code", "7"),
        ("pack/wide", lambda words: words.bitwise_xor_(0xF0), "place of the code", "1"),
        ("int4_lora_linear/slices_gate_up/bf16", lambda y: y[:, :32].add_(9), "slice", "slice 0 "),
    ],
)
def test_wrong_elements_are_divided_by_what_they_have_in_common(name, change, by, only):
    function, call = failed_call(name, change)
    drawn = error_map(function, call)
    divided = {division.by: division.only for division in breakdowns(function, call, drawn.wrong)}
    assert [key for key in divided if key.startswith(by)], divided
    assert f"only {only}" in next(value for key, value in divided.items() if key.startswith(by))


def test_large_results_and_groups_that_are_not_contiguous_are_drawn():
    drawn = error_map(*failed_call("dequantize/g_idx/bf16", lambda w: w[0].add_(1)))
    assert drawn.columns.groups is not None
    assert draw(drawn)
    wide = replace(drawn, classes=torch.zeros(2000, 700, dtype=torch.int64))
    wide.classes[1999, 699] = NOT_FINITE
    assert len(draw(wide)) < 20_000


def test_every_diagnosis_and_rule_has_a_meaning():
    assert set(IDENTIFIERS) <= set(MISTAKES)
    folder = Path(int4_lora.reference.__file__).parent / "conformance"
    sources = " ".join(file.read_text() for file in folder.rglob("*.py"))
    named = set(re.findall(r'Finding\(\s*"(\w+)"', sources))
    named |= set(re.findall(r'_finding\("(\w+)"', sources))
    assert {"call", "bound", "rms"} <= named <= set(RULES)


def test_a_page_of_a_run_that_stopped_or_crashed_says_so(tmp_path):
    report = tmp_path / "report.html"
    command = ["conform", "support.unruly_backends:Unruly", "--report", str(report), "--first"]
    cases = "expand/rank_3/bf16,pack/ragged,unpack/ragged"
    assert runner.invoke(app, [*command, "--cases", cases]).exit_code == 1
    shown = Reader(report.read_text())
    assert "Stopped at the first failure: 2 cases were not run." in shown.text
    assert "process was ended by SIGSEGV" in shown.text
    assert "process must not end" in shown.text


def conform(*options):
    return runner.invoke(app, ["conform", "int4_lora.reference", "--cases=pack/ragged", *options])


def test_only_a_report_is_replaced(tmp_path):
    file, mine = tmp_path / "report.html", tmp_path / "mine.html"
    mine.write_text("<!doctype html>\n<html><body>mine</body></html>")
    for _ in range(2):
        assert conform("--report", str(file)).exit_code == 0
    assert file.read_text().startswith(OPENING)
    link = tmp_path / "link.html"
    link.symlink_to(mine)
    (tmp_path / "empty.html").touch()
    (tmp_path / "loop").symlink_to("loop")
    for name in ("mine.html", "link.html", "empty.html", "loop", ".", "missing/report.html"):
        result = conform("--report", str(tmp_path / name))
        assert result.exit_code == 2, name
        assert "--report" in result.stderr
    assert mine.read_text().endswith("mine</body></html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "empty.html", "link.html", "loop", "mine.html", "report.html",
    ]  # fmt: skip
    link.unlink()
    link.symlink_to(file)
    check_replaceable(link)


def test_json_is_the_same_with_a_report(tmp_path):
    results = [conform("--json"), conform("--json", "--report", str(tmp_path / "report.html"))]
    with_report, without = (json.loads(result.stdout) for result in results)
    for case in (*with_report["cases"], *without["cases"]):
        case["seconds"] = 0
    assert with_report == without


def test_a_missing_library_is_named_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    place = "int4_lora.integration.conformance.report.drawing.find_spec"
    monkeypatch.setattr(place, lambda name: None)
    result = conform("--report", str(tmp_path / "report.html"))
    assert result.exit_code == 2
    assert "--report needs matplotlib: python -m pip install matplotlib" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_golden_check_writes_a_report(tmp_path):
    folder, results = tmp_path / "golden", tmp_path / "results"
    cases = "pack/ragged,int4_linear/ragged/bf16"
    assert runner.invoke(app, ["golden", "write", str(folder), "--cases", cases]).exit_code == 0
    results.mkdir()
    for case in exportable(select(cases)):
        right = Backend(int4_lora.reference, "reference").call(case.function, case.operands())
        right[-1, -1] += 1
        save_file({"result": right}, results / file_name(case.name))
    report = tmp_path / "report.html"
    for command in (["golden", "check", str(folder), str(results)],
                    ["conform", str(results), "--cases", cases]):  # fmt: skip
        assert runner.invoke(app, [*command, "--report", str(report)]).exit_code == 1
        shown = Reader(report.read_text())
        assert sum(address.startswith("data:image") for address in shown.addresses) == 2
        assert "1 of 10 wrong" in shown.text
        report.unlink()


def test_a_scoreboard_writes_a_report(tmp_path, monkeypatch):
    cases = select("pack/ragged,dequantize/g_idx_unbalanced/bf16")
    monkeypatch.setattr("int4_lora.reference.conformance.select", lambda quick: cases)
    report = tmp_path / "report.html"
    names = ["scoreboard", "--backends", "reference,compressed_tensors", "--report", str(report)]
    assert runner.invoke(app, [*names, "--write", str(report)]).exit_code == 2
    assert not report.exists()
    assert runner.invoke(app, [*names, "--json"]).exit_code == 0
    shown = Reader(report.read_text())
    assert "compressed_tensors" in shown.text
    assert MISTAKES["g_idx_column_order"] in shown.text
