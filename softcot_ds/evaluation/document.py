"""What all pages have in common: one file of HTML that needs nothing but itself, its tables and figures.

A policy in the page itself forbids all that does not come with it: nothing is loaded, and no script runs but the page's
own, whatever a text in it would have a browser do.
"""

import hashlib
from base64 import b64encode
from collections.abc import Collection, Sequence
from html import escape

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; margin: 0 auto; padding: 1rem;
       max-width: 76rem; }
h1 { font-size: 1.6rem; margin-bottom: 0; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .2rem; } p { max-width: 46rem; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); gap: 1rem; }
figure { margin: 0; } figure svg { width: 100%; max-width: 32rem; height: auto; display: block; }
figcaption { font-weight: 600; font-size: .95rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .2rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e3e3e3; }
th { background: #f4f4f4; } th.text, td.text { text-align: left; }
"""


def document(title: str, body: Sequence[str], style: str = "", script: str = "") -> str:
    """The page.

    Args:
        title: also its first heading.
        body: HTML.
        style: CSS beside that of all pages.
        script: what it does when it is looked at; it works without, too.
    """
    runs = f"script-src 'sha256-{b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" if script else ""
    policy = f"default-src 'none'; style-src 'unsafe-inline'; {runs}"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n<body>\n<h1>{escape(title)}</h1>\n"
        + "\n".join(body)
        + (f"\n<script>{script}</script>" if script else "")
        + "\n</body></html>\n"
    )


def figure(caption: str, what: str, svg: str) -> str:
    """``what`` it shows, for who cannot see it."""
    label = escape(f"{what}, {caption}", quote=True)
    return f'<figure role="img" aria-label="{label}"><figcaption>{escape(caption)}</figcaption>{svg}</figure>'


def table(heads: Sequence[str], texts: Collection[str], rows: Sequence[Sequence[str]]) -> str:
    """``texts``: the heads of columns that are no numbers."""
    kinds = [' class="text"' if head in texts else "" for head in heads]
    lines = ["".join(f"<th{kind}>{escape(head)}</th>" for head, kind in zip(heads, kinds, strict=True))]
    lines += ["".join(f"<td{kind}>{escape(text)}</td>" for text, kind in zip(row, kinds, strict=True)) for row in rows]
    return '<div class="wide"><table>' + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table></div>"
