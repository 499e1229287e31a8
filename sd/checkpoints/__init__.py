"""Weight files: read without running code that they contain, and written."""

from sd.checkpoints.checkpoint import Checkpoint, CheckpointError
from sd.checkpoints.files import read_checkpoint, read_state_dict, write_checkpoint

__all__ = ["Checkpoint", "CheckpointError", "read_checkpoint", "read_state_dict", "write_checkpoint"]
