"""The losses of the stages, each named by its paper."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import BlipVisionModel, ViltForQuestionAnswering

from benchmarks.starter.captions import agreement
from benchmarks.starter.data import Batch, Studio, Tokens
from benchmarks.starter.models import Matcher, Trunk
from benchmarks.starter.questions import Asker

# What share of the ITM negatives is drawn evenly, so that texts about something else stay easy.
_EVEN_NEGATIVES = 0.25
_MASKED_WORDS = 0.25
_CAPTION_EVERY = 2
_MAX_SCALE = 4.6052  # log 100, CLIP's cap


def contrastive(
    scale: torch.Tensor, images: torch.Tensor, texts: torch.Tensor, also_true: torch.Tensor
) -> torch.Tensor:
    """ITC: CLIP's symmetric loss (Radford et al. 2021, arXiv:2103.00020).

    Texts that happen to be true of another image of the batch are left out of its negatives.

    Args:
        images, texts: (N, D) normalised.
        also_true: (N, N) bool, images by texts.
    """
    logits = scale.float().clamp(max=_MAX_SCALE).exp() * images.float() @ texts.float().T
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(also_true & ~own, float("-inf"))
    target = torch.arange(len(logits), device=logits.device)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


def naming(scale: torch.Tensor, images: torch.Tensor, names: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
    """ITC against the names of all things, as UniCL contrasts labels (Yang et al. 2022, arXiv:2204.03610).

    Every picture is told from every name: dozens of negatives that no batch has to bring.

    Args:
        images: (N, D) normalised. names: (K, D) normalised. present: (N, K) bool, at least one a row.
    """
    logits = scale.float().clamp(max=_MAX_SCALE).exp() * images.float() @ names.float().T
    shares = present.float() / present.sum(1, keepdim=True)
    return functional.cross_entropy(logits, shares)


def language_model(decoder: nn.Module, tokens: Tokens, image_tokens: torch.Tensor, start: int) -> torch.Tensor:
    """LM: BLIP's captioning loss (Li et al. 2022, arXiv:2201.12086), next word given image and words before."""
    ids = tokens.ids.clone()
    ids[:, 0] = start
    seen = image_tokens.new_ones(image_tokens.shape[:2])
    logits = decoder(
        ids[:, :-1],
        attention_mask=tokens.mask[:, :-1],
        encoder_hidden_states=image_tokens,
        encoder_attention_mask=seen,
        use_cache=False,
    ).logits
    target = ids[:, 1:].masked_fill(tokens.mask[:, 1:] == 0, -100)
    return functional.cross_entropy(logits.float().flatten(0, 1), target.flatten())


class TrunkLosses:
    """Stage 1: ITC (captions, names) and LM on one tower, as in CoCa (Yu et al. 2022, arXiv:2205.01917) and BLIP."""

    def __init__(self, trunk: Trunk, studio: Studio, batch_size: int) -> None:
        self._trunk, self._studio, self._batch_size = trunk, studio, batch_size
        self._start = studio.tokenizer.convert_tokens_to_ids("[DEC]")
        self._num_names = len(studio.world.concepts)
        self._names = studio.tokens([studio.writer.name(concept) for concept in range(self._num_names)])

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        batch: Batch = self._studio.batch(self._batch_size, step)
        tokens = self._trunk.vision(batch.pixels).last_hidden_state
        texts = self._studio.tokens([caption.text for caption in batch.captions])
        num_concepts = len(self._studio.world.all_concepts)
        images, scale = self._trunk.image_features(tokens), self._trunk.logit_scale
        itc = contrastive(
            scale,
            images,
            self._trunk.text_features(texts.ids),
            agreement(batch.scenes, batch.captions, num_concepts).to(tokens.device),
        )
        present = torch.zeros(len(images), self._num_names, dtype=torch.bool)
        for row, scene in enumerate(batch.scenes):
            present[row, [concept for concept, _ in scene.items]] = True
        names = self._trunk.text_features(self._names.ids)
        # The decoder takes as long as the tower: half of the pictures are enough for it.
        captioned = slice(0, None, _CAPTION_EVERY)
        full = self._studio.tokens([self._studio.writer.full(scene) for scene in batch.scenes[captioned]])
        return {
            "itc": itc,
            "names": naming(scale, images, names, present.to(images.device)),
            "lm": language_model(self._trunk.decoder, full, tokens[captioned], self._start),
        }


class MatcherLosses:
    """Stage 2: ITC and ITM with one mined negative each way (ALBEF, Li et al. 2021, arXiv:2107.07651) on a fixed tower.

    With ``masked_words``, MLM too: words of true texts are masked and told from the image (BERT, arXiv:1810.04805).
    """

    def __init__(
        self, matcher: Matcher, vision: BlipVisionModel, studio: Studio, batch_size: int, *, masked_words: bool = False
    ) -> None:
        self._matcher, self._vision, self._studio = matcher, vision.bfloat16().eval(), studio
        self._batch_size, self._masked_words = batch_size, masked_words

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        batch = self._studio.batch(self._batch_size, step)
        with torch.no_grad():
            image_tokens = self._vision(batch.pixels).last_hidden_state
        texts = self._studio.tokens([caption.text for caption in batch.captions])
        true = agreement(batch.scenes, batch.captions, len(self._studio.world.all_concepts)).to(image_tokens.device)
        matcher = self._matcher
        alone = matcher.text_states(texts.ids, texts.mask)[:, 0]
        images = functional.normalize(matcher.vision_proj(image_tokens[:, 0]), dim=-1)
        words = functional.normalize(matcher.text_proj(alone), dim=-1)
        losses = {"itc": contrastive(matcher.logit_scale, images, words, true)}
        losses["itm"] = self._matching(texts, image_tokens, true, (images @ words.T).detach().float())
        if self._masked_words:
            losses["mlm"] = self._mask(texts, image_tokens, step)
        return losses

    def _matching(
        self, texts: Tokens, image_tokens: torch.Tensor, true: torch.Tensor, similarity: torch.Tensor
    ) -> torch.Tensor:
        num = len(image_tokens)
        likely = (similarity * self._matcher.logit_scale.detach().float().clamp(max=_MAX_SCALE).exp()).exp()
        likely = likely / likely.sum(1, keepdim=True)
        weights = (likely * (1 - _EVEN_NEGATIVES) + _EVEN_NEGATIVES / num).masked_fill(true, 0)
        wrong_text = torch.multinomial(weights, 1)[:, 0]
        wrong_image = torch.multinomial(weights.T, 1)[:, 0]
        ids = torch.cat([texts.ids, texts.ids[wrong_text], texts.ids])
        mask = torch.cat([texts.mask, texts.mask[wrong_text], texts.mask])
        seen = torch.cat([image_tokens, image_tokens, image_tokens[wrong_image]])
        logits = self._matcher.itm_head(self._matcher.text_states(ids, mask, seen)[:, 0])
        target = (torch.arange(3 * num, device=logits.device) < num).long()
        weight = logits.new_tensor([0.5, 1.0]).float()  # two negatives to a positive
        return functional.cross_entropy(logits.float(), target, weight)

    def _mask(self, texts: Tokens, image_tokens: torch.Tensor, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(step)
        tokenizer = self._studio.tokenizer
        chosen = torch.rand(texts.ids.shape, generator=generator).to(texts.ids.device) < _MASKED_WORDS
        chosen &= (texts.mask == 1) & (texts.ids != tokenizer.cls_token_id) & (texts.ids != tokenizer.sep_token_id)
        ids = texts.ids.masked_fill(chosen, tokenizer.mask_token_id)
        states = self._matcher.text_states(ids, texts.mask, image_tokens)[chosen]
        logits = states @ self._matcher.text_encoder.embeddings.word_embeddings.weight.T
        return functional.cross_entropy(logits.float(), texts.ids[chosen])


class VqaLosses:
    """Stage 3: ViLT (Kim et al. 2021, arXiv:2102.03334) as a classifier over one-word answers."""

    def __init__(self, model: ViltForQuestionAnswering, studio: Studio, batch_size: int) -> None:
        self._model, self._studio, self._batch_size = model, studio, batch_size
        self._asker = Asker(studio.world)
        self._answers = {answer: number for number, answer in enumerate(self._asker.answers)}

    def __call__(self, step: int) -> dict[str, torch.Tensor]:
        batch = self._studio.batch(self._batch_size, step)
        rng = self._studio.sampler.rng(step, purpose=2)
        questions = [self._asker.ask(scene, rng) for scene in batch.scenes]
        logits = answer_logits(self._model, batch.pixels, self._studio.tokens([q.text for q in questions]))
        target = torch.tensor([self._answers[q.answer] for q in questions], device=logits.device)
        return {"vqa": functional.cross_entropy(logits.float(), target)}


def answer_logits(model: ViltForQuestionAnswering, pixels: torch.Tensor, questions: Tokens) -> torch.Tensor:
    """(N, answers) for square pictures; skips ViLT's loop over the batch, which only shuffles their patches."""
    embeddings = model.vilt.embeddings
    patches = embeddings.patch_embeddings(pixels).flatten(2).transpose(1, 2)
    images = torch.cat([embeddings.cls_token.expand(len(pixels), -1, -1), patches], dim=1)
    return model(
        input_ids=questions.ids,
        attention_mask=questions.mask,
        image_embeds=images + embeddings.position_embeddings,
        pixel_mask=torch.ones(images.shape[:2], dtype=torch.long, device=pixels.device),
    ).logits
