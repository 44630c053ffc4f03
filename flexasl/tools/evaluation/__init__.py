"""Is a pruned model as good? Long-context tasks, answered by the unpatched model and under any policy.

    from flexasl import evaluation, run

    plan = evaluation.plan("ruler", lengths=[4096], policies=["asl", "fixed_layer:layer=15"], budgets=[512])
    model, tokenizer = run.load_model("some/model")
    evaluation.evaluate(plan, model, tokenizer, "out")  # continues where it was stopped
    print(evaluation.report("out"))

`tasks()` lists what there is, and `build` makes one prompt of a task. `flexasl eval` is the same on a command line.
"""

from flexasl.tools.evaluation.plans import Plan, Setting, plan
from flexasl.tools.evaluation.reporting import report
from flexasl.tools.evaluation.runner import evaluate
from flexasl.tools.evaluation.samples import Sample
from flexasl.tools.evaluation.sources import Sources
from flexasl.tools.evaluation.tasks import Task, build, tasks

__all__ = ["Plan", "Sample", "Setting", "Sources", "Task", "build", "evaluate", "plan", "report", "tasks"]
