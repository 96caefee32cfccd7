// Search, theme, keys and links into folded parts; without this script the page still reads and unfolds.
(() => {
  for (const page of document.querySelectorAll(".reattend:not([data-live])")) {
    page.dataset.live = "";
    const all = (selector) => [...page.querySelectorAll(selector)];
    const search = page.querySelector("[data-search]");
    const empty = page.querySelector("[data-empty]");

    const find = () => {
      const wanted = search.value.trim().toLowerCase();
      let found = 0;
      for (const place of all("[data-site]")) {
        const hit = place.dataset.site.toLowerCase().includes(wanted) || place.textContent.toLowerCase().includes(wanted);
        place.hidden = wanted !== "" && !hit;
        found += !place.hidden;
      }
      if (empty) empty.hidden = found > 0;
    };
    search.addEventListener("input", find);

    const isDark = () => {
      const set = page.dataset.theme;
      return set ? set === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    };
    page.querySelector("[data-theme-button]").addEventListener("click", () => {
      page.dataset.theme = isDark() ? "light" : "dark";
    });

    const open = (target) => {
      for (let at = target; at && at !== page; at = at.parentElement) {
        if (at.tagName === "DETAILS") at.open = true;
      }
      target.scrollIntoView({ block: "start" });
      (target.querySelector("summary") ?? target).focus({ preventScroll: true });
    };
    page.addEventListener("click", (event) => {
      const link = event.target.closest('a[href^="#"]');
      if (!link) return;
      const target = all("[id]").find((place) => `#${place.id}` === link.getAttribute("href"));
      if (!target) return;
      event.preventDefault();
      open(target);
    });

    // "/" searches, Escape leaves, j and k go through what can be unfolded
    page.tabIndex = -1;
    const keys = (event) => {
      if (event.target.closest?.("input, textarea, [contenteditable]")) {
        if (event.key === "Escape" && event.target === search) {
          search.value = "";
          find();
          search.blur();
        }
        return;
      }
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      const step = { j: 1, k: -1 }[event.key];
      if (event.key === "/") {
        event.preventDefault();
        search.focus();
      } else if (step) {
        const stops = all("summary").filter((s) => s.checkVisibility());
        const at = stops.indexOf(document.activeElement);
        stops[Math.min(Math.max(at + step, 0), stops.length - 1)]?.focus();
      }
    };
    // in a page of its own the keys work everywhere, in a notebook only inside the report
    const alone = page.parentElement === document.body && document.querySelectorAll(".reattend").length === 1;
    (alone ? document : page).addEventListener("keydown", keys);
    if (alone && location.hash) {
      const target = document.getElementById(location.hash.slice(1));
      if (target) open(target);
    }
  }
})();
