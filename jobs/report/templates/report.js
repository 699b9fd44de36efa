// The page's own script. Everything up to "the page" is pure: tests run it without a page.

// A box: {image: SQL of its image, index, kind: SQL of its class, states: [...], cells: [...]}, as tile_facts.py
// writes it. `wanted`: {kind, state, score, low, high}; what is "" or null there is not asked for.

/** True when a box is wanted. Scores are float32 in the tables: a bound is one too, as it is for DuckDB. */
function matches(box, wanted, columns) {
  if (wanted.kind && box.kind !== wanted.kind) return false;
  if (wanted.state && !box.states.includes(wanted.state)) return false;
  if (wanted.low === null && wanted.high === null) return true;
  const value = box.cells[columns.indexOf(wanted.score)];
  if (value === null) return false;
  const score = Math.fround(value);
  return (wanted.low === null || score >= Math.fround(wanted.low))
    && (wanted.high === null || score <= Math.fround(wanted.high));
}

/** A bound as a number that SQL reads as a decimal, never as a double; null when there is none. */
function boundOf(text) {
  const bound = Number.parseFloat(text);
  return Number.isFinite(bound) ? Number(bound.toFixed(6)) : null;
}

/** What a box is known by, in whichever tile it stands. */
function nameOf(box) {
  return `${box.image} AND instance_index = ${box.index}`;
}

/** The SQL of all rows of the tables that are wanted; "" when every row is. */
function whereOfFilter(wanted, stateWhere) {
  const parts = [wanted.kind, stateWhere];
  if (wanted.low !== null) parts.push(`${wanted.score} >= ${decimal(wanted.low)}`);
  if (wanted.high !== null) parts.push(`${wanted.score} <= ${decimal(wanted.high)}`);
  return parts.filter(Boolean).join(" AND ");
}

function decimal(bound) {
  return bound.toFixed(6).replace(/\.?0+$/, "");
}

/** The SQL of exactly these boxes, image by image. */
function whereOfBoxes(boxes) {
  const images = new Map();
  for (const box of boxes) images.set(box.image, [...(images.get(box.image) ?? []), box.index]);
  const parts = [...images].map(([image, indexes]) => indexes.length === 1
    ? `${image} AND instance_index = ${indexes[0]}`
    : `${image} AND instance_index IN (${indexes.sort((a, b) => a - b).join(", ")})`);
  return parts.length === 1 ? parts[0] : parts.map((part) => `(${part})`).join(" OR ");
}

/** A text as one word of a shell: in double quotes where nothing in it means anything there. */
function shellQuoted(text) {
  return /["$`\\!]/.test(text) ? `'${text.replaceAll("'", `'"'"'`)}'` : `"${text}"`;
}

/** A table as RFC 4180 has it. A text that a spreadsheet would compute gets an apostrophe before it. */
function csvOf(columns, boxes) {
  return [columns, ...boxes.map((box) => box.cells)]
    .map((cells) => cells.map(cellOf).join(",") + "\r\n").join("");
}

function cellOf(value) {
  if (value === null) return "";
  if (typeof value !== "string") return String(value);
  const computed = /^([\t\r\n]|[\s\uFEFF]*[=+\-@\uFF1D\uFF0B\uFF0D\uFF20])/.test(value);
  const text = computed ? `'${value}` : value;
  return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

function boxesOf(number) {
  return `${number.toLocaleString("en")} ${number === 1 ? "box" : "boxes"}`;
}

// the page

function begin() {
  const dialog = document.querySelector("dialog");
  document.addEventListener("click", (event) => {
    const pair = event.target.closest("figure .pair"), copy = event.target.closest(".copy");
    if (pair) {
      dialog.querySelector("p").textContent = pair.dataset.caption;
      dialog.querySelector(".pair").replaceChildren(...[...pair.children].map((image) => image.cloneNode()));
      dialog.showModal();
    } else if (copy) {
      copied(copy);
    } else if (event.target === dialog || event.target.closest(".close")) {
      dialog.close();
    }
  });
  const boxes = document.querySelector("#boxes");
  if (boxes) beginChoosing(boxes);
}

function copied(button) {
  if (button.dataset.said === undefined) button.dataset.said = button.textContent;
  const say = (text) => {
    button.textContent = text;
    setTimeout(() => { button.textContent = button.dataset.said; }, 1200);
  };
  const done = navigator.clipboard?.writeText(button.dataset.text) ?? Promise.reject();
  done.then(() => say("copied"), () => say("not allowed"));
}

// What is picked outlives a reload of this tab. A browser that stores nothing for files says so by throwing.
const KEPT = `hqlabel picked ${typeof location === "undefined" ? "" : location.pathname}`;

function keptNames() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
  } catch {
    return [];
  }
}

function keepNames(names) {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(names));
  } catch {
    // Then they are gone with the page.
  }
}

function beginChoosing(region) {
  const form = region.querySelector("#filter"), tray = region.querySelector("#picked");
  const columns = form.dataset.columns.split(" ");
  const tiles = [...region.querySelectorAll("figure[data-boxes]")].map((figure) => ({
    figure, boxes: JSON.parse(figure.dataset.boxes), mark: figure.querySelector(".pick input"),
  }));
  const picked = new Map();
  let shown = new Map();
  const pick = (boxes) => { for (const box of boxes) picked.set(nameOf(box), box); };
  const known = new Map(tiles.flatMap((tile) => tile.boxes).map((box) => [nameOf(box), box]));
  pick(keptNames().filter((name) => known.has(name)).map((name) => known.get(name)));
  const drop = (boxes) => { for (const box of boxes) picked.delete(nameOf(box)); };

  function filter() {
    const state = form.elements.state.selectedOptions[0];
    const wanted = {
      kind: form.elements.kind.value, state: state.value, score: form.elements.score.value,
      low: boundOf(form.elements.low.value), high: boundOf(form.elements.high.value),
    };
    shown = new Map(tiles.flatMap((tile) => tile.boxes)
      .filter((box) => matches(box, wanted, columns)).map((box) => [nameOf(box), box]));
    const fits = (tile) => tile.boxes.some((box) => shown.has(nameOf(box)));
    for (const tile of tiles) {
      const pair = tile.figure.closest(".together");
      tile.figure.hidden = !(pair ? tiles.some((one) => pair.contains(one.figure) && fits(one)) : fits(tile));
    }
    for (const part of region.querySelectorAll(".part")) {
      part.hidden = !part.querySelector("figure:not([hidden])");
    }
    form.querySelector("output").textContent = `${boxesOf(shown.size)} here`;
    region.querySelector(".nothing").hidden = shown.size > 0;
    const where = whereOfFilter(wanted, state.dataset.where ?? "");
    const copy = form.querySelector(".copy");
    copy.disabled = !where;
    copy.dataset.text = `--where ${shellQuoted(where)}`;
    region.dataset.view = form.elements.view.value;
  }

  function show() {
    for (const tile of tiles) {
      const number = tile.boxes.filter((box) => picked.has(nameOf(box))).length;
      tile.mark.checked = number === tile.boxes.length;
      tile.mark.indeterminate = number > 0 && !tile.mark.checked;
      tile.figure.classList.toggle("picked", tile.mark.checked);
    }
    keepNames([...picked.keys()]);
    const boxes = [...picked.values()], images = new Set(boxes.map((box) => box.image)).size;
    const text = boxes.length ? `--where ${shellQuoted(whereOfBoxes(boxes))}` : "";
    tray.hidden = boxes.length === 0;
    tray.querySelector("output").textContent =
      `${boxesOf(boxes.length)} of ${images} ${images === 1 ? "image" : "images"} picked`;
    tray.querySelector(".copy").dataset.text = text;
    const command = tray.querySelector("textarea");
    command.value = `${command.dataset.command} ${text}`;
  }

  function save() {
    const link = document.createElement("a");
    const table = new Blob([csvOf(columns, [...picked.values()])], { type: "text/csv;charset=utf-8" });
    link.href = URL.createObjectURL(table);
    link.download = "picked.csv";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  form.addEventListener("submit", (event) => event.preventDefault());
  region.addEventListener("change", (event) => {
    const tile = tiles.find((one) => one.mark === event.target);
    if (!tile) return;
    (event.target.checked ? pick : drop)(tile.boxes);
    show();
  });
  region.addEventListener("click", (event) => {
    const does = event.target.closest("[data-does]")?.dataset.does;
    if (does === "pick") pick(shown.values());
    if (does === "clear") picked.clear();
    if (does === "save") save();
    if (does) show();
  });
  form.hidden = false;
  region.classList.add("choosing");
  filter();
  show();
}

if (typeof document !== "undefined") begin();
