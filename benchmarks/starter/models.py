"""The four tiny models: their sizes, the modules that are trained, and how one vision tower serves all of them.

The tower is transformers' ``BlipVisionModel``. With ``no_ln_pre`` an open_clip vision transformer computes the same
function (same order of q, k and v, same epsilon, the last norm over all tokens), so that CLIP, the captioner and the
matcher can hold equal towers, and a tower trained once is exported to both formats.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from open_clip.transformer import TextTransformer
from torch import nn
from transformers import (
    BertTokenizer,
    BlipConfig,
    BlipTextConfig,
    BlipVisionConfig,
    BlipVisionModel,
    ViltConfig,
    ViltForQuestionAnswering,
)
from transformers.models.blip.modeling_blip_text import BlipTextLMHeadModel, BlipTextModel

from benchmarks.starter.captions import CONTEXT_LENGTH

PIXEL_MEAN = (0.5, 0.5, 0.5)
PIXEL_STD = (0.5, 0.5, 0.5)


@dataclass(frozen=True)
class Sizes:
    """Everything that fixes the shapes."""

    side_px: int
    patch_px: int
    vocabulary: int
    width: int = 192
    heads: int = 3
    vision_layers: int = 5
    text_layers: int = 3

    @property
    def num_patches(self) -> int:
        return (self.side_px // self.patch_px) ** 2


def sizes_of(side_px: int, tokenizer: BertTokenizer) -> Sizes:
    """64 patches either way: patches of 8 px at 64 px, of 12 px at 96 px."""
    return Sizes(side_px, side_px // 8, len(tokenizer))


def vision_config(sizes: Sizes) -> BlipVisionConfig:
    return BlipVisionConfig(
        hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        projection_dim=sizes.width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.heads,
        image_size=sizes.side_px,
        patch_size=sizes.patch_px,
        layer_norm_eps=1e-5,
        initializer_range=0.02,  # the default is 1e-10
    )


def text_config(sizes: Sizes, tokenizer: BertTokenizer) -> BlipTextConfig:
    return BlipTextConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        encoder_hidden_size=sizes.width,
        intermediate_size=4 * sizes.width,
        projection_dim=sizes.width,
        num_hidden_layers=sizes.text_layers,
        num_attention_heads=sizes.heads,
        max_position_embeddings=CONTEXT_LENGTH + 8,
        bos_token_id=tokenizer.convert_tokens_to_ids("[DEC]"),
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def blip_config(sizes: Sizes, tokenizer: BertTokenizer) -> BlipConfig:
    return BlipConfig(
        text_config=text_config(sizes, tokenizer).to_dict(),
        vision_config=vision_config(sizes).to_dict(),
        projection_dim=sizes.width,
        image_text_hidden_size=sizes.width,
    )


class Trunk(nn.Module):
    """What the first stage trains: the vision tower with CLIP's text tower and the captioner's decoder on it."""

    def __init__(self, sizes: Sizes, tokenizer: BertTokenizer) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision_config(sizes))
        # An offset of the patches would have no place in open_clip's tower.
        nn.init.zeros_(self.vision.embeddings.patch_embedding.bias)
        self.vision.embeddings.patch_embedding.bias.requires_grad_(False)
        for embedding in (self.vision.embeddings.class_embedding, self.vision.embeddings.position_embedding):
            nn.init.normal_(embedding, std=0.02)
        self.visual_projection = nn.Parameter(torch.randn(sizes.width, sizes.width) * sizes.width**-0.5)
        self.text = TextTransformer(
            context_length=CONTEXT_LENGTH,
            vocab_size=sizes.vocabulary,
            width=sizes.width,
            heads=sizes.heads,
            layers=sizes.text_layers,
            output_dim=sizes.width,
        )
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))  # log(1 / 0.07)
        self.decoder = BlipTextLMHeadModel(text_config(sizes, tokenizer))

    def image_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, 1 + patches, width) of the tower -> (N, width) normalised."""
        return nn.functional.normalize(tokens[:, 0] @ self.visual_projection, dim=-1)

    def text_features(self, ids: torch.Tensor) -> torch.Tensor:
        """(N, T) ids -> (N, width) normalised; open_clip's own forward takes the full context length alone."""
        states, causal = self.text._embeds(ids)
        length = ids.shape[1]
        states = self.text.ln_final(self.text.transformer(states, attn_mask=causal[:length, :length]))
        ends = states[torch.arange(len(ids), device=ids.device), ids.argmax(dim=-1)]
        return nn.functional.normalize(ends @ self.text.text_projection, dim=-1)


class Matcher(nn.Module):
    """What the second stage trains on a tower that stays as it is: BLIP's ITC projections and ITM head."""

    def __init__(self, sizes: Sizes, tokenizer: BertTokenizer) -> None:
        super().__init__()
        self.text_encoder = BlipTextModel(text_config(sizes, tokenizer), add_pooling_layer=False)
        self.vision_proj = nn.Linear(sizes.width, sizes.width)
        self.text_proj = nn.Linear(sizes.width, sizes.width)
        self.itm_head = nn.Linear(sizes.width, 2)
        self.logit_scale = nn.Parameter(torch.tensor(2.6593))

    def text_states(
        self, ids: torch.Tensor, mask: torch.Tensor, image_tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(N, tokens, width); with ``image_tokens`` every text attends to its image."""
        seen = None if image_tokens is None else image_tokens.new_ones(image_tokens.shape[:2])
        return self.text_encoder(
            ids, attention_mask=mask, encoder_hidden_states=image_tokens, encoder_attention_mask=seen, use_cache=False
        ).last_hidden_state


def build_vqa(sizes: Sizes, tokenizer: BertTokenizer, answers: tuple[str, ...]) -> ViltForQuestionAnswering:
    """A ViLT of the tower's depth, with an output per answer."""
    config = ViltConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.width,
        num_hidden_layers=sizes.vision_layers,
        num_attention_heads=sizes.heads,
        intermediate_size=4 * sizes.width,
        layer_norm_eps=1e-5,
        image_size=sizes.side_px,
        patch_size=sizes.patch_px,
        max_position_embeddings=CONTEXT_LENGTH + 8,
        pad_token_id=tokenizer.pad_token_id,
        id2label=dict(enumerate(answers)),
        label2id={answer: number for number, answer in enumerate(answers)},
    )
    return ViltForQuestionAnswering(config)


def start_vqa_from_tower(model: ViltForQuestionAnswering, vision: BlipVisionModel) -> None:
    """Copies the tower into ViLT's layers: both are pre-norm transformers over the same patches."""
    embeddings, source = model.vilt.embeddings, vision.embeddings
    pairs = [
        (embeddings.cls_token, source.class_embedding),
        (embeddings.position_embeddings, source.position_embedding),
        (embeddings.patch_embeddings.projection.weight, source.patch_embedding.weight),
        (model.vilt.layernorm.weight, vision.post_layernorm.weight),
        (model.vilt.layernorm.bias, vision.post_layernorm.bias),
    ]
    for mine, theirs in zip(model.vilt.encoder.layer, vision.encoder.layers, strict=True):
        attention = mine.attention.attention
        for kind in ("weight", "bias"):
            packed = getattr(theirs.self_attn.qkv, kind).chunk(3)
            linears = (attention.query, attention.key, attention.value)
            pairs += [(getattr(linear, kind), part) for linear, part in zip(linears, packed, strict=True)]
            pairs += [
                (getattr(mine.attention.output.dense, kind), getattr(theirs.self_attn.projection, kind)),
                (getattr(mine.intermediate.dense, kind), getattr(theirs.mlp.fc1, kind)),
                (getattr(mine.output.dense, kind), getattr(theirs.mlp.fc2, kind)),
                (getattr(mine.layernorm_before, kind), getattr(theirs.layer_norm1, kind)),
                (getattr(mine.layernorm_after, kind), getattr(theirs.layer_norm2, kind)),
            ]
    with torch.no_grad():
        nn.init.zeros_(embeddings.patch_embeddings.projection.bias)
        for target, value in pairs:
            target.copy_(value)
