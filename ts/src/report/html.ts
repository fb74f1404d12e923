/** What the HTML pages share. A page holds all it shows: no script, no link, no font, so it can be kept and passed on. */

/** Text that can stand anywhere in HTML; control characters and changes of direction become spaces. */
export const escapeHtml = (text: string): string =>
  text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`).replace(/(?!\n)[\p{Cc}\u202a-\u202e\u2066-\u2069]/gu, ' ')

/** Sections, tables and legends, in light and dark. */
export const PAGE_STYLE = `
:root{color-scheme:light dark;--page:#f6f6f4;--card:#fff;--ink:#17171a;--muted:#62625f;--line:#e2e1dc;--accent:#2a6fc9}
@media(prefers-color-scheme:dark){:root{--page:#111113;--card:#1b1b1e;--ink:#f0f0ee;--muted:#a3a29d;--line:#323236;--accent:#5b9bf0}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:15px/1.5 system-ui,-apple-system,'Segoe UI',Roboto,sans-serif}
main{max-width:980px;margin:0 auto;padding:40px 20px 60px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.02em}h2{font-size:19px;margin:0 0 6px}
p{margin:0 0 12px;max-width:74ch}.muted,small{color:var(--muted)}.muted{font-size:13px;margin:4px 0}
section{background:var(--card);border:1px solid var(--line);border-radius:12px;padding:22px 24px;margin-top:18px}
table{border-collapse:collapse;width:100%}th,td{padding:7px 10px 7px 0;text-align:left;border-bottom:1px solid var(--line);font-weight:400}
thead th{color:var(--muted);font-size:13px}tr:last-child>*{border-bottom:0}.number{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
tbody th{white-space:nowrap}.scroll{overflow-x:auto}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;color:var(--muted);margin:10px 0 4px}
.legend span{display:flex;align-items:center;gap:6px}.legend i{width:12px;height:12px;border-radius:3px}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(360px,100%),1fr));gap:18px 28px}
figure{margin:0}.panels figcaption{font-size:14px;margin-bottom:4px}.panels figcaption span{color:var(--muted)}
@media(max-width:620px){section{padding:16px}}
@media print{section{break-inside:avoid}}
`

/** A whole page that may load nothing from anywhere. `title` is text, `style` and `body` are as they shall stand. */
export const htmlPage = (title: string, style: string, body: string): string => `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>${escapeHtml(title)}</title><style>${style}</style></head><body><main>
${body}
</main></body></html>
`
