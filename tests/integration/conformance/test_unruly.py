"""Backends that crash, hang, or return unusual tensors are told so by name; the run goes on."""

import json

import pytest
from typer.testing import CliRunner

from int4_lora.integration.cli.app import app
from int4_lora.reference.conformance import Backend, run, select
from support import unruly_backends as unruly


def test_a_crash_and_a_hang_fail_their_case_and_the_run_goes_on():
    cases = "pack/ragged,unpack/ragged,shrink/rank_3/bf16,expand/rank_3/bf16"
    command = ["conform", "support.unruly_backends:Unruly", "--json", "--time-limit=15"]
    result = CliRunner().invoke(app, [*command, "--cases", cases])
    assert result.exit_code == 1, result.output
    outcomes = json.loads(result.stdout)["cases"]
    assert [(each["rule"], each["message"]) for each in outcomes] == [
        ("crash", "the process was ended by SIGSEGV"),
        ("crash", "the process exited with code 0"),
        ("hang", "no result within 15 s; the process was killed"),
        ("", ""),
    ]
    assert "select('pack/ragged')" in outcomes[0]["snippet"]


def test_processes_that_a_backend_starts_answer_for_no_case_and_end_with_it():
    cases = "pack/ragged,unpack/ragged,expand/rank_3/bf16"
    command = ["conform", "support.unruly_backends:Forks", "--json", "--time-limit=15"]
    result = CliRunner().invoke(app, [*command, "--cases", cases])
    outcomes = json.loads(result.stdout)["cases"]
    assert [(each["case"], each["rule"], each["message"]) for each in outcomes] == [
        ("pack/ragged", "", ""),
        ("unpack/ragged", "crash", "the process exited with code 3"),
        ("expand/rank_3/bf16", "", ""),
    ]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("not unicode", r"raised ValueError: \ud800\x1b[2J"),
        ("long", "raised ValueError: " + "x" * 500 + "..."),
        ("mute", "raised Mute: (its text raises RuntimeError)"),
        ("no exception", "raised GeneratorExit: "),
        ("exit", "raised SystemExit: 0"),
    ],
)
def test_whatever_is_raised_fails_its_case_alone(name, message):
    backend = Backend(unruly.Raises(name), "x")
    outcomes = list(run(backend, select("pack/ragged,pack/wide")))
    assert [(each.rule, each.message) for each in outcomes] == 2 * [("call", message)]


def test_an_endless_time_limit_is_refused():
    result = CliRunner().invoke(app, ["conform", "reference", "--time-limit=inf"])
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("kind", "rule", "message"),
    [
        (unruly.View, "memory", "returned a view of its operand x"),
        (unruly.ShortView, "memory", "returned a view of its operand x"),
        (unruly.Expanded, "memory", "elements of the result share memory: strides [0, 1]"),
        (unruly.Transposed, "memory", "the result is not contiguous: strides [1, 16]"),
        (unruly.Subclass, "form", "returned Parameter, a subclass of Tensor"),
        (unruly.Sparse, "form", "returned the layout torch.sparse_coo, not torch.strided"),
        (unruly.OtherDevice, "form", "returned on meta, not on cpu"),
        (unruly.Transposes, "modified", "wrote to its operand weight.packed"),
    ],
)
def test_an_unusual_result_is_named(kind, rule, message):
    cases = select("int4_linear/group_128/bf16")
    (outcome,) = run(Backend(kind(), "x"), cases, evidence=True)
    assert (outcome.status, outcome.rule) == ("failed", rule)
    assert outcome.message.startswith(message)


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        (unruly.TransposedDeclared, "int4_linear/group_128/bf16"),
        (unruly.EmptiesSlices, "int4_lora_linear/slices_gate_up/bf16"),
    ],
)
def test_what_is_declared_or_has_no_effect_passes(kind, case):
    (outcome,) = run(Backend(kind(), "x"), select(case))
    assert (outcome.status, outcome.message) == ("passed", "")
