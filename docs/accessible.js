// What the theme leaves out. It puts each copy button into a landmark without a name, so that a page with two code
// blocks has two alike; and code and tables that are wider than the page cannot be scrolled with the keyboard.
new MutationObserver(() => {
  for (const nav of document.querySelectorAll("nav.md-code__nav:not([role])")) nav.setAttribute("role", "presentation");
  for (const wide of document.querySelectorAll("pre > code, .md-typeset__scrollwrap")) {
    if (wide.tabIndex !== 0) wide.tabIndex = 0;
  }
}).observe(document.documentElement, { childList: true, subtree: true });
