"""Style sheets of our pages, and the script of the page that `page` writes."""

CSS = """
:root{color-scheme:light dark;--page:#f6f5f2;--card:#fff;--ink:#1d1d1f;--soft:#6e6e73;
--line:#e3e1dc;--accent:#3d6fb4}
@media(prefers-color-scheme:dark){:root{--page:#131417;--card:#1c1e22;--ink:#ececee;--soft:#9a9aa2;
--line:#2e3136;--accent:#86b1ee}}
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
header,main{max-width:1080px;margin:auto;padding:0 20px}
header{padding-top:40px}
h1{margin:0;font-size:2rem;letter-spacing:-.02em}
header p{margin:0 0 20px;color:var(--soft)}
article{background:var(--card);border:1px solid var(--line);border-radius:18px;padding:24px;
margin:0 0 28px}
h2{margin:0 0 16px;font-size:1.25rem;overflow-wrap:anywhere}
h3{margin:26px 0 8px;font-size:1rem}
small{color:var(--soft);font-weight:400;font-size:.85rem;margin-left:6px}
.tile{width:100%;aspect-ratio:1;background-repeat:no-repeat;border-radius:8px;
background-color:var(--line);box-shadow:inset 0 0 0 1px var(--line)}
.top{display:flex;gap:28px;align-items:flex-start}
.inputs{display:grid;gap:10px;width:150px;flex:none;max-height:440px;overflow:auto}
.spin{flex:1;min-width:0;max-width:840px}
.stage{display:grid;grid-template-columns:1fr 1fr;gap:12px;cursor:grab;touch-action:pan-y;
user-select:none}
.stage:active{cursor:grabbing}
.stage .tile{border-radius:14px}
.bar{display:flex;gap:12px;align-items:center;margin-top:12px}
.bar input{flex:1;min-width:0;accent-color:var(--accent)}
.bar output{width:7.5em;text-align:right;color:var(--soft);font-variant-numeric:tabular-nums}
.bar button{width:34px;height:34px;border:1px solid var(--line);border-radius:50%;background:none;
color:var(--ink);cursor:pointer;font-size:12px;line-height:1}
figure{margin:0}
figure .tile+.tile{margin-top:6px}
figcaption{margin-top:3px;color:var(--soft);font-size:.8rem;text-align:center;
font-variant-numeric:tabular-nums}
.row{display:grid;grid-auto-flow:column;grid-auto-columns:minmax(84px,1fr);gap:8px;overflow-x:auto}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(72px,1fr));gap:6px;margin-top:10px}
.plot{display:grid;grid-template-columns:auto 1fr;gap:0 6px;color:var(--soft);font-size:.8rem;
line-height:1}
.plot svg{display:block;width:100%}
.plot path{stroke:var(--line)}
.plot circle{fill:var(--accent)}
.scale,.axis{display:flex;justify-content:space-between}
.scale{flex-direction:column;text-align:right}
.axis{grid-column:2;margin-top:4px}
details{margin-top:20px}
summary{cursor:pointer;font-weight:600}
.settings{overflow-x:auto;margin-top:10px}
.settings td{min-width:7em}
table{border-collapse:collapse;font-size:.85rem}
th,td{text-align:left;vertical-align:top;padding:3px 18px 3px 0;border-bottom:1px solid var(--line);
font-weight:400;overflow-wrap:anywhere}
th{color:var(--soft);white-space:nowrap}
@media(max-width:680px){.settings th{white-space:normal}
.top{flex-direction:column}.inputs{width:100%;grid-template-columns:1fr 1fr}
.spin{width:100%}}
"""

CHARTS = """
:root{--c0:#3d6fb4;--c1:#c2572b;--c2:#2f8f6b;--c3:#9a5bb0;--c4:#a8841c;--c5:#6b7280}
@media(prefers-color-scheme:dark){:root{--c0:#86b1ee;--c1:#f09a70;--c2:#6fd0a8;--c3:#cf9be2;
--c4:#e0c060;--c5:#a3abb8}}
.charts{display:grid;grid-template-columns:1fr 1fr;gap:20px 36px}
.charts h4{margin:0 0 4px;font-size:.9rem}
.charts svg{display:block;width:100%;overflow:visible}
svg text{font-size:11px;fill:var(--ink)}
svg text.soft{fill:var(--soft)}
svg path.line{stroke:var(--line)}
.plain{--c:var(--soft)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}
.c5{--c:var(--c5)}
svg circle{fill:var(--c)}
svg circle.faint{opacity:.35}
svg path.bar{stroke:var(--c);stroke-width:3;stroke-linecap:round}
svg path.curve{stroke:var(--c);stroke-width:2;fill:none}
svg path.dashed{stroke-dasharray:5 4}
svg path.band{fill:var(--c);opacity:.14}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;margin:4px 0 0;font-size:.8rem;color:var(--soft)}
.legend i{display:inline-block;width:10px;height:10px;border-radius:50%;background:var(--c);
margin-right:5px}
@media(max-width:820px){.charts{grid-template-columns:1fr}}
"""

SCRIPT = """
for (const spin of document.querySelectorAll('.spin')) {
  const labels = JSON.parse(spin.dataset.labels), count = labels.length;
  const columns = +spin.dataset.columns, rows = +spin.dataset.rows;
  const [stage, bar] = spin.children, [button, slider, output] = bar.children;
  let playing = false, visible = false, last = 0, frame = 0;
  const show = (index) => {
    index = ((Math.round(index) % count) + count) % count;
    const x = 100 * (index % columns) / Math.max(columns - 1, 1);
    const y = 100 * Math.floor(index / columns) / Math.max(rows - 1, 1);
    for (const tile of stage.children) tile.style.backgroundPosition = `${x}% ${y}%`;
    slider.value = index;
    output.textContent = labels[index];
    slider.setAttribute('aria-valuetext', labels[index]);
  };
  const step = (now) => {
    if (!playing || !visible) return;
    if (now - last > 5000 / count) { last = now; show(+slider.value + 1); }
    frame = requestAnimationFrame(step);
  };
  const run = () => { cancelAnimationFrame(frame); frame = requestAnimationFrame(step); };
  const play = (on) => {
    playing = on;
    button.textContent = on ? '❚❚' : '▶';
    button.setAttribute('aria-label', on ? 'pause' : 'play');
    run();
  };
  new IntersectionObserver(([entry]) => {
    visible = entry.isIntersecting;
    run();
  }).observe(stage);
  button.onclick = () => play(!playing);
  slider.oninput = () => { play(false); show(+slider.value); };
  let from = null;
  stage.onpointerdown = (event) => {
    play(false);
    stage.setPointerCapture(event.pointerId);
    from = [event.clientX, +slider.value];
  };
  stage.onpointermove = (event) => {
    if (from) show(from[1] - (event.clientX - from[0]) * count / stage.clientWidth);
  };
  stage.onpointerup = stage.onpointercancel = () => { from = null; };
  play(!matchMedia('(prefers-reduced-motion: reduce)').matches);
}
"""
