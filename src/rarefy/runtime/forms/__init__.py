"""Stored forms: the kept entries of one weight and where they lie, losslessly, in one tensor of bytes.

encode     a matrix and its mask -> a form              header    the 128 bytes in front: sizes and offsets
Stored     a form: dense(), mask(), weight()            sections  the parts of a form as arrays
from_bytes bytes from a file -> a form, validated       places    where units lie, for every form alike
smallest   the form for a file                          validate  nothing is believed that was read
runnable   the form for a kernel                        quantize  float -> int8 and scales, an explicit step
"""

from rarefy.runtime.forms.convert import convert, runnable, smallest
from rarefy.runtime.forms.encode import encode
from rarefy.runtime.forms.header import FileForm, Header
from rarefy.runtime.forms.quantize import quantize
from rarefy.runtime.forms.stored import Stored, from_bytes

__all__ = [
    "FileForm",
    "Header",
    "Stored",
    "convert",
    "encode",
    "from_bytes",
    "quantize",
    "runnable",
    "smallest",
]
