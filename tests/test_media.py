"""Models that read images beside text: right, or refused by name before an image is read."""

import pytest
import torch
from models import GREEDY, HEADS, LAYERS, SHAPE, SMALL
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

import flexasl
from flexasl import UnsupportedError
from flexasl.integrations.transformers import media

IMAGE, IMAGE_TOKENS = 190, 4
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
GEMMA = {"image_token_index": IMAGE, "mm_tokens_per_image": IMAGE_TOKENS}
QWEN = {
    "text_config": SHAPE | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
    "image_token_id": IMAGE,
    "video_token_id": 191,
    "vision_start_token_id": 192,
}
QWEN_EYES = {
    "depth": 3,
    "embed_dim": 32,
    "hidden_size": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "mlp_ratio": 2,
    "intermediate_size": 48,
    "patch_size": 14,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
    "fullatt_block_indexes": [0],
}


def llava():
    eyes = CLIPVisionConfig(**EYES, image_size=28, projection_dim=32)
    config = LlavaConfig(text_config=LlamaConfig(**SHAPE), vision_config=eyes, image_token_index=IMAGE)
    return LlavaForConditionalGeneration(config)


def mistral3():
    text, eyes = MistralConfig(**SHAPE, sliding_window=48), PixtralVisionConfig(**EYES, image_size=56, head_dim=16)
    config = Mistral3Config(text_config=text, vision_config=eyes, image_token_index=IMAGE)
    return Mistral3ForConditionalGeneration(config)


def gemma3():
    eyes = SiglipVisionConfig(**EYES, image_size=28)
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=dict(SHAPE), vision_config=eyes, **GEMMA))


def paligemma():
    config = {"text_config": GemmaConfig(**SHAPE), "vision_config": SiglipVisionConfig(**EYES, image_size=28)}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(**config, image_token_index=IMAGE, projection_dim=64))


def qwen2_vl():
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**QWEN, vision_config=QWEN_EYES | {"hidden_size": 64}))


def qwen2_5_vl():
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN, vision_config=QWEN_EYES))


def qwen3_vl():
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**QWEN, vision_config=QWEN_EYES))


def made(kind):
    torch.manual_seed(3)
    return globals()[kind]().eval().requires_grad_(False)


def pictures(kind, count):
    generator = torch.Generator().manual_seed(count)
    size = 28 if kind == "llava" else 56
    given = {"pixel_values": torch.randn(count, 3, size, size, generator=generator)}
    return given if kind == "llava" else given | {"image_sizes": torch.tensor([[size, size]] * count)}


def prompts(*lengths, image_at=20):
    """Left-padded ids, each with an image's placeholders, and mask."""
    width, generator = max(lengths), torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        start = width - length
        ids[row, :start], mask[row, :start] = 0, 0
        ids[row, start + image_at : start + image_at + IMAGE_TOKENS] = IMAGE
    return {"input_ids": ids, "attention_mask": mask}


def answer(model, **inputs):
    out = model.generate(**inputs, max_new_tokens=5, output_logits=True, **GREEDY)
    return out, torch.stack(out.logits, 1)


@pytest.mark.parametrize("kind", media.MERGED)
def test_images_merged_into_the_embeddings_keep_all_is_identity(kind):
    model, batch = made(kind), prompts(90, 61)
    first, plain = answer(model, **batch, **pictures(kind, 2))
    more = prompts(30, 30, image_at=3)
    ids = torch.cat([first.sequences, more["input_ids"]], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 35, dtype=torch.long)], 1)
    turn = {"input_ids": ids, "attention_mask": mask, **pictures(kind, 2)}
    _, second = answer(model, past_key_values=first.past_key_values, **turn)
    with flexasl.patch(model, SMALL.replace(select_tokens=1.0)) as patch:
        out, got = answer(model, **batch, **pictures(kind, 2))
        assert [row.prompt_tokens for row in patch.report.rows] == [90, 61]
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-4)
        torch.testing.assert_close(
            answer(model, past_key_values=out.past_key_values, **turn)[1], second, rtol=0, atol=1e-4
        )
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"sdpa"}


@pytest.mark.parametrize("kind", media.MERGED)
def test_images_merged_into_the_embeddings_are_pruned_like_text(kind):
    model, batch, images = made(kind), prompts(90, 61), pictures(kind, 2)
    with flexasl.patch(model, SMALL.replace(kv_budget=16)) as patch:
        out, together = answer(model, **batch, **images)
        rows = patch.report.rows
        assert [row.kept_tokens for row in rows] == [24, 24] and len(out.past_key_values.layers) == LAYERS
        for row, length in enumerate((90, 61)):
            image = {name: value[row : row + 1] for name, value in images.items()}
            _, alone = answer(model, input_ids=batch["input_ids"][row : row + 1, -length:], **image)
            assert patch.report.rows[0].kept_positions == rows[row].kept_positions
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)
    logits = []
    for way in ("gather", "mask"):
        with flexasl.patch(model, SMALL.replace(propagate=way)):
            logits.append(answer(model, **batch, **images)[1])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["gemma3", "paligemma"])
def test_image_tokens_that_see_each_other_are_refused_when_patched(kind):
    model = made(kind)
    with pytest.raises(UnsupportedError, match=f"model type '{kind}' cannot be patched: its image tokens see each"):
        flexasl.patch(model, SMALL)
    assert not hasattr(model, "flexasl_patch")


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("qwen2_vl", "its positions have three parts"),
        ("qwen2_5_vl", "its positions have three parts"),
        ("qwen3_vl", "features of its images are added to hidden states of several layers"),
    ],
)
def test_models_that_are_right_for_text_alone_refuse_the_first_image(kind, why):
    model, batch = made(kind), prompts(90, 61)
    text = batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 5)}
    image = {"pixel_values": torch.randn(32, 3 * 2 * 14 * 14), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    kinds = {"mm_token_type_ids": (batch["input_ids"] == IMAGE).long()}
    _, plain = answer(model, **text)
    seen = []
    handle = model.model.visual.register_forward_pre_hook(lambda *_: seen.append(1))
    with flexasl.patch(model, SMALL.replace(select_tokens=1.0)) as patch:
        torch.testing.assert_close(answer(model, **text)[1], plain, rtol=0, atol=1e-4)
        before = patch.report
        for call in (model, lambda **inputs: answer(model, **inputs)):
            with pytest.raises(UnsupportedError, match=f"pixel_values is not available .* {kind!r}: {why}"):
                call(**batch, **image, **kinds)
        assert not seen and patch.report is before
        parts = torch.arange(90).expand(3, 1, -1).clone()
        parts[1, :, 40:] -= 3
        with pytest.raises(UnsupportedError, match="position_ids have parts for time, height and width that differ"):
            model(text["input_ids"][:1], position_ids=parts)
        embeds = model.get_input_embeddings()(text["input_ids"])
        added = {"deepstack_visual_embeds": [torch.ones(8, 64)], "visual_pos_masks": batch["input_ids"] == IMAGE}
        with pytest.raises(
            UnsupportedError, match="cannot be given an image while patched: features of its images are"
        ):
            model.get_decoder()(inputs_embeds=embeds, **added)
    handle.remove()


def test_the_vision_tower_keeps_its_attention():
    model = made("llava")
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    with flexasl.patch(model, SMALL):
        assert model.model.vision_tower.config._attn_implementation == "eager"
        assert model.get_decoder().config._attn_implementation == "flexasl"
        model(**prompts(90), **pictures("llava", 1))
        model.set_attn_implementation({"text_config": "eager", "vision_config": "eager"})
        with pytest.raises(UnsupportedError, match=r"call model.get_decoder\(\).set_attn_implementation\('flexasl'\)"):
            model(**prompts(90))
        model.get_decoder().set_attn_implementation("flexasl")
        model(**prompts(90), **pictures("llava", 1))
    assert model.model.vision_tower.config._attn_implementation == "eager"
    assert model.get_decoder().config is model.config.text_config
    assert model.config.text_config.num_attention_heads == HEADS
