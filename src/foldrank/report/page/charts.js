"use strict";
// Shows one view of each chart at a time, and what its legend has ticked.
for (const figure of document.querySelectorAll("figure.chart")) {
  const views = [...figure.querySelectorAll(".plot")];
  figure.querySelector("select")?.addEventListener("change", (event) => {
    views.forEach((view, number) => { view.hidden = number !== Number(event.target.value); });
  });
  views.forEach((view, number) => { view.hidden = number > 0; });
  for (const tick of figure.querySelectorAll(".legend input")) {
    tick.addEventListener("change", () => {
      tick.dataset.places.split(" ").forEach((place, number) => {
        for (const part of views[number].querySelectorAll(`[data-series="${place}"]`)) {
          part.style.display = tick.checked ? "" : "none";
        }
      });
    });
  }
  figure.querySelector(".controls").classList.add("live");
}
// Paper is white, and shows everything.
addEventListener("beforeprint", () => { document.documentElement.dataset.print = "yes"; });
addEventListener("afterprint", () => { delete document.documentElement.dataset.print; });
