"""`flexasl serve` over loopback, with the embedded model."""

import functools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request

import pytest
import torch

import flexasl
from flexasl import embedded
from flexasl.tools.text import magic_number, needle_prompt

PROMPTS = 4


def free_port():
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A server: its address, and the file of its reports."""
    port, reports = free_port(), tmp_path_factory.mktemp("reports") / "reports.jsonl"
    options = ["--select-tokens", "256", "--kv-budget", "256", "--max-model-len", "2048", "--max-new-tokens", "32"]
    options += ["--kv-memory", "0.2", "--port", str(port), "--reports", str(reports)]
    command = [sys.executable, "-m", "flexasl", "serve", *options, "--", "--enforce-eager"]
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # Where the tests run in the background, Ctrl-C is ignored, which a process would inherit.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    server = subprocess.Popen(command, env=environment, preexec_fn=heard, **pipes)
    lines = []
    told = threading.Thread(target=lambda: lines.extend(server.stderr), daemon=True)
    told.start()
    first = server.stdout.readline()
    assert f"http://127.0.0.1:{port}/v1, pruned by asl with select_tokens=256, kv_budget=256" in first, "".join(lines)
    yield f"http://127.0.0.1:{port}", reports
    server.send_signal(signal.SIGINT)
    assert server.wait(120) == 0
    with pytest.raises(OSError), socket.create_connection(("127.0.0.1", port), 1):
        pass


def ask(address, path="/v1/chat/completions", **body):
    body = {"model": "SmolLM2-135M-Instruct", "max_tokens": 12, "temperature": 0} | body
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def user(text):
    """A message of the user."""
    return [{"role": "user", "content": text}]


def metric(address, name):
    with urllib.request.urlopen(address + "/metrics", timeout=60) as page:
        found = re.findall(rf"^{name}(?:{{[^}}]*}})? (\S+)$", page.read().decode(), re.MULTILINE)
    return sum(map(float, found))


@pytest.fixture(scope="module")
def questions():
    tokenizer = embedded.load()[1]
    made = []
    for seed in range(PROMPTS):
        fact = magic_number(seed)
        made.append(needle_prompt(tokenizer, 500 + 300 * seed, 0.4, fact.needle, fact.question, seed))
    return made


def test_answers_as_under_transformers(served, questions):
    address, reports = served
    model, tokenizer = embedded.load()
    config = flexasl.ASLConfig(select_tokens=256, kv_budget=256)
    answers = [None] * PROMPTS

    def one(at):
        answers[at] = ask(address, messages=user(questions[at]))

    before = metric(address, "flexasl_prompts_total")
    threads = [threading.Thread(target=one, args=(at,)) for at in range(PROMPTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metric(address, "flexasl_prompts_total") == before + PROMPTS
    assert metric(address, "flexasl_kept_tokens_total") < 0.5 * metric(address, "flexasl_prompt_tokens_total")
    assert metric(address, "vllm:request_success_total") >= PROMPTS
    told = [json.loads(line) for line in reports.read_text().splitlines()]
    for text, answer in zip(questions, answers):
        ids = tokenizer.apply_chat_template(user(text), add_generation_prompt=True, return_dict=False)
        with flexasl.patch(model, config, tokenizer=tokenizer) as patch, torch.no_grad():
            prompt = torch.tensor([ids])
            out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
        said = answer["choices"][0]["message"]["content"]
        assert said == tokenizer.decode(out[0, len(ids) :], skip_special_tokens=True)
        (mine,) = [one for one in told if one["rows"][0]["prompt_tokens"] == len(ids)]
        row = patch.report.rows[0]
        assert mine["rows"][0]["kept_positions"] == list(row.kept_positions)
        assert mine["rows"][0]["ranked_by"] == row.ranked_by != ""
        assert mine["profile"] == patch.report.profile


def test_what_cannot_be_honoured_is_an_error_of_that_request(served, questions):
    address, _ = served
    bad = [
        ({"vllm_xargs": {"flexasl_select_tokens": 5}}, "select_tokens=5 does not exceed window"),
        ({"vllm_xargs": {"flexasl_tokens": 5}}, "flexasl_tokens=5 is not known"),
        ({"vllm_xargs": {"flexasl_policy": "full"}}, "would need more memory"),
        (
            {"messages": [{"role": "user", "content": questions[3] + questions[3]}]},
            "maximum context|too long|longer than",
        ),
        ({"max_tokens": 4000}, "max_tokens|maximum context|too large"),
    ]
    for settings, error in bad:
        with pytest.raises(urllib.error.HTTPError) as caught:
            ask(address, **({"messages": user(questions[0])} | settings))
        assert caught.value.code == 400
        assert re.search(error, caught.value.read().decode())
    done = ask(address, messages=user(questions[0]), vllm_xargs={"flexasl_select_tokens": 100})
    assert done["choices"][0]["message"]["content"]


def test_the_longest_answer_where_a_client_names_none(served, questions):
    done = ask(served[0], messages=user(questions[0]), max_tokens=None, ignore_eos=True)
    assert done["usage"]["completion_tokens"] == 32


def test_a_stock_client(served, questions):
    from openai import OpenAI

    client = OpenAI(base_url=f"{served[0]}/v1", api_key="none")
    asked = {
        "model": "SmolLM2-135M-Instruct",
        "messages": user(questions[0]),
        "temperature": 0,
    }
    whole = client.chat.completions.create(**asked, max_tokens=8, extra_body={"vllm_xargs": {"flexasl_kv_budget": 64}})
    parts = client.chat.completions.create(
        **asked, max_tokens=8, stream=True, extra_body={"vllm_xargs": {"flexasl_kv_budget": "64"}}
    )
    said = "".join(part.choices[0].delta.content or "" for part in parts)
    assert said == whole.choices[0].message.content != ""


def test_a_client_that_hangs_up(served, questions):
    address, _ = served
    body = {"model": "SmolLM2-135M-Instruct", "prompt": questions[3], "max_tokens": 32, "stream": True}
    host, port = address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        data = json.dumps(body).encode()
        head = ["POST /v1/completions HTTP/1.1", "Host: x", "Content-Type: application/json"]
        client.sendall("\r\n".join([*head, f"Content-Length: {len(data)}", "", ""]).encode() + data)
        client.recv(20)
    assert ask(address, "/v1/completions", prompt=questions[0])["usage"]["completion_tokens"]


def refused(*options):
    done = subprocess.run([sys.executable, "-m", "flexasl", "serve", *options], capture_output=True, text=True)
    assert done.returncode == 2
    return done.stderr.splitlines()[-1]


def test_refused_before_anything_is_loaded():
    assert "select_tokens=3 does not exceed window" in refused("--select-tokens", "3")
    assert "policy='gemfilter' reads tokens twice" in refused("--policy", "gemfilter")
    assert "MODEL is empty" in refused("")
    assert "two follows MODEL" in refused("one", "two", "--", "--enforce-eager")
    assert "model ./none cannot be served" in refused("./none")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"--port {port} is in use at 127.0.0.1" in refused("--port", port)
