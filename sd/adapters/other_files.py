"""What a file is that was given as an adapter of another kind: for errors."""

from __future__ import annotations

from collections.abc import Collection

from sd.checkpoints.key_rules import SGM_PREFIX, UNET_PREFIX, VAE_PREFIX
from sd.checkpoints.variants import VAE_PARTS, other_file

IP_ADAPTER = ("image_proj.", "ip_adapter.")


def what_it_is(keys: Collection[str]) -> str | None:
    """What a file with these keys is, such as "is a LoRA, ...", or None if that is unknown."""
    if any(key.startswith((UNET_PREFIX, SGM_PREFIX)) for key in keys):
        return "is a whole model: give it as the checkpoint"
    if any(key.startswith(IP_ADAPTER) for key in keys):
        return "is an IP-Adapter, which is not supported"
    known = other_file(keys)
    if known is None and any(key.removeprefix(VAE_PREFIX).startswith(VAE_PARTS) for key in keys):
        return "is a VAE: give it as `vae=`"
    return known
