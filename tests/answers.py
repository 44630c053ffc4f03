"""What tests of model families share: settings, greedy answers with logits, and what holds of rows and caches."""

import copy

import torch
from models import GREEDY, STAGED, left_padded, prompts

import flexasl

FIXED = flexasl.ASLConfig(select_tokens=24, window=8, kernel_size=3)
KEEP_ALL = FIXED.replace(select_tokens=1.0)
STAGES = STAGED.replace(min_layer=None, min_layer_unasked=None, max_layer=None, stages="0.5@1")
RULES = {"one selection": (FIXED, "fixed_layer:layer=2"), "stages": (STAGES, "asl")}


def say(model, new_tokens, **inputs):
    """Tokens [B, N] and logits [B, M, V] of a greedy answer, and the cache."""
    out = model.generate(**inputs, max_new_tokens=new_tokens, **GREEDY, output_logits=True)
    return out.sequences, torch.stack(out.logits, 1), out.past_key_values


def close(got, want, atol=2e-4):
    torch.testing.assert_close(got.float(), want.float(), rtol=0, atol=atol)


def check_rows_alone(model, config, policy, atol=2e-4):
    """A batch of three rows, one of them short, is answered as each row by itself; returns what each kept."""
    rows = prompts(70, 12, 43)
    with flexasl.patch(model, config, policy=policy) as patch:
        alone = [say(model, 9, input_ids=row[None]) for row in rows]
        sequences, logits, _ = say(model, 9, **left_padded(rows))
        kept = [row.kept_tokens for row in patch.report.rows]
    for row, (tokens, own_logits, _) in enumerate(alone):
        close(logits[row], own_logits[0], atol)
        assert torch.equal(sequences[row, -9:], tokens[0, -9:])
    return kept


def check_caches(model, config, policy, folder):
    """Saved, copied, cropped and reordered caches give the same, and beams of a batch are those of each row."""
    rows, after = torch.stack(prompts(60, 60)), torch.tensor([[7], [9]])
    with flexasl.patch(model, config, policy=policy):
        cache = model(rows, use_cache=True).past_key_values
        cache.save(folder / "a")
        copied, loaded = copy.deepcopy(cache), flexasl.load_cache(folder / "a", model)
        turned, cropped = copy.deepcopy(cache), copy.deepcopy(cache)
        turned.reorder_cache(torch.tensor([1, 0, 1]))
        cropped.activate_past_recording()
        model(torch.stack(prompts(5, 5, seed=4)), past_key_values=cropped)
        cropped.crop(-5)
        want = model(after, past_key_values=cache).logits
        for other in (copied, loaded, cropped):
            close(model(after, past_key_values=other).logits, want)
        close(model(after[[1, 0, 1]], past_key_values=turned).logits, want[[1, 0, 1]])
        beams = model.generate(rows, max_new_tokens=5, num_beams=3, **GREEDY).sequences
        alone = [model.generate(row[None], max_new_tokens=5, num_beams=3, **GREEDY).sequences for row in rows]
        assert torch.equal(beams, torch.cat(alone))
