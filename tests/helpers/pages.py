"""Reads a report's HTML page, and checks what holds for every report."""

import re
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(HTMLParser):
    """The page's rows of text and exact numbers, its pictures; fails on a tag that is not closed in its turn."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.text = file.read_text()
        self.words = re.sub(r"<[^>]*>", "", self.text)
        self.open: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.pictures: list[str] = []  # their descriptions
        self.captions: list[str] = []
        self.rows: list[tuple[str, list[float]]] = []  # first heading of a row, the numbers in it
        self.feed(self.text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attributes}
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.references += [values[name] for name in ("src", "href", "xlink:href", "srcset") if name in values]
        if tag == "svg" and "aria-hidden" not in values:
            self.pictures.append(values.get("aria-label", ""))
        if tag == "figcaption":
            self.captions.append("")
        if tag == "tr":
            self.rows.append(("", []))
        if tag == "data":
            self.rows[-1][1].append(float(values["value"]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "figcaption" in self.open:
            self.captions[-1] += data
        if self.open[-1:] == ["th"] and not self.rows[-1][0]:
            self.rows[-1] = (data.strip(), self.rows[-1][1])

    def numbers(self, title: str) -> list[float]:
        """The numbers of the first row with this heading."""
        return next(numbers for heading, numbers in self.rows if heading == title)


def read_page(file: Path) -> Page:
    """The page, after a check that it needs nothing else, describes its pictures, and shows no NaN."""
    page = Page(file)
    assert not {"script", "iframe", "link", "object"} & set(page.tags)
    assert all(reference.startswith(("#", "data:")) for reference in page.references)
    assert "@import" not in page.text
    assert not re.search(r"url\((?!#)", page.text)
    assert len(page.ids) == len(set(page.ids)), "ids of two figures clash"
    assert all(page.pictures), "a picture without a description"
    assert not re.search(r"\b(nan|inf)\b", page.text, re.IGNORECASE)
    return page
