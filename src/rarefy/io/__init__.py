"""Files: a packed model in safetensors, saved without pickle and loaded by mapping.

save, load   a model to a file and back            container   the file: alignment, checksums, atomic writes
"""

from rarefy.io.file import load, save

__all__ = ["load", "save"]
