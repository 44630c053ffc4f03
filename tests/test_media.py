"""Models that read images beside text: right, or refused by name before an image is read."""

import functools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import GREEDY, LAYERS, MOE, SHAPE, SLIDING, SMALL, STAGED
from tiny_chat import tiny_tokenizer
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

import flexasl
from flexasl import ASLConfig, Report, UnsupportedError
from flexasl.integrations.transformers import media
from flexasl.report import ImageReport
from flexasl.selectors import ScheduledSelector, Selection
from flexasl.tools.text import prose

IMAGE = 190
TOKENS = {"llava_next": 14, "llava_onevision": 14}
"""Tokens of an image, where these are not four."""
KINDS = [*media.TESTED, "gemma4_shared"]
BOTH_WAYS = ["gemma3", "gemma4", "paligemma"]
"""Those in which tokens of an image see each other."""
ROOMY = {"qwen3_vl": {"min_layer": 2}, "qwen3_vl_moe": {"min_layer": 2}}
"""Settings that leave the layers alone to whose outputs features are added."""
EYES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2, "patch_size": 14}
GEMMA = {"image_token_index": IMAGE, "mm_tokens_per_image": 4}
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
    eyes, text = SiglipVisionConfig(**EYES, image_size=28), SHAPE | SLIDING | {"head_dim": 16}
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=eyes, **GEMMA))


def gemma4(**text):
    shape = {**SHAPE, **SLIDING, "head_dim": 16, "global_head_dim": 32, "use_bidirectional_attention": "vision"}
    shape |= {"hidden_size_per_layer_input": 0, **text}
    eyes = EYES | {"num_key_value_heads": 2, "head_dim": 16, "pooling_kernel_size": 2, "position_embedding_size": 16}
    config = {"text_config": shape, "vision_config": eyes, "audio_config": None, "image_token_id": IMAGE}
    config |= {"video_token_id": 191, "audio_token_id": 192}
    return Gemma4ForConditionalGeneration(Gemma4Config(**config))


def gemma4_shared():
    """Of its smaller sizes, whose images are read in order, and whose last layers share keys and values."""
    full, sliding = "full_attention", "sliding_attention"
    kinds = {"layer_types": [full, full, sliding, full, sliding, full], "num_kv_shared_layers": 2}
    own = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": SHAPE["vocab_size"]}
    return gemma4(**kinds, **own, use_bidirectional_attention=None)


def paligemma():
    config = {"text_config": GemmaConfig(**SHAPE), "vision_config": SiglipVisionConfig(**EYES, image_size=28)}
    return PaliGemmaForConditionalGeneration(PaliGemmaConfig(**config, image_token_index=IMAGE, projection_dim=64))


def qwen2_vl():
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(**QWEN, vision_config=QWEN_EYES | {"hidden_size": 64}))


def qwen2_5_vl():
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**QWEN, vision_config=QWEN_EYES))


def qwen3_vl():
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(**QWEN, vision_config=QWEN_EYES))


def qwen3_vl_moe():
    text = QWEN["text_config"] | MOE | {"decoder_sparse_step": 1}
    return Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(**QWEN | {"text_config": text}, vision_config=QWEN_EYES))


def llava_next():
    eyes = CLIPVisionConfig(**EYES, image_size=28, projection_dim=32)
    config = {"text_config": LlamaConfig(**SHAPE), "vision_config": eyes, "image_token_index": IMAGE}
    return LlavaNextForConditionalGeneration(LlavaNextConfig(**config, image_grid_pinpoints=[[28, 56], [56, 28]]))


def llava_onevision():
    eyes = SiglipVisionConfig(**EYES, image_size=28)
    config = {"text_config": Qwen2Config(**SHAPE), "vision_config": eyes, "image_token_index": IMAGE}
    config |= {"video_token_index": 191, "vision_feature_layer": -1, "image_grid_pinpoints": [[28, 56], [56, 28]]}
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(**config))


def internvl():
    eyes = InternVLVisionConfig(**EYES | {"patch_size": [14, 14]}, image_size=[56, 56])
    config = {"text_config": Qwen2Config(**SHAPE), "vision_config": eyes, "image_token_id": IMAGE}
    return InternVLForConditionalGeneration(InternVLConfig(**config, downsample_ratio=0.5))


def smolvlm():
    config = {"text_config": LlamaConfig(**SHAPE), "vision_config": EYES | {"image_size": 56}, "scale_factor": 2}
    return SmolVLMForConditionalGeneration(SmolVLMConfig(**config, image_token_id=IMAGE))


def idefics3():
    config = {"text_config": LlamaConfig(**SHAPE), "vision_config": EYES | {"image_size": 56}, "scale_factor": 2}
    return Idefics3ForConditionalGeneration(Idefics3Config(**config, image_token_id=IMAGE))


def made(kind):
    torch.manual_seed(3)
    return globals()[kind]().eval().requires_grad_(False)


def pictures(kind, ids, each=1):
    """What the model takes beside text ids [B, M], with so many images a row: random, in the processors' shapes."""
    count, generator = each * len(ids), torch.Generator().manual_seed(len(ids))

    def random(*shape):
        return torch.randn(count, *shape, generator=generator)

    if kind.startswith("qwen"):  # 4 x 4 patches of an image, of which four become a token
        parts = {"pixel_values": random(16, 3 * 2 * 14 * 14).flatten(0, 1)}
        return parts | {"image_grid_thw": torch.tensor([[1, 4, 4]] * count), "mm_token_type_ids": (ids == IMAGE).int()}
    if kind in ("llava_next", "llava_onevision"):  # an image whole, and in two tiles
        return {"pixel_values": random(3, 3, 28, 28), "image_sizes": torch.tensor([[28, 56]] * count)}
    if kind.startswith("gemma4"):  # 4 x 4 patches, as Qwen's
        at = torch.cartesian_prod(torch.arange(4), torch.arange(4)).flip(1).expand(count, -1, -1)
        given = {"pixel_values": random(16, 3 * 14 * 14), "image_position_ids": at}
        return given | {"mm_token_type_ids": (ids == IMAGE).int()}
    if kind in ("gemma3", "paligemma"):
        marked = (ids == IMAGE).int() if kind == "gemma3" else torch.zeros_like(ids)
        return {"pixel_values": random(3, 28, 28), "token_type_ids": marked}
    if kind in ("smolvlm", "idefics3"):
        return {"pixel_values": random(3, 56, 56).unflatten(0, (len(ids), each))}
    size = 28 if kind == "llava" else 56
    given = {"pixel_values": random(3, size, size)}
    return given | {"image_sizes": torch.tensor([[size, size]] * count)} if kind == "mistral3" else given


def of_row(given, row):
    """The part of `pictures` of one row."""
    return {
        name: value.chunk(2)[row] if name == "pixel_values" else value[row : row + 1] for name, value in given.items()
    }


def prompts(*lengths, image_at=20, tokens=4):
    """Left-padded ids, each with an image's placeholders, and mask."""
    width, generator = max(lengths), torch.Generator().manual_seed(0)
    ids = torch.randint(3, IMAGE, (len(lengths), width), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        start = width - length
        ids[row, :start], mask[row, :start] = 0, 0
        ids[row, start + image_at : start + image_at + tokens] = IMAGE
    return {"input_ids": ids, "attention_mask": mask}


def answer(model, **inputs):
    out = model.generate(**inputs, max_new_tokens=5, output_logits=True, **GREEDY)
    return out, torch.stack(out.logits, 1)


def settings(kind, **changes):
    return SMALL.replace(**ROOMY.get(kind, {}) | changes)


@pytest.mark.parametrize("kind", KINDS)
def test_keep_all_is_identity_with_images(kind):
    model, tokens = made(kind), TOKENS.get(kind, 4)
    batch = prompts(90, 61, tokens=tokens)
    first, plain = answer(model, **batch, **pictures(kind, batch["input_ids"]))
    more = prompts(30, 30, image_at=3, tokens=tokens)
    ids = torch.cat([first.sequences, more["input_ids"]], 1)
    mask = torch.cat([batch["attention_mask"], torch.ones(2, 35, dtype=torch.long)], 1)
    turn = {"input_ids": ids, "attention_mask": mask, **pictures(kind, ids)}
    if kind.startswith("qwen") or kind == "paligemma":  # another question about the same image
        ids[:, first.sequences.shape[1] :].masked_fill_(more["input_ids"] == IMAGE, 5)
        turn = {"input_ids": ids, "attention_mask": mask}
        if kind.startswith("qwen"):  # whose place gives positions
            turn |= pictures(kind, ids)
            turn["mm_token_type_ids"] = (ids == IMAGE).int()
            del turn["pixel_values"]
    with flexasl.patch(model, settings(kind, select_tokens=1.0)) as patch:
        out, got = answer(model, **batch, **pictures(kind, batch["input_ids"]))
        assert [row.prompt_tokens for row in patch.report.rows] == [90, 61]
        torch.testing.assert_close(got, plain, rtol=0, atol=1e-4)
        _, mine = answer(model, past_key_values=out.past_key_values, **turn)
    _, second = answer(model, past_key_values=first.past_key_values, **turn)
    torch.testing.assert_close(mine, second, rtol=0, atol=1e-4)
    assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {"sdpa"}


@pytest.mark.parametrize("kind", KINDS)
def test_image_tokens_are_pruned_like_text(kind):
    model, tokens = made(kind), TOKENS.get(kind, 4)
    batch = prompts(90, 61, tokens=tokens)
    images = pictures(kind, batch["input_ids"])
    with flexasl.patch(model, settings(kind, kv_budget=16)) as patch:
        out, together = answer(model, **batch, **images)
        rows, said = patch.report.rows, str(patch.report)
        assert [row.kept_tokens for row in rows] == [24, 24] and len(out.past_key_values.layers) == LAYERS
        for row, length in enumerate((90, 61)):
            kept = sum(20 <= at < 20 + tokens for at in rows[row].kept_positions)
            assert rows[row].images == (ImageReport(first=20, tokens=tokens, kept_tokens=kept),)
            assert f"image tokens kept: {kept} of {tokens}" in said
            one = {
                name: value[:, -length:] if name.endswith("token_type_ids") else value
                for name, value in of_row(images, row).items()
            }
            _, alone = answer(model, input_ids=batch["input_ids"][row : row + 1, -length:], **one)
            assert patch.report.rows[0].kept_positions == rows[row].kept_positions
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)
        assert Report.from_dict(patch.report.to_dict()) == patch.report
    logits = []
    for way in ("gather", "mask"):
        with flexasl.patch(model, settings(kind, propagate=way)):
            logits.append(answer(model, **batch, **images)[1])
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_text_alone(kind):
    model, batch = made(kind), prompts(90, 61)
    batch["input_ids"].masked_fill_(batch["input_ids"] == IMAGE, 5)
    _, plain = answer(model, **batch)
    with flexasl.patch(model, settings(kind, select_tokens=1.0)):
        torch.testing.assert_close(answer(model, **batch)[1], plain, rtol=0, atol=1e-4)
    with flexasl.patch(model, settings(kind)) as patch:
        _, together = answer(model, **batch)
        assert [row.kept_tokens for row in patch.report.rows] == [24, 24]
        assert [row.images for row in patch.report.rows] == [(), ()]
        for row, length in enumerate((90, 61)):
            _, alone = answer(model, input_ids=batch["input_ids"][row : row + 1, -length:])
            torch.testing.assert_close(alone[0], together[row], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llava", "gemma3", "gemma4", "qwen2_5_vl"])
def test_the_question_about_an_image_ranks(kind, monkeypatch, tmp_path):
    """A model that reads images gives its decoder features; its ids have the question, and are saved with the cache."""
    monkeypatch.setitem(SHAPE, "vocab_size", 1000)
    monkeypatch.setitem(QWEN["text_config"], "vocab_size", 1000)
    model, tokenizer, asked = made(kind), tiny_tokenizer(), "Which animal do you see in the picture?"
    text = f"{' '.join(prose().split()[:60])}\n\n{asked}"
    message = [{"role": "user", "content": text}]
    said = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    ids = said["input_ids"].masked_fill(said["input_ids"] == IMAGE, 5)
    batch = {"input_ids": torch.cat([ids[:, :3], torch.full((1, 4), IMAGE), ids[:, 3:]], 1)}
    images = pictures(kind, batch["input_ids"])
    with flexasl.patch(model, STAGED.replace(select_tokens=64), tokenizer=tokenizer) as patch:
        cache = model(**batch, **images, use_cache=True).past_key_values
        assert patch.report.rows[0].ranked_by.startswith(asked) and patch.report.rows[0].kept_tokens == 64
        cache.save(tmp_path / "a")
        assert torch.equal(flexasl.load_cache(tmp_path / "a", model).token_ids, batch["input_ids"])
        patch.question = "do you see in the picture"
        model(**batch, **images)
        assert patch.report.rows[0].ranked_by == "do you see in the picture"


@pytest.mark.parametrize("kind", KINDS)
def test_several_images_in_each_row(kind):
    model, tokens = made(kind), TOKENS.get(kind, 4)
    batch = prompts(90, 71, tokens=tokens)
    for row, start in enumerate((45, 64)):
        batch["input_ids"][row, start : start + tokens] = IMAGE
    given = batch | pictures(kind, batch["input_ids"], each=2)
    _, plain = answer(model, **given)
    with flexasl.patch(model, settings(kind, select_tokens=1.0)) as patch:
        torch.testing.assert_close(answer(model, **given)[1], plain, rtol=0, atol=1e-4)
        firsts = [[image.first for image in row.images] for row in patch.report.rows]
        assert firsts == [[20, 45], [20, 45]]
    with flexasl.patch(model, settings(kind)) as patch:
        answer(model, **given)
        assert all(image.tokens == tokens for row in patch.report.rows for image in row.images)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_video_frames(kind):
    """Two frames of four tokens each, which Qwen3-VL reads with text between them."""
    model, batch = made(kind), prompts(90, 61)
    ids = batch["input_ids"]
    for row, start in enumerate((20, 49)):
        second = start + 4 if kind != "qwen3_vl" else start + 9
        ids[row, start : start + 4] = ids[row, second : second + 4] = 191
    given = batch | {
        "pixel_values_videos": torch.randn(64, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[2, 4, 4]] * 2),
        "mm_token_type_ids": (ids == 191).int() * 2,
    }
    _, plain = answer(model, **given)
    with flexasl.patch(model, settings(kind, select_tokens=1.0)) as patch:
        torch.testing.assert_close(answer(model, **given)[1], plain, rtol=0, atol=1e-4)
        frames = [image.tokens for image in patch.report.rows[1].images]
        assert frames == ([4, 4] if kind == "qwen3_vl" else [8])


@pytest.mark.parametrize("kind", ["llava", "qwen2_vl", "qwen3_vl", "internvl", *BOTH_WAYS])
def test_half_of_an_images_tokens_dropped_is_a_run_without_them(kind):
    """A policy that drops every second token of the image, against layers that run on the others alone."""
    model, batch = made(kind), prompts(61, tokens=4)
    images, layer = pictures(kind, batch["input_ids"]), 3
    keep = torch.ones(61, dtype=torch.bool)
    keep[20:24:2] = False

    class HalfOfTheImage(flexasl.policies.FixedLayer):
        name = "half_of_the_image"

        def selector(self, config, prompts):
            made = ScheduledSelector(lambda tokens: {layer: 59}, config, prompts)
            made.select = lambda at: [Selection(0, at, keep, 59)] if at == layer else []
            return made

    with flexasl.patch(model, ASLConfig(select_tokens=59, window=8), policy=HalfOfTheImage(layer)) as patch:
        got = model(**batch, **images).logits[0, -1]
        assert patch.report.rows[0].images[0].kept_tokens == 2
    left = keep.nonzero()[:, 0]

    def gather(value):
        if isinstance(value, tuple):
            return tuple(map(gather, value))
        if isinstance(value, torch.Tensor) and value.dim() > 1:
            return (
                value[:, left]
                if value.shape[1] == 61
                else value[..., left, :][..., left]
                if value.dim() == 4
                else value
            )
        return value

    hooks = [
        one.register_forward_pre_hook(
            lambda module, args, kwargs: (tuple(map(gather, args)), {k: gather(v) for k, v in kwargs.items()}),
            with_kwargs=True,
        )
        for one in model.get_decoder().layers[layer + 1 :]
    ]
    want = model(**batch, **images).logits[0, -1]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3_vl", "qwen3_vl_moe"])
def test_layers_that_features_are_added_to_keep_all_tokens(kind):
    model, batch = made(kind), prompts(90, 61)
    with flexasl.patch(model, SMALL) as patch:
        with pytest.raises(UnsupportedError, match="features of images are added to the outputs of the first 2 layers"):
            model(**batch, **pictures(kind, batch["input_ids"]))
        assert patch.report is None
        model(batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 5))
        assert patch.report.rows[0].kept_tokens == 24


def test_what_tokens_that_see_each_other_cannot_honour_is_refused():
    model, batch = made("paligemma"), prompts(60, 60)
    images = pictures("paligemma", batch["input_ids"])
    with flexasl.patch(model, settings("paligemma")):
        cache = model(**batch, **images, use_cache=True).past_key_values
        turn = {"input_ids": batch["input_ids"], "attention_mask": torch.ones(2, 120, dtype=torch.long)}
        with pytest.raises(
            UnsupportedError, match="a later turn of a model of type 'paligemma' has tokens that see each"
        ):
            model(**turn, **images, past_key_values=cache)


@pytest.mark.parametrize("later", ["keep", "prune"])
@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_tokens_of_a_later_turns_image_see_each_other(kind, later):
    """Unpatched, they do so too; and while tokens are dropped, each row is as alone."""
    model, first, more = made(kind), prompts(70, 70), prompts(60, 60, image_at=9)
    ids = torch.cat([first["input_ids"], more["input_ids"]], 1)
    images, after = pictures(kind, first["input_ids"]), pictures(kind, ids)

    def two_turns(rows):
        part = {name: value.chunk(2)[rows] if isinstance(rows, int) else value for name, value in images.items()}
        cache = model(first["input_ids"][_span(rows)], **part, use_cache=True).past_key_values
        part = {name: value.chunk(2)[rows] if isinstance(rows, int) else value for name, value in after.items()}
        return answer(model, input_ids=ids[_span(rows)], past_key_values=cache, **part)[1]

    plain = two_turns(None)
    with flexasl.patch(model, settings(kind, select_tokens=1.0, later_turns=later)):
        torch.testing.assert_close(two_turns(None), plain, rtol=0, atol=1e-4)
    with flexasl.patch(model, settings(kind, later_turns=later)) as patch:
        together = two_turns(None)
        assert [row.kept_tokens for row in patch.report.rows] == [24, 24]
        torch.testing.assert_close(torch.cat([two_turns(0), two_turns(1)]), together, rtol=0, atol=1e-4)
    marked = next(name for name in after if "token_type" in name)
    after[marked] = torch.zeros_like(after[marked])
    assert not torch.allclose(two_turns(None), plain), "the marks matter"


def _span(row):
    return slice(None) if row is None else slice(row, row + 1)


@pytest.mark.parametrize("kind", BOTH_WAYS)
def test_tokens_of_an_image_see_each_other(kind):
    """The order of an image's tokens behind a token is no matter to it, but for their positions."""
    model, batch = made(kind), prompts(60)
    images = pictures(kind, batch["input_ids"])
    unmarked = {name: value for name, value in images.items() if "token_type" not in name}
    with flexasl.patch(model, settings(kind, select_tokens=1.0)):
        assert not torch.allclose(model(**batch, **images).logits, model(**batch, **unmarked).logits)


def test_models_that_are_right_for_text_alone_refuse_the_first_image(monkeypatch):
    monkeypatch.setattr(media, "TESTED", ())
    monkeypatch.setitem(media.REASONS, "qwen3_vl", media.DEEP)
    for kind, why in (("qwen2_vl", "only .* are tested with images"), ("qwen3_vl", media.DEEP)):
        model, batch = made(kind), prompts(90, 61)
        image = pictures(kind, batch["input_ids"])
        text = batch | {"input_ids": batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 5)}
        _, plain = answer(model, **text)
        seen = []
        model.model.visual.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        with flexasl.patch(model, SMALL.replace(select_tokens=1.0)) as patch:
            torch.testing.assert_close(answer(model, **text)[1], plain, rtol=0, atol=1e-4)
            before = patch.report
            for call in (model, functools.partial(answer, model)):
                with pytest.raises(UnsupportedError, match=f"pixel_values is not available .* {kind!r}: {why}"):
                    call(**batch, **image)
            assert not seen and patch.report is before
            parts = torch.arange(90).expand(3, 1, -1).clone()
            parts[1, :, 40:] -= 3
            with pytest.raises(
                UnsupportedError, match="position_ids have parts for time, height and width that differ"
            ):
                model(text["input_ids"][:1], position_ids=parts)
            embeds = model.get_input_embeddings()(text["input_ids"])
            added = {"deepstack_visual_embeds": [torch.ones(8, 64)], "visual_pos_masks": batch["input_ids"] == IMAGE}
            with pytest.raises(
                UnsupportedError, match="cannot be given an image while patched: features of its images"
            ):
                model.get_decoder()(inputs_embeds=embeds, **added)


def test_threads_that_share_a_model_are_told_of_their_own_images():
    model = made("llava")

    def firsts(at):
        batch = prompts(60, image_at=at)
        with torch.no_grad():
            cache = model(**batch, **pictures("llava", batch["input_ids"]), use_cache=True).past_key_values
        return [image.first for image in cache.reports[-1].rows[0].images]

    places = [3, 9, 15, 21, 27, 33] * 3
    with flexasl.patch(model, SMALL), ThreadPoolExecutor(4) as pool:
        assert list(pool.map(firsts, places)) == [[at] for at in places]
        text = prompts(60)["input_ids"].masked_fill(prompts(60)["input_ids"] == IMAGE, 5)
        model.get_decoder()(text)
        assert model.flexasl_patch.report.rows[0].images == ()
