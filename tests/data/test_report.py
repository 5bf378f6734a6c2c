import html
import json
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from ling_flow.data.build import build_corpus
from ling_flow.data.corpus import Corpus
from ling_flow.data.filters import Decontamination, Filters
from ling_flow.data.report import html_page
from ling_flow.data.sources import FilesSource

EVIL = "<script>alert('x')</script> & more </pre>"


def evil_corpus(folder: Path) -> Corpus:
    texts = [f"{EVIL} {number}" for number in range(12)] + ["<b>bad bad bad</b> words", f"{EVIL} 3"]
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (folder / "evaluation.txt").write_text("<b>bad bad bad</b>")
    files = (FilesSource(name="own", paths=[str(folder / "evaluation.txt")]),)
    return build_corpus(
        folder / "corpus", [FilesSource(name="mine", paths=[str(folder / "a.jsonl")])], vocab_size=300, seed=0,
        validation_share=0.3, tokenizer_characters=1000, filters=Filters(decontamination=Decontamination(files=files)),
    )  # fmt: skip


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        assert not {"src", "href"} & {name for name, _ in attrs}  # nothing is loaded from elsewhere

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_all_text_is_escaped_and_shown(tmp_path: Path) -> None:
    corpus = evil_corpus(tmp_path)
    page = html_page(corpus.statistics, "Corpus of <mine>")
    assert "<script" not in page and "<b>" not in page
    parsed = Tags()
    parsed.feed(page)
    assert set(parsed.tags) <= {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "code", "pre",
                                "table", "tr", "th", "td", "div"}  # fmt: skip
    assert parsed.text.count("Corpus of <mine>") == 2
    shown = [text for text in parsed.text if text.startswith(EVIL)]
    assert shown == corpus.statistics.sources["mine"].samples and len(shown) == 3
    assert "< b > bad bad bad < / b >" in parsed.text and html.escape("<b>bad bad bad</b> words") in page
    row = "".join(f"<td class='number'>{n}</td>" for n in (12, f"{corpus.statistics.tokens:,}", 1, 0, 1, 0))
    assert f"<tr><td>mine</td>{row}</tr>" in page and f"<tr><td>all</td>{row}</tr>" in page


def test_the_histogram_counts_every_document_at_its_length(corpus: Corpus) -> None:
    page = html_page(corpus.statistics, "test")
    for name, source in corpus.statistics.sources.items():
        lengths = np.concatenate([np.diff(corpus.document_offsets(name, split)) for split in ("train", "validation")])
        for at, count in enumerate(source.length_histogram):
            assert count == sum(2**at <= length < 2 ** (at + 1) for length in lengths)
            assert not count or f"<td>{2**at:,} to {2 ** (at + 1) - 1:,}</td><td class='number'>{count:,}</td>" in page
        assert sum(source.length_histogram) == source.documents
        assert 0 < source.mean_line_length < 200 and 0 <= source.alphabetic_share < 1
