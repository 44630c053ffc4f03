"""`patch` and `load_cache`: which adapter serves which model."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from flexasl import checks
from flexasl.checks import article, instance, shown
from flexasl.config import LOOKUP_SCORES, ASLConfig
from flexasl.errors import ConfigError, UnsupportedError
from flexasl.policies import Policy, choose
from flexasl.profiles import Profile, find, is_open, path_for, place_for, store

if TYPE_CHECKING:
    import os

    from flexasl.integrations.base import BasePatch
    from flexasl.integrations.transformers import PrunedCache


def patch(
    model: Any,
    config: ASLConfig | None = None,
    policy: str | Policy = "asl",
    *,
    kernel: Literal["auto", "flex", "sdpa", "eager"] = "auto",
    compile: bool = False,
    foreign_hooks: Literal["refuse", "packed"] = "refuse",
    tokenizer: Any = None,
    question: Any = None,
    profile: str | os.PathLike[str] | Literal[False] | None = None,
    calibrate: bool | Mapping[str, Any] = False,
) -> BasePatch:
    """Makes `model` prune its prompts while it reads them, until `remove()` or the end of the `with` block.

    Args:
        model: A causal decoder in eval mode, of transformers (or a PEFT model around one), torchtune or torchtitan.
        config: The settings. None: `ASLConfig()`.
        policy: A name from `flexasl.policies.POLICIES` or `paper`, alone or with settings (`"fixed_layer:layer=9"`,
            `"asl:tau=0.3,min_layer=10"`), or an instance of a policy.
        kernel: What computes attention, see `FlexASLAttention`.
        compile: Whether the layers of a transformers model run as compiled graphs. These are made on the first prompt
            and the first new token, and serve all lengths and batches. Later turns run uncompiled. A backward pass
            through such a model raises `UnsupportedError`.
        foreign_hooks: What happens to hooks that other code has put on decoder layers or inside of them, before or
            after patching. On a layer they get and return hidden states [B, N, C] as unpatched, with 0 at padding, as
            long as no token was dropped. `"refuse"`: a prompt that a hook would get in another form is refused.
            `"packed"`: hooks get prompts as they run, [1, tokens that are left of all rows, C]. See docs/loading.md.
        tokenizer: The model's tokenizer. With it, prompts are ranked by the queries of their question, which is looked
            for in the user's last turn, and the question is kept. See docs/question.md.
        question: The question, where it is known: a text of the prompt, a span (start, stop) of positions (0 is the
            prompt's first token), a list of these for each row, or None. It can be set later on the patch, or given to
            one call of `generate`. Without `tokenizer` and `question`, and where no question is found, the last
            `window` tokens rank.
        profile: A file of settings that calibration found for the model. It fills in what the config leaves open.
            None: a profile that comes with the library or was stored on this machine is looked for. False: none is
            used.
        calibrate: Whether settings are found now where no profile is found. This takes minutes, shows its progress,
            needs the tokenizer, and stores the profile for the next time. True, or a dict of arguments of
            `flexasl.calibrate`. See docs/calibration.md.

    Returns:
        The patch. Its `report` describes the last prompt, and `remove()` restores the model.

    Raises:
        UnsupportedError: The model cannot be patched. It is then unchanged.
        ConfigError: Settings do not fit the model, have no effect under the policy, or were calibrated for another
            model. The model is then unchanged.

    Examples:
        >>> import flexasl, torch
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 6, "vocab_size": 100}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
        >>> prompt = torch.arange(90)[None]
        >>> with flexasl.patch(model, flexasl.ASLConfig(select_tokens=40)) as patch:
        ...     out = model.generate(prompt, max_new_tokens=3, do_sample=False)
        >>> patch.report.rows[0].kept_tokens
        40
    """
    chosen, settings = choose(policy, config)
    instance("compile", compile, bool, "True or False")
    checks.one_of("foreign_hooks", foreign_hooks, ("refuse", "packed"), error=ConfigError)
    if hasattr(model, "_orig_mod"):
        raise UnsupportedError(
            "model is the result of torch.compile; patch the model itself, with compile=True to compile its layers"
        )
    from flexasl.integrations import questions

    questions.check(question, tokenizer)
    found = _profile(without_peft(model), tokenizer, settings, chosen, profile, calibrate)
    made = _patched(without_peft(model), settings, chosen, kernel, compile, foreign_hooks, found)
    if profile and made.profile is None:
        made.remove()
        raise ConfigError(
            f"profile={shown(profile)} would have no effect, because the config sets other scores than it was found "
            "for, or layers that leave no room for its own; leave it out"
        )
    made.tokenizer, made.question = tokenizer, question
    return made


def _patched(
    model: Any,
    settings: ASLConfig,
    policy: Policy,
    kernel: str,
    compile: bool,
    foreign_hooks: str,
    profile: Profile | Literal[False] | None,
) -> BasePatch:
    if _is_a(model, "transformers", "PreTrainedModel"):
        from flexasl.integrations.transformers import Patch

        how: dict[str, Any] = {"kernel": kernel, "compile": compile, "foreign_hooks": foreign_hooks}
        return Patch(model, settings, policy, **how, profile=profile)
    others = {
        "torchtune": ("torchtune.modules", "TransformerDecoder"),
        "torchtitan": ("torchtitan.models.common.decoder", "Decoder"),
    }
    framework = next((name for name, place in others.items() if _is_a(model, *place)), None)
    if framework is None:
        raise UnsupportedError(
            f"model is {article(model)}; give a transformers causal language model (a PreTrainedModel), a "
            "torchtune TransformerDecoder or a torchtitan Decoder"
        )
    if compile:
        raise UnsupportedError(f"compile=True is not available for {framework} models; give compile=False")
    adapter: Any = importlib.import_module(f"flexasl.integrations.{framework}")
    patched: BasePatch = adapter.Patch(model, settings, policy, kernel=kernel, foreign_hooks=foreign_hooks)
    return patched


def _profile(
    model: Any, tokenizer: Any, settings: ASLConfig, policy: Policy, given: Any, calibrate: bool | Mapping[str, Any]
) -> Profile | Literal[False] | None:
    """The profile that is given or made now; what was given, None or False, where there is none."""
    instance("calibrate", calibrate, (bool, Mapping), "True, False or arguments of flexasl.calibrate", ConfigError)
    asked = "profile" if given is not None and given is not False else "calibrate"
    if asked == "calibrate" and calibrate is False:
        return False if given is False else None
    value = shown(given if asked == "profile" else calibrate)
    if given is not None and calibrate is not False:
        both = f"profile={shown(given)} and calibrate={shown(calibrate)}"
        raise ConfigError(f"{both} exclude each other; give one of them")
    if not _is_a(model, "transformers", "PreTrainedModel"):
        raise UnsupportedError(f"{asked}={value} is for transformers models, and this one is {article(model)}")
    if not policy.takes_profiles or not is_open(settings):
        why = "where the config leaves nothing open" if policy.takes_profiles else f"under policy {policy.name!r}"
        raise ConfigError(f"{asked}={value} would have no effect {why}; leave it out")
    from flexasl.integrations.transformers.fingerprint import calibrated_for

    known = calibrated_for(model)
    if asked == "profile":
        return Profile.load(given).of(known)
    if tokenizer is None:
        raise ConfigError(f"calibrate={value} needs the tokenizer to make prompts with; give tokenizer=")
    stored = find(known)
    if stored is not None:
        return stored
    from flexasl.calibration import calibrate_visibly

    how = dict(calibrate) if isinstance(calibrate, Mapping) else {}
    _refuse_other_scores(settings, how.get("config"), value)
    storable = path_for(known) is not None  # else it is known by its shape alone
    if storable:
        place_for(known)
    made = calibrate_visibly(model, tokenizer, **how).profile()
    return Profile.load(store(made)) if storable else dataclasses.replace(made, where="made now")


def _refuse_other_scores(settings: ASLConfig, config: Any, value: str) -> None:
    """Raises `ConfigError` where the settings have other scores than those that calibration would find layers for."""
    found = (config if isinstance(config, ASLConfig) else ASLConfig()).scored(LOOKUP_SCORES)
    for name in LOOKUP_SCORES:
        given, other = getattr(settings, name), getattr(found, name)
        if given not in (None, other):
            raise ConfigError(
                f"{name}={given!r} is given, and calibrate={value} finds settings for {name}={other!r}; give "
                f"calibrate={{'config': ASLConfig({name}={given!r})}}"
            )


def _is_a(model: Any, module: str, name: str) -> bool:
    """Whether the model is of this class, without importing the module: nobody else can have made such a model."""
    found = sys.modules.get(module)
    return found is not None and isinstance(model, getattr(found, name, ()))


def load_cache(path: str | os.PathLike[str], model: Any) -> PrunedCache:
    """Loads a cache that `save` wrote.

    Pass it to the model as `past_key_values` (`cache` in transformers 6.0), with the new ids after `cache.token_ids`
    and, in a padded batch, ones after `cache.attention_mask`. On a CPU its tensors are mapped from the file: you may
    replace the file while the cache is in use, but must not write into it.

    Args:
        path: The file.
        model: The model that read the prompt, patched.

    Returns:
        The cache.

    Raises:
        FlexASLError: The file is not an unchanged cache of this format version, or belongs to another model. Nothing
            is built then.
        FileNotFoundError: There is no such file.

    Examples:
        With the model and the prompt of the example of `patch`:

        >>> with tempfile.TemporaryDirectory() as folder, flexasl.patch(model):
        ...     read = model(prompt, use_cache=True).past_key_values
        ...     read.save(f"{folder}/prompt.safetensors")
        ...     cache = flexasl.load_cache(f"{folder}/prompt.safetensors", model)
        ...     ids = torch.cat([cache.token_ids, torch.tensor([[1, 2]])], 1)
        ...     out = model.generate(ids, past_key_values=cache, max_new_tokens=3, do_sample=False)
        >>> out.shape  # 90 tokens of the prompt, two of the question, three new ones
        torch.Size([1, 95])
    """
    path, model = checks.path("path", path), without_peft(model)
    if not _is_a(model, "transformers", "PreTrainedModel"):
        raise UnsupportedError(f"model is {article(model)}; saved caches are for transformers causal language models")
    if not hasattr(model, "flexasl_patch"):
        raise UnsupportedError(
            f"{type(model).__name__} is not patched, and a pruned cache can only be read by a patched model; "
            "call flexasl.patch(model) first"
        )
    from flexasl.integrations.transformers.loading import load

    return load(path, model)


def without_peft(model: Any) -> Any:
    """The model inside a PEFT model, whose adapters are modules of its layers."""
    peft = sys.modules.get("peft")
    if peft is None or not isinstance(model, peft.PeftModel):
        return model
    adapter = model.active_peft_config
    if adapter.is_prompt_learning:
        raise UnsupportedError(
            f"{type(model).__name__} has an adapter of type {adapter.peft_type.value}, which puts tokens of its own "
            "before the prompt; give a model with adapters inside its layers, such as LoRA"
        )
    return model.get_base_model()
