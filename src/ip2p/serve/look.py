"""How the page looks and which keys it knows: a theme of system fonts, its style sheet, its script."""

from __future__ import annotations

import gradio as gr

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "Helvetica Neue", "Arial", "sans-serif")
MONO = ("ui-monospace", "SFMono-Regular", "Consolas", "Menlo", "monospace")


def theme() -> gr.themes.Base:
    """Fonts that every computer has: nothing is fetched, so that the page works offline."""
    return gr.themes.Base(primary_hue="blue", neutral_hue="slate", font=FONTS, font_mono=MONO)


CSS = """
.gradio-container { max-width: 1400px !important; margin: 0 auto !important; }
#title { padding: 2px 0; }
#title h1 { font-size: 1.25rem; margin: 0; display: inline; }
#title p { display: inline; margin-left: .75rem; color: var(--body-text-color-subdued); }
#status { min-height: 3.1rem; }
#status .said { margin: 0 0 .35rem; font-weight: 600; }
#status .wrong { color: #b91c1c; font-weight: 500; }
.dark #status .wrong { color: #fca5a5; }
#status progress { width: 100%; height: .5rem; accent-color: var(--primary-500); }
#templates { gap: .35rem; flex-wrap: wrap; }
#templates button { min-width: 0; flex: 0 0 auto; font-weight: 400; border-radius: 1rem; }
#run_row { gap: .5rem; }
#strip .grid-container, #examples .grid-container { grid-auto-rows: min-content; }
#facts { overflow-wrap: anywhere; color: var(--body-text-color-subdued); font-size: .85rem; }
:focus-visible { outline: 3px solid var(--primary-500) !important; outline-offset: 1px; }
@media (max-width: 640px) {
  .gradio-container { padding: 8px !important; }
  #title p { display: block; margin: 0; }
}
@media (prefers-reduced-motion: reduce) { * { animation: none !important; transition: none !important; } }
"""

# Escape stops from anywhere; the rest of the keyboard is the browser's own.
HEAD = """
<script>
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") document.querySelector("#stop")?.click();
});
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
