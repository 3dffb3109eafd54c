"""How the page looks and which keys it knows: a theme of system fonts, its style sheet, its script."""

from __future__ import annotations

import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "Menlo", "monospace")


def theme() -> gr.themes.Base:
    """Fonts that every computer has: nothing is fetched, so that the page works offline."""
    # Gradio's grey for what stands beside a field is too pale to read: contrast 2.6, where 4.5 is asked for.
    quiet, quiet_dark = "*neutral_600", "*neutral_300"
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO).set(
        body_text_color_subdued=quiet,
        body_text_color_subdued_dark=quiet_dark,
        block_info_text_color=quiet,
        block_info_text_color_dark=quiet_dark,
        block_label_text_color=quiet,
        block_label_text_color_dark=quiet_dark,
        block_title_text_color="*neutral_700",
        block_title_text_color_dark="*neutral_200",
        button_primary_background_fill="*primary_600",
        button_primary_background_fill_hover="*primary_700",
        button_primary_background_fill_dark="*primary_600",
        button_large_text_size="*text_md",
    )


CSS = """
.gradio-container { max-width: 1400px !important; margin: 0 auto !important; }
#title { padding: 2px 0; }
#title h1 { font-size: 1.25rem; margin: 0; display: inline; }
#title p { display: inline; margin-left: .75rem; color: var(--body-text-color-subdued); }
#status { min-height: 3.1rem; }
#announced { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.grid-wrap { padding-top: 1.6rem; }
/* Columns of equal width, whatever their captions say: those would make the page wider than a phone. */
.gallery-container, .grid-wrap, .grid-container { min-width: 0; }
.grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
.thumbnail-item .caption-label { max-width: 100%; }
#status .said { margin: 0 0 .35rem; font-weight: 600; }
#status .wrong { color: #b91c1c; }
.dark #status .wrong { color: #fca5a5; }
#status progress { width: 100%; height: .5rem; accent-color: var(--primary-500); }
#templates { gap: .35rem; flex-wrap: wrap; }
#templates button { min-width: 0; flex: 0 0 auto; font-weight: 400; border-radius: 1rem; }
#run_row { gap: .5rem; }
#examples, #examples .grid-wrap { height: auto !important; }
#cells .grid-wrap { height: auto !important; max-height: none !important; }
#strip .grid-container, #examples .grid-container { grid-auto-rows: min-content; }
#facts { overflow-wrap: anywhere; color: var(--body-text-color-subdued); font-size: .85rem; }
:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 1px; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  #title p { display: block; margin: 0; }
  #candidates, #candidates .grid-wrap { height: auto !important; }
  #candidates .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
  #strip .grid-container { grid-template-columns: repeat(4, minmax(0, 1fr)) !important; }
  #strip, #strip .grid-wrap { height: auto !important; }
  #run_row button { white-space: nowrap; padding-inline: .5rem; }
  #again { flex: 2 1 auto; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""

# What Gradio's page lacks for a keyboard and a screen reader. Escape stops from anywhere; the comparison's
# handle moves with the arrows; pictures to choose from are called what stands below them; what the status
# says is read out, but not every step of its bar.
HEAD = """
<meta name="color-scheme" content="light dark">
<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector("#stop")?.click();
});
// On a phone the results stand below all fields.
document.addEventListener("click", (event) => {
  if (event.target.closest?.("#run, #surprise") && matchMedia("(max-width: 640px)").matches)
    document.querySelector("#status")?.scrollIntoView();
});
(() => {
  const set = (node, name, value) => {
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  };
  const drag = (handle, share) => {
    const picture = document.querySelector("#compare img").getBoundingClientRect();
    const own = handle.getBoundingClientRect(), x = own.x + own.width / 2, y = own.y + own.height / 2;
    const to = Math.min(picture.right, Math.max(picture.left, x + share * picture.width));
    const mouse = (kind, at, target) => target.dispatchEvent(
      new MouseEvent(kind, {clientX: at, clientY: y, view: window, bubbles: true, cancelable: true}));
    mouse("mousedown", x, handle); mouse("mousemove", to, window); mouse("mouseup", to, window);
    set(handle, "aria-valuenow", String(Math.round(100 * (to - picture.left) / picture.width)));
  };
  const mend = () => {
    for (const button of document.querySelectorAll("button.thumbnail-item")) {
      const words = button.querySelector("img")?.alt;
      if (words) set(button, "aria-label", words);
    }
    const handle = document.querySelector("#compare [data-testid=slider]");
    if (handle && handle.tabIndex !== 0) {
      handle.tabIndex = 0;
      for (const [name, value] of [["role", "slider"], ["aria-label", "Before and after"],
        ["aria-valuemin", "0"], ["aria-valuemax", "100"], ["aria-valuenow", "50"]]) set(handle, name, value);
      handle.addEventListener("keydown", (event) => {
        const share = {ArrowLeft: -0.05, ArrowRight: 0.05, Home: -1, End: 1}[event.key];
        if (share) { event.preventDefault(); drag(handle, share); }
      });
    }
    const zoom = document.querySelector("#compare button[aria-label=Undo]");
    if (zoom) { set(zoom, "aria-label", "Reset the zoom"); set(zoom, "title", "Reset the zoom"); }
    const said = document.querySelector("#status .said"), live = document.querySelector("#announced");
    if (said && live) {
      const words = document.querySelector("#status progress") ? "Working" : said.innerText;
      if (live.textContent !== words) live.textContent = words;
    }
  };
  const start = () => {
    const live = document.createElement("div");
    live.id = "announced"; live.setAttribute("role", "status"); document.body.append(live);
    let waits = false;
    new MutationObserver(() => {
      if (!waits) { waits = true; setTimeout(() => { waits = false; mend(); }, 50); }
    }).observe(document.body, {childList: true, subtree: true, attributes: true, attributeFilter: ["alt"]});
    mend();
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", start); else start();
})();
</script>
"""

# Puts a template into the instruction with its first gap marked, ready to be typed over.
TEMPLATE_JS = """
() => {
  const text = %s;
  setTimeout(() => {
    const box = document.querySelector("#instruction textarea, #instruction input");
    if (!box) return;
    box.focus();
    const gap = text.indexOf("…");
    if (gap >= 0) box.setSelectionRange(gap, gap + 1);
  }, 60);
  return text;
}
"""
