"""The look of the page: one column, dark or light as the reader's device is set."""

from fedex_lora.experiments.report.html import Html

CSS = Html("""
:root { color-scheme: light dark;
  --ground: #ffffff; --box: #f5f6f8; --ink: #1c1e21; --soft: #5a6068; --rule: #d9dce1;
  --grid: #dddddd; --warn: #fff4d6; --warn-edge: #c08a00;
  --good: #0b6b3a; --bad: #a8261d;
  --c0: #0b62a4; --c1: #b84a00; --c2: #00755a; --c3: #8b3a94;
  --c4: #5f5f5f; --c5: #7a6400; --c6: #c0215e; --c7: #1a7d94; }
@media (prefers-color-scheme: dark) { :root {
  --ground: #14161a; --box: #1d2026; --ink: #e6e8eb; --soft: #a2a9b3; --rule: #343a43;
  --grid: #343a43; --warn: #352b10; --warn-edge: #d8a730;
  --good: #6fd69b; --bad: #ff968c;
  --c0: #6ab4f0; --c1: #ff9a55; --c2: #4fcfa8; --c3: #d79ae0;
  --c4: #b5b5b5; --c5: #dcc04a; --c6: #ff85b0; --c7: #6fd0e6; } }
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 76rem; background: var(--ground);
  color: var(--ink); font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; padding-top: .8rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p, ul { margin: .4rem 0; } ul { padding-left: 1.2rem; }
.soft, figcaption { color: var(--soft); font-size: .88rem; }
.notes { margin: 1rem 0; padding: .5rem .9rem; background: var(--warn);
  border-left: 4px solid var(--warn-edge); border-radius: 4px; }
.verdict { margin: 1rem 0; padding: .7rem 1rem; background: var(--box); border-radius: 8px; }
.verdict h2, .verdict h3 { margin: .3rem 0; padding: 0; border: 0; }
.lead { font-size: 1.1rem; font-weight: 600; }
.verdict dl { display: grid; grid-template-columns: 10.5rem 1fr; gap: .3rem 1rem;
  margin: .5rem 0; }
.verdict dt { font-weight: 600; } .verdict dd { margin: 0; }
.verdict dd ul { display: flex; flex-wrap: wrap; gap: 0 1.6rem; margin: 0; padding: 0;
  list-style: none; font-variant-numeric: tabular-nums; }
.scroll { overflow-x: auto; margin: .6rem 0; border: 1px solid var(--rule); border-radius: 8px; }
.scroll:focus-visible { outline: 2px solid var(--c0); }
table { border-collapse: collapse; width: 100%; font-size: .86rem; overflow-wrap: normal;
  font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .55rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--rule); }
th:first-child { text-align: left; }
thead th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { font-weight: 600; }
tbody tr:last-child > * { border-bottom: 0; }
thead th { white-space: normal; }
.narrow { width: fit-content; max-width: 100%; }
.narrow td, .narrow th { text-align: left; }
.figures { display: grid; gap: 1.2rem; margin: 1rem 0;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); }
figure { margin: 0; min-width: 0; }
figure svg { display: block; width: 100%; max-width: 32rem; height: auto;
  stroke-linejoin: round; stroke-linecap: butt; font-family: inherit; }
figcaption { margin-top: .2rem; max-width: 32rem; }
details { margin: .6rem 0; }
summary { cursor: pointer; font-weight: 600; }
pre { overflow-x: auto; margin: .5rem 0; padding: .7rem .9rem; background: var(--box);
  border-radius: 8px; font: .85rem/1.45 ui-monospace, Menlo, Consolas, monospace; }
pre.wrap { white-space: pre-wrap; }
.findings { padding-left: 0; list-style: none; } .findings li { margin: .5rem 0; }
.findings p { margin: 0; color: var(--soft); font-size: .88rem; }
.findings span { display: inline-block; margin-right: .4rem; padding: 0 .5rem;
  border: 1px solid currentColor; border-radius: 1rem; font-size: .8rem; }
.open { color: var(--soft); }
.holds { color: var(--good); font-weight: 600; }
.fails { color: var(--bad); font-weight: 600; }
@media (max-width: 40rem) { .verdict dl { grid-template-columns: 1fr; gap: 0; }
  .verdict dd { margin-bottom: .5rem; } }
@media print { details > * { display: block; } }
""")
