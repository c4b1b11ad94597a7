"use strict";
// Fetches a page that shows the present again, and puts what is new in place of what was. Not while somebody types, reads a menu or is away.
(() => {
  const shown = () => document.querySelector("main[data-refresh]");
  if (!shown()) return;
  const busy = () => document.hidden || document.querySelector("main details[open]") || shown().contains(document.activeElement) ||
    String(getSelection());
  const turn = async () => {
    if (busy()) return;
    try {
      const answer = await fetch(location.href, { headers: { Accept: "text/html" } });
      if (answer.redirected) return location.reload();
      const found = new DOMParser().parseFromString(await answer.text(), "text/html").querySelector("main");
      if (found && !busy()) shown().replaceWith(document.adoptNode(found));
      if (!shown()) clearInterval(timer);
    } catch { /* it is asked again */ }
  };
  const timer = setInterval(turn, 1000 * Number(shown().dataset.refresh));
})();
