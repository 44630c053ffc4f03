"""Other methods by their authors' or maintainers' own code: answers and kept entries beside those of our versions.

    python bench/peers.py ours                            here: writes the model, prompts, our answers and entries
    python bench/peers.py kvpress --out docs/benchmarks/peers   in an environment with kvpress 0.5.5: compares

The second step needs torch, transformers 5.2, kvpress and what the first one wrote, and nothing of this package.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

TASKS = ("niah_single_2", "niah_multikey_1", "niah_multivalue", "by_meaning")
WAYS: dict[str, dict[str, Any]] = {
    "SnapKV, window 32, average of 7": {"policy": "snapkv", "window": 32, "kernel_size": 7},
    "SnapKV, window 64, average of 5": {"policy": "snapkv", "window": 64, "kernel_size": 5},
    "SnapKV, window 32, average of 25": {"policy": "snapkv", "window": 32, "kernel_size": 25},
    "StreamingLLM, first 4": {"policy": "streaming", "window": 32},
}
ANSWER_TOKENS = 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["ours", "kvpress"])
    parser.add_argument("--folder", type=Path, default=Path("out/peers"), help="what the first step writes")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--budget", type=int, default=256, help="entries of each layer and KV head")
    parser.add_argument("--samples", type=int, default=2, help="of each task")
    parser.add_argument("--seed", type=int, default=196)
    parser.add_argument("--out", type=Path, help="where to write the table, without ending")
    args = parser.parse_args()
    torch.manual_seed(0)
    with torch.inference_mode():
        if args.step == "ours":
            write_ours(args)
        else:
            compare(args)


def write_ours(args: argparse.Namespace) -> None:
    """The embedded model as a folder, and what our policies make of each prompt."""
    import flexasl
    from flexasl.tools.evaluation.tasks import build
    from flexasl.tools.loading import load_model
    from flexasl.tools.text import encode

    model, tokenizer = load_model(None)
    args.folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.folder / "model")
    made = []
    for index in range(args.samples):
        for task in TASKS:
            ids = encode(tokenizer, build(task, tokenizer, args.tokens, args.seed, index).prompt)
            told: dict[str, Any] = {"task": task, "ids": ids, "ways": {}}
            for name, way in WAYS.items():
                how = {key: value for key, value in way.items() if key != "policy"}
                config = flexasl.ASLConfig(kv_budget=args.budget, **how)
                prompt = torch.tensor([ids])
                with flexasl.patch(model, config, policy=way["policy"]):
                    out = model(prompt, use_cache=True, logits_to_keep=1)
                    kept = [layer.positions[0].expand(layer.keys.shape[1], -1) for layer in out.past_key_values.layers]
                    said = greedy(model, out, len(ids))
                told["ways"][name] = {"said": said, "kept": [one.sort(-1).values.tolist() for one in kept]}
            made.append(told)
            print(task, index, flush=True)
    about = {"budget": args.budget, "tokens": args.tokens, "seed": args.seed, "prompts": made}
    (args.folder / "ours.json").write_text(json.dumps(about))


def compare(args: argparse.Namespace) -> None:
    """The same by kvpress."""
    from kvpress import SnapKVPress, StreamingLLMPress
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(args.folder / "model", dtype=torch.float32)
    told = json.loads((args.folder / "ours.json").read_text())
    found: dict[str, list[tuple[int, float]]] = {name: [] for name in WAYS}
    for prompt in told["prompts"]:
        ids = torch.tensor([prompt["ids"]])
        ratio = 1 - (told["budget"] + 0.5) / ids.shape[1]
        for name, way in WAYS.items():
            if way["policy"] == "streaming":
                press = StreamingLLMPress(compression_ratio=ratio, n_sink=4)
            else:
                press = SnapKVPress(ratio, window_size=way["window"], kernel_size=way["kernel_size"])
            kept: list[Any] = []
            score = press.score

            def noted(module: Any, *states: Any, score: Any = score, kept: list[Any] = kept) -> Any:
                scores = score(module, *states)
                kept.append(scores[0].topk(told["budget"], -1).indices)
                return scores

            press.score = noted
            with press(model):
                out = model(ids, use_cache=True, logits_to_keep=1)
            said = greedy(model, out, ids.shape[1])
            ours = prompt["ways"][name]
            alike = [
                len({*mine} & {*its}) / told["budget"]
                for layer, heads in zip(kept, ours["kept"], strict=True)
                for mine, its in zip(layer.tolist(), heads, strict=True)
            ]
            found[name].append((said == ours["said"], fmean(alike)))
            print(prompt["task"], name, *found[name][-1], flush=True)
    rows = [
        f"| {name} | {sum(same for same, _ in seen)} of {len(seen)} | {fmean(alike for _, alike in seen):.4%} |"
        for name, seen in found.items()
    ]
    versions = ", ".join(f"{name} {version(name)}" for name in ("kvpress", "transformers", "torch"))
    text = (
        f"# Peers by their own code\n\n{versions}, against our versions, SmolLM2-135M-Instruct, float32, "
        f"{len(told['prompts'])} prompts of {told['tokens']:,} tokens (seed {told['seed']}; {', '.join(TASKS)}), "
        f"{told['budget']} entries a KV head: same answers, token by token ({ANSWER_TOKENS} tokens), and the share "
        "of kept entries that are the same, mean over layers and heads. `python bench/peers.py ours`, then "
        "`python bench/peers.py kvpress` in the other environment.\n\n"
        "| method | same answers | same entries |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
    )
    print(text)
    if args.out:
        args.out.with_suffix(".md").write_text(text, encoding="utf-8")


def greedy(model: Any, out: Any, tokens: int) -> list[int]:
    """The answer to a prompt of so many tokens, from its last logits and its cache."""
    said = [int(out.logits[0, -1].argmax())]
    while len(said) < ANSWER_TOKENS:
        at = torch.tensor([[tokens + len(said) - 1]])
        out = model(torch.tensor([said[-1:]]), past_key_values=out.past_key_values, position_ids=at)
        said.append(int(out.logits[0, -1].argmax()))
    return said


if __name__ == "__main__":
    main()
