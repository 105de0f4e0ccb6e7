// The theme is the system's, until the button was pressed. This runs before the page is painted, so that nothing flashes.

const theme = {
  get dark() {
    const chosen = document.documentElement.dataset.theme;
    return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  },
  set dark(dark) {
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    try {
      localStorage.setItem("theme", document.documentElement.dataset.theme);
    } catch {
      // A browser that keeps nothing forgets the choice with the tab.
    }
  },
};

try {
  const chosen = localStorage.getItem("theme");
  if (chosen) document.documentElement.dataset.theme = chosen;
} catch {
  // As above.
}

addEventListener("DOMContentLoaded", () => {
  const button = document.querySelector("#theme");
  const show = () => button.setAttribute("aria-pressed", String(theme.dark));
  button.addEventListener("click", () => {
    theme.dark = !theme.dark;
    show();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
  show();
});
