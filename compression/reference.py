"""The NumPy coder of every section codec: what compiled code is compared with, and replaced by.

Byte for byte what docs/codec-format.md says, on every machine.
"""

from __future__ import annotations

from typing import Final

from kvstore.compression import native
from kvstore.compression.ecsq import Ecsq
from kvstore.compression.eights import FP8
from kvstore.compression.exp3 import Exp3
from kvstore.compression.hadamard import HQ3_CODER, HQ4_CODER
from kvstore.compression.integers import Int4KV, Int8KV
from kvstore.compression.lz4frames import Lz4
from kvstore.compression.nvfp4 import NVFP4, NVFP4Compat
from kvstore.compression.rans import Rans
from kvstore.compression.raw import Raw
from kvstore.compression.shapes import CodecId, SectionCoder, SectionShape

REFERENCE: Final[dict[CodecId, SectionCoder]] = {
    CodecId.RAW: Raw(),
    CodecId.FP8: FP8(),
    CodecId.INT8KV: Int8KV(),
    CodecId.INT4KV: Int4KV(),
    CodecId.NVFP4: NVFP4(),
    CodecId.HQ4: HQ4_CODER,
    CodecId.HQ3: HQ3_CODER,
    CodecId.EXP3: Exp3(),
    CodecId.RANS: Rans(),
    CodecId.ECSQ: Ecsq(),
    CodecId.LZ4: Lz4(),
    CodecId.NVFP4_COMPAT: NVFP4Compat(),
}


def find_coder(codec: CodecId, shape: SectionShape) -> SectionCoder:
    """Return the fastest coder at hand for sections of *codec* like *shape*."""
    return native.find(codec, shape) or REFERENCE[codec]
