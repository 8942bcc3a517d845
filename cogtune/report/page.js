"use strict";
for (const form of document.querySelectorAll("form.filter")) {
  const items = [...document.querySelectorAll(form.dataset.items)];
  const words = items.map((item) => item.textContent.toLowerCase());
  const [select, input, output] = ["select", "input", "output"].map((name) => form.querySelector(name));
  const apply = () => {
    const text = input.value.trim().toLowerCase();
    let shown = 0;
    items.forEach((item, place) => {
      const fits = !select.value || item.dataset.kinds.split(" ").includes(select.value);
      item.hidden = !(fits && words[place].includes(text));
      shown += !item.hidden;
    });
    output.textContent = shown === items.length ? "" : `${shown} of ${items.length}`;
  };
  form.addEventListener("input", apply);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
}
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const key = (row) => row.cells[column].dataset.key || row.cells[column].textContent;
      const rows = [...table.tBodies[0].rows];
      rows.sort((a, b) => (down ? -1 : 1) * key(a).localeCompare(key(b), undefined, { numeric: true }));
      table.tBodies[0].append(...rows);
    });
  });
}
for (const video of document.querySelectorAll(".strip video")) {
  video.controls = false; // they would hide half of a small picture: shown when it is pointed at
  video.tabIndex = 0;
  for (const event of ["pointerenter", "focus"]) video.addEventListener(event, () => (video.controls = true));
  for (const event of ["pointerleave", "blur"]) video.addEventListener(event, () => (video.controls = false));
}
for (const strip of document.querySelectorAll(".samples")) {
  const button = strip.querySelector("button");
  const videos = [...strip.querySelectorAll("video")];
  button.hidden = false;
  button.addEventListener("click", () => {
    const stop = videos.some((video) => !video.paused);
    button.textContent = stop ? "Play all" : "Pause all";
    for (const video of videos) {
      video.currentTime = stop ? video.currentTime : 0;
      stop ? video.pause() : video.play();
    }
  });
}
