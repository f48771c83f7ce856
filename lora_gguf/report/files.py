"""The files that a user asked for, checked before the work begins."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lora_gguf.errors import UsageError, not_installed, printable
from lora_gguf.files.output import check_target

if TYPE_CHECKING:
    from lora_gguf.report.content import Content

EXTRA = "vl_convert"
PLOT_TYPES = (".png", ".svg")
NO_PAGE = (*PLOT_TYPES, ".pdf", ".jpg", ".json", ".md", ".txt", ".csv")


@dataclass(frozen=True)
class Pictures:
    """Where the page and the plot of a command go; ``command`` is its command line."""

    page: Path | None
    plot: Path | None
    command: tuple[str, ...]
    force: bool = False
    inputs: tuple[str | os.PathLike, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.page or self.plot)

    def check(self, outputs: Iterable[str | os.PathLike] = ()) -> None:
        """Raise ``UsageError``, ``UnsupportedError`` or ``FileError`` where ``write`` could not; ``outputs`` are other
        files to come.
        """
        taken = [os.path.realpath(path) for path in outputs]
        for path, option in ((self.page, "--report"), (self.plot, "--plot")):
            if path is None:
                continue
            if option == "--plot" and path.suffix.lower() not in PLOT_TYPES:
                raise UsageError(f"--plot {printable(path)}: expected a name that ends in {' or '.join(PLOT_TYPES)}")
            if option == "--report" and path.suffix.lower() in NO_PAGE:
                raise UsageError(f"--report {printable(path)}: a page is written: expected a name that ends in .html")
            if importlib.util.find_spec(EXTRA) is None:
                raise not_installed(option, "vl-convert-python", "Vega-Lite, which draws the charts")
            if os.path.realpath(path) in taken:
                raise UsageError(f"{option} {printable(path)}: another output of this command: name another file")
            taken.append(str(check_target(path, force=self.force, inputs=self.inputs)))

    def write(self, content: Content) -> list[Path]:
        """Write what was asked for of a ``content.Content``. Returns the paths."""
        from lora_gguf.report.page import write_page, write_plot

        others = [path for _, path in content.files]  # a merge may have chosen the name of its output itself
        if self.page:
            write_page(self.page, content, self.command, force=self.force, inputs=others)
        plot = (
            self.plot if content.report[content.rows] else None
        )  # a checkup that ends in a refusal has no tensors to draw
        if plot:
            write_plot(plot, content, force=self.force, inputs=others)
        return [path for path in (self.page, plot) if path]
