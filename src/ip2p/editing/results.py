"""The results of an edit: a list of pictures that notebooks display."""

from __future__ import annotations

from PIL import Image

from ip2p.base.errors import InputError
from ip2p.pictures.images import contact_sheet, to_bytes
from ip2p.pictures.infotext import parse_infotext

SHEET_WIDTH = 4


class EditResults(list[Image.Image]):
    """The results of an edit, in the order of their seeds. Notebooks show them with their seeds below."""

    def __repr__(self) -> str:
        pairs = zip(self._labels(), self, strict=True)
        shown = ", ".join(f"{label} ({image.width}x{image.height})" for label, image in pairs)
        return f"<{len(self)} edited picture{'' if len(self) == 1 else 's'}: {shown}>"

    def _repr_png_(self) -> bytes | None:
        """A contact sheet as PNG, for notebooks."""
        if not self:
            return None
        starts = range(0, len(self), SHEET_WIDTH)
        labels = self._labels()
        return to_bytes(
            contact_sheet(
                [self[start : start + SHEET_WIDTH] for start in starts],
                labels=[", ".join(labels[start : start + SHEET_WIDTH]) for start in starts],
            )
        )

    def _labels(self) -> list[str]:
        labels = []
        for image in self:
            try:
                labels.append(f"seed {parse_infotext(image.info.get('parameters', '')).seed}")
            except InputError:
                labels.append("no settings")
        return labels
