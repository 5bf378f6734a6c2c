"""The statistics of a corpus as one self-contained page for people."""

from __future__ import annotations

import html
from collections.abc import Sequence

from ling_flow.data.statistics import CorpusStatistics, SourceStatistics

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0; width: 100% }
th, td { text-align: left; vertical-align: top; padding: .3rem .7rem; border-bottom: 1px solid #ddd }
td.number { text-align: right; font-variant-numeric: tabular-nums }
td.bar { width: 60% } td.bar div { background: #3b6ea5; height: 1rem }
pre { margin: .5rem 0; padding: .5rem; white-space: pre-wrap; font-size: 13px; background: #f5f5f5 }
"""


def html_page(statistics: CorpusStatistics, title: str) -> str:
    """Counts, quality, lengths and samples by source; all text of documents is escaped."""
    sources = statistics.sources
    totals = (
        statistics.documents,
        statistics.tokens,
        statistics.duplicates,
        statistics.near_duplicates,
        statistics.contaminated,
        statistics.low_quality,
    )
    counts = [
        (s.documents, s.tokens, s.duplicates, s.near_duplicates, s.contaminated, s.low_quality)
        for s in sources.values()
    ]
    names = ("documents", "tokens", "exact duplicates", "near duplicates", "contaminated", "low quality")
    rows = [(name, *map(_number, row)) for name, row in zip([*sources, "all"], [*counts, totals], strict=True)]
    quality = [
        (
            name,
            _number(s.validation.documents),
            _number(s.validation.tokens),
            f"{s.characters / s.tokens:.2f}",
            f"{s.mean_line_length:.1f}",
            f"{s.alphabetic_share:.3f}",
            f"{s.repeated_line_share:.3f}",
            f"{s.unigram_entropy:.3f}",
        )
        for name, s in sources.items()
    ]
    measured = (
        "validation documents",
        "validation tokens",
        "characters per token",
        "characters per line",
        "share of letters",
        "share of repeated lines",
        "unigram entropy, nats",
    )
    return "".join(
        [
            f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{html.escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
            f"<p>Vocabulary of {_number(statistics.vocab_size)}, tokenizer {statistics.tokenizer_digest[:16]}, "
            f"corpus {statistics.digest[:16]}. Duplicates, contaminated and low-quality documents are left out.</p>",
            *(f"<p>{html.escape(line)}</p>" for line in filter_lines(statistics)),
            _table(("source", *names), rows),
            _table(("source", *measured), quality),
            *(_source(name, source) for name, source in sources.items()),
            "</body></html>\n",
        ]
    )


def filter_lines(statistics: CorpusStatistics) -> list[str]:
    """How far the filters could look, in sentences."""
    found, lines = statistics.filters, []
    if found and found.problems is not None:
        short = f"; {_number(found.short_problems)} more are too short to be looked for" if found.short_problems else ""
        lines.append(f"Documents were compared with {_number(found.problems)} evaluation problems{short}.")
    if found and found.partly_compared:
        lines.append(
            f"{_number(found.partly_compared)} documents share so much with so many others (a template) that they were "
            "not compared with all of those; near duplicates may be left among them."
        )
    return lines


def _source(name: str, source: SourceStatistics) -> str:
    parts = [f"<h2>{html.escape(name)}</h2>", _histogram(source.length_histogram), "<h3>Samples</h3>"]
    parts += [f"<pre>{html.escape(text)}</pre>" for text in source.samples]
    if source.contaminated_samples:
        parts.append("<h3>Left out: they hold an evaluation problem</h3>")
        parts += [
            f"<p>shared words: <code>{html.escape(sample.ngram)}</code></p><pre>{html.escape(sample.text)}</pre>"
            for sample in source.contaminated_samples
        ]
    return "".join(parts)


def _histogram(documents: Sequence[int]) -> str:
    """Rows from the shortest length that occurs to the longest."""
    first = next(at for at, count in enumerate(documents) if count)
    rows = "".join(
        f"<tr><td>{_number(2**at)} to {_number(2 ** (at + 1) - 1)}</td><td class='number'>{_number(count)}</td>"
        f"<td class='bar'><div style='width:{100 * count / max(documents):.1f}%'></div></td></tr>"
        for at, count in enumerate(documents)
        if at >= first
    )
    return f"<table><tr><th>tokens</th><th>documents</th><th></th></tr>{rows}</table>"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in header)
    body = "".join(
        f"<tr><td>{html.escape(row[0])}</td>"
        + "".join(f"<td class='number'>{html.escape(value)}</td>" for value in row[1:])
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: int) -> str:
    return f"{value:,}"
