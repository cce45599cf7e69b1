"""The measured power of the suite, and the page that shows it."""

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from int4_lora.integration.cli.app import app
from int4_lora.integration.cli.power import BEGIN, END, as_markdown
from int4_lora.reference.conformance import IDENTIFIERS, select
from int4_lora.reference.conformance.power import PLANTED, measure

PAGE = Path(__file__).parents[3] / "docs" / "conformance.md"


def test_one_wrong_weight_and_one_wrong_result_are_found():
    cases = select("int4_linear/ragged_asym/fp32,int4_lora_linear/mixed/fp32,int4_linear/exact/*")
    kinds = [each for each in PLANTED if each.diagnosis in ("offset", "scaling_missing")]
    weight, result, scaling = measure(cases, kinds)
    assert (weight.error, weight.found, weight.changed) == ("1 of 16,384 weights", 1, 1)
    assert (result.error, result.case) == ("1 of 1,024 results", "int4_lora_linear/mixed/fp32")
    share = float(re.search(r"1/([\d,]+)", scaling.error)[1].replace(",", ""))
    assert 2**10 < share <= 2**24


def test_the_table_is_written_into_a_page(tmp_path):
    page = tmp_path / "page.md"
    cases = "int4_linear/ragged/bf16,pack/ragged"
    result = CliRunner().invoke(app, ["power", "--cases", cases, "--write", str(page)])
    assert result.exit_code == 1  # no adapters in these cases
    text = page.read_text()
    assert text.startswith(f"# Page\n\n{BEGIN}\n| diagnosis |")
    assert "| `offset` | 1 of 572 weights | 1 of 1 cases | `int4_linear/ragged/bf16`" in text
    assert "| `slices_swapped` | none | 0 of 0 cases |  |" in text


@pytest.mark.nightly
def test_the_page_of_conformance_shows_the_measured_power():
    page = PAGE.read_text()
    shown = page.split(BEGIN)[1].split(END)[0]
    powers = list(measure(select(quick=True)))
    assert {power.diagnosis for power in powers} == set(IDENTIFIERS)
    assert all(power.found for power in powers)
    kept = [row.rpartition(" | ")[0] for row in as_markdown(powers).splitlines()]
    exact = [row for row in kept if " weights | " in row or " results | " in row]
    assert all(row in shown for row in exact)  # shares of bounds depend on the machine's sums
