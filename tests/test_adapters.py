"""PEFT's adapters on a patched model: right, or refused by type, and the model answers as before afterwards."""

import copy
import importlib.util

import peft
import pytest
import torch
from models import GREEDY, SMALL, left_padded, prompts, tiny
from peft import LoraConfig, XLoraConfig, get_peft_model

import flexasl
from flexasl import FlexASLError, UnsupportedError
from flexasl.integrations.transformers import adapters

TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
RANDOM = {"init_weights": False}
KINDS: dict[str, tuple[str, dict]] = {
    "adalora": ("AdaLoraConfig", {"total_step": 10}),
    "adamss": ("AdamssConfig", {}),
    "adaption_prompt": ("AdaptionPromptConfig", {"target_modules": None, "adapter_len": 4, "adapter_layers": 6}),
    "beft": ("BeftConfig", {"target_modules": ["v_proj"]}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "c3a": ("C3AConfig", {"block_size": 16, "target_modules": ["q_proj", "o_proj"], **RANDOM}),
    "deft": ("DeftConfig", {}),
    "delora": ("DeloraConfig", RANDOM),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20}),
    "frod": ("FrodConfig", {}),
    "glora": ("GloraConfig", {}),
    "gralora": ("GraloraConfig", {"gralora_k": 2, **RANDOM}),
    "hira": ("HiraConfig", RANDOM),
    "hra": ("HRAConfig", RANDOM),
    "ia3": ("IA3Config", {"feedforward_modules": ["down_proj"], "init_ia3_weights": False}),
    "ln_tuning": ("LNTuningConfig", {"target_modules": ["input_layernorm"]}),
    "loha": ("LoHaConfig", RANDOM),
    "lokr": ("LoKrConfig", RANDOM),
    "lora": ("LoraConfig", {"init_lora_weights": False}),
    "lora_dora": ("LoraConfig", {"init_lora_weights": False, "use_dora": True}),
    "lora_embeddings": ("LoraConfig", {"target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}),
    "lora_layers_again": ("LoraConfig", {"layer_replication": [[0, 4], [2, 6]], "init_lora_weights": False}),
    "miss": ("MissConfig", RANDOM),
    "oft": ("OFTConfig", {"oft_block_size": 4, **RANDOM}),
    "osf": ("OSFConfig", {}),
    "peanut": ("PeanutConfig", {}),
    "poly": ("PolyConfig", {}),
    "psoft": ("PsoftConfig", {}),
    "pvera": ("PveraConfig", {}),
    "randlora": ("RandLoraConfig", {}),
    "road": ("RoadConfig", {"group_size": 16, **RANDOM}),
    "shira": ("ShiraConfig", {"r": 2, **RANDOM}),
    "supertuning": ("SupertuningConfig", {}),
    "tinylora": ("TinyLoraConfig", {}),
    "trainable_tokens": ("TrainableTokensConfig", {"target_modules": ["embed_tokens"], "token_indices": [5, 6]}),
    "unilora": ("UniLoraConfig", {}),
    "vblora": ("VBLoRAConfig", {"vector_length": 16, "num_vectors": 20}),
    "vera": ("VeraConfig", {"target_modules": ["q_proj", "v_proj"], **RANDOM}),
    "waveft": ("WaveFTConfig", {"n_frequency": 20}),
}
"""What treats every token alone, each with what makes it fit the tiny model."""
LORA = LoraConfig(init_lora_weights=False, **TARGETS)
CALL = [5, 6, 7]
ACTIVATED = LoraConfig(init_lora_weights=False, alora_invocation_tokens=CALL, **TARGETS)
KEEP_ALL = SMALL.replace(select_tokens=1.0)


def two_rows():
    return left_padded(prompts(70, 41))


def config_of(kind):
    name, more = KINDS[kind]
    settings = {key: value for key, value in (TARGETS | more).items() if value is not None}
    return getattr(peft, name)(**settings)


def adapted(*configs):
    """A tiny model with random weights in adapters "fr" and "de"; the first is active."""
    model = None
    for name, config in zip(("fr", "de"), configs):
        torch.manual_seed(5)
        if model is None:
            model = get_peft_model(copy.deepcopy(tiny()), config, adapter_name=name)
        else:
            model.add_adapter(name, config)
    assert model is not None
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            if weights.requires_grad:
                weights.add_(0.3 * torch.randn(weights.shape, generator=generator))
    return model.eval().requires_grad_(False)


def generate(model, **inputs):
    settings = {**GREEDY, "max_new_tokens": 2, "output_logits": True}
    return torch.stack(model.generate(**inputs, **settings).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_that_treat_every_token_alone(kind):
    family = kind.partition("_")[0] if kind.startswith("lora") else kind
    assert family in adapters.TOKENWISE
    if kind == "adamss" and importlib.util.find_spec("sklearn") is None:
        pytest.skip("needs scikit-learn")
    model = adapted(config_of(kind))
    # Poly gives each row a task; the rows of a packed batch cannot have theirs.
    batch, more = two_rows(), {}
    if kind == "poly":
        batch, more = {"input_ids": batch["input_ids"][:1]}, {"task_ids": torch.tensor([0])}
    row = {"input_ids": two_rows()["input_ids"][:1]}
    plain = generate(model, **batch, **more)
    assert not torch.allclose(plain[0], generate(tiny(), **batch)[0], atol=1e-2)
    # Rounding grows with the logits.
    close = {"rtol": 0, "atol": 1e-5 * max(10.0, plain.abs().max().item())}
    with flexasl.patch(model, KEEP_ALL):
        torch.testing.assert_close(generate(model, **batch, **more), plain, **close)
    with flexasl.patch(model, SMALL) as patch:
        dropped = generate(model, **batch, **more)
        kept = [one.kept_positions for one in patch.report.rows]
        torch.testing.assert_close(generate(model, **row, **more)[:, :1], dropped[:, :1], **close)
        assert patch.report.rows[0].kept_positions == kept[0]
    with flexasl.patch(model, SMALL.replace(propagate="mask")):
        torch.testing.assert_close(generate(model, **batch, **more), dropped, **close)


def test_every_kind_of_adapter_in_the_list_is_tested():
    assert {kind.partition("_")[0] if kind.startswith("lora") else kind for kind in KINDS} == adapters.TOKENWISE


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (ACTIVATED, "has an activated LoRA .*, which counts its tokens from the end of the row"),
        (peft.LilyConfig(**TARGETS), "adapter of type LILY, which mixes its experts by the mean over all tokens"),
        (peft.ShadowConfig(task_type="CAUSAL_LM"), "adapter of type SHADOW, which runs a second decoder"),
    ],
)
def test_adapters_whose_effect_depends_on_other_tokens_are_refused_when_patched(config, why):
    model = adapted(config)
    for given in (model, model.get_base_model()):
        with pytest.raises(UnsupportedError, match=why):
            flexasl.patch(given, SMALL)
        assert not hasattr(model.get_base_model(), "flexasl_patch")


def test_a_kind_of_adapter_that_nobody_has_tried_is_refused(monkeypatch):
    monkeypatch.setattr(adapters, "TOKENWISE", frozenset())
    with pytest.raises(UnsupportedError, match="adapter of type LORA, which is not among those that are known to"):
        flexasl.patch(adapted(LORA), SMALL)


def test_x_lora_is_refused(tmp_path):
    for name in "01":
        adapted(LORA).save_pretrained(tmp_path / name)
    base = copy.deepcopy(tiny())
    base.config.use_cache = False
    places = {name: str(tmp_path / name / "fr") for name in "01"}
    model = get_peft_model(base, XLoraConfig(hidden_size=64, adapters=places, task_type="CAUSAL_LM")).eval()
    with pytest.raises(UnsupportedError, match="adapter of type XLORA, which weighs its adapters for each token by"):
        flexasl.patch(model, SMALL)
    first = copy.deepcopy(tiny())
    first.config.use_cache = False
    with flexasl.patch(first, SMALL):
        model = get_peft_model(first, XLoraConfig(hidden_size=64, adapters=places, task_type="CAUSAL_LM")).eval()
        with pytest.raises(UnsupportedError, match="adapter of type XLORA"):
            model(**two_rows())


@pytest.mark.parametrize("config", [ACTIVATED, peft.LilyConfig(**TARGETS)])
def test_adapters_that_come_or_go_while_the_model_is_patched(config):
    model, ids = copy.deepcopy(tiny()), two_rows()["input_ids"][:1].clone()
    ids[0, 40:43] = torch.tensor(CALL)
    with flexasl.patch(model, KEEP_ALL):
        plain = generate(model, input_ids=ids)
        wrapped = get_peft_model(model, config).eval()
        for call in (lambda: generate(wrapped, input_ids=ids), lambda: wrapped(input_ids=ids)):
            with pytest.raises(UnsupportedError, match=r"activated LoRA|type LILY"):
                call()
        with wrapped.disable_adapter():
            assert torch.equal(generate(wrapped, input_ids=ids), plain)
        assert torch.equal(generate(wrapped.unload(), input_ids=ids), plain)


def test_an_activated_lora_that_is_not_active():
    model = adapted(LORA, ACTIVATED)
    plain = generate(model, **two_rows())
    with flexasl.patch(model, KEEP_ALL):
        torch.testing.assert_close(generate(model, **two_rows()), plain, rtol=0, atol=1e-4)
        model.set_adapter("de")
        with pytest.raises(UnsupportedError, match="activated LoRA"):
            generate(model, **two_rows())
        model.set_adapter("fr")
        torch.testing.assert_close(generate(model, **two_rows()), plain, rtol=0, atol=1e-4)


NAMES = [["fr", "__base__"], ["de", "de"]]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("kind", ["lora", "road", "glora"])
def test_adapters_by_row_are_refused_and_leave_nothing_behind(kind, names):
    model = adapted(config_of(kind), config_of(kind))
    plain = generate(model, **two_rows())
    mixed = generate(model, **two_rows(), adapter_names=names)
    for inside in (model, model.get_base_model()):
        with flexasl.patch(inside, KEEP_ALL):
            for call in (generate, lambda given, **inputs: given(**inputs)):
                with pytest.raises(UnsupportedError, match=r"adapter_names of 2 rows cannot .* set_adapter"):
                    call(model, **two_rows(), adapter_names=names)
            torch.testing.assert_close(generate(model, **two_rows()), plain, rtol=0, atol=1e-4)
    assert torch.equal(generate(model, **two_rows()), plain)
    assert torch.equal(generate(model, **two_rows(), adapter_names=names), mixed)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_one_row_by_name_and_other_refusals_of_the_call():
    model, row = adapted(LORA, LORA), {"input_ids": two_rows()["input_ids"][:1]}
    want, plain = generate(model, **row, adapter_names=["__base__"]), generate(model, **row)
    with flexasl.patch(model, KEEP_ALL):
        got = generate(model, **row, adapter_names=["__base__"])
        torch.testing.assert_close(got, want, rtol=0, atol=1e-4)
        with pytest.raises(UnsupportedError, match="prefill_chunk_size=16"):
            generate(model, **row, adapter_names=["__base__"], prefill_chunk_size=16)
        with pytest.raises(UnsupportedError, match="labels is not available"):
            model(**row, labels=row["input_ids"], adapter_names=["__base__"])
        with pytest.raises(UnsupportedError, match="adapter_names of 3 rows"):
            generate(model, **row, adapter_names=["__base__"], num_beams=3)
    assert torch.equal(generate(model, **row), plain)


def test_tasks_by_row_are_refused():
    model = adapted(config_of("poly"))
    with (
        flexasl.patch(model, KEEP_ALL),
        pytest.raises(UnsupportedError, match="type POLY, which takes task_ids by row"),
    ):
        generate(model, **two_rows(), task_ids=torch.tensor([0, 0]))


@pytest.mark.parametrize("kind", ["lora", "ia3"])
def test_a_saved_cache_belongs_to_the_adapter_that_read_it(kind, tmp_path):
    model, path = adapted(config_of(kind), config_of(kind)), tmp_path / "prompt"
    with torch.no_grad(), flexasl.patch(model, SMALL):
        model(**left_padded(prompts(60)), use_cache=True).past_key_values.save(path)
        flexasl.load_cache(path, model)
        model.set_adapter("de")
        with pytest.raises(FlexASLError, match=r"adapters in use is \['fr.*\], and this model's is \['de.*\]"):
            flexasl.load_cache(path, model)
        with model.disable_adapter(), pytest.raises(FlexASLError, match=r"this model's is \[\]"):
            flexasl.load_cache(path, model)
        model.set_adapter("fr")
        flexasl.load_cache(path, model)
        if kind == "lora":
            model.base_model.model.model.layers[2].self_attn.q_proj.set_scale("fr", 0.5)
            with pytest.raises(FlexASLError, match="adapters in use"):
                flexasl.load_cache(path, model)
