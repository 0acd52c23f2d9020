(function () {
  "use strict";
  const data = JSON.parse(document.getElementById("report-data").textContent);

  // Figures follow the reader's colour scheme.
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  function paint() {
    if (!window.Plotly) return;
    const style = getComputedStyle(document.documentElement);
    const colour = (name) => style.getPropertyValue(name).trim();
    for (const figure of document.querySelectorAll(".plotly-graph-div")) {
      const layout = {
        "font.color": colour("--ink"), "hoverlabel.bgcolor": colour("--panel"),
        "hoverlabel.bordercolor": colour("--rule"), "hoverlabel.font.color": colour("--ink"),
        "modebar.color": colour("--rule"), "modebar.activecolor": colour("--quiet"), "modebar.bgcolor": "rgba(0,0,0,0)",
      };
      for (const axis of ["xaxis", "yaxis"]) layout[axis + ".gridcolor"] = colour("--grid");
      const maps = figure.data.flatMap((trace, index) => (trace.type === "heatmap" ? [index] : []));
      const traces = maps.length ? { colorscale: [data.diverging[dark.matches ? "dark" : "light"]] } : {};
      Plotly.update(figure, traces, layout, maps.length ? maps : undefined);
    }
  }
  paint();
  dark.addEventListener("change", paint);

  // Choose a head, see the prompts that move it most. Texts are read from the table, so they are in the file once.
  const picker = document.getElementById("picker");
  const arrays = data.arrays.filter((array) => array.prompts.some((found) => found.length));
  let show = function () {};
  if (picker && arrays.length) {
    const chosenArray = document.getElementById("picker-array");
    const chosenHead = document.getElementById("picker-head");
    const result = document.getElementById("picker-result");
    const element = (tag, className, text) => {
      const made = document.createElement(tag);
      if (className) made.className = className;
      if (text !== undefined) made.textContent = text;
      return made;
    };
    const format = (value) => (Math.abs(value) >= 0.001 && Math.abs(value) < 1e5 ? value.toFixed(3) : value.toExponential(2));
    const list = (title, side, found, units) => {
      const box = element("div", side);
      box.append(element("h3", "", title));
      if (!found.length) {
        box.append(element("p", "note", "No prompt on this page."));
        return box;
      }
      const table = element("table"), body = element("tbody");
      for (const [row, value] of found) {
        const line = element("tr"), source = document.getElementById("prompt-" + row);
        const link = element("a", "", source.cells[0].textContent);
        link.href = "#prompt-" + row;
        const number = element("td", "row index");
        number.append(link);
        const text = element("td", "prompt"), from = source.querySelector("td.prompt");
        text.append(element("span", "", from ? from.textContent : "(no text)"));
        line.append(element("td", "num", format(value) + (units ? " " + units : "")), number, text);
        body.append(line);
      }
      table.append(body);
      box.append(table);
      return box;
    };
    const draw = () => {
      const array = arrays[chosenArray.value], found = array.prompts[chosenHead.value] || [];
      result.replaceChildren(
        list("Most positive effect of " + array.labels[chosenHead.value], "positive", found.filter((f) => f[1] > 0), array.units),
        list("Most negative effect", "negative", found.filter((f) => f[1] < 0).reverse(), array.units));
    };
    const fill = (head) => {
      const array = arrays[chosenArray.value];
      chosenHead.replaceChildren(...array.labels.map((label, index) => new Option(label, index)));
      const at = array.labels.indexOf(head);
      chosenHead.value = at < 0 ? array.strongest : at;
      draw();
    };
    show = (name, head) => {
      const at = arrays.findIndex((array) => array.name === name);
      if (at < 0) return;
      chosenArray.value = at;
      fill(head);
      picker.scrollIntoView({ block: "nearest" });
    };
    chosenArray.replaceChildren(...arrays.map((array, index) => new Option(array.title, index)));
    chosenArray.addEventListener("change", () => fill(arrays[chosenArray.value].labels[chosenHead.value]));
    chosenHead.addEventListener("change", draw);
    picker.hidden = false;
    fill();
  }
  for (const section of document.querySelectorAll("section[data-array]")) {
    const name = section.dataset.array, figure = section.querySelector(".plotly-graph-div");
    for (const button of section.querySelectorAll("button.head"))
      button.addEventListener("click", () => show(name, button.dataset.head));
    if (figure && figure.on) figure.on("plotly_click", (event) => show(name, event.points[0].customdata));
  }

  // A click on a heading sorts the prompts by it, a second one the other way round; cells without a value stay last.
  const table = document.getElementById("prompt-table");
  if (table) {
    const headings = [...table.tHead.rows[0].cells];
    headings.forEach((heading, column) => heading.firstChild.addEventListener("click", () => {
      const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
      const key = (row) => {
        const cell = row.cells[column];
        if (cell.classList.contains("missing")) return null;
        return cell.dataset.value === undefined ? cell.textContent : Number(cell.dataset.value);
      };
      const compare = (a, b) => {
        const x = key(a), y = key(b);
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (typeof x === "number" ? x - y : x.localeCompare(y, undefined, { numeric: true }));
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
    }));
  }
})();
