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
WHOLE_GATHER: Final = "whole_gather"
WHOLE_SCATTER: Final = "whole_scatter"
"""Those of plain chunks: they take checksums on the way."""
LAY: Final = "spans_lay"
DIGEST: Final = "xxh3_blocks"


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Launch:
    """Kernels over some sections of all chunks of a transfer.

    Those of *gather* bring them from pages to staging, one behind the other, those of *scatter*
    back; where there are none, nothing is needed. *chunks* is what all are told, but for the number
    of chunks. Encoders *report*; decoders that say what is damaged *check*. What *is_padding* lies
    in no page: the gather makes zeros of it.

    Sections of variable rate are first *measure*d, which leaves *scratch_bytes* a chunk to the
    gather. A *coding* is what kernels of ecsq read of their preset.
    """

    gather: tuple[str, ...]
    scatter: tuple[str, ...]
    sections: NDArray[Any]
    chunks: Chunks
    measure: tuple[str, ...] = ()
    reports: bool = False
    checks: bool = False
    is_padding: bool = False
    scratch_bytes: int = 0
    coding: NDArray[Any] | None = None

    def says(self, *, encodes: bool) -> bool:
        """Whether its kernels report in this direction."""
        return self.reports if encodes else self.checks


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Form:
    """Chunks that are stored alike, in pages of one layout: one transfer moves chunks of one form.

    *size_bytes* is a multiple of 16. The first *head_bytes* are the host's: it writes them behind
    a store, and reads them before a load.

    Where *spans* are known, chunks are of *size_bytes* at most, and their sections lie where spans
    of their own say: *spans* is what is known of them before they are encoded, where the first
    begins and how long those of fixed rate are.
    """

    layout: PageLayout
    size_bytes: int
    launches: tuple[Launch, ...]
    is_plain: bool = False
    head_bytes: int = 0
    reported: tuple[int, ...] = ()
    """The sections that encoders report of, in the order of the launches."""
    spans: NDArray[Any] | None = None

    @property
    def varies(self) -> bool:
        """Whether chunks have sizes of their own, known behind their encoders."""
        return self.spans is not None

    @property
    def scratch_bytes(self) -> int:
        """What kernels note of one chunk."""
        return sum(launch.scratch_bytes for launch in self.launches)

    def said(self, *, encodes: bool) -> int:
        """Return how many sections are reported of, in one direction."""
        return sum(len(launch.sections) for launch in self.launches if launch.says(encodes=encodes))


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
    launch = Launch(
        gather=(WHOLE_GATHER,),
        scatter=(WHOLE_SCATTER,),
        sections=layout.sections(),
        chunks=told,
    )
    return Form(layout=layout, size_bytes=layout.chunk_bytes, launches=(launch,), is_plain=True)


def batch_for(form: Form, launch: Launch, count: int, places: Places) -> NDArray[Any]:
    """Return the argument of the kernels of *launch* over *count* chunks."""
    layout = form.layout
    pages = Pages(
        page_tokens=1 if launch.is_padding else layout.page_tokens,
        page_count=1 if launch.is_padding else layout.pages_per_chunk,
        page_stride=layout.page_stride,
        token_stride=layout.token_stride,
        head_stride=layout.head_stride,
    )
    spans = 0 if form.spans is None else len(form.spans)
    told = replace(launch.chunks, chunk_count=count, span_count=spans)
    return batch_of(told, pages, places)
