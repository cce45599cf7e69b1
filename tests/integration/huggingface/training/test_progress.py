"""What a training run shows on a terminal; without one, see tests/integration/cli/test_train.py."""

import io

from rich.console import Console

from int4_lora.integration.huggingface.training.progress import Bar


def shown(**settings):
    """Return what half a run shows."""
    output = io.StringIO()
    console = Console(file=output, width=100, **settings)
    with Bar(console) as bar:
        bar.say("[a note] about the data")
        bar.begin(4, 10)
        bar.step(5, 2.5)
        bar.evaluated(5, 2.25)
        bar.step(6, 2.125)
        bar.bar.refresh()
    return output.getvalue()


def test_a_bar_shows_the_loss_and_the_time_left():
    text = shown(force_terminal=True, color_system=None)
    assert "[a note] about the data" in text
    assert "step 5 of 10: evaluated loss 2.2500" in text
    assert "6/10" in text
    assert "loss 2.1250, evaluated 2.2500" in text
    assert "0:00:0" in text or "-:--:--" in text
    assert "step 6" not in text


def test_a_silent_run_tells_notes_only():
    output = io.StringIO()
    with Bar(Console(file=output, force_terminal=True), silent=True) as bar:
        bar.begin(0, 2)
        bar.step(1, 2.5)
        bar.evaluated(1, 2.5)
        bar.say("a note")
    assert output.getvalue() == "a note\n"
