// Draws the figure in the reader's colour scheme and names the points where there is room.
(() => {
  "use strict";
  const plot = document.getElementById("plot");
  const source = document.getElementById("figure").textContent;
  const config = { displayModeBar: false, scrollZoom: false, doubleClick: false, showTips: false };
  const NARROW_PX = 600, NARROW_MARKERS = 0.85, PRINT_WIDTH_PX = 680, LABEL_PX = 12, DIAMOND = 1.3;  // plotly draws diamonds wider than their size

  // "var(--kept)" -> the colour it has now.
  function coloured(value) {
    if (typeof value === "string") {
      const name = /^var\((--[a-z-]+)\)$/.exec(value);
      return name ? getComputedStyle(document.documentElement).getPropertyValue(name[1]).trim() : value;
    }
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, coloured(one)]));
  }

  function themed(width) {
    const figure = JSON.parse(source);
    const font = getComputedStyle(document.body).fontFamily;
    const axis = {
      gridcolor: "var(--line)", linecolor: "var(--line)", zeroline: false, automargin: true,
      fixedrange: true, tickfont: { color: "var(--muted)" },
    };
    const layout = figure.layout;
    for (const key of ["xaxis", "yaxis", "yaxis2"]) {
      if (layout[key]) Object.assign(layout[key], { ...axis, ...layout[key] });
    }
    Object.assign(layout, {
      width, showlegend: false, dragmode: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: font, size: 12, color: "var(--ink)" },
      hoverlabel: {
        align: "left", bgcolor: "var(--panel)", bordercolor: "var(--muted)",
        font: { family: font, size: 12, color: "var(--ink)" },
      },
    });
    if (width < NARROW_PX) {
      for (const trace of figure.data) {
        if (trace.marker) trace.marker.size = trace.marker.size.map((s) => Math.max(18, s * NARROW_MARKERS));
      }
    }
    return coloured(figure);
  }

  // The points in the plot's pixels; plotly knows where it has drawn them.
  function points() {
    const full = plot._fullLayout;
    return plot.data.filter((trace) => trace.customdata).flatMap((trace) => {
      const y = trace.yaxis === "y2" ? full.yaxis2 : full.yaxis;
      return trace.x.map((value, i) => ({
        name: trace.customdata[i],
        number: Number(trace.text[i]),
        x: full.xaxis._offset + full.xaxis.d2p(value),
        y: y._offset + y.d2p(trace.y[i]),
        radius: trace.marker.size[i] / 2 * (trace.marker.symbol === "diamond" ? DIAMOND : 1),
      }));
    });
  }

  // The steps of the front as thin boxes, across and then up or down.
  function front() {
    const full = plot._fullLayout;
    return plot.data.filter((trace) => trace.mode === "lines").flatMap((trace) => {
      const x = trace.x.map((v) => full.xaxis._offset + full.xaxis.d2p(v));
      const y = trace.y.map((v) => full.yaxis._offset + full.yaxis.d2p(v));
      return x.slice(1).flatMap((right, i) => [
        { left: x[i], right, top: y[i] - 1, bottom: y[i] + 1 },
        { left: right - 1, right: right + 1, top: Math.min(y[i], y[i + 1]), bottom: Math.max(y[i], y[i + 1]) },
      ]);
    });
  }

  const apart = (a, b) => a.right < b.left || b.right < a.left || a.bottom < b.top || b.bottom < a.top;
  const around = (x, y, w, h) => ({ left: x - w / 2, right: x + w / 2, top: y - h / 2, bottom: y + h / 2 });

  // A line from a mark to its name above or below.
  const leader = (p, dy, size) => ({
    text: "", showarrow: true, arrowhead: 0, arrowwidth: 1, arrowcolor: coloured("var(--muted)"),
    xref: "paper", yref: "paper", ax: 0, ay: dy - Math.sign(dy) * p.radius,
    x: (p.x - size.l) / size.w, y: 1 - (p.y + Math.sign(dy) * p.radius - size.t) / size.h,
  });

  // Beside, above or below its mark, best candidate first; where nothing is free, the number has to do.
  function labels() {
    const all = points();
    const size = plot._fullLayout._size;
    const frame = plot.getBoundingClientRect();
    const area = { left: size.l, right: size.l + size.w, top: size.t, bottom: size.t + size.h };
    const taken = all.map((p) => around(p.x, p.y, 2 * p.radius, 2 * p.radius));
    for (const words of plot.querySelectorAll(".annotation")) {
      const box = words.getBoundingClientRect();
      taken.push(around(
        (box.left + box.right) / 2 - frame.left, (box.top + box.bottom) / 2 - frame.top,
        box.width, box.height,
      ));
    }
    taken.push(...front());
    const ruler = document.createElement("canvas").getContext("2d");
    ruler.font = `${LABEL_PX}px ${getComputedStyle(document.body).fontFamily}`;
    const found = [];
    for (const p of all.sort((a, b) => a.number - b.number)) {
      const w = ruler.measureText(p.name).width + 6, h = LABEL_PX + 4;
      const side = p.radius + 3 + w / 2, over = p.radius + 2 + h / 2;
      const places = [[side, 0], [-side, 0]];
      for (const step of [0, LABEL_PX + 6, 2 * (LABEL_PX + 6)]) {
        for (const dy of [-over - step, over + step]) places.push([0, dy], [w / 2, dy], [-w / 2, dy]);
      }
      for (const [dx, dy] of places) {
        const box = around(p.x + dx, p.y + dy, w, h);
        const inside = box.left >= area.left && box.right <= area.right + 8 &&
          box.top >= area.top && box.bottom <= area.bottom;
        const boxes = [box];
        if (Math.abs(dy) > over) {
          const [near, far] = [p.y + Math.sign(dy) * (over - h / 2), p.y + dy - Math.sign(dy) * h / 2];
          boxes.push({ left: p.x - 1, right: p.x + 1, top: Math.min(near, far), bottom: Math.max(near, far) });
        }
        if (!inside || !taken.every((other) => boxes.every((one) => apart(one, other)))) continue;
        taken.push(...boxes);
        found.push({
          text: p.name, showarrow: false, xref: "paper", yref: "paper",
          x: (p.x + dx - size.l) / size.w, y: 1 - (p.y + dy - size.t) / size.h,
          xanchor: "center", yanchor: "middle", borderpad: 0,
          font: { size: LABEL_PX, color: coloured("var(--ink)") },
        });
        if (boxes.length > 1) found.push(leader(p, dy - Math.sign(dy) * h / 2, size));
        break;
      }
    }
    return found;
  }

  let drawn = 0;
  async function draw(width) {
    drawn = width;
    const figure = themed(width);
    await Plotly.react(plot, figure.data, figure.layout, config);
    await Plotly.relayout(plot, { annotations: [...figure.layout.annotations, ...labels()] });
  }

  const redraw = () => draw(plot.parentElement.clientWidth);
  redraw();
  new ResizeObserver(() => {
    if (plot.parentElement.clientWidth !== drawn) redraw();
  }).observe(plot.parentElement);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => {
    document.documentElement.classList.add("printing");
    draw(PRINT_WIDTH_PX);
  });
  addEventListener("afterprint", () => {
    document.documentElement.classList.remove("printing");
    redraw();
  });
})();
