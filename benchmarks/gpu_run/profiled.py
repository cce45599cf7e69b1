"""List the kernels of one layer with adapters, and the time of each."""

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contenders import our_layers
from benchmarks.tables import markdown

__all__ = ["profiled"]

TOKENS = 16  # the first number of tokens, if it is not among them
CALLS, WARM_UPS = 10, 3


@torch.inference_mode()
def _profile(layer):
    """Return the profile of calls of each of our layers and of the dense one, by name."""
    activities = [ProfilerActivity.CPU]
    if layer.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    profiles = {}
    for contender in our_layers(layer):
        weights = contender.weights
        for number in range(WARM_UPS):
            contender.layer(weights[number % len(weights)])
        with profile(activities=activities) as profiles[contender.name]:
            for number in range(CALLS):
                contender.layer(weights[number % len(weights)])
            if layer.device.type == "cuda":
                torch.cuda.synchronize()
    return profiles


def profiled(run):
    """Yield the kernels of one layer, as a record and as a table; write a trace of it."""
    counts = run.options.tokens
    layer = run.layer(TOKENS if TOKENS in counts else counts[0])
    on_gpu = layer.device.type == "cuda"
    profiles = _profile(layer)
    rows = []
    for name, measured in profiles.items():
        for event in measured.key_averages():
            microseconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
            if microseconds and (not on_gpu or event.device_type.name == "CUDA"):
                launches, each = event.count / CALLS, microseconds / CALLS
                rows.append({"layer": name, "kernel": event.key, "launches": launches, "us": each})
    rows.sort(key=lambda row: (row["layer"], -row["us"]))
    profiles["ours + LoRA"].export_chrome_trace(str(run.folder / "profile-trace.json"))
    sizes = {"rows": layer.rows, "columns": layer.columns, "tokens": layer.tokens}
    yield {**sizes, "calls": CALLS, "kernels": rows}, _table(rows, sizes)


def _table(rows, sizes):
    lines = [
        [row["layer"], row["kernel"], f"{row['launches']:g}", f"{row['us']:.2f}"] for row in rows
    ]
    shape = f"{sizes['rows']} x {sizes['columns']}, {sizes['tokens']} tokens, called from Python:"
    head = ["layer", "kernel or operator", "launches a layer", "us a layer"]
    return f"{shape}\n\n{markdown(head, lines)}"
