"""The whole job as one would write it at first: Pillow in threads, transformers, open_clip, one model after another."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from transformers import AutoTokenizer, BlipForConditionalGeneration, BlipForImageTextRetrieval

from vlmflow.config import ModelConfig

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Decoded = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@dataclass
class Models:
    """As their libraries load them, in bfloat16 on CUDA and float32 on a processor."""

    captioner: Any
    matcher: Any
    tokenizer: Any
    clip: Any
    prompts: torch.Tensor  # (labels, D) unit vectors
    device: str
    dtype: torch.dtype
    blip_side: int
    clip_side: int

    @classmethod
    def load(cls, configs: dict[str, ModelConfig], device: str, num_labels: int = 20) -> Models:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        captioner = BlipForConditionalGeneration.from_pretrained(configs["caption"].path, dtype=dtype).eval().to(device)
        matcher = BlipForImageTextRetrieval.from_pretrained(configs["match"].path, dtype=dtype).eval().to(device)
        tokenizer = AutoTokenizer.from_pretrained(configs["caption"].path)
        clip = open_clip.create_model(f"local-dir:{configs['embed'].path}").to(device, dtype).eval()
        tokens = open_clip.get_tokenizer("ViT-L-14")([f"a photo of thing {number}" for number in range(num_labels)])
        with torch.inference_mode():
            prompts = torch.nn.functional.normalize(clip.encode_text(tokens.to(device)), dim=-1)
        side = captioner.config.vision_config.image_size
        return cls(captioner, matcher, tokenizer, clip, prompts, device, dtype, side, clip.visual.image_size[0])


def run(files: Sequence[Path], models: Models, batch_size: int, out: Path, num_tokens: int) -> float:
    """Does all files and writes one Parquet file; returns the seconds it took."""
    started = time.perf_counter()
    rows: list[pa.Table] = []
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        batches = [files[start : start + batch_size] for start in range(0, len(files), batch_size)]
        # The next batch is decoded while the models are at this one.
        waiting = [threads.submit(_decode, path, models) for path in batches[0]]
        for number, batch in enumerate(batches):
            decoded = [future.result() for future in waiting]
            following = batches[number + 1] if number + 1 < len(batches) else []
            waiting = [threads.submit(_decode, path, models) for path in following]
            rows.append(_infer(batch, decoded, models, num_tokens))
    pq.write_table(pa.concat_tables(rows), out)
    return time.perf_counter() - started


def _decode(path: Path, models: Models) -> Decoded:
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    sides = (models.blip_side, models.clip_side)
    large, small = (image.resize((side, side), Image.Resampling.BICUBIC) for side in sides)
    return np.asarray(large), np.asarray(small)


@torch.inference_mode()
def _infer(batch: Sequence[Path], decoded: Sequence[Decoded], models: Models, num_tokens: int) -> pa.Table:
    large, small = (_normalised(np.stack(pixels), models) for pixels in zip(*decoded, strict=True))
    tokens = models.captioner.generate(
        pixel_values=large, do_sample=False, num_beams=1, min_new_tokens=num_tokens, max_new_tokens=num_tokens
    )
    captions = models.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    texts = models.tokenizer(captions, padding=True, truncation=True, max_length=77, return_tensors="pt")
    found = models.matcher(
        pixel_values=large,
        input_ids=texts["input_ids"].to(models.device),
        attention_mask=texts["attention_mask"].to(models.device),
    )
    vectors = torch.nn.functional.normalize(models.clip.encode_image(small), dim=-1)
    return pa.table(
        {
            "path": [str(path) for path in batch],
            "caption": captions,
            "itm": found.itm_score.float().softmax(dim=1)[:, 1].cpu().numpy(),
            "scores": list((vectors @ models.prompts.T).float().cpu().numpy()),
            "vector": list(vectors.float().cpu().numpy()),
        }
    )


def _normalised(pixels: np.ndarray[Any, Any], models: Models) -> torch.Tensor:
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    values = (values - torch.tensor(_MEAN).view(1, 3, 1, 1)) / torch.tensor(_STD).view(1, 3, 1, 1)
    return values.to(models.device, models.dtype)
