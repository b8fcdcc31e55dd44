"use strict";
// The page's view: one map and its words at a time, or all methods beside each other.
(() => {
  if (typeof DecompressionStream === "undefined") return; // an old browser keeps the still maps
  const data = JSON.parse(document.getElementById("data").textContent);
  const many = data.methods.length > 1;
  const signed = data.methods.some((method) => method.signed);
  // Relevance has no unit: scores of unlike inputs, and words of a caption, differ much in strength.
  const state = {
    method: 0, layout: "over", opacity: data.opacity, sign: "all", cells: false, scale: "own",
  };

  const make = (tag, attributes = {}, ...children) => {
    const element = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (value !== null && value !== false) element.setAttribute(name, value === true ? "" : value);
    }
    element.append(...children);
    return element;
  };
  const number = (value, digits = 3) => String(Number(value.toPrecision(digits)));

  // Numbers.

  const bytes = async (text) => {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  };
  const values = async (map) => {
    if (!map.values) {
      const buffer = await bytes(map.data);
      map.values = map.bits === 32
        ? new Float32Array(buffer)
        : Float32Array.from(new Int8Array(buffer), (step) => step * map.limit / 127);
    }
    return map.values;
  };
  // The largest relevance of a method in all of the page.
  const largest = (method, of) => Math.max(0, ...data.views.flatMap(
    (view) => view.rows.map((row) => of(row.panels[method]))));
  const ofMap = (panel) => (panel.map ? panel.map.limit : 0);
  const ofWords = (panel) => Math.max(0, ...panel.words.map(([, value]) => Math.abs(value)));
  const common = data.methods.map((_, i) => ({ map: largest(i, ofMap), words: largest(i, ofWords) }));
  const limit = (panel, method) => state.scale === "common"
    ? common[method]
    : { map: ofMap(panel), words: ofWords(panel) };
  const kept = (value) =>
    (state.sign === "for" && value < 0) || (state.sign === "against" && value > 0) ? 0 : value;

  // Colours.

  const parts = (code) => [1, 3, 5].map((i) => parseInt(code.slice(i, i + 2), 16));
  const tables = Object.fromEntries(Object.entries(data.colours).map(([name, codes]) =>
    [name, codes.map(parts)]));
  const colour = (share, isSigned) => {
    const anchors = tables[isSigned ? "signed" : "unsigned"];
    const place = Math.min(1, Math.max(0, isSigned ? (share + 1) / 2 : share)) * (anchors.length - 1);
    const i = Math.min(anchors.length - 2, Math.floor(place));
    return anchors[i].map((part, c) => part + (place - i) * (anchors[i + 1][c] - part));
  };
  const light = (rgb) => rgb.map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);

  // One map.

  const sample = (map, y, x) => {
    const [rows, columns] = map.shape;
    const at = (row, column) => map.values[row * columns + column];
    if (state.cells) return at(Math.floor(y * rows), Math.floor(x * columns));
    const v = Math.min(rows - 1, Math.max(0, y * rows - 0.5));
    const u = Math.min(columns - 1, Math.max(0, x * columns - 0.5));
    const i = Math.floor(v), j = Math.floor(u);
    const k = Math.min(rows - 1, i + 1), l = Math.min(columns - 1, j + 1);
    return (i + 1 - v) * ((j + 1 - u) * at(i, j) + (u - j) * at(i, l))
      + (v - i) * ((j + 1 - u) * at(k, j) + (u - j) * at(k, l));
  };
  const draw = async (canvas, panel, method) => {
    const map = panel.map;
    await values(map);
    const { width, height } = canvas;
    const context = canvas.getContext("2d");
    const image = context.createImageData(width, height);
    const end = limit(panel, method).map || 1;
    for (let y = 0, i = 0; y < height; y += 1) {
      for (let x = 0; x < width; x += 1, i += 4) {
        const share = kept(sample(map, (y + 0.5) / height, (x + 0.5) / width)) / end;
        const hatched = share < data.hatchedBelow && (x + y) % 10 < 2.5;
        const rgb = colour(share, panel.signed);
        for (let c = 0; c < 3; c += 1) image.data[i + c] = hatched ? rgb[c] * 0.55 : rgb[c];
        image.data[i + 3] = 255;
      }
    }
    context.putImageData(image, 0, 0);
  };
  const ticks = (end, isSigned) => make("div", { class: "ticks" }, ...(
    end === 0 ? ["0 everywhere"] : isSigned ? [number(-end), "0", number(end)] : ["0", number(end)]
  ).map((text) => make("span", {}, text)));
  // The colours as they are drawn; of a map over its image, those over the image's mean grey.
  const bar = (end, isSigned, grey) => {
    const colours = make("i");
    const strip = make("div", { class: isSigned ? "bar signed" : "bar", "aria-hidden": "true" },
      colours);
    if (grey) {
      colours.style.opacity = state.opacity;
      const level = Math.round(255 * grey);
      strip.style.background = `rgb(${level} ${level} ${level})`;
    }
    return [strip, ticks(end, isSigned)];
  };
  const ninths = (y, x) => [["upper", "", "lower"][Math.min(2, Math.floor(3 * y))],
    ["left", "", "right"][Math.min(2, Math.floor(3 * x))]].filter(Boolean).join(" ") || "centre";

  // The value under the pointer, or at a cell that the arrow keys move.
  const explore = (stack, map, readout) => {
    const [rows, columns] = map.shape;
    const cursor = make("div", { class: "cursor", hidden: true });
    stack.append(cursor);
    let row = Math.floor(rows / 2), column = Math.floor(columns / 2);
    const tell = async () => {
      const value = (await values(map))[row * columns + column];
      const share = map.limit ? ` (${Math.round(100 * value / map.limit)}% of the largest)` : "";
      readout.textContent = `row ${row + 1} of ${rows}, column ${column + 1} of ${columns}, `
        + `${ninths((row + 0.5) / rows, (column + 0.5) / columns)}: ${number(value)}${share}`;
      cursor.hidden = false;
      const percent = { top: row / rows, left: column / columns, height: 1 / rows,
        width: 1 / columns };
      for (const [name, part] of Object.entries(percent)) cursor.style[name] = `${100 * part}%`;
    };
    const stop = () => { cursor.hidden = true; readout.textContent = ""; };
    const step = [rows, columns].map((n) => Math.max(1, Math.round(n / 32)));
    stack.addEventListener("keydown", (event) => {
      const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
      if (!(event.key in move)) return;
      event.preventDefault();
      row = Math.min(rows - 1, Math.max(0, row + move[event.key][0] * step[0]));
      column = Math.min(columns - 1, Math.max(0, column + move[event.key][1] * step[1]));
      tell();
    });
    const point = (event) => {
      const box = stack.getBoundingClientRect();
      row = Math.min(rows - 1, Math.max(0, Math.floor(rows * (event.clientY - box.top) / box.height)));
      column = Math.min(columns - 1,
        Math.max(0, Math.floor(columns * (event.clientX - box.left) / box.width)));
      tell();
    };
    stack.addEventListener("pointermove", point);
    stack.addEventListener("pointerdown", point);
    stack.addEventListener("focus", tell);
    stack.addEventListener("blur", stop);
    stack.addEventListener("pointerleave", stop);
  };

  const mapOf = (view, panel, method, photo, name) => {
    const beside = state.layout === "beside";
    const [rows, columns] = panel.map.shape;
    const [width, height] = view.size || [columns, rows];
    const factor = 480 / Math.max(width, height);
    const canvas = make("canvas", {
      width: Math.max(1, Math.round(width * factor)),
      height: Math.max(1, Math.round(height * factor)),
      role: "img", "aria-label": `${name}: ${panel.said}`,
      class: photo && !beside ? "over" : null,
    });
    const stack = make("div", {
      class: "stack map", tabindex: "0", role: "application",
      "aria-label": `Map by ${name}; ${panel.said}; arrow keys tell values`,
    });
    const image = (src) => make("img", { src, alt: "" });
    if (photo && !beside) stack.append(image(photo.pale));
    stack.append(canvas);
    if (photo && !beside) canvas.style.opacity = state.opacity;
    const readout = make("output", { class: "readout", "aria-live": "polite" });
    explore(stack, panel.map, readout);
    draw(canvas, panel, method);
    const pair = make("div", { class: "pair" });
    if (photo && beside) pair.append(make("div", { class: "stack" }, image(photo.colours)));
    pair.append(stack);
    const end = limit(panel, method).map;
    const own = panel.map.own.join(" x ");
    const sent = panel.map.shape.join(" x ");
    const what = sent === own ? `${own} values` : `${own} values, averaged to ${sent} for this page`;
    const how = make("p", { class: "muted" },
      `${state.cells ? "drawn as measured" : "smoothed"}: ${what}`);
    return [pair, ...bar(end, panel.signed, photo && !beside && view.grey), how, readout];
  };
  const wordsOf = (panel, method) => {
    const end = limit(panel, method).words;
    const words = make("div", { class: "words", role: "list", "aria-label": "words and their relevance" },
      ...panel.words.map(([word, given]) => {
        const value = kept(given);
        const rgb = colour(value / (end || 1), panel.signed);
        const chip = make("span", {
          class: value < 0 ? "word against" : "word", role: "listitem", title: number(given),
        }, `${word} `, make("small", {}, number(given, 2)));
        chip.style.background = `rgb(${rgb.map(Math.round).join(" ")})`;
        chip.style.color = light(rgb) > 0.1791 ? "#000" : "#fff";
        return chip;
      }));
    return [words, ...bar(end, panel.signed)];
  };

  // One view.

  const panelOf = (view, row, method, photo) => {
    const panel = row.panels[method], name = data.methods[method].name;
    const map = make("div", {}, make("h3", {}, name));
    if (panel.map) map.append(...mapOf(view, panel, method, photo, name));
    const text = make("div", { class: "text" }, make("p", { class: "said" }, panel.said));
    if (panel.words.length) {
      if (view.caption.length) text.append(make("p", { class: "muted" }, "Words before it:"));
      text.append(...wordsOf(panel, method));
    }
    if (panel.flag) text.append(make("p", { class: panel.flagged ? "flag" : "muted" }, panel.flag));
    return make("div", { class: panel.map ? "panel mapped" : "panel" }, map, text);
  };
  const mount = (article, view) => {
    const live = article.querySelector(".live");
    const [pale, colours] = [...article.querySelectorAll("svg image[id]")]
      .map((image) => image.getAttribute("href"));
    const photo = pale && { pale, colours };
    const panels = make("div", { class: "panels" });
    const said = make("p", { class: "muted", "aria-live": "polite" });
    let chosen = view.rows.length - 1;
    const buttons = view.caption.map(({ word, row, flagged }) => row === null
      ? make("span", {}, word)
      : make("button", { type: "button", class: flagged ? "flagged" : null, "data-row": row }, word));
    const show = () => {
      const row = view.rows[chosen];
      const methods = state.method === "all" ? data.methods.map((_, i) => i) : [state.method];
      panels.replaceChildren(...methods.map((method) => panelOf(view, row, method, photo)));
      panels.classList.toggle("one", methods.length === 1);
      panels.classList.toggle("wide", state.layout === "beside" && Boolean(photo));
      if (!buttons.length) return;
      said.textContent = row.said;
      for (const button of buttons) {
        if (button.dataset.row) {
          button.setAttribute("aria-pressed", String(Number(button.dataset.row) === chosen));
        }
      }
    };
    const clickable = buttons.filter((button) => button.dataset.row);
    for (const [i, button] of clickable.entries()) {
      const choose = () => { chosen = Number(button.dataset.row); show(); };
      button.addEventListener("click", choose);
      button.addEventListener("keydown", (event) => {
        const next = clickable[i + ({ ArrowLeft: -1, ArrowRight: 1 }[event.key] ?? NaN)];
        if (!next) return;
        event.preventDefault();
        next.focus();
        next.click();
      });
    }
    if (buttons.length) {
      chosen = view.caption.find(({ row }) => row !== null).row;
      const group = { class: "caption", role: "group", "aria-label": "Words of the caption" };
      live.append(make("p", { class: "muted" }, "Choose a word to see what it was written from."),
        make("div", group, ...buttons), said);
    }
    live.append(panels);
    live.hidden = false;
    article.querySelector(".still").hidden = true;
    show();
    return show;
  };

  // What one can choose, for all views at once.

  const redraws = [];
  const redraw = () => {
    document.getElementById("scale").textContent = data.scales[state.scale];
    redraws.forEach((show) => show());
  };
  const select = (label, key, options) => {
    const list = make("select", { name: key }, ...options.map(([value, text]) =>
      make("option", { value, selected: String(state[key]) === value }, text)));
    list.addEventListener("change", () => {
      state[key] = { method: (x) => (x === "all" ? x : Number(x)), cells: (x) => x === "true" }[key]
        ?.(list.value) ?? list.value;
      redraw();
    });
    return make("label", {}, label, list);
  };
  const controls = make("form", { class: "controls", "aria-label": "What the maps show" });
  if (many) {
    controls.append(select("Method", "method", [
      ...data.methods.map(({ name }, i) => [String(i), name]), ["all", "all, beside each other"]]));
  }
  const opacity = make("input", { type: "range", min: "0", max: "100", name: "opacity",
    value: String(100 * state.opacity) });
  opacity.addEventListener("input", () => { state.opacity = opacity.value / 100; redraw(); });
  controls.append(
    select("Map", "layout", [["over", "over the image"], ["beside", "beside the image"]]),
    make("label", {}, "Opacity", opacity),
    select("Detail", "cells", [["false", "smoothed"], ["true", "as measured"]]),
    select("Scale", "scale", [["own", "each its own"], ["common", "one for all"]]));
  if (signed) {
    controls.append(select("Sign", "sign",
      [["all", "for and against"], ["for", "for"], ["against", "against"]]));
  }
  controls.addEventListener("submit", (event) => event.preventDefault());

  if (!data.views.some((view) => view.rows.some((row) => row.panels.some((panel) => panel.map)))) {
    for (const label of controls.querySelectorAll("[name=layout], [name=opacity], [name=cells]")) {
      label.parentElement.remove();
    }
  }
  document.querySelector("header").after(controls);
  document.querySelectorAll("article.view").forEach((article, i) => {
    redraws.push(mount(article, data.views[i]));
  });

  // In a notebook, the frame is as high as its page.
  const fit = () => {
    try {
      if (window.frameElement) {
        window.frameElement.style.height = `${document.querySelector("main").offsetHeight + 24}px`;
      }
    } catch { /* a frame of another origin keeps its height */ }
  };
  new ResizeObserver(fit).observe(document.body);
})();
