// Show the ledger's entries by verdict; does nothing on pages that have no filter.
addEventListener("DOMContentLoaded", () => {
  const buttons = [...document.querySelectorAll(".ledger-filter button")];
  if (!buttons.length) return;
  const entries = [...document.querySelectorAll(".ledger-entry")];
  const count = document.querySelector(".ledger-count");
  const pressed = (button) => button.getAttribute("aria-pressed") === "true";
  const show = () => {
    const wanted = buttons.filter(pressed).map((button) => "ledger-" + button.value);
    for (const entry of entries)
      entry.hidden = wanted.length > 0 && !wanted.some((name) => entry.classList.contains(name));
    count.textContent = `${entries.filter((e) => !e.hidden).length} of ${entries.length} entries`;
  };
  for (const button of buttons)
    button.addEventListener("click", () => {
      button.setAttribute("aria-pressed", String(!pressed(button)));
      show();
    });
  // an entry that a link points to must be visible
  addEventListener("hashchange", () => {
    for (const button of buttons) button.setAttribute("aria-pressed", "false");
    show();
    document.getElementById(location.hash.slice(1))?.scrollIntoView();
  });
  show();
});
