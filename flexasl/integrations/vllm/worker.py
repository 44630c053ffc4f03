"""vLLM's worker of the platform, which tells the model what the scheduler says of each step."""

from __future__ import annotations

import functools
from typing import Any

from flexasl.errors import UnsupportedError


def __getattr__(name: str) -> Any:
    if name != "Worker":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _worker()


@functools.cache
def _worker() -> type:
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as Plain
    elif current_platform.is_cuda_alike():
        from vllm.v1.worker.gpu_worker import Worker as Plain
    else:
        raise UnsupportedError(f"vLLM on {current_platform.device_type} is not supported; use CPU, CUDA or ROCm")

    class Worker(Plain):
        def execute_model(self, scheduler_output: Any) -> Any:
            pruning = self.get_model().flexasl
            pruning.expect(scheduler_output, self._names)
            return super().execute_model(scheduler_output)

        def flexasl_reports(self) -> dict[str, dict[str, Any]]:
            """By request, the reports of the last prompts, as `Report.to_dict` makes them; for `collective_rpc`."""
            reports = self.get_model().flexasl.reports
            return {name: report.to_dict() for name, report in reports.items()}

        def _names(self) -> list[str]:
            """The requests of the step, in the order of their rows."""
            runner = self.model_runner
            if self.use_v2_model_runner:
                return list(runner.model_state.names)
            return list(runner.input_batch.req_ids)

    Worker.__module__ = __name__
    return Worker
