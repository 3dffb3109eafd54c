"""The page of `ip2p ui`: its fields, and which action each of them starts.

What the actions do is in `ip2p.serve.actions`; how the page looks in `ip2p.serve.look`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import ipaddress
import json
import os
import typing
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from anyio import to_thread
from starlette.routing import Mount

from ip2p.serve.session import AGE, Session, cache

# Gradio reads both when it is imported or makes a component.
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ["GRADIO_TEMP_DIR"] = str(cache())

import gradio as gr

from ip2p import settings as config
from ip2p.base.errors import Ip2pError
from ip2p.editing import advice
from ip2p.serve import look
from ip2p.serve.actions import Actions, Values, complain, say, worded
from ip2p.serve.gate import Gate, Page
from ip2p.serve.run import Controls

if TYPE_CHECKING:
    from fastapi import FastAPI
    from gradio.components import Component

    from ip2p.serve.service import Service

REGIONS = [
    ("everywhere", "everywhere"),
    ("where I paint", "painted"),
    ("where a mask file is white", "file"),
    ("where the model finds it", "found"),
]
CONTROLS = tuple(field.name for field in dataclasses.fields(Controls))
RESULTS = ("candidates", "compare", "region_found", "facts", "go_on", "download")
STATE = ("session", "status", "picture", "editor", "strip", "undo", "redo", "again", "take", *RESULTS)
WAITING = 200  # events that Gradio holds before it begins them
# What every event of the page has in common. The service has limits of its own and says what waits.
EVENT: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": None, "api_visibility": "private"}

Client = Callable[[gr.Request], str]


def build_page(service: Service, *, client: Client | None = None, examples: bool = True) -> gr.Blocks:
    """The page over a service; `mount` puts it into an application.

    client: names who asks, for the service's fairness; by default the address, on loopback the browser.
    examples: draw pages of the storybook to begin with.
    """
    return _Builder(service, client or caller).build(examples)


def caller(request: gr.Request) -> str:
    """The address that asks; where all come from this machine, the browser's session."""
    host = request.client.host if request.client else ""
    try:
        local = ipaddress.ip_address(host).is_loopback
    except ValueError:
        local = True
    return f"page {request.session_hash}" if local else host


class _Builder:
    def __init__(self, service: Service, client: Client) -> None:
        self.service, self.client = service, client
        self.actions = Actions(service)
        self.fields: dict[str, Any] = {}
        self.templates: list[tuple[gr.Button, str]] = []

    def build(self, examples: bool) -> gr.Blocks:
        with Page(title="ip2p", analytics_enabled=False, delete_cache=(600, AGE)) as page:
            page.pixels = self.service.limits.pixels
            self.fields["session"] = gr.State(Session(), delete_callback=Session.close)
            gr.HTML("<h1>ip2p</h1><p>Edit a picture by saying what to change.</p>", elem_id="title")
            with gr.Row():
                with gr.Column(scale=4, min_width=300):
                    self._ask(examples)
                with gr.Column(scale=6, min_width=300):
                    self._answer()
            self._wire()
            self._api()
        page.queue(default_concurrency_limit=None, max_size=WAITING)
        return page

    # --- fields -----------------------------------------------------------------------------------

    def _add(self, name: str, kind: type[Component], label: str, **options: Any) -> Component:
        """A field, with the advice that belongs to it below its label."""
        if name in advice.BESIDE and "info" in inspect.signature(kind).parameters:
            options["info"] = advice.BESIDE[name]
        self.fields[name] = made = kind(label=label, elem_id=name, **options)
        return made

    def _button(self, name: str, words: str, **options: Any) -> None:
        kind = options.pop("kind", gr.Button)
        self.fields[name] = kind(words, elem_id=name, **options)

    def _ask(self, examples: bool) -> None:
        limits = self.service.limits
        own = self.actions.own(None)
        self._add(
            *("picture", gr.Image, "Picture"),
            type="filepath",
            image_mode=None,
            sources=["upload", "clipboard"],
            height=300,
            buttons=["fullscreen"],
            placeholder="Drop a picture here, paste one, or click to choose",
        )
        self._button("take", "Use its settings", size="sm", visible=False)
        self._add(
            *("instruction", gr.Textbox, "Instruction"),
            value="",
            placeholder="make it night",
            max_length=limits.words,
            lines=1,
        )
        with gr.Row(elem_id="run_row"):
            self._button("run", "Edit", variant="primary", min_width=90)
            self._button("stop", "Stop", variant="stop", min_width=70)
            self._button("surprise", "Surprise me", min_width=110)
        with gr.Row(elem_id="templates"):
            for template, _ in advice.templates():
                self.templates.append((gr.Button(template, size="sm"), template))
        self.examples = self.actions.examples() if examples else []
        if self.examples:
            self._add(
                *("examples", gr.Gallery, "Examples: click one"),
                value=[(str(file), instruction) for file, instruction in self.examples],
                columns=3,
                fit_columns=False,
                height=170,
                allow_preview=False,
                interactive=False,
                buttons=[],
            )
        with gr.Accordion("How much", open=True):
            with gr.Row():
                for name, label in (("text_cfg", "Text CFG"), ("image_cfg", "Image CFG")):
                    self._add(
                        name, gr.Number, label, value=own[name], minimum=0, maximum=config.MAX_SCALE, step=0.1
                    )
            self._add(
                "count",
                gr.Slider,
                "Candidates",
                minimum=1,
                maximum=limits.count,
                step=1,
                value=min(4, limits.count),
            )
        with gr.Accordion("Where", open=False):
            self._add("region", gr.Radio, "Edit", choices=REGIONS, value="everywhere")
            # The columns are hidden and shown, not the fields: at each such update Gradio makes a new field
            # for that browser, whose files it does not delete by age.
            with gr.Column(visible=False) as painted:
                self._add(
                    *("editor", gr.ImageEditor, "Paint the region"),
                    type="pil",
                    sources=(),
                    transforms=(),
                    layers=False,
                    brush=gr.Brush(default_size=24, colors=["#ff3b30b0"], color_mode="fixed"),
                    eraser=gr.Eraser(default_size=24),
                    buttons=[],
                    height=340,
                )
            with gr.Column(visible=False) as file:
                self._add(
                    *("mask", gr.Image, "Mask: white is edited"),
                    type="filepath",
                    image_mode=None,
                    sources=["upload", "clipboard"],
                    height=200,
                )
            with gr.Column(visible=False) as found:
                self._add(
                    "auto_mask",
                    gr.Slider,
                    "Threshold",
                    minimum=0,
                    maximum=1,
                    step=0.05,
                    value=config.AUTO_MASK,
                )
            self.regions = {"painted": painted, "file": file, "found": found}
        with gr.Accordion("More settings", open=False):
            self._add("negative", gr.Textbox, "Negative prompt", value="", max_length=limits.words)
            with gr.Row():
                self._add(
                    "steps",
                    gr.Slider,
                    "Steps",
                    minimum=1,
                    maximum=limits.steps,
                    step=1,
                    value=own["steps"],
                )
                self._add("seed", gr.Number, "Seed", value=-1, minimum=-1, precision=0)
            with gr.Row():
                self._add(
                    "sampler",
                    gr.Dropdown,
                    "Sampler",
                    choices=list(typing.get_args(config.SamplerName)),
                    value=own["sampler"],
                )
                self._add(
                    "spacing",
                    gr.Dropdown,
                    "Noise levels",
                    choices=list(typing.get_args(config.ScheduleName)),
                    value=own["spacing"],
                )
            with gr.Row():
                self._add("size", gr.Textbox, "Size", value="", placeholder="the model's own")
                self._add(
                    "model",
                    gr.Dropdown,
                    "Model",
                    choices=list(self.service.models),
                    value=self.service.models[0],
                )
            self._button(
                *("settings_file", "Settings from an edited file"),
                kind=gr.UploadButton,
                file_types=[".png", ".jpg", ".jpeg", ".webp"],
                size="sm",
            )

    def _answer(self) -> None:
        self.fields["status"] = gr.HTML(say("Drop a picture to begin."), elem_id="status")
        with gr.Tabs():
            with gr.Tab("Results", id="results"):
                self._add(
                    *("candidates", gr.Gallery, "Candidates: click one to compare it"),
                    columns=4,
                    fit_columns=False,
                    height=210,
                    allow_preview=False,
                    interactive=False,
                    object_fit="contain",
                    buttons=[],
                )
                self._add(
                    "compare",
                    gr.ImageSlider,
                    "Before and after",
                    type="filepath",
                    interactive=False,
                    buttons=["fullscreen"],
                    max_height=520,
                )
                self.fields["facts"] = gr.HTML(elem_id="facts")
                with gr.Row():
                    self._button("go_on", "Continue from it", variant="primary", interactive=False)
                    self._button("download", "Download", kind=gr.DownloadButton, interactive=False)
                self._add(
                    "region_found",
                    gr.Image,
                    "Where it was edited (white)",
                    interactive=False,
                    visible=False,
                    height=200,
                    buttons=[],
                )
            with gr.Tab("CFG matrix", id="matrix"):
                self._matrix()
            with gr.Tab("Batch", id="batch"):
                self._batch()
            with gr.Tab("Advice", id="advice"):
                gr.Markdown(advice.TEXT)
        self._add(
            *("strip", gr.Gallery, "History: click a step to go on from there"),
            columns=6,
            fit_columns=False,
            height=170,
            allow_preview=False,
            interactive=False,
            buttons=[],
        )
        with gr.Row():
            self._button("undo", "Undo", size="sm", interactive=False, min_width=70)
            self._button("redo", "Redo", size="sm", interactive=False, min_width=70)
            self._button("again", "Run this step again", size="sm", interactive=False, min_width=120)

    def _matrix(self) -> None:
        gr.Markdown(
            "One edit for each pair of scales, with the picture, instruction and settings on the left."
        )
        values = self.actions.axes(None)
        with gr.Row():
            for name, label in (("columns", "Columns: text CFG"), ("rows", "Rows: image CFG")):
                self._add(name, gr.Textbox, label, value=values[name], max_length=200)
        with gr.Row():
            self._button("draw", "Draw the matrix", variant="primary")
            self._button("sheet", "Download as one picture", kind=gr.DownloadButton, interactive=False)
        self._add(
            *("cells", gr.Gallery, "Matrix: click a cell to take its settings over"),
            columns=4,
            fit_columns=False,
            height="auto",
            allow_preview=False,
            interactive=False,
            buttons=[],
        )

    def _batch(self) -> None:
        gr.Markdown("One instruction for many pictures, with the settings on the left.")
        self._add("files", gr.File, "Pictures", file_count="multiple", type="filepath", height=200)
        with gr.Row():
            self._button("edit_all", "Edit all", variant="primary")
            self._button("zip", "Download the zip", kind=gr.DownloadButton, interactive=False)
        self.fields["errors"] = gr.HTML(elem_id="errors")

    # --- events -----------------------------------------------------------------------------------

    def _wire(self) -> None:
        on, fields, actions = self._on, self.fields, self.actions
        on(fields["picture"].upload, actions.open, inputs=("picture",), outputs=STATE)
        on(fields["picture"].clear, lambda session: actions.open(session, None), outputs=STATE)
        on(fields["go_on"].click, actions.go_on, outputs=(*STATE, "instruction"))
        on(fields["undo"].click, actions.undo, outputs=STATE)
        on(fields["redo"].click, actions.redo, outputs=STATE)
        self._on_select("candidates", actions.choose, outputs=RESULTS)
        self._on_select("strip", actions.go, outputs=STATE)
        if self.examples:
            self._on_select(
                *("examples", lambda session, number: actions.example(session, *self.examples[number])),
                outputs=(*STATE, "instruction"),
            )
        on(fields["take"].click, actions.take, outputs=("status", *CONTROLS))
        on(
            fields["settings_file"].upload,
            lambda session, path: actions.take_from(path),
            inputs=("settings_file",),
            outputs=("status", *CONTROLS),
        )
        on(fields["stop"].click, actions.stop, outputs=("status",))
        on(
            fields["model"].input,  # by hand: what takes settings over brings these itself
            lambda session, model: actions.own(model),
            inputs=("model",),
            outputs=("text_cfg", "image_cfg", "steps", "sampler", "spacing"),
        )
        self._on_select("cells", actions.cell, outputs=("text_cfg", "image_cfg", "seed"))
        on(
            fields["model"].change,
            lambda session, model: actions.axes(model),
            inputs=("model",),
            outputs=("columns", "rows"),
        )
        for name, action, more, outputs in (
            ("draw", actions.matrix, ("columns", "rows"), ("cells", "sheet")),
            ("edit_all", actions.batch, ("files",), ("errors", "zip")),
        ):
            fields[name].click(
                self._edit(action, len(more)),
                [fields["session"], *self._controls(), *self._some(more)],
                self._some(("session", "status", *outputs)),
                **EVENT,
            )
        edit = self._edit(actions.edit)
        gr.on(
            [fields["run"].click, fields["instruction"].submit],
            edit,
            [fields["session"], *self._controls()],
            self._some(STATE),
            **EVENT,
        )
        again = self._on(fields["again"].click, actions.again, outputs=(*STATE, *CONTROLS))
        again.success(edit, [fields["session"], *self._controls()], self._some(STATE), **EVENT)
        surprise = on(
            fields["surprise"].click,
            lambda session, model: actions.surprise(model),
            inputs=("model",),
            outputs=("text_cfg", "image_cfg", "seed", "status"),
        )
        surprise.success(edit, [fields["session"], *self._controls()], self._some(STATE), **EVENT)
        fields["region"].change(
            lambda region: [gr.update(visible=region == name) for name in self.regions],
            fields["region"],
            list(self.regions.values()),
            **EVENT,
        )
        for button, template in self.templates:
            button.click(
                None, None, fields["instruction"], js=look.TEMPLATE_JS % json.dumps(template), **EVENT
            )

    def _api(self) -> None:
        """The same actions for programs (gradio_client): named, without a browser's history."""
        files, told, trigger = gr.File(visible=False), gr.JSON(visible=False), gr.Button(visible=False)
        public = EVENT | {"api_visibility": "public"}
        controls = [name for name in CONTROLS if name != "painted"]

        def read(values: Sequence[Any]) -> Controls:
            return Controls(**dict(zip(controls, values, strict=True)))

        async def edit(request: gr.Request, picture: str | None, *values: Any) -> tuple[list[str], list[Any]]:
            with told_outside():
                return await self.actions.edit_once(picture, read(values), self.client(request))

        async def batch(
            request: gr.Request, paths: list[str] | None, *values: Any
        ) -> tuple[list[str], list[Any]]:
            with told_outside():
                return await self.actions.batch_once(paths or [], read(values), self.client(request))

        async def settings(path: str | None) -> dict[str, Any]:
            with told_outside():
                return await to_thread.run_sync(self.actions.settings_of, path)

        fields = self._some(controls)
        for name, act, inputs, outputs, words in (
            (
                *("edit", edit, [self.fields["picture"], *fields], [files, told]),
                "Edit a picture; files in its own format with their settings inside, and these settings.",
            ),
            (
                *("batch", batch, [self.fields["files"], *fields], [files, told]),
                "Edit many pictures once each; a zip with their names, and what could not be edited.",
            ),
            (
                *("settings", settings, [self.fields["settings_file"]], [told]),
                "The settings that an edited file carries.",
            ),
            ("models", lambda: list(self.service.models), [], [told], "The names of the models."),
        ):
            # Programs name the fields as the settings are named; Gradio reads names and defaults from here.
            named = [
                inspect.Parameter(
                    field.elem_id,
                    inspect.Parameter.POSITIONAL_OR_KEYWORD,
                    default=field.value if field in fields else inspect.Parameter.empty,
                )
                for field in inputs
            ]
            special = [own for own in inspect.signature(act).parameters.values() if own.name == "request"]
            act.__signature__ = inspect.Signature([*special, *named])  # type: ignore[union-attr]
            trigger.click(act, inputs, outputs, api_name=name, api_description=words, **public)

    def _controls(self) -> list[Component]:
        return self._some(["editor" if name == "painted" else name for name in CONTROLS])

    def _some(self, names: Sequence[str]) -> list[Component]:
        return [self.fields["editor" if name == "painted" else name] for name in dict.fromkeys(names)]

    def _on(
        self,
        trigger: Any,
        action: Callable[..., Values],
        *,
        inputs: Sequence[str] = (),
        outputs: Sequence[str],
    ) -> Any:
        async def act(session: Session, *values: Any) -> dict[Any, Any]:
            return await self._told(functools.partial(action, session, *values))

        return trigger(act, self._some(("session", *inputs)), self._some(outputs), **EVENT)

    def _on_select(self, name: str, action: Callable[..., Values], *, outputs: Sequence[str]) -> None:
        async def act(session: Session, event: gr.SelectData) -> dict[Any, Any]:
            return await self._told(functools.partial(action, session, int(event.index)))

        self.fields[name].select(act, self._some(("session",)), self._some((*outputs, "status")), **EVENT)

    def _edit(self, action: Callable[..., AsyncGenerator[Values, None]], more: int = 0) -> Callable[..., Any]:
        """A long action as an event: of its values the controls come first, then `more` others."""

        async def act(request: gr.Request, session: Session, *values: Any) -> AsyncIterator[dict[Any, Any]]:
            split = len(values) - more
            try:
                controls = Controls(**dict(zip(CONTROLS, values[:split], strict=True)))
                news = action(session, controls, self.client(request), *values[split:])
                async with contextlib.aclosing(news) as told:
                    async for some in told:
                        yield self._shown(some)
            except Ip2pError as error:
                yield self._shown({"status": complain(error)})

        return act

    async def _told(self, action: Callable[[], Values]) -> dict[Any, Any]:
        """The values of an action that runs in a thread, or its error in the status."""
        try:
            return self._shown(await to_thread.run_sync(action))
        except Ip2pError as error:
            return self._shown({"status": complain(error)})

    def _shown(self, values: Values) -> dict[Any, Any]:
        """Values by field instead of by name: a button's is whether it can be pressed."""
        shown: dict[Any, Any] = {}
        for name, value in values.items():
            if name == "failed":  # for programs
                continue
            field = self.fields["editor" if name == "painted" else name]
            if name == "cells":
                value = gr.update(value=value[0], columns=value[1])
            elif name == "take":
                value = gr.update(visible=value)
            elif name == "region_found":
                value = gr.update(value=value, visible=value is not None)
            elif isinstance(field, gr.DownloadButton):
                value = gr.update(value=value, interactive=value is not None)
            elif isinstance(field, gr.Button):
                value = gr.update(interactive=value)
            shown[field] = value
        return shown


@contextlib.contextmanager
def told_outside() -> Iterator[None]:
    """An error of ours as Gradio's, whose words reach a program."""
    try:
        yield
    except Ip2pError as error:
        raise gr.Error(worded(error), print_exception=False) from None


def mount(app: FastAPI, page: gr.Blocks, path: str = "/", *, max_file_size: int | None = None) -> FastAPI:
    """Put the page into an application, after all other routes.

    max_file_size: bytes of one file that the page takes.
    """
    mounted = gr.mount_gradio_app(
        app,
        page,
        path=path,
        theme=look.theme(),
        css=look.CSS,
        head=look.HEAD,
        footer_links=["settings"],
        run_history=False,
        allowed_paths=[],
        max_file_size=max_file_size,
        show_error=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    # Gradio looks at the paths that a browser sends only in an app that it launched itself.
    page.has_launched = True
    for route in app.routes:
        if isinstance(route, Mount) and getattr(route.app, "blocks", None) is page:
            route.app = Gate(route.app, path)
    return mounted
