"""Files: packed models in one file, and the directories of transformers, pruned, proved and packed.

save, load          a model to a file and back        container    that file: alignment, checksums, atomic writes
read_model          a directory -> a model            shards       its safetensors, one tensor at a time
write_model         a pruned directory                folder       appears whole or not at all
collect             what write_model takes            record       rarefy.json: counts, masks' digests, versions
check               prove a model or a directory      journal      a long run continues where it was killed
write_packed        a smaller directory               packing      which weights gain by it
unpack_directory    the way back, bit for bit         weights      packed or not, as dense tensors
transformers        its quantizer and models          register     told when both are imported
                                                      architecture what files and models call the same things
"""

from rarefy.io.collect import collect
from rarefy.io.directory import Written, read_model, write_model
from rarefy.io.file import load, save
from rarefy.io.journal import Journal
from rarefy.io.packed import PackedFiles, unpack_directory, write_packed
from rarefy.io.prove import check, check_directory
from rarefy.io.record import CalibrationRecord, Record, SiteRecord
from rarefy.io.register import register

__all__ = [
    "CalibrationRecord",
    "Journal",
    "PackedFiles",
    "Record",
    "SiteRecord",
    "Written",
    "check",
    "check_directory",
    "collect",
    "load",
    "read_model",
    "register",
    "save",
    "unpack_directory",
    "write_model",
    "write_packed",
]
