"""Released VAR weights (FoundationVision/VAR) and its trainer's checkpoints, read and written.

tokenizer = load_tokenizer("vae_ch160v4096z32.pth")
transformer = load_transformer("var_d16.pth")
"""

from varcli.interop.checkpoint import Checkpoint, read_checkpoint
from varcli.interop.folders import ExportResult, ImportResult, export_official, import_official
from varcli.interop.loading import load_quantizer, load_tokenizer, load_transformer

__all__ = [
    "Checkpoint",
    "ExportResult",
    "ImportResult",
    "export_official",
    "import_official",
    "load_quantizer",
    "load_tokenizer",
    "load_transformer",
    "read_checkpoint",
]
