"""The report's style sheet."""

STYLE = """
:root { color-scheme: light dark;
  --paper: #fcfcfa; --ink: #1c2126; --quiet: #5c6670; --line: #d9dde0; --grid: #c9ced2; --heat: 0 114 178;
  --s0: #0072b2; --s1: #c25700; --s2: #00805c; --s3: #a8497f; --s4: #7a6a00; --s5: #3d7fa8; }
@media (prefers-color-scheme: dark) { :root {
  --paper: #14181b; --ink: #e4e7e9; --quiet: #9aa5ad; --line: #333b41; --grid: #4a545b; --heat: 86 180 233;
  --s0: #56b4e9; --s1: #f0954a; --s2: #3fc79a; --s3: #dd8fbd; --s4: #d9c84a; --s5: #9cc9e6; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; padding-top: .75rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
h4 { font-size: .9rem; margin: 1rem 0 .25rem; color: var(--quiet); overflow-wrap: anywhere; }
p { max-width: 44rem; margin: .5rem 0; }
.note { color: var(--quiet); font-size: .875em; font-weight: normal; }
.table { overflow-x: auto; margin: .5rem 0; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--quiet); font-weight: 600; }
th:first-child, td:first-child { padding-left: 0; }
.text1 :is(th, td):first-child, .text2 :is(th, td):nth-child(-n+2), .text3 :is(th, td):nth-child(-n+3) {
  text-align: left; }
.maps { display: flex; flex-wrap: wrap; gap: 0 2rem; }
.maps > div { min-width: 0; max-width: 100%; }
figure { margin: .75rem 0; max-width: 34rem; }
figure svg { width: 100%; height: auto; display: block; }
figure svg text { font-family: inherit !important; }
details { margin: 1rem 0; }
summary { cursor: pointer; color: var(--quiet); }
blockquote { margin: .5rem 0; padding: .25rem .75rem; border-left: 3px solid var(--line); overflow-wrap: anywhere; }
pre { overflow-x: auto; font-size: .8rem; }
"""
