"""What is told of pruned prompts outside: a file of reports, and counters beside vLLM's own on /metrics."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from flexasl.report import Report


class Reporting:
    """Counts prompts, and writes their reports down, in the first rank only."""

    def __init__(self, file: str | None) -> None:
        """file: gets a line of JSON for each prompt."""
        from vllm.distributed import get_tensor_model_parallel_rank

        self._first = get_tensor_model_parallel_rank() == 0
        self._file = Path(file) if file is not None and self._first else None
        if self._file is not None:
            self._file.touch()

    def add(self, name: str, report: Report) -> None:
        if not self._first:
            return
        (row,) = report.rows
        counters = _counters()
        counters["prompts"].labels(pruned=str(row.pruned).lower()).inc()
        counters["tokens"].inc(row.prompt_tokens)
        counters["kept"].inc(row.kept_tokens)
        counters["layer_tokens"].inc(sum(row.layer_tokens))
        counters["layer_tokens_full"].inc(report.num_layers * row.prompt_tokens)
        counters["entries"].inc(sum(report.kv_tokens))
        for one in row.selections:
            counters["selections"].labels(layer=str(one.layer)).inc()
        if self._file is not None:
            with self._file.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"request": name} | report.to_dict()) + "\n")


@functools.cache
def _counters() -> dict[str, Any]:
    """Made once a process. vLLM's server finds those of other processes by PROMETHEUS_MULTIPROC_DIR."""
    from prometheus_client import Counter

    return {
        "prompts": Counter("flexasl_prompts", "Prompts that were read.", ["pruned"]),
        "tokens": Counter("flexasl_prompt_tokens", "Tokens of these."),
        "kept": Counter("flexasl_kept_tokens", "Of these, tokens that the deepest layers read."),
        "layer_tokens": Counter("flexasl_layer_tokens", "Tokens that layers read, of all layers together."),
        "layer_tokens_full": Counter("flexasl_layer_tokens_full", "The same, had nothing been pruned."),
        "entries": Counter("flexasl_kv_entries", "Cache entries that were kept, of all layers together."),
        "selections": Counter("flexasl_selections", "Selections, by layer.", ["layer"]),
    }
