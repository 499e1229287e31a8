"""Stage 2: the text encoder, by contrast with an encoder of pictures (2103.00020).

In: pictures with captions. Out: a text encoder in whose last token everything stands that tells one picture from
another. The picture encoder is needed for the comparison only, and as a judge afterwards; no picture is made with it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sd.blocks import Downsample, ResidualBlock
from sd.clip import CLIP
from sd.config import TextConfig
from sd.tokenizer import Tokenizer
from sd.training.data import Pictures
from sd.training.losses import contrastive_loss

WIDTH = 128  # of the space in which pictures and captions are compared


class PictureEncoder(nn.Module):
    """Pictures -> vectors: a small convolutional network that knows where things are."""

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
        self.out = nn.Linear(16 * 96, out_width)  # one weight a place: where things are counts

    def forward(self, images: Tensor) -> Tensor:
        """images (B, 3, H, W) in [-1, 1] -> (B, out_width). Seen at 64 x 64, enough to tell scenes apart."""
        x = resize(images, 64) if images.shape[-1] != 64 else images
        x = F.silu(self.levels(x))  # (B, 96, 4, 4)
        return self.out(x.flatten(1))  # (B, out_width), of (B, 1536)


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
    """tokens (B, N) -> the state at the first end token, which has seen the whole caption (B, width)."""
    end = tokens.argmax(dim=1)  # (B,): the end token has the largest id of all
    longest = int(end.max()) + 1  # what is after it, no state before it can see
    return clip(tokens[:, :longest])[torch.arange(len(tokens), device=tokens.device), end]


class TextStage:
    """Picture encoder and caption encoder, trained to find each other."""

    name = "text"
    learning_rate = 2e-3
    divisible = False
    ema = 0.995

    def __init__(self, config: TextConfig, pictures: Pictures, tokens: list[Tensor], batch_size: int = 256):
        self.config = {"width": config.width, "layers": config.layers, "heads": config.heads}
        self.batch_size = min(batch_size, len(pictures))
        self.tokens = tokens
        self.small = shrink(pictures)
        self.networks = nn.ModuleDict({"pictures": PictureEncoder(), "captions": CaptionEncoder(config)})
        self.networks.log_scale = nn.Parameter(torch.tensor(2.66))  # log(1 / 0.07), as in 2103.00020, section 2.5

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        # No picture twice: it could not tell its own caption from its own other one.
        indices = torch.randperm(len(self.small), generator=generator)[: self.batch_size]
        return self.small[indices], pick_captions(self.tokens, indices, generator)

    def loss(self, images: Tensor, tokens: Tensor) -> Tensor:
        pictures = self.networks["pictures"](images.float() / 127.5 - 1).float()
        captions = self.networks["captions"](tokens.long()).float()
        return contrastive_loss(pictures, captions, self.networks.log_scale)


def tokenise(pictures: Pictures, tokenizer: Tokenizer) -> list[Tensor]:
    """The captions of each picture as tokens, int32 (captions, 77)."""
    known: dict[str, Tensor] = {}
    rows = []
    for captions in pictures.captions:
        for caption in captions:
            if caption not in known:
                known[caption] = tokenizer([caption])[0].int()
        rows.append(torch.stack([known[caption] for caption in captions]))
    return rows


def pick_captions(tokens: list[Tensor], indices: Tensor, generator: torch.Generator) -> Tensor:
    """One caption by chance of each of the pictures (B,) -> (B, 77)."""
    chance = torch.rand(len(indices), generator=generator)
    return torch.stack([tokens[i][int(c * len(tokens[i]))] for i, c in zip(indices.tolist(), chance.tolist())])


def shrink(pictures: Pictures, side: int = 64) -> Tensor:
    """All pictures at the size at which they are compared, uint8 (N, 3, side, side)."""
    parts = []
    for indices in torch.arange(len(pictures)).split(256):
        small = resize(pictures.batch(indices), side)
        parts.append(((small.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)


def resize(images: Tensor, side: int) -> Tensor:
    """Pictures (B, 3, H, W) -> (B, 3, side, side), without the patterns that left out pixels would make."""
    near = images.cpu() if images.device.type == "mps" else images  # torch 2.4 cannot do it there
    return F.interpolate(near, size=side, mode="bilinear", antialias=True).to(images.device)


@torch.no_grad()
def silence_unknown_tokens(clip: CLIP, tokens: list[Tensor]) -> None:
    """Zeroes the embeddings of tokens that no caption holds: an unknown word is then neutral, not noise."""
    seen = torch.cat([row.flatten() for row in tokens]).unique().long()
    known = torch.zeros(len(clip.token_embedding.weight), dtype=torch.bool)
    known[seen] = True
    clip.token_embedding.weight[~known] = 0


@torch.no_grad()
def retrieval(images: Tensor, captions: Tensor) -> float:
    """How often the most similar of N captions (N, D) is the picture's own (N, D): a share in 0..1."""
    cosine = F.normalize(images, dim=-1) @ F.normalize(captions, dim=-1).T  # (N, N)
    return (cosine.argmax(dim=1) == torch.arange(len(cosine), device=cosine.device)).float().mean().item()
