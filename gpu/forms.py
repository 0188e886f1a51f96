"""How a chunk lies in staging and in host memory, and the kernels that bring it there and back.

The plain form is the chunk as it is. The forms of codecs are made by those who know codecs:
`kvstore.client.gpu_forms`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Final

from numpy.typing import NDArray

from kvstore.gpu.batches import Chunks, Pages, Places, batch_of
from kvstore.gpu.pages import VECTOR_BYTES, PageLayout

GATHER: Final = "raw_gather"
SCATTER: Final = "raw_scatter"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Launch:
    """One kernel over some sections of all chunks of a transfer.

    *gather* brings them from pages to staging, *scatter* back; one that is empty is not needed.
    *chunks* is what both are told, but for the number of chunks. Encoders *report*. What
    *is_padding* lies in no page: the gather makes zeros of it.
    """

    gather: str
    scatter: str
    sections: NDArray[Any]
    chunks: Chunks
    reports: bool = False
    is_padding: bool = False


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Form:
    """Chunks that are stored alike, in pages of one layout: one transfer moves chunks of one form.

    *size_bytes* is a multiple of 16. The first *head_bytes* are the host's: it writes them behind
    a store, and reads them before a load.
    """

    layout: PageLayout
    size_bytes: int
    launches: tuple[Launch, ...]
    is_plain: bool = False
    head_bytes: int = 0
    reported: tuple[int, ...] = ()
    """The sections that encoders report of, in the order of the launches."""

    @property
    def reports(self) -> int:
        """How many sections encoders report of."""
        return len(self.reported)


def plain_form(layout: PageLayout) -> Form:
    """Return the form of chunks that are stored as they are."""
    told = Chunks(
        chunk_count=0,
        section_count=len(layout.planes),
        heads=layout.heads,
        tokens=layout.chunk_tokens,
        width=layout.row_bytes // VECTOR_BYTES,
        extra=layout.head_bytes,
    )
    launch = Launch(gather=GATHER, scatter=SCATTER, sections=layout.sections(), chunks=told)
    return Form(layout=layout, size_bytes=layout.chunk_bytes, launches=(launch,), is_plain=True)


def batch_for(layout: PageLayout, launch: Launch, count: int, places: Places) -> NDArray[Any]:
    """Return the argument of a kernel of *launch* over *count* chunks."""
    pages = Pages(
        page_tokens=1 if launch.is_padding else layout.page_tokens,
        page_count=1 if launch.is_padding else layout.pages_per_chunk,
        page_stride=layout.page_stride,
        token_stride=layout.token_stride,
        head_stride=layout.head_stride,
    )
    return batch_of(replace(launch.chunks, chunk_count=count), pages, places)
