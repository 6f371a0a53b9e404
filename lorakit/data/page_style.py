"""The look of the report's page, and the script that sorts and filters its table."""

STYLE = """
:root{color-scheme:light dark;--ground:#f5f6f8;--card:#fff;--ink:#1c2027;--quiet:#667080;--line:#dfe3e9;
--accent:#c97a00;--bar:#e8a33d;--error:#b3261e;--error-bg:#fdecea;--warn:#8a5a00;--warn-bg:#fff6e0;--violet:#6a4fd0;--blue:#1d6fb8}
@media (prefers-color-scheme:dark){:root{--ground:#16181d;--card:#20232a;--ink:#e9eaee;--quiet:#98a1b0;--line:#333843;
--accent:#ffb81c;--bar:#c98a24;--error:#ff9d94;--error-bg:#3a2022;--warn:#ffcf70;--warn-bg:#322a18;--violet:#a593f5;
--blue:#6fb4f2}}
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5 system-ui,"Segoe UI",Roboto,"Helvetica Neue",
"Noto Sans",sans-serif}
header,main{max-width:1400px;margin:0 auto;padding:0 28px}
header{padding-top:34px}
h1{font-size:28px;line-height:1.2;margin:0 0 4px;overflow-wrap:anywhere}
header p{margin:0 0 22px;color:var(--quiet)}
h2{font-size:18px;margin:0 0 12px}
section{margin:0 0 34px}
small,.quiet,.count{color:var(--quiet)}
.count{font-weight:400;font-size:15px;margin-left:4px}
b.error{color:var(--error)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(122px,1fr));gap:12px}
.tiles div{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px 14px;display:flex;
flex-direction:column}
.tiles span{color:var(--quiet);font-size:13px}
.tiles strong{font-size:25px;line-height:1.3;font-weight:600;font-variant-numeric:tabular-nums}
.list{border-radius:10px;padding:14px 18px;border:1px solid var(--line);border-left:4px solid var(--warn);
background:var(--warn-bg)}
.list.error{border-left-color:var(--error);background:var(--error-bg)}
.list h2{margin:0 0 6px;color:var(--warn)}
.list.error h2{color:var(--error)}
.list ul{margin:0;padding:0;list-style:none}
.list li{padding:2px 0;overflow-wrap:anywhere}
summary{cursor:pointer;color:var(--quiet);padding-top:4px}
.bars{width:100%;height:auto;display:block;font:14px system-ui,sans-serif;font-variant-numeric:tabular-nums}
.bars text{fill:var(--ink)}.bars text.quiet{fill:var(--quiet)}
.bars .bar{fill:var(--bar)}.bars .shape{fill:none;stroke:var(--quiet);stroke-width:1.5}
.cards{display:grid;grid-template-columns:repeat(auto-fill,minmax(400px,1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:12px;display:flex;
flex-direction:column}
.pair{display:grid;grid-template-columns:1fr 1fr;gap:10px;align-items:center;justify-items:center;flex:1}
.pair img{max-width:100%;height:auto;border-radius:3px;display:block}
figcaption{padding-top:10px}
figcaption p{margin:0 0 2px;overflow-wrap:anywhere;display:-webkit-box;-webkit-box-orient:vertical;-webkit-line-clamp:4;
overflow:hidden}
figcaption small{overflow-wrap:anywhere}
.badge{border:1px solid currentColor;border-radius:20px;padding:0 8px;margin-left:6px;font-size:12px}
.badge.regularization{color:var(--violet)}.badge.validation{color:var(--blue)}
.scroll{overflow-x:auto;background:var(--card);border:1px solid var(--line);border-radius:10px}
table{border-collapse:collapse;width:100%;font-size:14px;line-height:1.4}
th,td{padding:7px 10px;text-align:left;vertical-align:top;border-top:1px solid var(--line)}
thead th{border-top:0;color:var(--quiet);font-weight:500;white-space:nowrap}
tbody th{font-weight:600;overflow-wrap:anywhere}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
.pictures td{border-top:1px solid var(--line)}
.pictures img{display:block;max-width:72px;max-height:72px;width:auto;height:auto;border-radius:3px}
.pictures tbody tr{content-visibility:auto;contain-intrinsic-size:auto 86px}
.pictures .key{min-width:150px;max-width:280px;overflow-wrap:anywhere}
.pictures .caption{min-width:220px;max-width:420px;overflow-wrap:anywhere}
.caption div{max-height:7em;overflow:auto}
.pictures .notes{min-width:200px;max-width:360px;color:var(--warn);overflow-wrap:anywhere}
.notes ul{margin:0;padding-left:16px}
.noted .key{box-shadow:inset 3px 0 var(--bar)}
th button{all:unset;cursor:pointer;padding:2px 0}
th button:focus-visible{outline:2px solid var(--accent);outline-offset:2px;border-radius:2px}
th button:hover,th[aria-sort=ascending] button,th[aria-sort=descending] button{color:var(--ink)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
#filter{font:inherit;color:inherit;background:var(--card);border:1px solid var(--line);border-radius:8px;
padding:7px 12px;width:min(420px,100%)}
#tools{margin:0 0 10px}#matches{color:var(--quiet);margin-left:8px}
@media (max-width:520px){header,main{padding-left:14px;padding-right:14px}.cards{grid-template-columns:1fr}}
@media print{.scroll{overflow:visible}#tools{display:none}}
"""

SCRIPT = """
"use strict";
(() => {
  const table = document.getElementById("pictures");
  if (!table) return;
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const rows = [...body.rows].map((row, place) => ({row, place, text: row.textContent.toLowerCase()}));
  const value = (cell) => "v" in cell.dataset ? Number(cell.dataset.v) : cell.textContent.toLowerCase();
  heads.forEach((head, column) => {
    const button = head.querySelector("button");
    if (!button) return;
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => { if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none"); });
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      for (const entry of rows) entry.value = value(entry.row.cells[column]);
      rows.sort((a, b) => {
        const order = a.value < b.value ? -1 : a.value > b.value ? 1 : 0;
        return (up ? order : -order) || a.place - b.place;
      });
      body.append(...rows.map((entry) => entry.row));
    });
  });
  const filter = document.getElementById("filter"), matches = document.getElementById("matches");
  const narrow = () => {
    const words = filter.value.toLowerCase().split(" ").filter(Boolean);
    let found = 0;
    for (const entry of rows) {
      const match = words.every((word) => entry.text.includes(word));
      entry.row.hidden = !match;
      found += match;
    }
    matches.textContent = words.length ? found + " of " + rows.length : "";
  };
  filter.addEventListener("input", narrow);
  document.getElementById("tools").hidden = false;
})();
"""
