"""The report as one page of HTML that needs no network: tables, plots, examples."""

import base64
import html
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem;
       color: #1b1b1b; background: #fff; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
td, th { padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd;
         vertical-align: top; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
pre { white-space: pre-wrap; background: #f6f6f4; padding: .6rem; margin: .3rem 0; }
img { max-width: 100%; }
h2 { margin-top: 2.2rem; }
"""


def report_page(report: Mapping[str, Any]) -> str:
    """Return the page; every text of the corpus in it is escaped."""
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><title>Cleaning report</title>",
        f"<style>{_STYLE}</style><h1>Cleaning report</h1>",
        f"<p>{_esc(report['config']['input']['path'])}, preset {_esc(report['config']['preset'])}."
        "</p>",
        *_why(report),
        *_edits(report),
        *_duplicates(report),
        *_rounds(report["rounds"]),
        "<h2>Lengths</h2>",
        _lengths(report["lengths_read"], report["lengths_kept"]),
        *_kinds(report),
        "<h2>Examples</h2>",
        *_examples(report["examples"]),
        "<h2>Configuration</h2>",
        f"<pre>{_esc(_lines(report['config']))}</pre></html>",
    ]
    return "\n".join(parts)


def _why(report: Mapping[str, Any]) -> Iterable[str]:
    documents, size = report["documents"], report["bytes"]
    read = max(1, documents.get("read", 0))
    yield _table(
        ("", "documents", "share", "megabytes"),
        [
            (name, documents.get(name, 0), _share(documents.get(name, 0), read), _mb(size, name))
            for name in ("read", "kept", "dropped", "quarantined")
        ],
    )
    yield "<p>Megabytes are of text as it was read, for what is kept as it was written.</p>"
    yield "<h2>Why documents left</h2>"
    yield _bars(report["reasons"], "documents")
    yield _table(
        ("step and reason", "documents", "share of all", "megabytes"),
        [
            (name, count, _share(count, read), _mb(report["reason_bytes"], name))
            for name, count in report["reasons"].items()
        ],
    )


def _edits(report: Mapping[str, Any]) -> Iterable[str]:
    kept = max(1, report["documents"].get("kept", 0))
    yield "<h2>What was edited</h2>"
    yield _table(
        ("rule", "documents", "share of kept", "times"),
        [
            (name, count, _share(count, kept), report["edits"][name])
            for name, count in report["edited_documents"].items()
        ],
    )
    yield _table(("personal data", "masked"), report["pii"].items())


def _duplicates(report: Mapping[str, Any]) -> Iterable[str]:
    pairs = report["pairs"]
    yield "<h2>Duplicates</h2>"
    yield (
        f"<p>{pairs['candidates']:,} candidate pairs, {pairs['verified']:,} at or above a Jaccard "
        f"index of {report['config']['dedup']['jaccard']}; a pair at that index becomes a candidate "
        f"with probability {report['found_at_threshold']:.3f}.</p>"
    )
    pieces = report["pieces"]
    if pieces:
        yield (
            f"<p>Among {pieces['pieces']:,} {report['config']['dedup']['pieces']}: "
            f"{pieces['candidates']:,} candidate pairs, {pieces['verified']:,} at or above it.</p>"
        )


def _rounds(rounds: Sequence[Mapping[str, Any]]) -> Iterable[str]:
    if not rounds:
        return
    yield "<h2>Self-cleaning</h2>"
    yield _table(
        (
            "round",
            "documents",
            "dropped",
            "held-out bits per byte",
            "different words",
            "byte pair entropy",
            "source divergence",
        ),
        [
            (
                found["round"],
                found["documents"],
                sum(found["reasons"].values()),
                _number(found["heldout_bits_per_byte"]),
                f"{found['before']['type_token_ratio']:.4f} to "
                f"{found['after']['type_token_ratio']:.4f}",
                f"{found['before']['byte_pair_entropy']:.3f} to "
                f"{found['after']['byte_pair_entropy']:.3f}",
                f"{found['source_divergence_bits']:.5f} bits",
            )
            for found in rounds
        ],
    )


def _kinds(report: Mapping[str, Any]) -> Iterable[str]:
    yield "<h2>Languages and sources</h2>"
    yield _table(
        ("language", "documents kept", "megabytes"),
        [
            (name, count, _mb(report["language_bytes"], name))
            for name, count in report["language_documents"].items()
        ],
    )
    kept = report["sources_kept"]
    yield _table(
        ("source", "read", "kept", "share kept"),
        [
            (name, count, kept.get(name, 0), _share(kept.get(name, 0), count))
            for name, count in report["sources_read"].items()
        ],
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _esc(value: object) -> str:
    return html.escape(str(value))


def _share(part: int, whole: int) -> str:
    return f"{100 * part / max(1, whole):.2f} %"


def _mb(sizes: Mapping[str, int], name: str) -> str:
    return f"{sizes.get(name, 0) / 1e6:,.2f}"


def _table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    def row(cells: Sequence[object], tag: str) -> str:
        texts = [f"{cell:,}" if type(cell) is int else _esc(cell) for cell in cells]
        marked = [
            f"<{tag}{' class=n' if place else ''}>{text}</{tag}>"
            for place, text in enumerate(texts)
        ]
        return f"<tr>{''.join(marked)}</tr>"

    body = "".join(row(cells, "td") for cells in rows)
    return f"<table>{row(heads, 'th')}{body}</table>" if body else ""


def _examples(examples: Mapping[str, Sequence[Mapping[str, str]]]) -> Iterable[str]:
    for reason, shown in examples.items():
        yield f"<h3>{_esc(reason)}</h3>"
        for example in shown:
            yield f"<div>{_esc(example['id'])}<pre>{_esc(example['begins'])}</pre></div>"


def _lines(config: Mapping[str, Any], prefix: str = "") -> str:
    out = []
    for name, value in config.items():
        if isinstance(value, Mapping):
            out.append(_lines(value, f"{prefix}{name}."))
        elif value is not None:
            out.append(f"{prefix}{name} = {value}")
    return "\n".join(out)


def _bars(counts: Mapping[str, int], label: str) -> str:
    if not counts:
        return ""
    names, values = list(counts)[::-1], list(counts.values())[::-1]
    figure, axes = _figure(0.32 * len(names) + 0.8)
    axes.barh(names, values, color="#4063a8")
    axes.set_xlabel(label)
    return _image(figure, "documents by reason")


def _lengths(before: Mapping[str, int], after: Mapping[str, int]) -> str:
    buckets = sorted({int(name) for name in (*before, *after)})
    if not buckets:
        return ""
    figure, axes = _figure(2.8)
    places = range(len(buckets))
    for counts, color, label, shift in (
        (before, "#b8b8b0", "read", -0.2),
        (after, "#4063a8", "kept", 0.2),
    ):
        values = [counts.get(str(bucket), 0) for bucket in buckets]
        axes.bar([place + shift for place in places], values, width=0.4, color=color, label=label)
    axes.set_xticks(list(places), [f"{2**bucket:,}" for bucket in buckets], rotation=45)
    axes.set_xlabel("bytes of text, below")
    axes.set_ylabel("documents")
    axes.legend()
    return _image(figure, "documents by length")


def _figure(height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), layout="constrained")
    return figure, figure.subplots()


def _image(figure: Any, name: str) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="{_esc(name)}" src="data:image/png;base64,{text}">'
