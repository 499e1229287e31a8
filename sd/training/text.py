"""Stage 2, the text encoder, trained as in CLIP (2103.00020): images and captions are mapped to the same space.

In: images with captions. Out: a text encoder whose end token summarises the caption. The image encoder is needed only
for this training and for evaluation; generating images does not use it.
"""

from __future__ import annotations

import logging
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.blocks import Downsample, ResidualBlock
from sd.clip import CLIP
from sd.config import TextConfig
from sd.images import from_uint8, to_uint8
from sd.tokenizer import Tokenizer
from sd.training import ranks
from sd.training.data import CaptionedImages
from sd.training.losses import contrastive_loss

log = logging.getLogger(__name__)

WIDTH = 128  # dimensions of the space that images and captions share


class ImageEncoder(nn.Module):
    """Images -> vectors: a small convolutional network. Its output depends on where things are in the image."""

    def __init__(self, out_width: int = WIDTH):
        super().__init__()
        self.levels = nn.Sequential(
            nn.Conv2d(3, 32, 8, stride=4, padding=2),  # (B, 32, 16, 16)
            ResidualBlock(32, 32, 8, 1e-5),
            Downsample(32, symmetric=True),
            ResidualBlock(32, 64, 8, 1e-5),
            Downsample(64, symmetric=True),
            ResidualBlock(64, 96, 8, 1e-5),  # (B, 96, 4, 4)
        )
        self.out = nn.Linear(16 * 96, out_width)  # no pooling before it, which would lose the positions

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> (B, out_width). They are resized to 64 x 64 first."""
        x = resize(images, 64) if images.shape[-1] != 64 else images  # (B, 3, 64, 64)
        x = F.silu(self.levels(x))  # (B, 96, 4, 4)
        return self.out(x.flatten(1))  # (B, 1536) -> (B, out_width)


class CaptionEncoder(nn.Module):
    """Captions -> vectors: the text encoder's state at the end token, projected (2103.00020, section 2.4)."""

    def __init__(self, config: TextConfig, out_width: int = WIDTH):
        super().__init__()
        self.clip = CLIP(config)
        nn.init.normal_(self.clip.token_embedding.weight, std=0.2)
        nn.init.normal_(self.clip.position_embedding.weight, std=0.1)
        self.out = nn.Linear(config.width, out_width, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens (B, N) -> (B, out_width)."""
        return self.out(end_states(self.clip, tokens))


def end_states(clip: CLIP, tokens: Tensor) -> Tensor:
    """tokens (B, N) -> (B, width): the state at the first end token, which attends to the whole caption."""
    end = tokens.argmax(dim=1)  # (B,): the end token has the largest id of all
    longest = int(end.max()) + 1  # attention is causal: tokens after it do not change the states before it
    return clip(tokens[:, :longest])[torch.arange(len(tokens), device=tokens.device), end]


class TextStage:
    """Image encoder and caption encoder, trained together so that an image and its caption get similar vectors."""

    name = "text"
    learning_rate = 2e-3  # halved when training starts from a trained text encoder
    divisible = False
    gathers = True
    ema = 0.995

    def __init__(
        self,
        config: TextConfig,
        dataset: CaptionedImages,
        tokens: list[Tensor],
        batch_size: int = 256,
        in_pairs: bool = False,
        start: CLIP | None = None,
    ):
        """`tokens` are the captions of `dataset`, as `tokenise` returns them. `start` is a trained text encoder to
        start from; the image encoder always starts at random.

        With `in_pairs`, a batch has images 0 and 1, or 2 and 3, ... together. In scenes of the toy world, these show
        the same two things with colours or places exchanged. Without such neighbours, a text encoder learns which words
        a caption has, but not which colour belongs to which thing (2210.01936).
        """
        self.config = {"width": config.width, "layers": config.layers, "heads": config.heads}
        self.batch_size = min(batch_size, len(dataset))
        self.tokens, self.in_pairs = tokens, in_pairs
        self.small = shrink(dataset)
        # State files call the image encoder "pictures".
        self.networks = nn.ModuleDict({"pictures": ImageEncoder(), "captions": CaptionEncoder(config)})
        self.networks.log_scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07), as in 2103.00020, section 2.5
        if start is not None:
            self.networks["captions"].clip.load_state_dict(start.state_dict())
            self.learning_rate /= 2

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random images, uint8 (B, 3, 64, 64), and a caption of each, (B, 77)."""
        # No image twice: its second caption would count as a wrong one for the first copy.
        if self.in_pairs:
            pairs = torch.randperm(len(self.small) // 2, generator=generator)[: self.batch_size // 2]
            indices = torch.stack([2 * pairs, 2 * pairs + 1], dim=1).flatten()
        else:
            indices = torch.randperm(len(self.small), generator=generator)[: self.batch_size]
        return self.small[indices], pick_captions(self.tokens, indices, generator)

    def loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Each rank encodes its share (B', ...) of the batch, and compares all of them."""
        image_vectors = ranks.gather(self.networks["pictures"](from_uint8(images)).float())  # (B, D)
        caption_vectors = ranks.gather(self.networks["captions"](tokens.long()).float())  # (B, D)
        return contrastive_loss(image_vectors, caption_vectors, self.networks.log_scale)


def tokenise(dataset: CaptionedImages, tokenizer: Tokenizer) -> list[Tensor]:
    """The captions as token ids: for each image int32 (number of captions, 77).

    Long captions are truncated. Logs a line with their number, instead of the tokenizer's warning for each.
    """
    texts = list(dict.fromkeys(caption for captions in dataset.captions for caption in captions))
    with warnings.catch_warnings(record=True) as truncated:
        warnings.simplefilter("always")
        known = {text: tokenizer([text])[0].int() for text in texts}
    if truncated:
        counts = len(truncated), len(texts), tokenizer.context_length - 2
        log.warning("%d of %d captions have more than %d tokens: their ends are not used.", *counts)
    return [torch.stack([known[caption] for caption in captions]) for captions in dataset.captions]


def pick_captions(tokens: list[Tensor], indices: Tensor, generator: torch.Generator) -> Tensor:
    """Indices of images (B,) -> one random caption of each, (B, 77)."""
    chance = torch.rand(len(indices), generator=generator)
    return torch.stack([tokens[i][int(c * len(tokens[i]))] for i, c in zip(indices.tolist(), chance.tolist())])


def shrink(dataset: CaptionedImages, side: int = 64) -> Tensor:
    """All images at the size that the image encoder uses, uint8 (N, 3, side, side)."""
    batches = torch.arange(len(dataset)).split(256)
    return torch.cat([to_uint8(resize(dataset.batch(indices), side)) for indices in batches])


def resize(images: Tensor, side: int) -> Tensor:
    """Images (B, 3, H, W) -> (B, 3, side, side), with antialiasing."""
    source = images.cpu() if images.device.type == "mps" else images  # torch 2.4 has no antialiasing on MPS
    return F.interpolate(source, size=side, mode="bilinear", antialias=True).to(images.device)


@torch.no_grad()
def silence_unknown_tokens(clip: CLIP, tokens: list[Tensor]) -> None:
    """Zero the embeddings of all tokens that are in no caption: unknown words are then neutral instead of random."""
    seen = torch.cat([row.flatten() for row in tokens]).unique().long()
    known = torch.zeros(len(clip.token_embedding.weight), dtype=torch.bool)
    known[seen] = True
    clip.token_embedding.weight[~known] = 0


@torch.no_grad()
def retrieval(images: Tensor, captions: Tensor) -> float:
    """Vectors of N images and of their captions, (N, D) each -> the share, in 0..1, of images whose own caption is the
    most similar of all N."""
    cosine = F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T  # (N, N)
    return (cosine.argmax(dim=1) == torch.arange(len(cosine), device=cosine.device)).float().mean().item()
