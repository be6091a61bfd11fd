"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const SVG = "http://www.w3.org/2000/svg";
  const DENSITY = [[247, 251, 255], [107, 174, 214], [8, 48, 107]];
  const RECALL = [[140, 45, 4], [254, 153, 41], [255, 255, 229]];
  const ERROR = [[255, 255, 240], [240, 130, 140], [110, 10, 50]];
  const BARS = { density: "#3a7fc0", recall: "#d9822b", error: "#b5385a" };
  const WORST = 5;

  const byId = (id) => document.getElementById(id);
  // What was not finite is null.
  const fixed = (value, digits = 3) => (value === null ? "not finite" : value.toFixed(digits));
  const calls = (field) => data.nodes.flatMap((node) => node[field]).filter((v) => v !== null);

  function html(tag, attributes = {}, ...children) {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    element.append(...children);
    return element;
  }

  function svg(tag, attributes = {}, text = null) {
    const element = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
    if (text !== null) element.textContent = text;
    return element;
  }

  function colour(scale, share) {
    const at = Math.min(Math.max(share, 0), 1) * (scale.length - 1);
    const low = Math.min(Math.floor(at), scale.length - 2);
    const mix = scale[low].map((c, i) => Math.round(c + (at - low) * (scale[low + 1][i] - c)));
    return `rgb(${mix.join(",")})`;
  }

  // The node table: sort by a heading, filter by words and by decision.
  function nodeTable() {
    const table = byId("node-table");
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => {
      heading.querySelector("button").addEventListener("click", () => {
        const falling = heading.getAttribute("aria-sort") === "ascending";
        headings.forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", falling ? "descending" : "ascending");
        const isNumber = heading.dataset.type === "number";
        const text = (row) => row.cells[column].textContent;
        const compare = (a, b) =>
          isNumber
            ? Number(text(a)) - Number(text(b))
            : text(a).localeCompare(text(b), "en", { numeric: true });
        // What has no number stays at the end, whichever way the rest is sorted.
        const empty = (row) => isNumber && text(row) === "";
        body.append(
          ...[...rows].sort(
            (a, b) => empty(a) - empty(b) || (falling ? -1 : 1) * compare(a, b),
          ),
        );
      });
    });
    const filter = () => {
      const words = byId("find").value.toLowerCase().split(/\s+/).filter(Boolean);
      const wanted = byId("show").value;
      let shown = 0;
      for (const row of rows) {
        const text = row.textContent.toLowerCase();
        const fits =
          (!wanted || row.dataset.decision === wanted) && words.every((word) => text.includes(word));
        row.hidden = !fits;
        shown += fits;
      }
      byId("shown").textContent = `${shown} of ${rows.length} nodes`;
    };
    byId("find").addEventListener("input", filter);
    byId("show").addEventListener("change", filter);
    filter();
  }

  // One heat map for each model, branch and quantity.
  function heatMaps() {
    const groups = new Map();
    data.passes.forEach((pass, index) => {
      const key = JSON.stringify([pass.model, pass.branch]);
      if (!groups.has(key)) groups.set(key, { ...pass, columns: [] });
      groups.get(key).columns.push({ index, step: pass.step });
    });
    const models = new Set(data.passes.map((pass) => pass.model)).size;
    const least = calls("recalls").reduce((a, b) => Math.min(a, b), 1);
    const most = calls("errors").reduce((a, b) => Math.max(a, b), 0);
    for (const group of groups.values()) {
      const nodes = data.nodes.filter((node) => node.model === group.model);
      const names = [models > 1 ? group.model : "", group.branch].filter(Boolean).join(", ");
      if (names) byId("heat-maps").append(html("h3", {}, names));
      const pair = html("div", { class: "pair" });
      pair.append(
        heatMap("Density", nodes, group.columns, "densities", DENSITY, 0, 1),
        heatMap("Achieved recall", nodes, group.columns, "recalls", RECALL, least, 1),
        heatMap("Error of the output", nodes, group.columns, "errors", ERROR, 0, most),
      );
      byId("heat-maps").append(pair);
      byId("heat").hidden = false;
    }
  }

  function heatMap(title, nodes, columns, field, scale, low, high) {
    const cell = { width: Math.max(6, Math.min(40, 420 / columns.length)), height: 17 };
    const left = 8 + 6.4 * Math.max(...nodes.map((node) => node.name.length));
    const top = 26;
    const width = left + Math.max(cell.width * columns.length, 150) + 12;
    const height = top + cell.height * nodes.length + 62;
    const picture = svg("svg", {
      width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title,
    });
    picture.append(svg("text", { x: left, y: 14, "font-weight": 600 }, title));
    nodes.forEach((node, row) => {
      const y = top + row * cell.height;
      picture.append(svg("text", { x: left - 6, y: y + 12, "text-anchor": "end" }, node.name));
      columns.forEach((column, i) => {
        const call = node.passes.indexOf(column.index);
        if (call < 0) return;
        const value = node[field][call];
        const share = high > low ? (value - low) / (high - low) : low === 0 ? 0 : 1;
        const rect = svg("rect", {
          x: left + i * cell.width, y, width: cell.width, height: cell.height,
          fill: value === null ? "#999" : colour(scale, share), stroke: "#fff", "stroke-width": 0.5,
        });
        const text = `${node.name}, step ${column.step}: ${title.toLowerCase()} ${fixed(value)}`;
        rect.append(svg("title", {}, text));
        picture.append(rect);
      });
    });
    const bottom = top + nodes.length * cell.height;
    const longest = Math.max(...columns.map((column) => column.step.length));
    const every = Math.ceil((8 + 6.5 * longest) / cell.width);
    columns.forEach((column, i) => {
      if (i % every) return;
      const x = left + (i + 0.5) * cell.width;
      picture.append(svg("text", { x, y: bottom + 13, "text-anchor": "middle" }, column.step));
    });
    picture.append(
      svg("text", { x: left - 6 - 3 * longest, y: bottom + 13, "text-anchor": "end" }, "step"),
      ...legend(left, bottom + 28, scale, low, high),
    );
    return html("figure", {}, picture);
  }

  // Enough to tell the parts of a scale apart.
  const digits = (span) => (span > 0 ? Math.max(2, Math.ceil(1 - Math.log10(span))) : 2);

  function legend(x, y, scale, low, high) {
    const parts = 40;
    const bars = Array.from({ length: parts }, (_, i) =>
      svg("rect", {
        x: x + i * 3, y, width: 3.2, height: 9, fill: colour(scale, i / (parts - 1)),
      }),
    );
    return [
      ...bars,
      svg("rect", { x, y, width: 3 * parts, height: 9, fill: "none", stroke: "#d9dee5" }),
      svg("text", { x, y: y + 22 }, fixed(low, digits(high - low))),
      svg("text", { x: x + 3 * parts, y: y + 22, "text-anchor": "end" }, fixed(high, digits(high - low))),
    ];
  }

  function distributions() {
    if (!data.nodes.length) return;
    const recalls = calls("recalls");
    const targets = [...new Set(data.nodes.map((node) => node.target))];
    // To twentieths, so that its ticks are round; errors have no natural end.
    const low = Math.max(0, Math.floor(Math.min(1, ...targets, recalls.reduce((a, b) => Math.min(a, b), 1)) * 20) / 20);
    const high = calls("errors").reduce((a, b) => Math.max(a, b), 1e-6);
    byId("histograms").append(
      histogram("Density", calls("densities"), [0, 1], BARS.density, []),
      histogram("Achieved recall", recalls, [Math.min(low, 0.95), 1], BARS.recall, targets),
      histogram("Error of the output", calls("errors"), [0, high], BARS.error, []),
    );
    byId("distributions").hidden = false;
  }

  function histogram(title, values, [low, high], fill, marks) {
    const [left, top, width, height, bins] = [44, 26, 400, 150, 25];
    const span = high - low;
    const counts = new Array(bins).fill(0);
    for (const value of values) {
      counts[Math.max(0, Math.min(bins - 1, Math.floor(((value - low) / span) * bins)))] += 1;
    }
    const most = Math.max(1, ...counts);
    const picture = svg("svg", {
      width: left + width + 20, height: top + height + 34, role: "img", "aria-label": title,
      viewBox: `0 0 ${left + width + 20} ${top + height + 34}`,
    });
    picture.append(svg("text", { x: left, y: 14, "font-weight": 600 }, title));
    counts.forEach((count, i) => {
      const size = (count / most) * height;
      const edges = [i, i + 1].map((edge) => fixed(low + (edge / bins) * span, digits(span)));
      const bar = svg("rect", {
        x: left + (i / bins) * width + 0.5, y: top + height - size,
        width: width / bins - 1, height: size, fill,
      });
      bar.append(svg("title", {}, `${edges[0]} to ${edges[1]}: ${count} calls`));
      picture.append(bar);
    });
    const line = { stroke: "#5b6675", "stroke-width": 1 };
    picture.append(
      svg("line", { x1: left, x2: left + width, y1: top + height, y2: top + height, ...line }),
      svg("text", { x: left - 6, y: top + 10, "text-anchor": "end" }, String(most)),
      svg("text", { x: left - 6, y: top + height, "text-anchor": "end" }, "0"),
    );
    for (let i = 0; i <= 5; i += 1) {
      const x = left + (i / 5) * width;
      const text = fixed(low + (i / 5) * span, digits(span));
      picture.append(svg("text", { x, y: top + height + 15, "text-anchor": "middle" }, text));
    }
    for (const mark of marks) {
      const x = left + ((mark - low) / span) * width;
      picture.append(
        svg("line", { x1: x, x2: x, y1: top, y2: top + height, ...line, "stroke-dasharray": "4 3" }),
      );
    }
    if (marks.length) {
      const text = marks.length === 1 ? "dashed: target" : "dashed: targets";
      picture.append(
        svg("text", { x: left + width, y: 14, "text-anchor": "end" }, text),
      );
    }
    return html("figure", {}, picture);
  }

  function worstNodes() {
    const below = (node) => node.recall - node.target;
    const worst = [...data.nodes].sort((a, b) => below(a) - below(b)).slice(0, WORST);
    for (const node of worst) {
      const card = html("div", { class: "card" });
      const interval = node.interval.map((end) => fixed(end)).join(" .. ");
      const text =
        ` recall ${fixed(node.recall)} (95 % interval ${interval}),` +
        ` target ${fixed(node.target)}, error ${fixed(node.error, 4)}, density ${fixed(node.density)}`;
      card.append(html("p", {}, html("code", {}, node.name), text));
      if (node.recalls.length > 1) card.append(curve(node));
      byId("worst-nodes").append(card);
      byId("worst").hidden = false;
    }
  }

  // Recall and density of a node, call by call.
  function curve(node) {
    const [left, top, width, height] = [34, 8, 420, 70];
    const picture = svg("svg", {
      width: left + width + 90, height: top + height + 8, role: "img",
      viewBox: `0 0 ${left + width + 90} ${top + height + 8}`,
      "aria-label": `recall and density of ${node.name}, call by call`,
    });
    const y = (value) => top + (1 - value) * height;
    for (const edge of [0, 1]) {
      picture.append(
        svg("line", { x1: left, x2: left + width, y1: y(edge), y2: y(edge), stroke: "#d9dee5" }),
        svg("text", { x: left - 6, y: y(edge) + 4, "text-anchor": "end" }, String(edge)),
      );
    }
    const labels = [["recall", node.recalls, BARS.recall], ["density", node.densities, BARS.density]];
    const ends = labels.map(([, values]) => y(values[values.length - 1]) + 4);
    if (Math.abs(ends[0] - ends[1]) < 12) ends[1] = ends[0] + (ends[1] < ends[0] ? -12 : 12);
    labels.forEach(([name, values, stroke], i) => {
      const x = (at) => left + (at / (values.length - 1)) * width;
      const points = values.flatMap((value, at) => (value === null ? [] : `${x(at)},${y(value)}`));
      const text = svg("text", { x: left + width + 8, y: ends[i] }, name);
      text.style.fill = stroke;
      picture.append(
        svg("polyline", { points: points.join(" "), fill: "none", stroke, "stroke-width": 1.8 }),
        text,
      );
    });
    return picture;
  }

  function tileMaps() {
    const names = new Map(data.nodes.map((node) => [`${node.model} ${node.path} ${node.ordinal}`, node.name]));
    for (const map of data.tileMaps) {
      const name = names.get(`${map.model} ${map.path} ${map.ordinal}`) || `${map.path}#${map.ordinal}`;
      const panels = html("div", { class: "panels" });
      for (const panel of map.panels) {
        const canvas = html("canvas", { width: panel.columns, height: panel.rows });
        const factor = Math.max(1, Math.floor(230 / Math.max(panel.columns, panel.rows)));
        canvas.style.width = `${panel.columns * factor}px`;
        canvas.style.height = `${panel.rows * factor}px`;
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `tile map of ${name}, ${panel.name}`);
        const context = canvas.getContext("2d");
        const image = context.createImageData(panel.columns, panel.rows);
        const cells = Uint8Array.from(atob(panel.cells), (char) => char.charCodeAt(0));
        cells.forEach((value, i) => {
          const shade = colour(DENSITY, value / 255).slice(4, -1).split(",").map(Number);
          image.data.set([...shade, 255], 4 * i);
        });
        context.putImageData(image, 0, 0);
        const caption = `${panel.name}, density ${fixed(panel.density)}`;
        panels.append(html("figure", {}, canvas, html("figcaption", {}, caption)));
      }
      const size = `${map.q_tiles} query tiles x ${map.kv_tiles} key tiles`;
      byId("tile-maps").append(html("h3", {}, `${name}: ${size}`), panels);
      byId("tiles").hidden = false;
    }
  }

  nodeTable();
  heatMaps();
  distributions();
  worstNodes();
  tileMaps();
})();
